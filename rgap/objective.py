"""The distance between an update and the one that a candidate batch would send, many at once."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod

import torch
from torch import Tensor, nn

from rgap.federated import LocalTraining, average
from rgap.isolation import plain_kernels
from rgap.losses import Loss
from rgap.presets import Coordinates, Preset
from rgap.priors import Statistics
from rgap.solvers.priors import Prior, TotalVariation
from rgap.solvers.registration import registered_mean

__all__ = ["Objective"]

KINK = 1e-3  # rounding of the total variation, in the optimiser's units


class Objective:
    """``D(∇L(x, t), G) + Σ w·term(r)`` and its gradient, for many rows r at once; ``x = c + u·r``.

    Args:
        model: in eval mode; a copy does the work.
        gradients: the update by parameter name.
        loss: the client's.
        targets: of the batch; None: unknowns, logits [B, classes] behind the data of each row.
        shape: of the batch, [B, *input_shape].
        preset: distance, terms and weights.
        coordinates: of the rows.
        prior: of the data as the optimiser has them, in place of the total variation.
        local: how the client trains between two rounds.
        steps: of its training.
        dtype: of the arithmetic.
    """

    def __init__(
        self,
        model: nn.Module,
        gradients: Mapping[str, Tensor],
        loss: Loss,
        targets: Tensor | None,
        shape: tuple[int, ...],
        preset: Preset,
        coordinates: Coordinates,
        prior: Prior | None = None,
        local: LocalTraining | None = None,
        steps: int = 1,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        place = next(iter(gradients.values())).device
        self.model = copy.deepcopy(model).to(place, dtype).requires_grad_(False)
        self.statistics = Statistics(self.model) if preset.statistics else None
        self.parameters: dict[str, Tensor] = dict(self.model.named_parameters())
        self.leaves = {n: p.detach().requires_grad_() for n, p in self.parameters.items()}
        self.sent = {n: g.to(place, dtype) for n, g in gradients.items()}
        self.norm = float(sum(float(g.square().sum()) for g in self.sent.values()) ** 0.5)
        self.loss, self.shape, self.preset, self.coordinates = loss, shape, preset, coordinates
        self.local, self.steps, self.prior = local, steps, prior
        if prior is None and preset.variation and len(shape) > 2:
            self.prior = TotalVariation(smoothing=KINK, isotropic=False)
        self.targets = targets
        if targets is not None:
            self.targets = targets.to(place, dtype if targets.is_floating_point() else None)
        self.logits: tuple[int, ...] = (0,)
        if targets is None:
            with torch.no_grad(), plain_kernels():
                probe = torch.full(shape, coordinates.centre, dtype=dtype, device=place)
                self.logits = tuple(self.model(probe).shape)

    @property
    def unknowns(self) -> int:
        """Entries of a row: the data, then the logits of unknown targets."""
        return prod(self.shape) + prod(self.logits)

    @property
    def usual(self) -> float:
        """The distance of an update that says nothing, about."""
        return self.norm**2 if self.preset.distance == "squares" else 1.0

    def data(self, row: Tensor) -> Tensor:
        """The batch of a row, [B, *input_shape]."""
        return self.coordinates.centre + self.coordinates.unit * self.normal(row)

    def normal(self, row: Tensor) -> Tensor:
        """The same as the optimiser has it."""
        return row[: prod(self.shape)].reshape(self.shape)

    def goals(self, row: Tensor) -> Tensor:
        """The targets of a row; soft ones where they are unknowns."""
        if self.targets is not None:
            return self.targets
        return torch.softmax(row[prod(self.shape) :].reshape(self.logits), 1)

    def single(self, row: Tensor, graph: bool) -> Tensor:
        """Distance and statistics of one row by itself, differentiable.

        Args:
            row: data, then logits.
            graph: by PyTorch's graph, which is a quarter faster; else by function transforms, which
                can be batched.
        """
        x, goals, kept = self.data(row), self.goals(row), list[Tensor]()

        def value(parameters: dict[str, Tensor], rows: slice) -> tuple[Tensor, Tensor]:
            outputs = torch.func.functional_call(self.model, parameters, (x[rows],))
            far = self.statistics.penalty() if self.statistics else outputs.new_zeros(())
            return self.loss(outputs, goals[rows]), far

        def gradient(parameters: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
            if graph:
                loss, far = value(parameters, rows)
                found = torch.autograd.grad(
                    loss, list(parameters.values()), create_graph=True, materialize_grads=True
                )
                own = dict(zip(parameters, found, strict=True))
            else:
                own, far = torch.func.grad(value, has_aux=True)(parameters, rows)
            kept.append(far)
            return own

        parameters = self.leaves if graph else self.parameters
        total = self._distance(average(gradient, parameters, self.local, self.steps, len(x)))
        if self.statistics:
            total = total + self.preset.statistics * kept[0]
        return total

    def _distance(self, own: dict[str, Tensor]) -> Tensor:
        if self.preset.distance == "cosine":
            inner = torch.stack([(own[n] * g).sum() for n, g in self.sent.items()]).sum()
            size = torch.stack([own[n].square().sum() for n in self.sent]).sum().sqrt()
            return 1.0 - inner / (size * self.norm)
        total = torch.stack([(own[n] - g).square().sum() for n, g in self.sent.items()]).sum()
        return total / self.norm**2 if self.preset.distance == "relative" else total

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Values [R] and gradients [R, n] of rows [R, n]."""
        with plain_kernels(), torch.enable_grad():
            if len(rows) == 1:
                row = rows[0].detach().requires_grad_()
                value = self.single(row, graph=True)
                slopes = torch.autograd.grad(value, row)[0][None]
                values = value[None]
            else:
                both = torch.func.grad_and_value(partial(self.single, graph=False))
                slopes, values = torch.func.vmap(both)(rows)
        values, slopes = values.detach(), slopes.detach()
        for more, pull in self._terms(rows):
            size = pull[0].numel()
            slopes[:, :size] += pull.flatten(1)
            values = values + more
        return values, slopes

    def _terms(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Values [R] and gradients [R, B, *input_shape] of what the update is not needed for."""
        data = rows[:, : prod(self.shape)].reshape(len(rows), *self.shape)
        if self.prior is not None:
            values = torch.stack([self.prior.value(r) for r in data])
            pulls = torch.stack([self.prior.gradient(r) for r in data])
            yield self.preset.variation * values, self.preset.variation * pulls
        if self.preset.size:
            squares = data.flatten(1).square().mean(1)
            yield self.preset.size * squares, self.preset.size * 2.0 * data / data[0].numel()
        if self.preset.group and len(rows) > 1:
            gap = data - registered_mean(data)  # the mean is held fixed
            squares = gap.flatten(1).square().mean(1)
            yield self.preset.group * squares, self.preset.group * 2.0 * gap / data[0].numel()
