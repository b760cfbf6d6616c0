"""``rgap match``: the batch whose update comes nearest, on any network."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from rgap.cli.answer import Answer
from rgap.cli.command import command
from rgap.cli.making import Making
from rgap.cli.mending import Mending
from rgap.cli.options import Labelled, MatchMethod, PriorName, Work, either, optional
from rgap.cli.spoken import worded
from rgap.cli.starting import StartFile, first_of

if TYPE_CHECKING:
    from rgap.matching import Preset
    from rgap.matching.checkpoint import Checkpoint, Progress
    from rgap.update.local_training import LocalTraining
    from rgap.update.update import Update

__all__ = ["match"]

EVERY = 10.0  # seconds between two writings of a checkpoint


@dataclass(frozen=True, kw_only=True)
class Search:
    """How a search goes: its method, where it begins, and when it ends."""

    panel: ClassVar[str] = "Search"
    method: Annotated[
        str,
        typer.Option(
            help=f"How to search: {either(MatchMethod, 'rgap.presets')}.", metavar="METHOD"
        ),
    ] = MatchMethod.gauss_newton.value
    start: StartFile = None
    prior: Annotated[
        str | None,
        optional(
            f"What is likely: {either(PriorName, 'rgap.priors')}; default: the method's own.",
            "NAME",
        ),
    ] = None
    generations: Annotated[
        int | None,
        optional(
            "Of an evolution strategy that finds a generator's first codes: of latent, gias and "
            "gifd; needs pip install 'rgap[evolution]'.",
            "N",
            min=1,
        ),
    ] = None
    restarts: Annotated[
        int | None, optional("How often to begin anew; default: the method's own.", "N", min=1)
    ] = None
    iterations: Annotated[
        int | None, optional("Of a start, at most; default: the method's own.", "N", min=1)
    ] = None
    patience: Annotated[
        int | None, optional("Iterations without progress that end it.", "N", min=1)
    ] = None
    time_limit: Annotated[
        float | None, optional("Seconds after which no further step is begun.", "SECONDS")
    ] = None
    checkpoint: Annotated[
        Path | None,
        optional(
            "Go on from this file if it is there, and write it every ten seconds and at the end.",
            "FILE",
            "--resume",
        ),
    ] = None

    def how(self) -> str | Preset:
        """The method, with an evolution strategy before it where one is asked for."""
        from rgap.matching import PRESETS

        if self.generations is None:
            return self.method
        preset = PRESETS.get(self.method)
        if preset is None or not preset.domains or preset.domains[0].over != "latent":
            raise ValueError(
                f"--generations: of a search that begins with codes of a generator, got --method "
                f"{self.method}; write --method gifd"
            )
        return replace(preset, evolution=self.generations)

    def held(self) -> Checkpoint | None:
        """Where an earlier search was, None at the first."""
        from rgap.matching.checkpoint import Checkpoint

        path = self.checkpoint
        if path is None:
            return None
        if not path.parent.is_dir():
            raise ValueError(f"--resume: no folder {path.parent}; create it first")
        return Checkpoint.load(path) if path.exists() else None

    def writer(self) -> Callable[[Progress], None] | None:
        """A callback that writes down where the search is, now and then."""
        path, last = self.checkpoint, time.monotonic()
        if path is None:
            return None

        def told(progress: Progress) -> None:
            nonlocal last
            if time.monotonic() - last > EVERY:
                progress.checkpoint.save(path)
                last = time.monotonic()

        return told


@dataclass(frozen=True, kw_only=True)
class Local:
    """The training of a client that made several steps."""

    panel: ClassVar[str] = "Local training"
    local_steps: Annotated[
        int | None, optional("Steps of the client, if the update does not state them.", "N", min=1)
    ] = None
    local_rate: Annotated[
        float | None,
        optional("The client's learning rate, for an update over several local steps.", "X"),
    ] = None
    local_size: Annotated[
        int | None, optional("Samples of a local step; default: all.", "N", min=1)
    ] = None

    def stepped(self, update: Update) -> Update:
        """The update as one over these steps."""
        steps = self.local_steps
        return update if steps is None else replace(update, local_steps=steps)

    def training(self) -> LocalTraining | None:
        """The training as the search declares it, None for a single step."""
        from rgap.update.local_training import LocalTraining

        if self.local_rate is not None:
            return LocalTraining(self.local_rate, self.local_size)
        if self.local_size is not None:
            raise ValueError("--local-size: expected a rate with it; write --local-rate 0.01 too")
        return None


@command
def match(
    context: typer.Context,
    sent: Labelled,
    answer: Answer,
    search: Search,
    making: Making,
    local: Local,
    mending: Mending,
    work: Work,
) -> int:
    """Search the batch whose update comes nearest, on any network; nothing is certified."""
    import rgap

    network = sent.network()
    update = local.stepped(mending.mended(sent.read(), network))
    answer.check(update)
    size = update.batch_size if sent.batch_size is None else sent.batch_size
    checkpoint = search.held()
    recovery = rgap.match(
        network,
        update,
        method=search.how(),
        labels=sent.known(update),
        batch_size=sent.batch_size,
        generator=making.made(),
        start=first_of(search.start, size),
        prior=search.prior,
        local=local.training(),
        noise=sent.noise,
        restarts=search.restarts,
        iterations=search.iterations,
        patience=search.patience,
        time_limit=inf if search.time_limit is None else search.time_limit,
        callback=search.writer(),
        checkpoint=checkpoint,
        **work.arguments(),
    )
    recovery = worded(recovery, context, "reason", "warnings")
    if search.checkpoint is not None and recovery.checkpoint is not None:
        recovery.checkpoint.save(search.checkpoint)
    nearest = replace(
        recovery, inputs=recovery.nearest, labels=recovery.nearest_labels, candidates=()
    )
    written = answer.write(recovery, update, recovery.reason)
    numbers = {**recovery.summary(), "labels": nearest.summary()["labels"]}
    answer.show(recovery, numbers, written)
    return 0 if recovery.inputs is not None else 1
