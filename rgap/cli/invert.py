"""``rgap invert``: what the equations of an update determine, certified."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

import typer

from rgap.cli.answer import Answer
from rgap.cli.command import command
from rgap.cli.making import Making
from rgap.cli.mending import Mending
from rgap.cli.options import Labelled, PriorName, Work, either, optional
from rgap.cli.spoken import worded
from rgap.cli.starting import StartFile, first_of

if TYPE_CHECKING:
    from torch import nn

    from rgap.priors import Likely
    from rgap.recovery import Recovery
    from rgap.update.update import Update

__all__ = ["CODES", "Completion", "Task", "invert"]

CODES = {"EXACT": 0, "INCONSISTENT": 3, "UNSUPPORTED": 4}  # any other status: 1


@dataclass(frozen=True, kw_only=True)
class Completion:
    """How an inversion goes on where its equations end."""

    panel: ClassVar[str] = "Completion"
    complete: Annotated[
        bool,
        typer.Option(
            "--complete",
            help="Where the equations end, go on and let a prior choose what they leave open.",
            metavar="",
        ),
    ] = False
    prior: Annotated[
        str | None,
        optional(
            f"Of --complete: {either(PriorName, 'rgap.priors')}; natural, the default, is "
            "that of pictures where inputs have neighbours, tv and anisotropic are total "
            "variation, squares is the distance from one half.",
            "NAME",
        ),
    ] = None
    start: StartFile = None
    time_limit: Annotated[
        float | None,
        optional(
            "Seconds after which no layer's equations are solved or counted (with --complete "
            "after half of them) and --complete begins no further step; telling samples apart and "
            "a last polish come on top. Default: 60 of --complete, no limit for the equations.",
            "SECONDS",
        ),
    ] = None

    def __post_init__(self) -> None:
        if self.prior is not None and not self.complete:
            raise ValueError("--prior: chooses in a completion only; write --complete as well")
        if self.start is not None and not self.complete:
            raise ValueError("--start: of a completion only; write --complete as well")


class Task(NamedTuple):
    """What is inverted, and how.

    Attributes:
        sent: the update's file and what it does not state.
        completion: how it goes on.
        network: with its weights.
        update: mended.
        prior: of the completion; None for the usual one.
    """

    sent: Labelled
    completion: Completion
    network: nn.Module
    update: Update
    prior: Likely | None

    @classmethod
    def of(cls, sent: Labelled, completion: Completion, making: Making, mending: Mending) -> Task:
        """Everything read and held against each other."""
        prior, network = _prior(completion, making), sent.network()
        return cls(sent, completion, network, mending.mended(sent.read(), network), prior)

    def recovery(self, context: typer.Context, work: Work) -> Recovery:
        """The update inverted, in the words of the command."""
        import rgap

        sent, update = self.sent, self.update
        size = update.batch_size if sent.batch_size is None else sent.batch_size
        recovery = rgap.invert(
            self.network,
            update,
            labels=sent.known(update),
            batch_size=sent.batch_size,
            complete=self.completion.complete,
            prior=self.prior,
            start=first_of(self.completion.start, size),
            time_limit=self.completion.time_limit,
            noise=sent.noise,
            **work.arguments(),
        )
        return worded(recovery, context, "reason", "warnings")


@command
def invert(
    context: typer.Context,
    sent: Labelled,
    answer: Answer,
    completion: Completion,
    making: Making,
    mending: Mending,
    work: Work,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say it layer by layer.", metavar="")
    ] = False,
    why: Annotated[
        bool, typer.Option("--why", help="Rank what stands in the way.", metavar="")
    ] = False,
) -> int:
    """Recover from an update what its equations determine, and say what they do not."""
    task = Task.of(sent, completion, making, mending)
    answer.check(task.update)
    recovery = task.recovery(context, work)
    written = answer.write(recovery, task.update, _why_not(recovery))
    numbers, text = recovery.summary(), ""
    if why:
        from rgap.analysis.causes.explain import explain as rank_causes

        limits: dict[str, Any] = {n: work.arguments()[n] for n in ("memory_budget", "progress")}
        if completion.time_limit is not None:
            limits["time_limit"] = completion.time_limit
        causes = rank_causes(recovery, task.network, task.update, **limits)
        numbers["why"], text = causes.numbers(), causes.text
    answer.show(recovery, numbers, written, explain=explain, text=text)
    return CODES.get(recovery.status.name, 1)


def _prior(completion: Completion, making: Making) -> Likely | None:
    """The prior by its name, or the generator."""
    made = making.made()
    if made is None:
        return completion.prior
    if not completion.complete:
        raise ValueError("--generator: chooses in a completion only; write --complete as well")
    if completion.prior is not None:
        raise ValueError("--prior: a generator is a prior by itself; leave one of them out")
    return made


def _why_not(recovery: Recovery) -> str:
    """Why a recovery has no pictures to write."""
    if recovery.inputs is not None:
        return "several batches fit; name a folder for all of them"
    if recovery.candidates:
        return (
            "the completion found no batch that reproduces the update; name a folder or a "
            ".safetensors file for the nearest, which is no recovery"
        )
    return "the batch is not determined"
