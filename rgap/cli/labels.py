"""``rgap labels``: how often each class occurs in a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from rgap.cli.command import command
from rgap.cli.console import print_json, stdout
from rgap.cli.mending import Mending
from rgap.cli.options import Arguments, Json, LabelMethod, Sent, Work, either
from rgap.cli.spoken import worded

if TYPE_CHECKING:
    from torch import nn

    from rgap.labels import LabelEstimate
    from rgap.update.update import Update

__all__ = ["labels"]


@command
def labels(
    context: typer.Context,
    sent: Sent,
    mending: Mending,
    work: Work,
    method: Annotated[
        str,
        typer.Option(
            help=f"{either(LabelMethod, 'rgap.labels')}; all is each of them, exact recovers the "
            "batch first.",
            metavar="METHOD",
        ),
    ] = LabelMethod.best.value,
    as_json: Json = False,
) -> int:
    """Read the labels of a batch off the last layer's gradient: how often each class occurs."""
    from rgap.labels import METHODS
    from rgap.report.labels import print_labels

    if method != LabelMethod.all and method not in METHODS:
        offered = either(LabelMethod, "rgap.labels")
        raise ValueError(f"--method: expected {offered}, got {method!r}; write --method best")
    network, arguments = sent.network(), work.arguments()
    update = mending.mended(sent.read(), network)
    names = list(METHODS.working()) if method == LabelMethod.all else [method]
    estimates = {
        name: worded(_estimate(network, update, name, sent, arguments), context, "reason")
        for name in names
    }
    if as_json:
        print_json(
            {
                "batch_size": update.batch_size if sent.batch_size is None else sent.batch_size,
                "classes": len(next(iter(estimates.values())).confidence),
                "methods": {name: one.summary() for name, one in estimates.items()},
            }
        )
    else:
        print_labels(stdout(), estimates)
    return 0 if any(one.decided for one in estimates.values()) else 1


def _estimate(
    network: nn.Module, update: Update, method: str, sent: Sent, arguments: Arguments
) -> LabelEstimate:
    """One method's answer; ``exact`` inverts the update for the features that it needs."""
    import torch

    import rgap
    from rgap.labels import LabelEstimate, estimate, head_features

    size, room = sent.batch_size, arguments["memory_budget"]
    # Before the work of an inversion: what is refused is refused at once.
    first = estimate(
        network, update, method=method, batch_size=size, device=arguments["device"],
        memory_budget=room,
    )  # fmt: skip
    if method != "exact" or update.local_steps > 1:
        return first
    recovery = rgap.invert(network, update, batch_size=size, noise=sent.noise, **arguments)
    if "targets" not in recovery.certified:
        return replace(first, reason=f"{recovery.status.name}: {recovery.reason}")
    inputs = recovery.inputs
    features = None if inputs is None else head_features(network, update, inputs)
    if features is None and recovery.labels is not None:  # certified, but not by the identity
        counts = torch.bincount(recovery.labels, minlength=len(first.confidence))
        sure = counts.new_ones(len(counts), dtype=torch.float64)
        return LabelEstimate.of(counts, sure, method, ("the recovery certifies the targets",))
    return estimate(
        network, update, method=method, batch_size=size, features=features,
        device=arguments["device"], memory_budget=room,
    )  # fmt: skip
