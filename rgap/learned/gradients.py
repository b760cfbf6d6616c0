"""Hashed gradients of single samples, from which those of all batches follow.

A gradient of a batch is the mean of its samples' (their sum, where the loss sums), and hashing is
linear: ``h(g_batch) = 1/B Σ_b h(g_b)``.  So every picture goes through the model once.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import vmap

from rgap.jacobian.module_gradient import ClientLoss, ModuleGradient
from rgap.learned.design import Client, Design
from rgap.learned.hashing import FeatureHash
from rgap.network.running import run
from rgap.progress import Watch, silent
from rgap.update.losses import Loss
from rgap.update.targets import CLASSES

__all__ = ["HashedGradient", "of_batches"]

HELD = 1 << 24  # numbers of single gradients that are held at a time
TOGETHER = 256  # of them at most
PROBES = 64  # pictures of noise that the size of each tensor's gradient is taken from


@dataclass(frozen=True, eq=False)
class HashedGradient:
    """``x, y ↦ h(D⁻¹ ∂L(f_θ(x), y)/∂θ)`` of one model.

    Attributes:
        hashing: h.
        scales: D, one number for each parameter that is trained, by name.
    """

    hashing: FeatureHash
    scales: dict[str, float]
    _model: nn.Module
    _loss: Loss

    @classmethod
    def of(cls, model: nn.Module, client: Client, design: Design) -> HashedGradient:
        """That of a model in eval mode, which is left as it is.

        D is 1, or, of a conditioned design, the root mean square of each tensor's gradient over
        pictures of noise with random labels: only the model is needed for it.

        Raises:
            ValueError: a conditioned design, and a loss whose targets are no classes.
        """
        hashing, loss = client.hashing(design), client.loss
        own = cls(hashing, dict.fromkeys(client.names, 1.0), model, loss)
        if not design.conditioned:
            return own
        if loss.name not in CLASSES or loss.targets != "index":
            raise ValueError(
                f"conditioned: expected a loss of class indices, got {loss.name!r}; write "
                "conditioned=False"
            )
        draw = torch.Generator().manual_seed(hashing.seed)
        low, high = client.value_range
        noise = (low + (high - low) * torch.rand(PROBES, *client.shape, generator=draw)).to(
            own._like
        )
        with torch.no_grad():
            classes = run(own._model, noise[:1]).shape[1]
        labels = torch.randint(classes, (PROBES,), generator=draw).to(noise.device)
        squares = [0.0] * len(client.names)
        for taken in own._single(noise, labels, silent):
            for place, name in enumerate(client.names):
                own_square = float(taken[name].double().square().mean())
                squares[place] += own_square * len(taken[name])
        sizes = [(total / PROBES) ** 0.5 or 1.0 for total in squares]
        return cls(hashing, dict(zip(client.names, sizes, strict=True)), own._model, loss)

    @property
    def _like(self) -> Tensor:
        return next(self._model.parameters())

    def sent(self, gradients: dict[str, Tensor]) -> Tensor:
        """The hash of an update, [m], float32, on the model's device."""
        held = [gradients[name].to(self._like.device) / s for name, s in self.scales.items()]
        return self.hashing.of(held).float()

    def rows(self, pictures: Tensor, labels: Tensor, watch: Watch = silent) -> Tensor:
        """The hash of every sample alone, [N, m], float32, on the model's device.

        Args:
            pictures: x, ``[N, *shape]``.
            labels: y, [N, ...].
            watch: told of every chunk.
        """
        parts = [
            self.hashing.rows([taken[name] / scale for name, scale in self.scales.items()])
            for taken in self._single(pictures, labels, watch)
        ]
        return torch.cat(parts).float()

    def _single(
        self, pictures: Tensor, labels: Tensor, watch: Watch
    ) -> Iterator[dict[str, Tensor]]:
        """Gradients of single samples by name, ``[n, *shape]``, a chunk after another."""
        twin = copy.deepcopy(self._model)
        own = ModuleGradient(twin, ClientLoss(self._loss, None), list(self.scales))
        entries = sum(p.numel() for p in own.parameters.values())
        count = max(1, min(TOGETHER, HELD // entries))
        for first in range(0, len(pictures), count):
            watch("gradients of pictures", first + 1, len(pictures))
            x, y = pictures[first : first + count], labels[first : first + count]
            yield _each(own, x.to(self._like), y.to(self._like.device))


def _each(own: ModuleGradient, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Gradients of single samples: all at once, or one by one where a model's code forbids it."""

    def single(one: Tensor, label: Tensor) -> dict[str, Tensor]:
        return own.gradient(one[None], label[None], graph=False)[0]

    try:
        return vmap(single)(x, y)
    except (RuntimeError, ValueError):  # a forward that asks for values, or an operation without it
        taken = [own.gradient(x[i : i + 1], y[i : i + 1])[0] for i in range(len(x))]
        return {n: torch.stack([one[n].detach() for one in taken]) for n in taken[0]}


def of_batches(rows: Tensor, index: Tensor, loss: Loss) -> Tensor:
    """Hashed gradients of batches out of those of their samples, [N, m].

    Args:
        rows: of single samples, [P, m].
        index: of the samples of every batch, [N, B].
        loss: the client's: a mean or a sum over its samples.

    >>> of_batches(torch.tensor([[1.0], [3.0]]), torch.tensor([[0, 1], [1, 1]]), Loss()).flatten()
    tensor([2., 3.])
    """
    total = rows[index[:, 0]]
    for column in index.T[1:]:  # not all samples of all batches at a time
        total = total + rows[column]
    return total / index.shape[1] if loss.reduction == "mean" else total
