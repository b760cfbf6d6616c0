"""The distance between an update and the one that a candidate batch would send, many at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from rgap.jacobian.module_gradient import ClientLoss, ModuleGradient
from rgap.matching.batch_norm import Statistics
from rgap.matching.presets import Coordinates, Preset
from rgap.network.batch_statistics import without_running_statistics
from rgap.network.isolation import convolution_work, plain_kernels, small_kernels
from rgap.network.running import guarded
from rgap.solvers.priors import Prior, TotalVariation, value_and_gradient
from rgap.solvers.registration import registered_mean

__all__ = ["Objective", "cosine_distance"]

TOGETHER = (
    4  # rows from which one batched evaluation is faster on a processor than one after another
)
KINK = 1e-3  # rounding of the total variation, in the optimiser's units


def cosine_distance(own: Tensor, sent: Tensor, size: float) -> Tensor:
    """``1 − ⟨own, sent⟩/(‖own‖ ‖sent‖)`` of flat updates; ``size`` is the norm of ``sent``.

    >>> own, sent = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 4.0])
    >>> round(float(cosine_distance(own, sent, 5.0)), 6)
    0.2
    """
    return 1.0 - (own * sent).sum() / (own.square().sum().sqrt() * size)


class Objective:
    """``D(∇L(x, t), G) + Σ w·term(r)`` and its gradient, for many rows r at once; ``x = c + u·r``.

    Args:
        model: a copy does the work; batch norms in train mode take the statistics of the batch.
        gradients: the update by parameter name.
        source: the loss, its targets and how the client trains; no targets: unknowns, logits
            [B, classes] behind the data of each row.
        shape: of the batch, [B, *input_shape].
        preset: distance, terms and weights.
        coordinates: of the rows.
        prior: of the data as the optimiser has them, in place of the total variation.
        dtype: of the arithmetic.
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: Mapping[str, Tensor],
        source: ClientLoss,
        shape: tuple[int, ...],
        preset: Preset,
        coordinates: Coordinates,
        prior: Prior | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        place = next(iter(gradients.values())).device
        twin = copy.deepcopy(model).to(place, dtype)
        self.statistics = Statistics(twin) if preset.statistics else None
        without_running_statistics(twin)
        self.sent = {n: g.to(place, dtype) for n, g in gradients.items()}
        self.whole = torch.cat([g.flatten() for g in self.sent.values()])
        self.norm = float(sum(float(g.square().sum()) for g in self.sent.values()) ** 0.5)
        self.shape, self.preset, self.coordinates, self.prior = shape, preset, coordinates, prior
        if prior is None and preset.variation and len(shape) > 2:
            self.prior = TotalVariation(smoothing=KINK, isotropic=False)
        targets = source.targets
        if targets is not None:
            targets = targets.to(place, dtype if targets.is_floating_point() else None)
        self.source = replace(source, targets=targets)
        names = [name for name, _ in model.named_parameters()]
        watch = (self.statistics.norms, self.statistics.penalty) if self.statistics else ()
        self.update = ModuleGradient(twin, self.source, names, *watch)
        probe = torch.full(shape, coordinates.centre, dtype=dtype, device=place)
        with guarded(twin, probe):
            self.work = convolution_work(twin, probe)
        self.logits: tuple[int, ...] = (0,)
        if targets is None:
            with torch.no_grad():
                self.logits = tuple(self.update.run(probe).shape)

    @property
    def unknowns(self) -> int:
        """Entries of a row: the data, then the logits of unknown targets."""
        if self.coordinates.decoder is not None:
            return self.coordinates.decoder.size
        return prod(self.shape) + prod(self.logits)

    @property
    def usual(self) -> float:
        """The distance of an update that says nothing, about."""
        return self.norm**2 if self.preset.distance == "squares" else 1.0

    def data(self, row: Tensor) -> Tensor:
        """The batch of a row, [B, *input_shape]."""
        if self.coordinates.decoder is not None:
            return self.coordinates.decoder.batch(row)
        return self.coordinates.centre + self.coordinates.unit * self.normal(row)

    def normal(self, row: Tensor) -> Tensor:
        """The same as the optimiser has it."""
        return row[: prod(self.shape)].reshape(self.shape)

    def goals(self, row: Tensor) -> Tensor:
        """The targets of a row; soft ones where they are unknowns."""
        if self.source.targets is not None:
            return self.source.targets
        return torch.softmax(row[prod(self.shape) :].reshape(self.logits), 1)

    def single(self, row: Tensor, graph: bool) -> Tensor:
        """Distance and statistics of one row by itself, differentiable.

        Args:
            row: data, then logits.
            graph: by PyTorch's graph, in half the time; else by function transforms, which can be
                batched.
        """
        own, far = self.update.gradient(self.data(row), self.goals(row), graph=graph)
        total = self._distance(own)
        if self.statistics:
            total = total + self.preset.statistics * far[0]
        return total

    def _distance(self, own: dict[str, Tensor]) -> Tensor:
        ours = torch.cat([own[n].flatten() for n in self.sent])
        if self.preset.distance == "cosine":
            return cosine_distance(ours, self.whole, self.norm)
        total = (ours - self.whole).square().sum()
        return total / self.norm**2 if self.preset.distance == "relative" else total

    @contextmanager
    def kernels(self) -> Iterator[None]:
        """Where evaluations are made: kernels with second derivatives, and fast for their size."""
        with plain_kernels(), small_kernels(self.work), torch.enable_grad():
            yield

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Values [R] and gradients [R, n] of rows [R, n]; in :meth:`kernels`."""
        if self.coordinates.decoder is not None:
            pairs = [self._decoded(row) for row in rows]
            return torch.stack([v for v, _ in pairs]), torch.stack([g for _, g in pairs])
        if len(rows) == 1 or (len(rows) < TOGETHER and rows.device.type == "cpu"):
            pairs = [self._followed(row) for row in rows]
            values, slopes = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        else:
            both = torch.func.grad_and_value(partial(self.single, graph=False))
            slopes, values = torch.func.vmap(both)(rows)
        values, slopes = values.detach(), slopes.detach()
        for more, pull in self._terms(rows):
            slopes[:, : prod(self.shape)] += pull.flatten(1)
            values = values + more
        return values, slopes

    def values(self, rows: Tensor) -> Tensor:
        """Values [R] alone, of rows [R, n] that a decoder makes batches of; in :meth:`kernels`."""
        with torch.no_grad():
            return torch.stack([self._value(row) for row in rows])

    def _value(self, row: Tensor) -> Tensor:
        value = self.single(row, graph=False)
        for more, _ in self._terms(self._normalised(self.data(row))):
            value = value + more[0]
        return value

    def _followed(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope of one row."""
        row = row.detach().requires_grad_()
        value = self.single(row, graph=True)
        return value.detach(), torch.autograd.grad(value, row)[0]

    def _decoded(self, row: Tensor) -> tuple[Tensor, Tensor]:
        """Value and slope of one row that a decoder makes a batch of, all terms included."""
        row = row.detach().requires_grad_()
        batch = self.data(row)
        data = batch.detach().requires_grad_()
        own, far = self.update.gradient(data, self.goals(row), graph=True)
        value = self._distance(own)
        if self.statistics:
            value = value + self.preset.statistics * far[0]
        (slope,) = torch.autograd.grad(value, data)
        value = value.detach()
        for more, pull in self._terms(self._normalised(data.detach())):
            value, slope = value + more[0], slope + pull[0] / self.coordinates.unit
        return value, torch.autograd.grad(batch, row, slope)[0]

    def _normalised(self, batch: Tensor) -> Tensor:
        """A batch in the optimiser's units, a row [1, n]."""
        return ((batch - self.coordinates.centre) / self.coordinates.unit).reshape(1, -1)

    def _terms(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Values [R] and gradients [R, B, *input_shape] of what the update is not needed for."""
        data = rows[:, : prod(self.shape)].reshape(len(rows), *self.shape)
        if self.prior is not None:
            both = [value_and_gradient(self.prior, r) for r in data]
            values, pulls = (torch.stack(parts) for parts in zip(*both, strict=True))
            yield self.preset.variation * values, self.preset.variation * pulls
        if self.preset.size:
            squares = data.flatten(1).square().mean(1)
            yield self.preset.size * squares, self.preset.size * 2.0 * data / data[0].numel()
        if self.preset.group and len(rows) > 1:
            gap = data - registered_mean(data)  # the mean is held fixed
            squares = gap.flatten(1).square().mean(1)
            yield self.preset.group * squares, self.preset.group * 2.0 * gap / data[0].numel()
