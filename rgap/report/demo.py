"""The demonstration: what a gradient gives away, where it stops, and the figures that show it.

Five parts, all on photographs that come with the package: one picture through LeNet and one
through CNN6, recovered from float32 gradients; a batch of two, where the equations fall short by a
number that can be counted; that count for every layer and batch size; and four pictures of one
label in one gradient of a ResNet-18, which is wide enough to give them away.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from torch import Tensor, nn

from rgap.analysis.discard.audit import audit
from rgap.analysis.discard.table import Audit
from rgap.analysis.plots.discard import discard_heatmap, psnr, side_by_side
from rgap.analysis.scoring import score
from rgap.inversion.invert import Head, invert
from rgap.models import published as models
from rgap.models.classifiers import resnet
from rgap.network.watching import watched
from rgap.photos import packaged as photos
from rgap.recovery import Recovery, Status, plain
from rgap.report.pictures import replacing, save_figure
from rgap.update.capture import capture
from rgap.update.update import Update

if TYPE_CHECKING:
    from rich.status import Status as Spinner

__all__ = ["FILES", "Case", "Demo", "head_of", "run"]

FILES = ("recovered.png", "discard.png", "demo.json")  # in the folder of a demonstration

BATCHES = (1, 2, 4, 8)
STEPS = 5
WIDTHS = (64, 64, 128, 128, 256, 256, 512, 512)  # ResNet-18 for 32×32 pictures
FOUR, LABEL = (2, 11, 16, 23), 5  # photographs of one batch, and the label of all
PATIENCE = 600.0  # seconds of its recovery


@dataclass(frozen=True)
class Case:
    """One attack of the demonstration.

    Attributes:
        network: name of the network.
        loss: of the client.
        originals: the client's pictures [B, C, H, W], float32, which the attack does not see.
        labels: the client's labels.
        recovery: what `rgap.invert` answered.
        given: what the attack was given besides the update, "" for nothing.
    """

    network: str
    loss: str
    originals: Tensor
    labels: tuple[int, ...]
    recovery: Recovery
    given: str = ""

    @property
    def answers(self) -> Tensor | None:
        """The recovered pictures in the client's order, which no update holds; None for none."""
        if self.recovery.inputs is None:
            return None
        return self.recovery.inputs[score(self.recovery, self.originals).order]

    @property
    def psnr(self) -> tuple[float, ...] | None:
        """PSNR of every recovered picture in dB, None when there is none."""
        if self.answers is None:
            return None
        pairs = zip(self.originals, self.answers, strict=True)
        return tuple(psnr(original, answer) for original, answer in pairs)

    def summary(self) -> dict[str, Any]:
        """The case as plain numbers, for JSON."""
        return {
            "network": self.network,
            "batch_size": len(self.originals),
            "loss": self.loss,
            "true_labels": list(self.labels),
            "given": self.given,
            "psnr": None if self.psnr is None else list(self.psnr),
            "recovery": self.recovery.summary(),
        }


@dataclass(frozen=True)
class Demo:
    """What the demonstration found, and where it put the figures.

    Attributes:
        single: the two attacks on one picture.
        pair: the attack on a batch of two.
        residual: the attack on four pictures of one label in a ResNet-18.
        audit: the discard of LeNet, layer by batch size.
        files: figures and numbers, in the order they are named.
        seconds: wall time.
    """

    single: tuple[Case, ...]
    pair: Case
    residual: Case
    audit: Audit
    files: tuple[Path, ...]
    seconds: float

    @property
    def certified(self) -> bool:
        """True if every picture that was attacked alone came back exactly."""
        return all(case.recovery.status is Status.EXACT for case in self.single)

    def summary(self) -> dict[str, Any]:
        """Everything as plain numbers, for JSON."""
        return {
            "single": [case.summary() for case in self.single],
            "pair": self.pair.summary(),
            "residual": self.residual.summary(),
            "audit": self.audit.summary(),
            "files": [str(file) for file in self.files],
            "seconds": self.seconds,
        }


def run(output: Path, *, seed: int = 0, console: Console | None = None) -> Demo:
    """Run the demonstration and write its figures.

    Args:
        output: folder for ``recovered.png``, ``discard.png`` and ``demo.json``; made if absent.
        seed: of the networks' weights and of the photographs' choice.
        console: where progress goes, if it is a terminal.

    Returns:
        The :class:`Demo`.

    Raises:
        ValueError: ``output`` is a file.
    """
    start = time.perf_counter()
    for place in (output, *output.parents):
        if place.exists() and not place.is_dir():
            raise ValueError(
                f"--output: expected a folder, got the file {place}; write --output demo"
            )
    count = len(photos.names())
    first, second, third = (
        photos.load(count=1, start=(seed + i) % count).float() for i in (0, 5, 9)
    )
    with _Steps(console) as step, _one_thread():
        step("LeNet: recovering a photograph from its gradient")
        lenet = models.lenet(seed=seed)
        single = [_attack("LeNet, sigmoid", lenet, "cross_entropy", first, (3,))]
        step("CNN6: recovering a photograph from its gradient")
        binary = models.LOSSES["cnn6"]
        single.append(_attack("CNN6, LeakyReLU", models.cnn6(seed=seed), binary, second, (1,)))
        step("LeNet: two photographs in one gradient")
        pair = _attack(
            "LeNet, sigmoid",
            lenet,
            "cross_entropy",
            torch.cat((first, third)),
            (3, 7),
            "head features and cotangents",
        )
        step(f"LeNet: counting equations for batches of {', '.join(map(str, BATCHES))}")
        probe = photos.load(count=max(BATCHES))
        table = audit(lenet, (3, 32, 32), BATCHES, inputs=probe, seed=seed)
        table = replace(table, model="LeNet")  # its class is a plain Sequential
        step("ResNet-18: four photographs of one label in one gradient")
        four = torch.cat([photos.load(count=1, start=(seed + i) % count) for i in FOUR])
        residual = _attack(
            "ResNet-18", _residual(seed), "cross_entropy", four.float(), (LABEL,) * len(FOUR)
        )
    files = tuple(output / name for name in FILES)
    demo = Demo(tuple(single), pair, residual, table, files, time.perf_counter() - start)
    _write(demo)
    return demo


def head_of(model: nn.Module, update: Update, inputs: Tensor, targets: Tensor) -> Head:
    """The true features and cotangents of the last linear layer, read with hooks.

    An attacker does not have them for a batch: a study that starts here asks what the layers
    below determine once the head is solved.

    Args:
        model: whose last ``nn.Linear`` is the head.
        update: of this batch; gives the loss.
        inputs: the client's pictures.
        targets: the client's labels.

    Raises:
        ValueError: a model without a linear layer.
    """
    linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise ValueError(f"expected a network with a linear head, got {type(model).__name__}")
    with watched({"head": linear[-1]}) as calls:
        value = update.loss(model(inputs), targets)
    (cotangents,) = torch.autograd.grad(value, calls[-1].made)
    return Head(calls[-1].given.detach(), cotangents)


def _attack(
    name: str,
    model: nn.Module,
    loss: str,
    pictures: Tensor,
    labels: tuple[int, ...],
    given: str = "",
) -> Case:
    targets = torch.tensor(labels)
    if loss != "cross_entropy":
        targets = targets[:, None]
    update = capture(model, pictures, targets, loss)
    head = head_of(model, update, pictures, targets) if given else None
    recovery = invert(model, update, head=head, time_limit=PATIENCE)
    return Case(name, loss, pictures, labels, recovery, given)


def _residual(seed: int) -> nn.Module:
    """As PyTorch draws it, with the running statistics of photographs, in eval mode."""
    model = resnet(channels=WIDTHS, seed=seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    with torch.no_grad():
        model.train()(photos.load(count=len(photos.names())).float())
    return model.eval()


def _write(demo: Demo) -> None:
    recovered, discard, numbers = demo.files
    recovered.parent.mkdir(parents=True, exist_ok=True)
    cases = (*demo.single, demo.pair, demo.residual)
    originals = [picture for case in cases for picture in case.originals]
    answers: list[Tensor | None] = []
    titles: list[str] = []
    for case in cases:
        batch = len(case.originals)
        answers += [None] * batch if case.answers is None else list(case.answers)
        titles += [f"{case.network}\nB = {batch}"] * batch
    save_figure(side_by_side(originals, answers, titles=titles), recovered)
    save_figure(discard_heatmap(demo.audit), discard)
    with replacing(numbers) as beside:
        beside.write_text(json.dumps(plain(demo.summary()), indent=2, allow_nan=False) + "\n")


@contextmanager
def _one_thread() -> Iterator[None]:
    """A second thread gains a third on systems this small, and loses far more on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Steps:
    """Numbered steps with a spinner on a terminal, and a line with the time once each is done."""

    def __init__(self, console: Console | None) -> None:
        self._console = console if console is not None and console.is_terminal else None
        self._spinner: Spinner | None = None
        self._name, self._number, self._since = "", 0, 0.0

    def __enter__(self) -> Callable[[str], None]:
        if self._console is not None:
            self._spinner = self._console.status("")
            self._spinner.start()
        return self._step

    def _step(self, name: str) -> None:
        self._done()
        self._name, self._number, self._since = name, self._number + 1, time.perf_counter()
        if self._spinner is not None:
            self._spinner.update(f"[{self._number}/{STEPS}] {name} …")

    def _done(self) -> None:
        if self._console is not None and self._name:
            passed = time.perf_counter() - self._since
            self._console.print(f"[green]✓[/green] {self._name} [dim]{passed:.1f} s[/dim]")

    def __exit__(self, kind: object, *_: object) -> None:
        if self._spinner is not None:
            self._spinner.stop()
        if kind is None:
            self._done()
