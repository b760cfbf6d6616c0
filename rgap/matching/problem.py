"""What a search is given, checked before any work is done, and how long it may go on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf

from torch import Tensor, nn

from rgap.jacobian.cancelled import cancelled
from rgap.jacobian.module_update import ClientLoss
from rgap.labels import estimate
from rgap.matching.checkpoint import Checkpoint, Progress
from rgap.matching.presets import Preset
from rgap.network.batch_statistics import mixing
from rgap.precision import Precision
from rgap.priors import Likely, named, prior_of
from rgap.recovery import Recovery
from rgap.remedy import LOCAL, Remedy
from rgap.seeding import start_as
from rgap.solvers.priors import Prior
from rgap.update.local_training import LocalTraining
from rgap.update.preflight import ClientView, require_targets

BEST = "best"  # of the methods of labels
STATED = Remedy("labels=", "--labels").then(" in the client's order if it is known")
Callback = Callable[[Progress], bool | None]


@dataclass(frozen=True, eq=False)
class SearchProblem:
    """A model and an update, ready to be matched.

    Attributes:
        client: both, checked.
        gradients: the tensors that were sent, where the work is done.
        shape: of the batch, [B, *input_shape].
        source: the loss, the targets and how the client trains; no targets: they are searched.
        start: to begin with, float64.
        prior: of the data; None for the method's own.
        precision: of the update, with the noise that was stated.
        notes: what was assumed of it, for a reader.
        chooser: what the prior is called in a report; "" for none.
    """

    client: ClientView
    gradients: dict[str, Tensor]
    shape: tuple[int, ...]
    source: ClientLoss
    start: Tensor | None
    prior: Prior | None
    precision: Precision
    notes: tuple[str, ...] = ()
    chooser: str = ""

    @property
    def model(self) -> nn.Module:
        """As the client had it."""
        return self.client.model

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Of the data."""
        return self.client.update.value_range

    @classmethod
    def of(
        cls,
        client: ClientView,
        preset: Preset | None,
        start: Tensor | Recovery | None,
        prior: Likely | None,
        local: LocalTraining | None,
        deadline: float = inf,
    ) -> SearchProblem:
        """Check what a search is given; arguments and errors as for :func:`rgap.match`.

        Labels that nobody stated are read off the update, by the preset's method, or by the best
        one where that does not decide them, unless the preset searches them with the data.
        """
        update, size, known = client.update, client.batch, client.labels
        if update.local_steps > 1 and local is None:
            raise ValueError(
                f"local training: the update is an average over {update.local_steps} local steps, "
                f"expected how the client trains; write {LOCAL}"
            )
        if size is None:
            raise ValueError(
                "batch_size: expected a number of samples, got none; write batch_size=1"
            )
        if local is not None and local.size is not None and local.size > size:
            raise ValueError(
                f"local: expected at most {size} samples a step, the batch, got {local.size}; "
                f"write LocalTraining(rate={local.rate:g})"
            )
        notes: tuple[str, ...] = ()
        searched = preset is not None and preset.joint and update.loss.name == "cross_entropy"
        if known is None and not searched:
            method = preset.labels if preset else BEST
            read = estimate(client.model, update, method=method, batch_size=size)
            if method != BEST and (read.labels is None or read.reason):
                rest = estimate(client.model, update, method=BEST, batch_size=size)
                if rest.labels is not None:
                    notes = (
                        f"the labels were read off by {rest.method}: {method} does not decide them "
                        f"({read.reason})",
                    )
                    read = rest
            if read.labels is None:
                raise ValueError(
                    f"labels: they cannot be read off this update ({read.reason}); write the "
                    f"client's own, one class index a sample, as {STATED}"
                )
            known = read.labels
            if local is not None and update.local_steps > 1 and (local.size or size) < size:
                notes += (
                    "the labels were read off the update, which does not say in which step each "
                    f"was used: their order over the steps is a guess; write {STATED}",
                )
        shape, place = (size, *client.input_shape), client.place
        if known is not None:
            require_targets(client.model, client.update.loss, known, client.input_shape, size)
            known = known.to(place)
        precision = client.precision()
        void = cancelled(client.model, shape) if any(mixing(client.model)) else frozenset()
        sent = [n for n in update.gradients if precision.sent(n)]
        if void.intersection(sent):
            notes += (
                f"left out: {', '.join(n for n in sent if n in void)}: a shift before a batch norm "
                "in train mode changes nothing, so that its gradient is what rounding leaves of 0",
            )
        return cls(
            client,
            {n: update.gradients[n].detach().to(place) for n in sent if n not in void},
            shape,
            ClientLoss(update.loss, known, local, update.local_steps),
            None if start is None else start_as(start, size, client.input_shape).to(place),
            _prior(prior, preset, client, deadline),
            precision,
            notes,
            _called(prior, preset, shape),
        )


@dataclass(frozen=True, eq=False)
class Limits:
    """How often, how long and under whose eyes a search goes on.

    Attributes:
        restarts: starts.
        iterations: at most.
        patience: iterations without progress after which it stops; None: it does not.
        seconds: after which no further step is begun.
        seed: of the starts, and of the noise that a method adds.
        callback: told after every step; True stops.
        settings: of the call, which a checkpoint is for.
        checkpoint: of a search that was stopped, to go on from.
    """

    restarts: int
    iterations: int
    patience: int | None = None
    seconds: float = inf
    seed: int = 0
    callback: Callback | None = None
    settings: Mapping[str, str] | None = None
    checkpoint: Checkpoint | None = None

    def saved(self, tensors: Mapping[str, Tensor]) -> Checkpoint:
        """Where a search under these limits stands."""
        return Checkpoint(dict(self.settings or {}), tensors)


def _prior(
    prior: Likely | None, preset: Preset | None, client: ClientView, deadline: float
) -> Prior | None:
    """The prior, of a name the one of the data in the optimiser's units."""
    if prior is None:
        return None
    bounds = client.update.value_range
    if preset is not None and bounds is not None:
        bounds = preset.coordinates(bounds).rows(bounds)
    return prior_of(prior, client.input_shape, bounds, deadline)


def _called(prior: Likely | None, preset: Preset | None, shape: tuple[int, ...]) -> str:
    """What a report calls the prior, or the method's own."""
    made = "what the generator makes" if preset is not None and preset.domains else ""
    if prior is not None:
        own = named(prior)
    elif preset is None:
        own = named("natural")
    else:
        own = "the total variation" if preset.variation and len(shape) > 2 else ""
    return " and ".join(filter(None, (made, own)))
