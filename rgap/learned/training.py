"""Training of an inverse: gradients of known pictures once, then batches of them over and over."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import replace
from math import inf
from pathlib import Path

import torch
from torch import Tensor, nn

from rgap import validation
from rgap.learned.design import Client, Design
from rgap.learned.fingerprint import Fingerprint
from rgap.learned.fitting import Fitting, Pool, batches
from rgap.learned.gradients import HashedGradient, of_batches
from rgap.learned.inverse import Inverse, built
from rgap.learned.schedule import Schedule
from rgap.learned.standard import Standard
from rgap.machine import memory
from rgap.matching.checkpoint import Checkpoint, Ended
from rgap.network.agreement import refuse_unready
from rgap.network.running import refuse_meta, refuse_wrapped
from rgap.progress import Progress, Shown
from rgap.update.losses import Loss
from rgap.update.preflight import require_targets
from rgap.update.storage import digest, require_folder

__all__ = ["train"]

MEASURED = 4096  # batches of each size that means and deviations are taken from
COPIES = 2  # of all hashed gradients: as they come, and parted in two
SAVED = 30.0  # seconds between two states on file
PUBLISHED, LENGTH = Design(), Schedule()


def train(
    model: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    *,
    loss: str | Loss = "cross_entropy",
    design: Design = PUBLISHED,
    schedule: Schedule = LENGTH,
    value_range: tuple[float, float] = (0.0, 1.0),
    start: Inverse | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: Shown = False,
    memory_budget: float | None = None,
) -> Inverse:
    """An inverse of one model, learned from pictures like those of its clients.

    ``min_φ E ‖N_φ(h(g(x, y))) − x‖²`` over batches x of the pictures, under the best pairing of the
    pictures of a batch.  Every picture goes through the model once; the gradient of a batch is then
    the mean of its samples'.  A share of the pictures is held out, and the weights that do best on
    it are kept.

    With m hashed numbers of an update and n unknowns the Jacobian of h(g) has rank m at most: where
    m < n, pictures that differ along n − m directions look alike to it, and what stands there is
    what the pictures have in common.

    Source: Wu, Chen, Guo and Weinberger, *Learning to invert* (2023).

    Args:
        model: the clients', in eval mode, with the weights of the day; it is left as it is.
        pictures: ``[P, *shape]``, floating.
        labels: a target for each, [P] of classes, or as the loss takes them.
        loss: the clients', a mean or a sum over samples.
        design: of hash and networks.
        schedule: of the steps.
        value_range: of the pictures.
        start: an inverse of the same design, whose networks are trained further: less work than
            from random weights where the model has moved a little.
        checkpoint: a file that states are written to twice a minute, and that an existing state is
            taken from: a call that was killed goes on to the weights that it would have had.
        progress: True for a line on a terminal, or a function that is told; see
            :mod:`rgap.progress`.
        memory_budget: bytes for the hashed gradients; by default half of what the machine has free.

    Raises:
        ValueError: no pictures, too few, NaN or values out of range among them; labels that do not
            belong to the loss; a model in train mode; a loss of one's own; a checkpoint of another
            call.
        TypeError: no network, pictures that are no floating tensor.
        FileNotFoundError: no folder for the checkpoint.
        OutOfMemory: hashed gradients that do not fit.

    >>> import rgap
    >>> model = rgap.models.mlp((16,), 4, input_shape=(1, 4, 4), seed=0)
    >>> x, y = torch.rand(60, 1, 4, 4), torch.arange(60) % 4
    >>> short = Schedule(steps=20, updates=16, rate=1e-3, every=10)
    >>> found = train(model, x, y, design=Design(hash_size=64, hidden=32), schedule=short)
    >>> update = rgap.capture(model, x[:1], y[:1])
    >>> found.pictures(model, update).shape
    torch.Size([1, 1, 4, 4])
    """
    began = time.perf_counter()
    client = _client(model, pictures, labels, loss, value_range, schedule)
    held = held_out(len(pictures), schedule.held_out, design)
    entries = sum(p.numel() for n, p in model.named_parameters() if n in client.names)
    memory.require(
        f"hashed gradients of {len(pictures):,} pictures",
        COPIES * 4.0 * len(pictures) * (design.hash_size or entries),
        memory.budget_of(memory_budget, next(model.parameters()).device),
        "Design(hash_size=1024)",
    )
    file = None if checkpoint is None else Path(checkpoint)
    if file is not None:
        require_folder(file)
    fingerprint = Fingerprint.of(model)
    if start is not None:
        start.fingerprint.require(model, moved=True)
    settings = {
        "model": fingerprint.weights,
        "pictures": digest(pictures, labels),
        "client": repr(client),
        "design": repr(design),
        "schedule": repr(replace(schedule, time_limit=inf, patience=None)),
        "start": "None" if start is None else digest(*start.network.state_dict().values()),
    }
    limit = schedule.time_limit
    with Progress(progress, began + limit if limit < inf else None) as show:
        source = HashedGradient.of(model, client, design)
        rows = source.rows(pictures, labels, show.stage)
        low, high = client.value_range
        unit = ((pictures - low) / (high - low)).to(rows)
        learned, kept_back = Pool(rows, unit, client.loss).parted(held, schedule.seed)
        standard = measured(learned, design, schedule.seed)
        fit = _begun(client, design, schedule, standard, (learned, kept_back), start)
        ended = _followed(fit, show, file, settings, began)
    report = fit.report(ended)
    guess = None if fit.counter is None else fit.counter.requires_grad_(False)
    return Inverse(
        design, client, fingerprint, standard, fit.network.requires_grad_(False), guess, report
    )


def held_out(count: int, share: float, design: Design) -> int:
    """How many of so many pictures are held out.

    Raises:
        ValueError: less than a batch is left, or held out.
    """
    held = max(1, round(share * count))
    if min(held, count - held) < design.batch_sizes[-1]:
        raise ValueError(
            f"pictures: expected at least {design.batch_sizes[-1]} to learn from and as many held "
            f"out, a batch, got {count - held} and {held}; give more pictures"
        )
    return held


def measured(pool: Pool, design: Design, seed: int) -> Standard:
    """Means and deviations of the hashed gradients of batches of every size."""
    draw, count = torch.Generator().manual_seed(seed), len(pool.hashed)
    return Standard.of(
        [
            of_batches(
                pool.hashed, batches(count, size, MEASURED, draw).to(pool.hashed.device), pool.loss
            )
            for size in design.batch_sizes
        ],
        design.scale_free,
    )


def _client(
    model: nn.Module,
    pictures: Tensor,
    labels: Tensor,
    loss: str | Loss,
    value_range: tuple[float, float],
    schedule: Schedule,
) -> Client:
    """What is known of the clients, after all was checked that the training is given."""
    validation.module(model)
    refuse_meta(model)
    refuse_unready(model)
    refuse_wrapped(model)
    bounds = require_pictures(pictures, value_range)
    known = require_labels(labels, len(pictures))
    declared = Loss.of(loss)
    if declared.own or not declared.known or declared.weight is not None:
        raise ValueError(
            f"loss: expected a named one that weighs samples alike, got {declared.name!r}"
            f"{' with class weights' if declared.weight else ''}; write loss='cross_entropy'"
        )
    names = tuple(name for name, p in model.named_parameters() if p.requires_grad)
    if not names:
        raise ValueError(
            "model: expected parameters that a client trains, got none; write "
            "model.requires_grad_(True)"
        )
    require_targets(model, declared, known, pictures.shape[1:])
    return Client(declared, tuple(pictures.shape[1:]), bounds, names, schedule.seed)


def require_labels(labels: Tensor, count: int) -> Tensor:
    """A copy of the targets of so many pictures.

    Raises:
        TypeError: none at all, or no tensor.
        ValueError: not as many.
    """
    known = validation.labels(labels, count)
    if known is None:
        raise TypeError("labels: expected a target for each picture, got None; write labels=")
    return known


def require_pictures(pictures: Tensor, value_range: tuple[float, float]) -> tuple[float, float]:
    """Raise unless these are pictures to learn from; the range of their values.

    Raises:
        TypeError: no floating tensor.
        ValueError: none at all, NaN or infinity, values out of range, a range that is none.
    """
    if not isinstance(pictures, Tensor) or not pictures.is_floating_point():
        kind = pictures.dtype if isinstance(pictures, Tensor) else type(pictures).__name__
        raise TypeError(
            f"pictures: expected a floating tensor [P, *shape], got {kind}; write "
            "pictures.float() / 255, or rgap.photos.folder(path)"
        )
    if pictures.ndim < 2 or not pictures.numel():
        raise ValueError(
            f"pictures: expected at least one, [P, *shape], got {list(pictures.shape)}; write "
            "rgap.photos.folder(path)"
        )
    validation.require_finite("pictures", pictures, "drop those that are broken")
    bounds = validation.bounds(value_range)
    if bounds is None:
        raise TypeError(
            "value_range: expected the range of the pictures' values, got None; write "
            "value_range=(0.0, 1.0)"
        )
    low, high = bounds
    if float(pictures.min()) < low or float(pictures.max()) > high:
        raise ValueError(
            f"pictures: expected values in [{low:g}, {high:g}], got {float(pictures.min()):.3g} to "
            f"{float(pictures.max()):.3g}; write value_range=, the range after normalisation"
        )
    return bounds


def _begun(
    client: Client,
    design: Design,
    schedule: Schedule,
    standard: Standard,
    pools: tuple[Pool, Pool],
    start: Inverse | None,
) -> Fitting:
    """A training at its first step."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(schedule.seed)
        network, guess = built(design, client, standard.centres.shape[1])
    if start is not None:
        if (start.design, start.client) != (design, client):
            raise ValueError(
                "start: expected an inverse of the same design, client and seed, got another; "
                "write design=start.design, schedule=Schedule(seed=start.client.seed)"
            )
        network.load_state_dict(start.network.state_dict())
        if guess is not None and start.counter is not None:
            guess.load_state_dict(start.counter.state_dict())
    place = standard.centres.device
    return Fitting(
        design, schedule, standard, network.to(place), None if guess is None else guess.to(place),
        *pools,
    )  # fmt: skip


def _followed(
    fit: Fitting, show: Progress, file: Path | None, settings: Mapping[str, str], began: float
) -> Ended:
    """Take the steps that are left, and the best weights at the end; why it ended."""
    if file is not None and file.exists():
        state = Checkpoint.load(file)
        state.require(settings)
        fit.restore(dict(state.tensors))
    schedule, spent, saved = fit.schedule, fit.seconds, time.perf_counter()

    def save() -> None:
        if file is not None:
            Checkpoint(settings, fit.tensors()).save(file)

    if not fit.kept:
        fit.look()
    ended = Ended.DONE
    while fit.step < schedule.steps:
        fit.seconds = spent + time.perf_counter() - began
        if fit.stale >= (schedule.patience or inf):
            ended = Ended.STILL
            break
        if fit.seconds >= schedule.time_limit:
            ended = Ended.TIME
            break
        how = f"held out {fit.best:.2e}"
        show.stage("step", fit.step + 1, schedule.steps, "step", how)
        fit.advance()
        if fit.step % schedule.every == 0 or fit.step == schedule.steps:
            fit.look()
            if time.perf_counter() - saved > SAVED:
                save()
                saved = time.perf_counter()
    fit.seconds = spent + time.perf_counter() - began
    save()
    if ended is Ended.TIME:
        fit.look()
    fit.finish()
    return ended
