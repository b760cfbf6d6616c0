"""The loop of a training: steps of Adam, looks at what was held out, states to go on from."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

import torch
from torch import Tensor, nn

from rgap.learned.assignment import assigned_error
from rgap.learned.design import Design
from rgap.learned.gradients import of_batches
from rgap.learned.networks import under, with_size
from rgap.learned.report import TrainingReport
from rgap.learned.schedule import Schedule
from rgap.learned.standard import Standard
from rgap.matching.checkpoint import Ended
from rgap.update.losses import Loss

__all__ = ["Fitting", "Pool", "batches"]

LOOKED_AT = 512  # held-out batches of each size, at most
BETTER = 1e-3  # relative: a smaller decrease is none


@dataclass(frozen=True, eq=False)
class Pool:
    """Pictures with the hashed gradient of each.

    Attributes:
        hashed: of single samples, [P, m].
        pictures: in [0, 1], ``[P, *shape]``.
        loss: the client's.
    """

    hashed: Tensor
    pictures: Tensor
    loss: Loss

    def drawn(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Hashed gradients and pictures of batches [N, B], ``[N, m]`` and ``[N, B, *shape]``."""
        at = index.to(self.hashed.device)
        return of_batches(self.hashed, at, self.loss), self.pictures[at]

    def parted(self, held: int, seed: int) -> tuple[Pool, Pool]:
        """Those to learn from and those that are held out, so many, in an order of the seed."""
        order = torch.randperm(
            len(self.pictures), generator=torch.Generator().manual_seed(seed)
        ).to(self.hashed.device)
        learned, back = (
            Pool(self.hashed[part], self.pictures[part], self.loss)
            for part in (order[held:], order[:held])
        )
        return learned, back


def batches(count: int, size: int, number: int, draw: torch.Generator) -> Tensor:
    """Batches of different samples, each sample as often as any other but for one, [number, size].

    >>> batches(5, 2, 3, torch.Generator().manual_seed(0)).shape
    torch.Size([3, 2])
    """
    whole = count // size  # batches of one order of all samples
    orders = [
        torch.randperm(count, generator=draw)[: whole * size] for _ in range(-(-number // whole))
    ]
    return torch.cat(orders).reshape(-1, size)[:number]


@dataclass(eq=False)
class Fitting:
    """The state of a training.

    Attributes:
        design: of the networks.
        schedule: of the steps.
        standard: of hashed gradients.
        network: to the pictures.
        counter: to the batch size.
        learned, held: pictures to learn from, and held out.
        step: that come next.
        seconds: spent so far.
        best: mean error of what was held out, the least so far.
        stale: looks since.
        kept: weights at the best.
    """

    design: Design
    schedule: Schedule
    standard: Standard
    network: nn.Sequential
    counter: nn.Sequential | None
    learned: Pool
    held: Pool
    step: int = 0
    seconds: float = 0.0
    best: float = inf
    stale: int = 0
    kept: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts = {"network": self.network}
        self._networks = nn.ModuleDict(parts | ({"counter": self.counter} if self.counter else {}))
        self._optimiser = torch.optim.Adam(self._networks.parameters(), self.schedule.rate)
        self._draw = torch.Generator().manual_seed(self.schedule.seed)
        looks = torch.Generator().manual_seed(self.schedule.seed + 1)
        count = min(LOOKED_AT, len(self.held.pictures))
        self._looks = [
            batches(len(self.held.pictures), size, count, looks) for size in self.design.batch_sizes
        ]

    def advance(self) -> None:
        """One step of Adam on batches of one size; sizes take turns."""
        place = self.step % len(self.design.batch_sizes)
        index = batches(
            len(self.learned.pictures),
            self.design.batch_sizes[place],
            self.schedule.updates,
            self._draw,
        )
        hashed, truth = self.learned.drawn(index)
        for group in self._optimiser.param_groups:
            group["lr"] = self.schedule.rate_at(self.step, self.seconds)
        self._optimiser.zero_grad()
        with torch.enable_grad():
            value = self._errors(hashed, truth, place).mean()
            if self.counter is not None:
                logits = self.counter(self.standard.rows(hashed, 0))
                wanted = torch.full((len(index),), place, device=logits.device)
                value = value + nn.functional.cross_entropy(logits, wanted)
            value.backward()  # type: ignore[no-untyped-call]
        self._optimiser.step()
        self.step += 1

    def look(self) -> None:
        """Compare with the best on what was held out, and keep the weights if they are better."""
        error = sum(self.errors().values()) / len(self.design.batch_sizes)
        if error < self.best * (1 - BETTER):
            self.best, self.stale = error, 0
            self.kept = {n: t.detach().clone() for n, t in self._networks.state_dict().items()}
        else:
            self.stale += 1

    def errors(self) -> dict[int, float]:
        """Mean squared error on what was held out, by batch size."""
        with torch.no_grad():
            return {
                size: float(self._errors(*self.held.drawn(index), place).mean())
                for place, (size, index) in enumerate(
                    zip(self.design.batch_sizes, self._looks, strict=True)
                )
            }

    def counted(self) -> float | None:
        """Share of the held-out batches whose size the counter guesses right."""
        if self.counter is None:
            return None
        with torch.no_grad():
            right = [
                self.counter(self.standard.rows(self.held.drawn(index)[0], 0)).argmax(1) == place
                for place, index in enumerate(self._looks)
            ]
        return float(torch.cat(right).double().mean())

    def report(self, ended: Ended) -> TrainingReport:
        """How well the networks do on what was held out, and what it took."""
        middle = self.learned.pictures.mean(0)
        return TrainingReport(
            self.errors(), float((self.held.pictures - middle).square().mean()), self.counted(),
            self.step, self.seconds, ended,
        )  # fmt: skip

    def finish(self) -> None:
        """Take the best weights."""
        self._networks.load_state_dict(self.kept)

    def tensors(self) -> dict[str, Tensor]:
        """All that :meth:`restore` needs."""
        moments = {
            f"adam/{place}/{name}": value
            for place, state in self._optimiser.state_dict()["state"].items()
            for name, value in state.items()
        }
        numbers = [self.step, self.seconds, self.best, self.stale]
        return {
            **{f"now/{n}": t for n, t in self._networks.state_dict().items()},
            **{f"kept/{n}": t for n, t in self.kept.items()},
            **moments,
            "draw": self._draw.get_state(),
            "numbers": torch.tensor(numbers, dtype=torch.float64),
        }

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Go on from :meth:`tensors`, to the weights that the training would have had."""
        step, self.seconds, self.best, stale = tensors["numbers"].tolist()
        self.step, self.stale = int(step), int(stale)
        self._draw.set_state(tensors["draw"])
        self._networks.load_state_dict(under(tensors, "now/"))
        self.kept = under(tensors, "kept/")
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in under(tensors, "adam/").items():
            place, _, kind = name.partition("/")
            state.setdefault(int(place), {})[kind] = value
        whole = self._optimiser.state_dict()
        self._optimiser.load_state_dict({**whole, "state": state})

    def _errors(self, hashed: Tensor, truth: Tensor, place: int) -> Tensor:
        rows = with_size(self.standard.rows(hashed, place), place, len(self.design.batch_sizes))
        return assigned_error(self.network(rows)[:, : truth.shape[1]], truth)
