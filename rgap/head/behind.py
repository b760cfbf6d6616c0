"""A loss behind the steps that follow the last affine map, as one loss of its pre-activations.

With t the steps and z what the affine map gives, ``L(z, y) = ℓ(t(z), y)``.  Its cotangent is
``k = Tᵀ κ(t(z), y)``, where ``T = ∂t/∂z`` [C, m] is taken exactly: temperature, batch norm of
logits, a softmax, a slice or a pool, square or not, sample by sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import inf, prod

import torch
from torch import Tensor

from rgap.arithmetic.reverse import hessian_product
from rgap.head.mapped import Mapped
from rgap.limits import VANISHING
from rgap.network.activations.piecewise import Identity
from rgap.network.chain import Chain
from rgap.network.reshape import Op, Reshape
from rgap.update.losses import Loss
from rgap.update.targets import CLASSES

__all__ = ["Behind", "behind", "idle", "lifted"]


@dataclass(frozen=True)
class Behind(Loss):
    """The loss of z [N, m] that ``ℓ`` of ``t(z)`` [N, C] is; targets are those of ``ℓ``.

    Attributes:
        steps: t, in forward order, each sample by sample.

    >>> from rgap.network.scaling import Scale
    >>> half = Scale("t", "scale", (3,), torch.tensor([0.5]).double(), torch.zeros(1).double())
    >>> loss = Behind(steps=(half,))
    >>> z, y = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64), torch.tensor([1])
    >>> k = loss.cotangent(z, y)
    >>> torch.allclose(k, 0.5 * Loss().cotangent(0.5 * z, y))
    True
    >>> loss.read(loss.targets_from(z, k))[0].tolist()
    [1]
    """

    steps: tuple[Op, ...] = ()

    @property
    def plain(self) -> bool:
        """False: nothing that holds of p − y at the logits holds of k at z."""
        return False

    def outputs(self, classes: int) -> int:
        """C, whatever the m entries of z are."""
        return prod(self.steps[-1].out_shape)

    def words(self) -> str:
        """The steps by name."""
        return ", ".join(f"'{op.name}' ({op.kind})" for op in self.steps if not idle(op))

    def __call__(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``ℓ(t(z), y)``."""
        return super().__call__(self._rise(outputs), targets)

    def cotangent(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``Tᵀ κ(t(z), y)``, [N, m]."""
        above, pull = self._linearised(outputs)
        return pull(super().cotangent(above, targets))

    def cotangent_jvp(
        self, outputs: Tensor, direction: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        """``∂k/∂z v``."""
        if targets is None:
            raise ValueError(
                f"targets: the curvature of {self.name} behind {self.words()} depends on them; "
                "write loss.cotangent_jvp(outputs, direction, targets)"
            )
        return hessian_product(lambda z: self(z, targets), outputs, direction)

    def targets_from(self, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Dense targets [N, C] whose k at z is ``cotangent``, as nearly as any is.

        Where T has full row rank there is one.  Else class indices are those that come nearest,
        moved by what T shows of the rest, and other targets the ones of least κ: :meth:`open_at`
        says which step leaves them open.
        """
        above, _ = self._linearised(outputs)
        back = torch.linalg.pinv(self.jacobian(outputs).mT, rtol=VANISHING)  # [N, C, m]
        kappa = (back @ cotangent[..., None])[..., 0]
        if self.targets != "index" or self.name not in CLASSES:
            return super().targets_from(above, kappa)
        nearest = self._nearest(outputs, cotangent)
        gap = cotangent - self.cotangent(outputs, nearest)
        moved = super().targets_from(above, super().cotangent(above, nearest))
        scale = self.magnitude(above)
        shown: Tensor = moved - (back @ gap[..., None])[..., 0] / scale
        return shown

    def longest(self, outputs: Tensor) -> float:
        """``‖T‖₂`` times that of ``ℓ``; infinite where T depends on z."""
        if not all(op.affine for op in self.steps):
            return inf
        own = super().longest(outputs.new_zeros(1, self.outputs(0)))
        return own * float(torch.linalg.matrix_norm(self.jacobian(outputs[:1]), 2))

    def open_at(self, outputs: Tensor) -> str:
        """Which steps leave a target of some sample open, and in how many directions; "" for none.

        Targets y and y + d with ``Tᵀ ∂κ/∂y d = 0`` send the same.
        """
        values = torch.linalg.svdvals(self.jacobian(outputs))
        rank = int((values > VANISHING * values[:, :1].clamp_min(1e-300)).sum(1).min())
        missing = self.outputs(0) - rank
        if missing <= 0:
            return ""
        return (
            f"{self.words()} takes away {missing} of the {self.outputs(0)} directions of a target"
        )

    def jacobian(self, outputs: Tensor) -> Tensor:
        """T of every sample, [N, C, m]."""
        above, pull = self._linearised(outputs)
        eye = torch.eye(above.shape[1]).to(above)
        return torch.stack([pull(row.expand_as(above)) for row in eye], 1)

    def rounding(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``|T|ᵀ`` times that of ``ℓ``."""
        above, _ = self._linearised(outputs)
        own = super().rounding(above, targets)
        return torch.einsum("ncm,nc->nm", self.jacobian(outputs).abs(), own)

    def dense(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """Targets in the shape of t(z)."""
        return super().dense(targets, outputs.new_zeros(len(outputs), self.outputs(0)))

    def _nearest(self, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Class of every sample whose k comes nearest, [N]."""
        nearest = []
        scale = self._reduction.scale(
            outputs.new_zeros(len(outputs), self.outputs(0)), torch.empty(0)
        )
        for z, k in zip(outputs, cotangent, strict=True):
            labels = torch.arange(self.outputs(0), device=z.device)
            many = replace(self, reduction="sum").cotangent(z.expand(len(labels), -1), labels)
            nearest.append((scale * many - k).square().sum(1).argmin())
        return torch.stack(nearest)

    def _rise(self, z: Tensor) -> Tensor:
        for op in self.steps:
            z = op.forward(z)
        return z

    def _linearised(self, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """t(z), and κ ↦ Tᵀκ."""
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            above = self._rise(z)

        def pull(kappa: Tensor) -> Tensor:
            if not above.requires_grad:
                return torch.zeros_like(z)
            return torch.autograd.grad(above, z, kappa, retain_graph=True, materialize_grads=True)[
                0
            ]

        return above.detach(), pull


def idle(op: Op) -> bool:
    """True for a step that hands the logits on as they are."""
    return isinstance(op, (Reshape, Identity))


def behind(chain: Chain, loss: Loss) -> tuple[Chain, Loss]:
    """The chain up to its last affine map, and the loss of what that gives.

    Steps that change nothing stay where they are, and so do others than shapes of outputs that are
    no vectors.
    """
    return lifted(chain, loss) if loss.equations else (chain, loss)


def lifted(chain: Chain, loss: Loss) -> tuple[Chain, Loss]:
    """The same for any loss with a formula: of losses without equations, single samples are read.

    Args:
        chain: the network.
        loss: of its outputs; one that is weighed by the batch's classes as a sum.
    """
    if not chain.stages or loss.own or not loss.known or not chain.output_shape:
        return chain, loss
    last, vector = chain.stages[-1], len(chain.output_shape) == 1
    still = all(idle(op) for op in last.tail)
    if last.affine.geometry is not None or still is vector:
        return chain, loss
    options = {f.name: getattr(loss, f.name) for f in fields(Loss)}
    if not vector:
        return chain, Mapped(**options, shape=chain.output_shape)
    stage = replace(last, tail=())
    chain = replace(chain, stages=(*chain.stages[:-1], stage))
    return chain, Behind(**options, steps=last.tail)
