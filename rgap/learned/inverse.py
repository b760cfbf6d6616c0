"""The inverse of a model: a network from its gradient to the pictures of the batch."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from rgap import validation
from rgap.learned.design import Client, Design
from rgap.learned.fingerprint import Fingerprint
from rgap.learned.gradients import HashedGradient
from rgap.learned.networks import counter, decoder, under, with_size
from rgap.learned.report import TrainingReport
from rgap.learned.standard import Standard
from rgap.matching.checkpoint import Ended
from rgap.network.agreement import refuse_unready
from rgap.update.losses import UNKNOWN
from rgap.update.preflight import ClientView, require_targets
from rgap.update.storage import declared, described, opened, require_whole, written
from rgap.update.update import Update

__all__ = ["Inverse", "built", "load"]

FORMAT = "rgap.inverse"
VERSION = 1
ALL_ORDERS = 6  # samples up to which every order of the labels is tried
DRIFTS = ("refuse", "allow")


def built(
    design: Design, client: Client, inputs: int
) -> tuple[nn.Sequential, nn.Sequential | None]:
    """Networks of a design with weights from torch's random state, and the counter if any."""
    sizes = len(design.batch_sizes)
    shape = (design.batch_sizes[-1], *client.shape)
    network = decoder(design.network, inputs + (sizes if sizes > 1 else 0), design.hidden, shape)
    return network, counter(inputs, sizes) if sizes > 1 else None


@dataclass(frozen=True, eq=False)
class Inverse:
    """Pictures from gradients of one model, in one pass: nothing is searched or certified.

    The order of a batch is not in its gradient; rows come in any, or in that of stated labels.

    Source: Wu, Chen, Guo and Weinberger, *Learning to invert* (2023).

    Attributes:
        design: of the networks.
        client: whose gradients they read.
        fingerprint: of its model.
        standard: of hashed gradients.
        network: from z to a batch, values in (0, 1).
        counter: from z to the batch size; None where one size was trained for.
        report: of the training.
    """

    design: Design
    client: Client
    fingerprint: Fingerprint
    standard: Standard
    network: nn.Sequential
    counter: nn.Sequential | None
    report: TrainingReport

    def pictures(
        self,
        model: nn.Module,
        update: Update,
        *,
        batch_size: int | None = None,
        labels: Tensor | None = None,
        drift: str = "refuse",
    ) -> Tensor:
        """The batch that the networks make of an update, ``[B, *shape]``, float32.

        ``rgap.match(model, update, start=...)`` begins with it.

        Args:
            model: the client's, with the weights of the day.
            update: what it sent.
            batch_size: B; else the update's, that of the labels, or the guess (:meth:`sizes`).
            labels: of the batch, [B, ...]: row b is then the picture that goes with label b, by the
                pairing whose gradient is nearest to the update.  Give :func:`rgap.match` the same.
            drift: ``"refuse"`` or ``"allow"`` weights that are not those of the training.

        Raises:
            ValueError: another model, moved weights, an update that does not fit, a batch size that
                was not trained for, labels that are no targets of the model.
        """
        source, hashed = self._hashed(model, update, drift)
        size = update.batch_size if batch_size is None else batch_size
        if size is None and isinstance(labels, Tensor):
            size = len(labels)
        if size is None:
            odds = self._odds(hashed)
            size = max(odds, key=odds.__getitem__)
        size = validation.count("batch_size", size)
        made = self.made(hashed[None], self.design.place(size))[0]
        low, high = self.client.value_range
        made = low + (high - low) * made
        known = validation.labels(update.labels if labels is None else labels, size)
        if known is not None:
            require_targets(model, self.client.loss, known, self.client.shape)
        return made if known is None else made[self._order(source, made, known, hashed)]

    def sizes(self, model: nn.Module, update: Update, *, drift: str = "refuse") -> dict[int, float]:
        """The probability of every batch size that was trained for, guessed from the gradient.

        Where a fully connected layer's gradient tells it, its rank is the size: a proof, which this
        is not.

        Args:
            model: the client's.
            update: what it sent.
            drift: as in :meth:`pictures`.
        """
        return self._odds(self._hashed(model, update, drift)[1])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all; no pickle."""
        tensors = {
            "centres": self.standard.centres,
            "spreads": self.standard.spreads,
            "sketch": self.fingerprint.sketch,
            **{f"network/{n}": t for n, t in self.network.state_dict().items()},
        }
        if self.counter is not None:
            tensors |= {f"counter/{n}": t for n, t in self.counter.state_dict().items()}
        loss, report = described(self.client.loss), asdict(self.report)
        header = {
            "design": asdict(self.design),
            "client": {**asdict(self.client), "loss": loss},
            "architecture": self.fingerprint.architecture,
            "weights": self.fingerprint.weights,
            "norm": self.fingerprint.norm,
            "report": {**report, "ended": self.report.ended.name},
        }
        held = {name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}
        written(
            path, held, {"format": FORMAT, "version": str(VERSION), "inverse": json.dumps(header)}
        )

    def made(self, hashed: Tensor, place: int) -> Tensor:
        """Batches in (0, 1) from hashed gradients [N, m] of the size at a place, [N, B, ...]."""
        rows = with_size(self.standard.rows(hashed, place), place, len(self.design.batch_sizes))
        with torch.no_grad():
            batch: Tensor = self.network(rows)
        return batch[:, : self.design.batch_sizes[place]]

    def _hashed(
        self, model: nn.Module, update: Update, drift: str
    ) -> tuple[HashedGradient, Tensor]:
        """What hashes the model's gradients, and the update's hash on the networks' device."""
        if drift not in DRIFTS:
            raise ValueError(
                f"drift: expected 'refuse' or 'allow', got {drift!r}; write drift='allow'"
            )
        refuse_unready(model)
        self.fingerprint.require(model, moved=True)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        view = ClientView.of(model, update, input_shape=self.client.shape)
        self.fingerprint.require(view.model, moved=drift == "allow")
        model, update = view.model, view.update
        if update.local_steps > 1:
            raise ValueError(
                f"update: expected a gradient, got an average over {update.local_steps} local "
                "steps; write rgap.match(model, update, local=...)"
            )
        if update.loss.name != UNKNOWN and update.loss != self.client.loss:
            raise ValueError(
                f"update: expected the loss that the inverse was trained for, {self.client.loss}, "
                f"got {update.loss}; write rgap.learned.train(..., loss=update.loss)"
            )
        if changed := sorted(trained ^ set(self.client.names)):
            raise ValueError(
                f"model: expected the parameters that the inverse was trained for, {changed[0]!r} "
                "is frozen in one and not in the other; write rgap.learned.train(...) for this one"
            )
        source = HashedGradient.of(model, self.client, self.design)
        return source, source.sent(update.gradients).to(self.standard.centres.device)

    def _odds(self, hashed: Tensor) -> dict[int, float]:
        sizes = self.design.batch_sizes
        if self.counter is None:
            return {sizes[0]: 1.0}
        with torch.no_grad():
            odds = self.counter(self.standard.rows(hashed[None], 0))[0].softmax(0)
        return dict(zip(sizes, odds.tolist(), strict=True))

    def _order(
        self, source: HashedGradient, made: Tensor, labels: Tensor, hashed: Tensor
    ) -> Tensor:
        """Which row goes with each label: ``min_π ‖Σ_b h(g(x̂_π(b), y_b)) − c h(g)‖``."""
        size = len(made)
        every = torch.arange(size).repeat(size)
        single = source.rows(made.repeat_interleave(size, 0), labels[every.to(labels.device)])
        single = single.to(hashed).reshape(size, size, -1)  # [picture, label, m]
        aim = hashed * (size if self.client.loss.reduction == "mean" else 1)
        if size > ALL_ORDERS:  # without the products of two samples
            costs = (single - aim / size).square().sum(2).cpu().numpy()
            return torch.from_numpy(linear_sum_assignment(costs.T)[1])
        orders = torch.tensor(list(permutations(range(size))))
        sums = single[orders, torch.arange(size)].sum(1)
        return orders[int((sums - aim).square().sum(1).argmin())]


def load(path: str | os.PathLike[str]) -> Inverse:
    """Read an inverse that :meth:`Inverse.save` wrote.

    Raises:
        ValueError: another file, a damaged one, one of a later version, or with tensors missing or
            not finite.
        FileNotFoundError: no such file.
    """
    again = "inverse.save(path)"
    metadata, tensors = opened(path, again)
    version = metadata.get("version", "")
    if metadata.get("format") != FORMAT or version != str(VERSION):
        kind = f"version {version}" if metadata.get("format") == FORMAT else "another file"
        raise ValueError(
            f"{Path(path)}: expected an inverse of version {VERSION}, got {kind}; write {again}"
        )
    try:
        read = _read(json.loads(metadata["inverse"]), tensors)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, IndexError) as error:
        raise ValueError(
            f"{Path(path)}: its tensors are not those of its design "
            f"({' '.join(str(error).split())}); write {again}"
        ) from error
    require_whole(path, metadata, tensors)
    return read


def _read(header: dict[str, Any], tensors: dict[str, Tensor]) -> Inverse:
    """What :meth:`Inverse.save` wrote."""
    for name, tensor in tensors.items():
        validation.require_finite(name, tensor, "train it again")
    design, report = Design(**header["design"]), header["report"]
    client = Client(
        declared(header["client"]["loss"]),
        tuple(header["client"]["shape"]),
        tuple(header["client"]["value_range"]),
        tuple(header["client"]["names"]),
        header["client"]["seed"],
    )
    errors = {int(size): error for size, error in report["errors"].items()}
    standard = Standard(tensors["centres"], tensors["spreads"], design.scale_free)
    with torch.random.fork_rng(devices=[]):
        network, guess = built(design, client, standard.centres.shape[1])
    network.load_state_dict(under(tensors, "network/"))
    if guess is not None:
        guess.load_state_dict(under(tensors, "counter/"))
    return Inverse(
        design,
        client,
        Fingerprint(
            tuple(header["architecture"]), header["weights"], tensors["sketch"], header["norm"]
        ),
        standard,
        network.requires_grad_(False),
        None if guess is None else guess.requires_grad_(False),
        TrainingReport(**{**report, "errors": errors, "ended": Ended[report["ended"]]}),
    )
