"""``rgap report``: all that is to say of an update, on one page that can be handed on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from rgap.cli.audit import sizes
from rgap.cli.command import command
from rgap.cli.console import print_json, say
from rgap.cli.invert import CODES, Completion, Task
from rgap.cli.making import Making
from rgap.cli.mending import Mending
from rgap.cli.options import Force, Json, Labelled, Work, check_output, optional

if TYPE_CHECKING:
    from torch import Tensor

    from rgap.recovery import Recovery
    from rgap.update.update import Update

__all__ = ["report"]


@dataclass(frozen=True, kw_only=True)
class Contents:
    """What the page has beside the recovery, and where it goes."""

    panel: ClassVar[str] = "Page"
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Where to write the page.", metavar="FILE")
    ] = Path("report.html")
    originals: Annotated[
        list[str] | None,
        optional(
            "The client's pictures, where they are known: files, folders or photos:0-3, shown "
            "beside what came back.",
            "PATH",
        ),
    ] = None
    batch_sizes: Annotated[
        str, typer.Option(help="Of the table of the network, as in 1,2,4 or 1-8.", metavar="N,N,…")
    ] = "1,2,4,8"
    harden: Annotated[
        bool,
        typer.Option("--harden", help="Look for what would change the verdict.", metavar=""),
    ] = False
    made_up: Annotated[
        bool,
        typer.Option(
            "--made-up",
            help="Of a completion, how much of every pixel is made up: minutes at batches of 4.",
            metavar="",
        ),
    ] = False
    force: Force = False
    as_json: Json = False

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes of the table."""
        return sizes(self.batch_sizes, "--batch-sizes", "1,2,4,8")

    def pictures(self, update: Update) -> Tensor | None:
        """The client's, in the shape and the range of the update's."""
        from rgap.report.pictures import read_pictures

        if not self.originals:
            return None
        try:
            pictures = read_pictures(self.originals, update.input_shape)
        except ValueError as error:
            raise ValueError(str(error).replace("--images", "--originals")) from error
        low, high = update.value_range or (0.0, 1.0)
        return low + (high - low) * pictures


@command
def report(
    context: typer.Context,
    sent: Labelled,
    contents: Contents,
    completion: Completion,
    making: Making,
    mending: Mending,
    work: Work,
) -> int:
    """Write one page of what an update gives away: for people, to be opened in a browser."""
    from rgap.report.full import Beside, full

    check_output(contents.output, ".html")
    batches = contents.batches  # refused before the work where it is none
    task = Task.of(sent, completion, making, mending)
    originals = contents.pictures(task.update)
    recovery = task.recovery(context, work)
    own = [w.replace("rgap.analysis.made_up says", "--made-up shows") for w in recovery.warnings]
    recovery = replace(recovery, warnings=tuple(own))
    page = full(
        recovery,
        task.update.value_range,
        _settings(task, work, recovery),
        originals=originals,
        prior=_named(task.prior) if completion.complete else "",
        beside=Beside(**_found(task, recovery, contents, batches, work)),
    )
    page.save(contents.output)
    if contents.as_json:
        print_json({"output": str(contents.output), **recovery.summary()})
    else:
        typer.echo(f"{page.verdict.word}: {page.verdict.sentence}\nwritten to {contents.output}")
    return CODES.get(recovery.status.name, 1)


def _settings(task: Task, work: Work, recovery: Recovery) -> dict[str, str]:
    """What was asked for."""
    sent, size = task.sent, task.update.batch_size
    size = size if sent.batch_size is None else sent.batch_size
    return {
        "network": sent.model,
        "weights": "of the factory" if sent.weights is None else str(sent.weights),
        "update": str(sent.update),
        "batch size": "not stated" if size is None else str(size),
        "loss": str(task.update.loss.name),
        "seed": str(work.seed),
        "seconds": f"{recovery.seconds:.1f}",
    }


def _found(
    task: Task, recovery: Recovery, contents: Contents, batches: tuple[int, ...], work: Work
) -> dict[str, Any]:
    """The sections on the update and on the network."""
    import rgap

    network, update = task.network, task.update
    limits: dict[str, Any] = {n: work.arguments()[n] for n in ("memory_budget", "progress")}
    found = {"check": _tried("check", rgap.check, network, update)}
    shape = update.input_shape
    if shape is None and recovery.nearest is not None:
        shape = tuple(recovery.nearest.shape[1:])
    if shape is not None:
        limits["loss"] = update.loss
        found["audit"] = _tried("audit", rgap.analysis.audit, network, shape, batches, **limits)
    if shape is not None and contents.harden:
        limits["batch_size"] = update.batch_size or 1
        found["hardening"] = _tried("harden", rgap.analysis.harden, network, shape, **limits)
    if contents.made_up and recovery.inputs is not None:
        found["made_up"] = _tried(
            "made-up share", rgap.analysis.made_up, network, recovery, update=update
        )
    return found


def _named(prior: Any) -> str:
    from rgap.priors import named

    return named("natural" if prior is None else prior)


def _tried(what: str, call: Any, *given: Any, **more: Any) -> Any:
    """The result of a section that the page can do without; why it has none is said."""
    try:
        return call(*given, **more)
    except (ValueError, MemoryError, NotImplementedError) as error:
        say(f"the page has no section on {what}: {str(error).splitlines()[0]}")
        return None
