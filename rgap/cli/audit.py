"""``rgap audit``: how much of a batch an update determines, layer by layer or all of it at once."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from rgap.cli.command import command
from rgap.cli.console import print_json, say, stdout
from rgap.cli.options import (
    Force,
    Json,
    RankMethod,
    Sample,
    TimeLimit,
    Work,
    check_output,
    optional,
    whole_numbers,
)
from rgap.cli.spoken import worded

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from rgap.analysis.joint_rank.table import Identifiability

__all__ = ["audit", "sizes"]

MOST, LARGEST = 1024, 10**6  # sizes of a range, each of which is audited; samples of a batch


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """Which ranks are counted, at which batch sizes, and for how long."""

    panel: ClassVar[str] = "Ranks"
    batch_sizes: Annotated[
        str, typer.Option(help="Batch sizes to audit, as in 1,2,4 or 1-8.", metavar="N,N,…")
    ] = "1,2,4,8"
    method: Annotated[
        RankMethod,
        typer.Option(
            help="Of ranks: exact (measured), sketch (random, for large layers) or formula "
            "(counted from the sizes alone).",
            metavar="METHOD",
        ),
    ] = RankMethod.exact
    joint: Annotated[
        bool,
        typer.Option(
            "--joint",
            help="The whole update at once: its rank as a function of the data.",
            metavar="",
        ),
    ] = False
    time_limit: TimeLimit = None

    @property
    def batches(self) -> tuple[int, ...]:
        """The batch sizes."""
        return sizes(self.batch_sizes, "--batch-sizes", "1,2,4,8")


@command
def audit(
    context: typer.Context,
    sample: Sample,
    ranks: Ranks,
    work: Work,
    plot: Annotated[
        Path | None,
        optional("Write the heat map, or with --joint the curves: .png, .pdf or .svg.", "FILE"),
    ] = None,
    force: Force = False,
    as_json: Json = False,
) -> int:
    """Count, layer by layer, how much of a batch the gradient determines."""
    from rgap.report.pictures import figure_format, save_figure

    if plot is not None:
        figure_format(plot, "--plot")
        check_output(plot, option="--plot")
    if ranks.joint:
        counted = _jointly(sample, ranks, work)
    else:
        counted = _layer_by_layer(sample, ranks, work, context)
    if plot is not None:
        save_figure(counted.draw(), plot)
    if as_json:
        print_json({**counted.numbers, "plot": None if plot is None else str(plot)})
        return 0
    console = stdout()
    for part in counted.parts:
        console.print(part, highlight=False)
    if plot is not None:
        console.print(f"Figure: {plot}", highlight=False, soft_wrap=True)
    return 0


@dataclass(frozen=True)
class _Counted:
    """An audit, as numbers for JSON, as tables and words, and as a figure to draw."""

    numbers: dict[str, Any]
    parts: tuple[Table | str, ...]
    draw: Callable[[], Figure]


def _layer_by_layer(sample: Sample, ranks: Ranks, work: Work, context: typer.Context) -> _Counted:
    """The rank of every layer's gradient at every batch size."""
    from rgap.analysis.discard.audit import audit as measure
    from rgap.report.tables import audit_table, own_gradient_table

    batches, network, (shape, loss) = ranks.batches, sample.network(), sample.declared()
    result = measure(
        network, shape, batches, loss=loss, method=ranks.method.value,
        time_limit=ranks.time_limit, **work.arguments(),
    )  # fmt: skip
    # The name that was asked for says more than nn.Sequential.
    result = replace(worded(result, context, "notes"), model=sample.model)
    shown = (audit_table(result), own_gradient_table(result), result.explain())
    return _Counted(result.summary(), shown, result.plot)


def _jointly(sample: Sample, ranks: Ranks, work: Work) -> _Counted:
    """The rank of the whole update at every batch size that the time allows."""
    from rgap.analysis.joint_rank.identifiability import identifiability
    from rgap.analysis.plots.null_space import nullity_curves
    from rgap.machine.allowance import OutOfTime, seconds_of
    from rgap.report.tables import joint_table

    batches, network, (shape, loss) = ranks.batches, sample.network(), sample.declared()
    arguments = work.arguments()
    results: list[Identifiability] = []
    end = time.perf_counter() + seconds_of(ranks.time_limit)
    for batch in batches:
        left = max(end - time.perf_counter(), 1e-3)
        try:
            result = identifiability(network, shape, batch, loss=loss, time_limit=left, **arguments)
        except OutOfTime as reason:
            if not results:
                raise
            say(f"B = {batch} and what follows was not measured ({reason})")
            break
        results.append(replace(result, model=sample.model))
    return _Counted(
        {"model": sample.model, "joint": [result.summary() for result in results]},
        tuple(part for result in results for part in (joint_table(result), result.explain())),
        lambda: nullity_curves(results),
    )


def sizes(text: str, option: str, example: str) -> tuple[int, ...]:
    """Whole numbers of at least 1 and ranges of them, once each.

    >>> sizes("1-3,8,2", "--batch-sizes", "1,2")
    (1, 2, 3, 8)
    """

    def spread(found: re.Match[str]) -> str:
        first, last = map(int, found.groups())
        if not 0 < first <= last < first + MOST:
            raise ValueError(
                f"{option}: expected a range of at most {MOST} sizes, the smallest first, got "
                f"{found[0]!r}; write {option} 1-8"
            )
        return ",".join(map(str, range(first, last + 1)))

    whole = re.sub(r"(?<![^\s,])(\d+)\s*-\s*(\d+)(?![^\s,])", spread, text)
    numbers = tuple(dict.fromkeys(whole_numbers(whole, option, example)))
    if max(numbers) > LARGEST:
        raise ValueError(
            f"{option}: expected batches of at most {LARGEST} samples, got {max(numbers)}; write "
            f"{option} {example}"
        )
    return numbers
