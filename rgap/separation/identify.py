"""Which target belongs to a sample: the cotangent that lies in the range of the gradient.

A sample x of the mixture has one cotangent k with ``(I − UUᵀ) k = 0`` and ``xᵀ G⁺ k = 1``
(Wedderburn: exactly then taking k xᵀ away lowers the rank of G by one).  With the loss's scale left
out of k the second reads ``xᵀ G⁺ k = B/m`` for a picture that occurs m times in a batch of B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rgap.limits import BETTER, OUTSIDE, RIVAL
from rgap.network.chain import Chain
from rgap.separation.mixture import Mixture
from rgap.update.losses import Loss
from rgap.update.targets import CROSS_ENTROPY

LISTED = 32  # classes up to which each is tried; above, the head's own gradient shortlists
SHORT = 6  # classes that each root puts on that list


@dataclass(frozen=True)
class Identity:
    """The target of one root.

    Attributes:
        kappa: cotangent at the head, with the loss's scale left out, [C].
        dual: S⁻¹Uᵀk scaled to be 1 on the root, [R].
        share: xᵀG⁺k: B/m for a mean, 1/m for a sum; NaN for a continuous target, whose κ it
            scales to 1.
        outside: share of k outside the range of G.
        next: the same for the second best target.
        label: the class, or None for a continuous target.
        error: standard error of the share; 0 where it was not asked for.
    """

    kappa: Tensor
    dual: Tensor
    share: float
    outside: float
    next: float
    label: int | None
    error: float = 0.0

    @property
    def accepted(self) -> bool:
        """True if this target fits and no other does."""
        return self.outside <= OUTSIDE and self.next > BETTER * self.outside and self.share != 0.0


def identify(
    chain: Chain, samples: Mixture, head: Mixture, roots: Tensor, loss: Loss
) -> list[Identity]:
    """The target of every root.

    Args:
        chain: the network.
        samples: mixture of the stage that the roots belong to.
        head: mixture of the last stage.
        roots: [S, R].
        loss: the client's.
    """
    z = samples.stage.affine.forward(samples.inputs(roots))
    logits, pull = pullback(chain, samples.stage.index, z)
    single = replace(loss, reduction="sum")
    labels = _labels(single, logits, head)
    if labels is None:
        return continuous(chain, samples, roots, loss)
    every = torch.ones(len(roots), dtype=torch.long, device=roots.device)
    kappas = [single.cotangent(logits, c * every) for c in labels]
    table = torch.stack(kappas, 1)  # [S, options, C]
    k = torch.stack([pull(kappa).flatten(1) for kappa in kappas], 1)  # [S, options, m]
    # A cotangent of the wrong sign is parallel to the right one where there are two classes.
    wrong = torch.einsum("sor,sr->so", samples.dual(k), roots) <= 0
    best = (samples.outside(k) + 10.0 * wrong).argmin(1).tolist()
    return [
        replace(choose(samples, q, own, kappa, i), label=labels[i])
        for q, own, kappa, i in zip(roots, k, table, best, strict=True)
    ]


def choose(samples: Mixture, q: Tensor, k: Tensor, kappa: Tensor, best: int) -> Identity:
    """One of several targets for a root, and how far the next one is.

    A rival has to give its cotangent a similar weight: one that belongs to another sample of the
    batch lies in the range as well, but is 0 on this one.

    Args:
        samples: the mixture.
        q: the root, [R].
        k: cotangents of the targets, [options, m].
        kappa: at the head, [options, C].
        best: the target chosen.
    """
    outside, duals = samples.outside(k), samples.dual(k)
    shares = duals @ q
    share = float(shares[best])
    rivals = similar(shares, shares[best])
    rivals[best] = False
    second = float(outside[rivals].min()) if bool(rivals.any()) else 1.0
    return Identity(
        kappa[best], duals[best] / share, share, float(outside[best]), second, label=best
    )


def similar(shares: Tensor, share: Tensor) -> Tensor:
    """Which targets give a root's cotangent a weight like that of the chosen one, [options]."""
    return (shares / share > 1.0 / RIVAL) & (shares / share < RIVAL)


def continuous(chain: Chain, samples: Mixture, roots: Tensor, loss: Loss) -> list[Identity]:
    """κ with ``(I − UUᵀ) Jᵀκ = 0`` of every root: any target, where one direction fits."""
    z = samples.stage.affine.forward(samples.inputs(roots))
    logits, pull = pullback(chain, samples.stage.index, z)
    eye = torch.eye(logits.shape[1], dtype=logits.dtype, device=logits.device)
    jacobian = torch.stack([pull(e.expand_as(logits)).flatten(1) for e in eye], 1)
    centred = loss.name == CROSS_ENTROPY and loss.plain
    return [free(samples, q, own, centred) for q, own in zip(roots, jacobian, strict=True)]


def pullback(chain: Chain, index: int, z: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Logits of pre-activations z of stage ``index``, and their cotangents carried down to z."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        logits = rise(chain, index, z)

    def pull(kappa: Tensor) -> Tensor:
        return torch.autograd.grad(logits, z, kappa, retain_graph=True)[0]

    return logits.detach(), pull


def rise(chain: Chain, index: int, z: Tensor) -> Tensor:
    """Logits [S, C] of pre-activations z [S, *out_shape] of stage ``index``."""
    for stage in chain.stages[index:]:
        if stage.index > index:
            for op in stage.lead:
                z = op.forward(z)
            z = stage.affine.forward(z)
        for op in stage.tail:
            z = op.forward(z)
    return z


def top(chain: Chain, index: int, u: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs of the last layer and logits, of inputs u [S, *in_shape] of stage ``index``."""
    features = u
    for stage in chain.stages[index:]:
        if stage.index > index:
            for op in stage.lead:
                u = op.forward(u)
        features, u = u, stage.affine.forward(u)
        for op in stage.tail:
            u = op.forward(u)
    return features, u


def _labels(loss: Loss, logits: Tensor, head: Mixture) -> list[int] | None:
    """Class indices worth trying, shortlisted where there are many; None if continuous."""
    classes = loss.outputs(logits.shape[1])
    if loss.targets != "index":
        return None
    if loss.name != CROSS_ENTROPY:
        return [0, 1] if classes == 1 else None
    if classes <= LISTED:
        return list(range(classes))
    listed: set[int] = set()
    every = torch.arange(classes, device=logits.device)
    for z in logits:
        many = loss.cotangent(z.expand(classes, -1), every)
        listed |= set(head.outside(many).argsort()[:SHORT].tolist())
    return sorted(listed)


def free(samples: Mixture, q: Tensor, jacobian: Tensor, centred: bool) -> Identity:
    """The weakest direction of (I − UUᵀ) Jᵀ.

    Args:
        samples: the mixture.
        q: the root, [R].
        jacobian: Jᵀ of every logit, [C, m].
        centred: the entries of κ sum to 0 (cross-entropy).
    """
    basis = torch.eye(len(jacobian), dtype=jacobian.dtype, device=jacobian.device)
    if centred:
        basis = torch.linalg.qr(basis - 1.0 / len(basis)).Q[:, :-1].T
    rows = basis @ jacobian
    gap = rows - (rows @ samples.left) @ samples.left.T
    left, values, _ = torch.linalg.svd(gap, full_matrices=False)
    kappa = left[:, -1] @ basis
    k = kappa @ jacobian
    size = float(k.norm().clamp_min(1e-300))
    dual = samples.dual(k)
    share = float(q @ dual)
    second = float(values[-2]) / size if len(values) > 1 else 1.0
    return Identity(
        kappa / share, dual / share, float("nan"), float(values[-1]) / size, second, None
    )
