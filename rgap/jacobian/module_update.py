"""How far the update that a module would send for some data is from the one that was sent."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from math import inf, isfinite

import torch
from torch import Tensor, nn

from rgap.jacobian.module_gradient import ClientLoss, KnownFeatures, ModuleGradient, watchable
from rgap.jacobian.smoothing import soften
from rgap.network.batch_statistics import without_running_statistics
from rgap.precision import GROWTH, Precision

__all__ = ["ClientLoss", "KnownFeatures", "ModuleUpdate", "watchable"]


EXPLAINED = 2.0  # squared miss of an answer, in units of what stated noise makes on average


class ModuleUpdate(ModuleGradient):
    """Normalised residuals of an update, ``r_j(x) = (g_j(x) − G_j)/‖G_j‖``; see :meth:`at`.

    With stated noise the units are u_j, ``1/u_j² = 1/‖G_j‖² + (E/ν²)/‖G‖²``, for E what it makes of
    ``Σ_j ‖g_j − G_j‖²/‖G_j‖²`` and ν² of ``‖g − G‖²/‖G‖²``: either makes half of what it makes of
    ‖r‖².  In the first sum alone a tensor that the noise drowns would leave all others open.

    Where the source is known features, their misfit at x is the first part of r.

    Args:
        model: a copy does the work; batch norms in train mode take the statistics of the batch.
        gradients: the update G, by parameter name.
        source: the loss, or what is known inside.
        shape: of the batch, [B, *input_shape].
        dtype: of the arithmetic.
        precision: with noise, tensors that it drowns count as little as it lets them.

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
        precision: Precision | None = None,
    ) -> None:
        place = next(iter(gradients.values())).device
        twin = without_running_statistics(copy.deepcopy(model).to(place, dtype))
        self.sharpness = soften(twin)
        super().__init__(twin, source, gradients)
        self.inside = source if isinstance(source, KnownFeatures) else None
        reached = self.reached(torch.full(shape, 0.5, dtype=dtype, device=place))
        self.gradients = {n: gradients[n].to(dtype) for n in reached}
        self.parameters = {n: self.parameters[n] for n in reached}
        self.scales = _scales(self.gradients, precision)
        self.sent = gradients
        self.unit = 1.0

    def only(self, names: Collection[str]) -> ModuleUpdate:
        """The same with the gradients of some parameters alone."""
        part = copy.copy(self)
        part.gradients = {n: g for n, g in self.gradients.items() if n in names}
        part.parameters = {n: p for n, p in self.parameters.items() if n in names}
        return part

    @property
    def equations(self) -> int:
        """An upper bound on the independent equations of the data."""
        own = sum(g.numel() for g in self.gradients.values())
        return own + (self.inside.known.equations if self.inside else 0)

    def balance(self, x: Tensor) -> None:
        """Make the misfit of what is known inside 1 at x, as that of a gradient is."""
        if self.inside is not None:
            with torch.no_grad():
                self.run(x)
                misfit = self.inside.known.misfit(self.seen)
            self.unit = 1.0 / max(float(misfit.norm()), 1e-300)

    def expected(self, precision: Precision) -> float:
        """‖r‖² that errors explain at the client's data: what a solver need not go below.

        Each gradient by its rounding, the error of the cotangent, and the noise that was added to
        it; what is known inside by its own errors (Morozov's discrepancy principle).
        """
        inside = self.inside
        blur = (GROWTH * precision.unit) ** 2 + (inside.blur**2 if inside else 0.0)
        total = sum(
            blur + precision.noise_rms(n, g) ** 2 * g.numel() * self.scales[n] ** 2
            for n, g in self.gradients.items()
            if self.scales[n] > 0
        )
        return total + (inside.known.expected * self.unit * self.unit if inside else 0.0)

    def allowed(self, precision: Precision, blank: Tensor) -> tuple[float, float]:
        """What stated noise explains: of ‖r‖², and of the squared miss of all that was sent.

        Args:
            precision: of the update.
            blank: data that nobody would take for an answer: noise that explains what these miss
                tells no data from others, and explains nothing.
        """
        if not precision.noisy:
            return 0.0, 0.0
        each = EXPLAINED * self.expected(precision)
        own = EXPLAINED * _share(self.gradients, precision) ** 2
        gaps = self.gaps(blank)
        size = sum(size**2 for _, size in gaps.values())
        missed = sum((gap * self.scales[n]) ** 2 for n, (gap, _) in gaps.items())
        if missed <= each and sum(gap**2 for gap, _ in gaps.values()) <= own * size:
            return 0.0, 0.0
        return each, EXPLAINED * _share(self.sent, precision) ** 2  # of all, not of those below

    def misfit(self, x: Tensor) -> float:
        """‖r(x)‖², infinite where it is not a number."""
        value = float(self.at(x).residual.square().sum())
        return value if isfinite(value) else inf

    def gaps(self, x: Tensor) -> dict[str, tuple[float, float]]:
        """‖g_j(x) − G_j‖ and ‖G_j‖ by parameter name."""
        return {
            n: (float((own.detach() - self.gradients[n]).norm()), float(self.gradients[n].norm()))
            for n, own in self.gradient(x)[0].items()
        }

    def settle(self, x: Tensor, sharpness: float) -> None:
        """Take the spreads of softened modules from x (:mod:`rgap.jacobian.smoothing`), once."""
        if self.sharpness:
            with self.softened(sharpness), torch.no_grad():
                self.run(x)

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

    def apart(self, x: Tensor) -> Tensor:
        """``‖u − û‖²/‖û‖² + mean_j ‖g_j − G_j‖²/‖G_j‖²`` in the graph of x; every tensor counts."""
        own = self.gradient(x)[0].items()
        misses = [((g - self.gradients[n]) * self.scales[n]).square().sum() for n, g in own]
        value = torch.stack(misses).mean() if misses else x.new_zeros(())
        if self.inside is not None:
            known = self.inside.known
            size = known.misfit(torch.zeros_like(self.seen)).square().sum()
            value = value + known.misfit(self.seen).square().sum() / size.clamp_min(1e-30)
        return value

    def rows(self, x: Tensor) -> Tensor:
        """r(x) as part of the graph of x: what is known inside, then the gradients."""
        parts = [
            ((own - self.gradients[n]) * self.scales[n]).flatten()
            for n, own in self.gradient(x)[0].items()
        ]
        if self.inside is not None:
            parts.insert(0, self.inside.known.misfit(self.seen) * self.unit)
        return torch.cat(parts)


def _share(gradients: Mapping[str, Tensor], precision: Precision) -> float:
    """ν: the noise of all gradients together over their size, 0 where all are 0."""
    noise = sum(_noise(n, g, precision) ** 2 for n, g in gradients.items())
    size = sum(float(g.square().sum()) for g in gradients.values())
    return float((noise / size) ** 0.5) if size > 0 else 0.0


def _noise(name: str, gradient: Tensor, precision: Precision) -> float:
    """N_j: expected length of the noise in one gradient."""
    return float(precision.noise_rms(name, gradient) * gradient.numel() ** 0.5)


def _scales(gradients: Mapping[str, Tensor], precision: Precision | None) -> dict[str, float]:
    """One over the unit of each gradient; 0 for one that is 0."""
    sizes = {n: float(g.norm()) for n, g in gradients.items() if float(g.norm()) > 0}
    own = {n: 1.0 / size**2 for n, size in sizes.items()}
    share = _share(gradients, precision) if precision is not None else 0.0
    if precision is not None and share > 0:
        each = sum(_noise(n, gradients[n], precision) ** 2 * own[n] for n in sizes)
        whole = each / share**2 / sum(size**2 for size in sizes.values())
        own = {n: one + whole for n, one in own.items()}
    return {n: own.get(n, 0.0) ** 0.5 for n in gradients}
