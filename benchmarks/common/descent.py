"""What trainings share: windows of pictures, and a descent that goes on after a kill."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import interpolate

from benchmarks.common.pictures import SIDE
from rgap.update.storage import written

REDUCED = 1.0, 0.5, 0.25, 0.125  # sides of a picture that windows are cut from, of its own


class Source:
    """Where batches are drawn from.

    Args:
        pictures: 32×32 ones as they are, of larger ones windows at several sizes.
        shift: by which a picture is moved, at most.
    """

    def __init__(self, pictures: Tensor, shift: int) -> None:
        side, self.shift = pictures.shape[-1], shift
        sides = {max(round(share * side), SIDE) for share in REDUCED} if side > SIDE else {SIDE}
        self.sizes = [interpolate(pictures, (size, size), mode="area") for size in sorted(sides)]

    def batch(self, count: int, draw: torch.Generator) -> Tensor:
        """Pictures, [count, C, 32, 32]."""
        made = []
        for which in torch.randint(len(self.sizes), (count,), generator=draw).tolist():
            some = self.sizes[which]
            number, top, left, mirrored = (
                int(torch.randint(most, (1,), generator=draw))
                for most in (len(some), *(n - SIDE + 1 for n in some.shape[2:]), 2)
            )
            one = some[number, :, top : top + SIDE, left : left + SIDE]
            if self.shift:
                moves = torch.randint(-self.shift, self.shift + 1, (2,), generator=draw).tolist()
                one = one.roll(moves, (1, 2))
            elif mirrored:
                one = one.flip(2)
            made.append(one)
        return torch.stack(made)


class Plan(NamedTuple):
    """How long a descent is.

    Attributes:
        epochs: at most.
        steps: of an epoch.
        seconds: after which no epoch begins.
        checkpoint: written every epoch, gone on from.
    """

    epochs: int
    steps: int
    seconds: float
    checkpoint: Path | None


def descent(
    model: nn.Module,
    rule: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    test: Callable[[], str],
    plan: Plan,
    draw: torch.Generator,
) -> None:
    """Descend, the rate down to nothing over the epochs, and print what the test says after each.

    Where it goes on after a kill it ends at the weights that it would have had: every epoch's draws
    begin from the state on file.

    Args:
        model: what is trained.
        rule: of its parameters, at the rate of the beginning.
        loss: of a batch that it draws.
        test: of the pictures held out; called without gradients, in eval mode.
        plan: how long.
        draw: of the batches.
    """
    rate, begun, spent = rule.param_groups[0]["lr"], 0, 0.0
    if plan.checkpoint and plan.checkpoint.exists():
        begun, spent = _resumed(model, rule, plan.checkpoint, draw)
    for epoch in range(begun, plan.epochs):
        began = time.perf_counter()
        if spent >= plan.seconds:
            break
        for group in rule.param_groups:
            group["lr"] = rate * (1.0 - epoch / plan.epochs)
        model.train()
        for _ in range(plan.steps):
            rule.zero_grad()
            loss().backward()
            rule.step()
        model.eval()
        with torch.no_grad():
            told = test()
        spent += time.perf_counter() - began
        print(f"epoch {epoch + 1}: held out, {told}, {spent:.0f} s", flush=True)
        if plan.checkpoint:
            kept = {f"model.{n}": t for n, t in model.state_dict().items()}
            for number, state in rule.state_dict()["state"].items():
                kept |= {f"rule.{number}.{n}": t for n, t in state.items()}
            kept["at"] = torch.tensor([epoch + 1, spent], dtype=torch.float64)
            kept["draw"] = draw.get_state()
            written(plan.checkpoint, kept, {})


def _resumed(
    model: nn.Module, rule: torch.optim.Optimizer, checkpoint: Path, draw: torch.Generator
) -> tuple[int, float]:
    """Epochs and seconds of a run on file, which everything is set to."""
    kept = load_file(checkpoint)
    whole = rule.state_dict()
    for name, value in kept.items():
        kind, _, rest = name.partition(".")
        if kind == "rule":
            number, _, entry = rest.partition(".")
            whole["state"].setdefault(int(number), {})[entry] = value
    model.load_state_dict(
        {n.partition(".")[2]: t for n, t in kept.items() if n.startswith("model.")}
    )
    rule.load_state_dict(whole)
    draw.set_state(kept["draw"])
    epoch, spent = kept["at"].tolist()
    return int(epoch), spent
