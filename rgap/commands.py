"""``rgap labels``, which :mod:`rgap.cli` registers beside its own commands."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rgap.console import clean, print_json, stdout, waiting
from rgap.options import Json, LabelMethod, Model, Seed, Weights

if TYPE_CHECKING:
    from torch import nn

    from rgap.labels import LabelEstimate
    from rgap.update import Update

__all__ = ["labels"]


def labels(
    context: typer.Context,
    model: Model,
    update: Annotated[
        Path, typer.Argument(metavar="UPDATE", help="What rgap capture wrote.", show_default=False)
    ],
    method: Annotated[
        LabelMethod,
        typer.Option(help="One method, or all of them; exact recovers the batch first."),
    ] = LabelMethod.best,
    weights: Weights = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="If the update does not state it.", min=1, show_default=False),
    ] = None,
    as_json: Json = False,
    seed: Seed = 0,
) -> None:
    """Read the labels of a batch off the last layer's gradient: how often each class occurs."""
    with clean(context):
        import rgap
        from rgap.labels import METHODS
        from rgap.modelspec import resolve
        from rgap.report.labels import print_labels

        if not update.is_file():
            raise ValueError(f"UPDATE: no file {update}; write one with rgap capture")
        sent = rgap.Update.load(update)
        network = resolve(model, weights)
        names = list(METHODS) if method is LabelMethod.all else [method.value]
        with waiting("reading labels"):
            found = {name: _read(network, sent, name, batch_size, seed) for name in names}
        if as_json:
            print_json(
                {
                    "batch_size": sent.batch_size if batch_size is None else batch_size,
                    "classes": len(next(iter(found.values())).confidence),
                    "methods": {name: one.summary() for name, one in found.items()},
                }
            )
        else:
            print_labels(stdout(), found)
    raise typer.Exit(0 if any(one.decided for one in found.values()) else 1)


def _read(
    network: nn.Module, sent: Update, method: str, batch_size: int | None, seed: int
) -> LabelEstimate:
    """One method's answer; `exact` inverts the update for the features that it needs."""
    from dataclasses import replace

    import torch

    import rgap
    from rgap.labels import LabelEstimate, estimate, head_features

    if method != "exact":
        return estimate(network, sent, method=method, batch_size=batch_size)
    # Before the work of an inversion: what is refused is refused at once.
    undecided = estimate(network, sent, method=method, batch_size=batch_size)
    if sent.local_steps > 1:
        return undecided
    recovery = rgap.invert(network, sent, batch_size=batch_size, seed=seed, progress=True)
    if recovery.inputs is None or not recovery.exact:
        return replace(undecided, reason=f"{recovery.status.name}: {recovery.reason}")
    features = head_features(network, sent, recovery.inputs)
    if features is None and recovery.labels is not None:  # certified, but not by the identity
        counts = torch.bincount(recovery.labels, minlength=len(undecided.confidence))
        sure = torch.ones(len(counts), dtype=torch.float64)
        return LabelEstimate.of(counts, sure, method, ("the recovery is exact",))
    return estimate(network, sent, method=method, batch_size=batch_size, features=features)
