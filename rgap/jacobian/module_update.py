"""The update of any module as a function of the data, with products of its Jacobian.

``g(x) = ∂L(f_θ(x), t)/∂θ``.  One graph is built at each x (:mod:`rgap.jacobian.products`).  No
chain of layers is needed, only activations with a second derivative worth following.

Where closed forms found something of the input u of some layer, and the cotangent there, the
layers above drop out: ``G_j = ∂⟨cotangent, u(x)⟩/∂θ_j`` for every parameter below.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import inf, isfinite

import torch
from torch import Tensor, nn

from rgap.constraints.known_input import Equations
from rgap.jacobian.products import GraphProducts
from rgap.jacobian.smoothing import soften
from rgap.network.isolation import plain_kernels
from rgap.network.running import run
from rgap.precision import GROWTH, Precision
from rgap.update.local_training import LocalTraining, average
from rgap.update.losses import Loss


def cosine_distance(own: Tensor, sent: Tensor, size: float) -> Tensor:
    """``1 − ⟨own, sent⟩/(‖own‖ ‖sent‖)`` of flat updates; ``size`` is the norm of ``sent``.

    >>> own, sent = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> round(float(cosine_distance(own, sent, 5.0)), 6)
    0.2
    """
    return 1.0 - (own * sent).sum() / (own.square().sum().sqrt() * size)


@dataclass(frozen=True)
class KnownFeatures:
    """What closed forms found inside the network.

    Attributes:
        layer: module path.
        shape: of the layer's input for the batch, [B, *in_shape].
        known: equations of that input.
        cotangent: of the loss there, like the input.
        blur: relative error of the cotangent.
    """

    layer: str
    shape: tuple[int, ...]
    known: Equations
    cotangent: Tensor
    blur: float = 0.0


@dataclass(frozen=True)
class ClientLoss:
    """The loss itself, where no closed form began.

    Attributes:
        loss: the client's.
        targets: of the batch, as the loss wants them; None where a search finds them.
        local: how the client trains between two rounds; None: it sends one gradient.
        steps: of its training.
    """

    loss: Loss
    targets: Tensor | None
    local: LocalTraining | None = None
    steps: int = 1

    def value(self, outputs: Tensor, rows: slice = slice(None)) -> Tensor:
        """The loss of the model's outputs for some rows of the batch."""
        if self.targets is None:
            raise ValueError("targets: expected those of the batch, got none; write targets=...")
        return self.loss(outputs, self.targets[rows])


def watchable(model: nn.Module, layer: str) -> bool:
    """True if a layer is a module of the model: then a hook sees its input.

    A call of ``F.linear`` is a stage of the network, but no module.

    >>> watchable(nn.Sequential(nn.Linear(2, 2)), "0"), watchable(nn.Linear(2, 2), "linear")
    (True, False)
    """
    return any(name == layer for name, _ in model.named_modules(remove_duplicate=False))


class ModuleUpdate:
    """Normalised residuals of an update for any module; see :meth:`at`.

    Args:
        model: in eval mode; a float64 copy does the work.
        gradients: the update, float64, by parameter name.
        source: the loss, or what is known inside.
        shape: of the batch, [B, *input_shape].
        dtype: of the arithmetic.

    ``sharpness`` rounds off the kinks of the copy, for a solver that anneals them
    (:mod:`rgap.jacobian.smoothing`); the residual is the network's own outside ``with
    softened(...)``.

    Raises:
        ValueError: the source is a layer that is no module of the model (see :func:`watchable`).
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: Mapping[str, Tensor],
        source: KnownFeatures | ClientLoss,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float64,
    ) -> None:
        place = next(iter(gradients.values())).device
        self.model = copy.deepcopy(model).to(place, dtype).requires_grad_(False)
        self.sharpness = soften(self.model)
        self.source = source
        self._seen: list[Tensor] = []
        if isinstance(source, KnownFeatures):
            if not watchable(self.model, source.layer):
                raise ValueError(
                    f"source: expected a module of the model, whose input can be watched, got "
                    f"{source.layer!r}; write the path of one of model.named_modules()"
                )
            layer = self.model.get_submodule(source.layer)
            layer.register_forward_pre_hook(self._note, with_kwargs=True)
        self.parameters = {n: p for n, p in self.model.named_parameters() if n in gradients}
        probe = torch.full(shape, 0.5, dtype=dtype, device=place)
        leaves, found = self._gradients(probe, create_graph=False)
        self.gradients = {
            n: gradients[n].to(dtype) for n, g in zip(leaves, found, strict=True) if g is not None
        }
        self.parameters = {n: self.parameters[n] for n in self.gradients}
        self.scales = {
            n: 1.0 / float(g.norm()) if float(g.norm()) > 0 else 0.0
            for n, g in self.gradients.items()
        }
        self.unit = 1.0

    @property
    def equations(self) -> int:
        """An upper bound on the independent equations of the data."""
        own = sum(g.numel() for g in self.gradients.values())
        return own + (self.source.known.equations if isinstance(self.source, KnownFeatures) else 0)

    def at(self, x: Tensor) -> GraphProducts:
        """The residual at x [B, *input_shape], with the products of its Jacobian."""
        return GraphProducts(self.rows, x)

    def balance(self, x: Tensor) -> None:
        """Make the misfit of what is known inside 1 at x, as that of a gradient is."""
        if isinstance(self.source, KnownFeatures):
            with torch.no_grad():
                self._run(x, {})
                misfit = self.source.known.misfit(self._seen[0].reshape(self.source.shape))
            self.unit = 1.0 / max(float(misfit.norm()), 1e-300)

    def expected(self, precision: Precision) -> float:
        """‖r‖² that errors explain at the client's data: what a solver need not go below.

        Each gradient by its rounding, the error of the cotangent, and the noise that was added to
        it; what is known inside by its own errors (Morozov's discrepancy principle).
        """
        inside = self.source if isinstance(self.source, KnownFeatures) else None
        blur = (GROWTH * precision.unit) ** 2 + (inside.blur**2 if inside else 0.0)
        total = sum(
            blur + precision.noise_rms(n, g) ** 2 * g.numel() * self.scales[n] ** 2
            for n, g in self.gradients.items()
            if self.scales[n] > 0
        )
        return total + (inside.known.expected * self.unit**2 if inside else 0.0)

    def misfit(self, x: Tensor) -> float:
        """‖r(x)‖², infinite where it is not a number."""
        value = float(self.at(x).residual.square().sum())
        return value if isfinite(value) else inf

    def gaps(self, x: Tensor) -> dict[str, tuple[float, float]]:
        """‖G_j(x) − G_j‖ and ‖G_j‖ by parameter name."""
        leaves, found = self._gradients(x, create_graph=False)
        return {
            n: (float((own.detach() - self.gradients[n]).norm()), float(self.gradients[n].norm()))
            for n, own in zip(leaves, found, strict=True)
            if own is not None
        }

    def settle(self, x: Tensor, sharpness: float) -> None:
        """Take the spreads of softened modules from x (:mod:`rgap.jacobian.smoothing`), once."""
        if self.sharpness:
            with self.softened(sharpness), torch.no_grad():
                self._run(x, {})

    @contextmanager
    def softened(self, sharpness: float | None) -> Iterator[None]:
        """The kinks rounded off inside, and as they were afterwards, whatever is raised.

        Args:
            sharpness: β of :mod:`rgap.jacobian.smoothing`; None for the network's own kinks.
        """
        before = self.sharpness.value
        self.sharpness.value = sharpness
        try:
            yield
        finally:
            self.sharpness.value = before

    def features(self, x: Tensor) -> Tensor:
        """Mean square of the misfit of what is known inside, as part of the graph of x."""
        assert isinstance(self.source, KnownFeatures)
        with torch.enable_grad():
            self._run(x, {})
            return (
                self.source.known.misfit(self._seen[0].reshape(self.source.shape)).square().mean()
            )

    def direction(self, x: Tensor, share: float) -> Tensor:
        """1 − cosine of the gradients, and a share of :meth:`features`, in the graph of x."""
        leaves, found = self._gradients(x, create_graph=True)
        assert all(g is not None for g in found)
        own = torch.cat([g.flatten() for g in found if g is not None])
        sent = torch.cat([self.gradients[n].flatten() for n in leaves])
        value = cosine_distance(own, sent, float(sent.norm()))
        if isinstance(self.source, KnownFeatures):
            u = self._seen[0].reshape(self.source.shape)
            value = value + share * self.source.known.misfit(u).square().mean()
        return value

    def rows(self, x: Tensor) -> Tensor:
        """Residual as part of the graph of x: what is known inside, then normalised gradients."""
        parts = []
        leaves, found = self._gradients(x, create_graph=True)
        for n, own in zip(leaves, found, strict=True):
            assert own is not None
            parts.append(((own - self.gradients[n]) * self.scales[n]).flatten())
        if isinstance(self.source, KnownFeatures):
            u = self._seen[0].reshape(self.source.shape)
            parts.insert(0, self.source.known.misfit(u) * self.unit)
        return torch.cat(parts)

    def _gradients(
        self, x: Tensor, create_graph: bool
    ) -> tuple[dict[str, Tensor], tuple[Tensor | None, ...]]:
        source = self.source
        with torch.enable_grad():
            leaves = {n: p.clone().requires_grad_() for n, p in self.parameters.items()}
            if isinstance(source, ClientLoss) and source.local is not None:
                found = average(
                    partial(self._step, x, source), leaves, source.local, source.steps, len(x)
                )
                return leaves, tuple(found.values())
            outputs = self._run(x, leaves)
            if isinstance(source, KnownFeatures):
                value = (source.cotangent * self._seen[0].reshape(source.shape)).sum()
            else:
                value = source.value(outputs)
            if not leaves or not value.requires_grad:
                return leaves, (None,) * len(leaves)
            return leaves, torch.autograd.grad(
                value, list(leaves.values()), create_graph=create_graph, allow_unused=True
            )

    def _step(
        self, x: Tensor, source: ClientLoss, parameters: dict[str, Tensor], rows: slice
    ) -> dict[str, Tensor]:
        value = source.value(self._run(x[rows], parameters), rows)
        found = torch.autograd.grad(
            value, list(parameters.values()), create_graph=True, materialize_grads=True
        )
        return dict(zip(parameters, found, strict=True))

    def _run(self, x: Tensor, leaves: Mapping[str, Tensor]) -> Tensor:
        self._seen.clear()
        with plain_kernels():
            return run(self.model, x, leaves)

    def _note(self, _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]) -> None:
        self._seen.append(args[0] if args else next(iter(named.values())))
