"""A recovery as a page for people: what came back, how sure it is, and where equations ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, log10
from typing import TYPE_CHECKING, NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from rgap import validation
from rgap.page import (
    Cell,
    Page,
    Part,
    Section,
    Shown,
    Table,
    Text,
    Verdict,
    extent,
    picture,
    pictures,
)
from rgap.recovery.layers import LayerReport, Route, sentence

if TYPE_CHECKING:
    from rgap.recovery.result import Recovery

__all__ = ["page", "sections", "verdict"]

MOST = 32  # pictures of a batch on one page; more are counted
CANDIDATES = 8  # on one page
LARGEST = 1_200_000  # letters of all pictures of a batch, beyond which no more are shown
DIRECTIONS = 6  # of a null space
Range = tuple[float, float] | None


def page(
    recovery: Recovery,
    originals: Tensor | None,
    value_range: Range,
    settings: Mapping[str, str],
    prior: str = "",
) -> Page:
    """The page of a recovery alone; see :meth:`rgap.Recovery.report`."""
    title = "What this update gives away"
    told = {**settings, "seconds": f"{recovery.seconds:.1f}"}
    parts = sections(recovery, originals, value_range)
    return Page(title, verdict(recovery, prior), parts, told)


def verdict(recovery: Recovery, prior: str = "") -> Verdict:
    """The status in a sentence for someone who is no mathematician."""
    name, made_by = recovery.status.name, f" by {prior}" if prior else " by a prior"
    if name != "EXACT" and "inputs" in recovery.certified:
        return Verdict(
            name,
            "given away",
            "This update gives the data of its batch away: every value of them is certified. What "
            "is not settled is the rest, its targets or how the update was declared.",
        )
    if name == "EXACT":
        count = len(recovery.inputs) if recovery.inputs is not None else 0
        one = count == 1
        what = "its one sample" if one else f"all {count} samples of its batch"
        back, near = ("it", "it") if one else ("they", "them")
        return Verdict(
            name,
            "given away",
            f"This update gives {what} away: {back} came back from the update alone, with a "
            f"certificate that no other data near {near} send the same update.",
        )
    if recovery.searched:
        same = "send the same update" if name == "COMPLETED" else "come near the client's update"
        return Verdict(
            name,
            "partly",
            f"A search found data that {same}. Nothing certifies that they are the client's: "
            f"other data may too, and parts of what is shown may be made up{made_by}.",
        )
    if name == "COMPLETED":
        return Verdict(
            name,
            "partly",
            "Data were found that send the same update, but the update does not determine all of "
            f"them: what it leaves open was made up{made_by} and may not be the client's.",
        )
    if name == "AMBIGUOUS":
        count = len(recovery.candidates)
        left = (
            f"This update leaves {count} batches that it does not tell apart."
            if count > 1
            else "This update does not tell several batches apart; one that sends it is shown."
        )
        return Verdict(name, "partly", f"{left} None of them is certified to be the client's.")
    if name == "UNDERDETERMINED":
        return _underdetermined(recovery)
    if name == "INCONSISTENT":
        return Verdict(
            name,
            "failed",
            "The update does not fit this network as it was declared, so nothing can be said of "
            "the data behind it. That is no sign of privacy: see what may be wrong below.",
        )
    return Verdict(
        name,
        "failed",
        "This network has a step that these equations do not pass, so nothing was decided. That "
        "is no sign of privacy.",
    )


def _underdetermined(recovery: Recovery) -> Verdict:
    """What is known of a batch that is not."""
    name = recovery.status.name
    if recovery.candidates:
        return Verdict(
            name,
            "partly",
            "The equations do not determine these data. A completion was tried and found none "
            "that send the same update: what is shown is the nearest, which is no recovery.",
        )
    if recovery.determined is not None and bool(recovery.determined.any()):
        known, every = int(recovery.determined.sum()), recovery.determined.numel()
        return Verdict(
            name,
            "partly",
            f"This update gives {known:,} of the {every:,} values of its data away; the others "
            "are not determined by it.",
        )
    if recovery.features:
        return Verdict(
            name,
            "partly",
            "This update gives away what the network computed of every sample, but not the data "
            "themselves: several batches send the same update.",
        )
    return Verdict(
        name,
        "open",
        "The equations of this update do not determine its data: other batches send the same "
        "update. An attack that knows what such data look like may still come near them.",
    )


def sections(recovery: Recovery, originals: Tensor | None, value_range: Range) -> list[Section]:
    """What came back, layer by layer, and what no equation fixes."""
    value_range = validation.bounds(value_range)
    if originals is not None:
        _require(originals, recovery)
    return [
        Section("What came back", _answer(recovery, originals, value_range)),
        Section("Layer by layer", _layers(recovery)),
        Section("Directions that no equation sees", _directions(recovery)),
        Section("Notes", [Text(items=recovery.warnings)] if recovery.warnings else []),
    ]


def _require(originals: Tensor, recovery: Recovery) -> None:
    """Refuse originals that nothing can be held against."""
    batch = recovery.nearest if recovery.nearest is not None else recovery.partial
    wanted = None if batch is None else tuple(batch.shape[1:])
    good = isinstance(originals, Tensor) and originals.ndim > 1 and len(originals) > 0
    if not good or (wanted is not None and tuple(originals.shape[1:]) != wanted):
        shape = "B, …" if wanted is None else ", ".join(map(str, ("B", *wanted)))
        got = list(originals.shape) if isinstance(originals, Tensor) else type(originals).__name__
        raise ValueError(
            f"originals: expected the client's data [{shape}], got {got}; write originals=x as the "
            "client had it, or leave it out"
        )
    if not bool(originals.isfinite().all()):
        raise ValueError("originals: expected finite values, got NaN or infinity; leave it out")


def _answer(recovery: Recovery, originals: Tensor | None, value_range: Range) -> list[Part]:
    """Pictures and numbers of the answer."""
    parts: list[Part] = [Text(f"{recovery.status.name}: {recovery.reason}")]
    for shown in _shown(recovery):
        parts += _pictures(shown, originals, value_range)
    facts = []
    if recovery.labels is not None and recovery.labels.numel() <= 10 * MOST:
        facts.append(f"Labels: {', '.join(f'{v:g}' for v in recovery.labels.flatten().tolist())}.")
    if recovery.inputs is not None and recovery.error_bound is not None:
        scope = "any value" if "inputs" in recovery.certified else "any determined value"
        facts.append(f"No error of {scope} exceeds {recovery.error_bound:.2g}, by the equations.")
    if recovery.residual is not None:
        facts.append(
            f"Sent through the network again, it gives the update up to {recovery.residual:.2g} "
            "of its size."
        )
    for name, value in recovery.features.items():
        facts.append(f"The input of '{name}' is determined: {value.numel()} values.")
    return [*parts, Text(items=facts)] if facts else parts


class _Batch(NamedTuple):
    """A batch that is drawn.

    Attributes:
        samples: of it.
        labels: of them, or None.
        copies: how many samples of the client's each stands for, or None.
        kind: what they are, in words.
    """

    samples: Tensor
    labels: Tensor | None
    copies: Tensor | None
    kind: str


def _shown(recovery: Recovery) -> list[_Batch]:
    """What is drawn of a recovery; only what is certified is called recovered."""
    if recovery.candidates:
        kind = "found by a search" if recovery.searched else "candidate"
        return [
            _Batch(c.inputs, c.labels, c.multiplicities, f"{kind}{f' {number}' * several}, "
                   "not certified")
            for several in [len(recovery.candidates) > 1]
            for number, c in enumerate(recovery.candidates[:CANDIDATES])
        ]  # fmt: skip
    if recovery.inputs is None:
        if recovery.partial is None:
            return []
        kind = "determined values, open ones hatched"
        return [_Batch(recovery.partial, recovery.labels, recovery.multiplicities, kind)]
    kind = "not certified"
    if recovery.searched:
        kind = "found by a search, not certified"
    elif recovery.status.name == "COMPLETED":
        kind = "completed: partly made up"
    elif "inputs" in recovery.certified:
        kind = "recovered"
    return [_Batch(recovery.inputs, recovery.labels, recovery.multiplicities, kind)]


def _pictures(batch: _Batch, originals: Tensor | None, value_range: Range) -> list[Part]:
    """Each beside the original that is nearest to it, where these are known."""
    made: list[Shown | None] = []
    shown, count = batch.samples, 0
    beside = {} if originals is None else _nearest(shown, originals)
    for number, sample in enumerate(shown):
        if number == MOST or sum(len(each.source) for each in made if each) > LARGEST:
            break
        count += 1
        words = f"{number}: {batch.kind}{_beside(batch, number)}"
        ends, alt = value_range or extent(sample), f"Sample {number} of the batch, {batch.kind}"
        if number in beside and originals is not None:
            own = beside[number]
            other = originals[own].to(sample)
            ends = value_range or extent(torch.stack([other, sample]))
            made.append(picture(other, ends, f"{number}: original {own}", f"Original {own}"))
            words += _off(other, sample, value_range)
        made.append(picture(sample, ends, words, alt))
    more = len(shown) - count
    return [*pictures(made), *([Text(f"{more} more are not shown.")] if more else [])]


def _beside(batch: _Batch, number: int) -> str:
    """Label and copies of a sample."""
    words, labels, copies = "", batch.labels, batch.copies
    if labels is not None and labels.ndim == 1 and len(labels) == len(batch.samples):
        words += f", label {labels[number].item():g}"
    if copies is not None and len(copies) == len(batch.samples) and int(copies[number]) > 1:
        words += f", stands for {int(copies[number])} samples"
    return words


def _off(original: Tensor, sample: Tensor, value_range: Range) -> str:
    """How far a whole sample is off: in decibels where the range is known, else its rms error."""
    if not bool(sample.isfinite().all()):
        return ""
    error = float((original.double() - sample.double()).square().mean().sqrt())
    if error == 0:
        return ", equal"
    if value_range is None:
        return f", rms error {error:.2g}"
    return f", {-20 * log10(error / (value_range[1] - value_range[0])):.1f} dB"


def _nearest(shown: Tensor, originals: Tensor) -> dict[int, int]:
    """The original that belongs to each sample, the order of a batch not being in its update.

    Entries that are not known decide nothing; where there are fewer originals than samples, some
    have none.
    """
    mine, theirs = shown.detach().double().flatten(1), originals.double().flatten(1)
    known = mine.isfinite().double()
    mine = mine.nan_to_num(0.0, 0.0, 0.0) * known
    costs = mine.square().sum(1, keepdim=True) - 2 * mine @ theirs.T + known @ theirs.square().T
    rows, columns = linear_sum_assignment(costs.numpy())
    return dict(zip(rows.tolist(), columns.tolist(), strict=True))


def _layers(recovery: Recovery) -> list[Part]:
    """Ranks and missing equations, the share that is missing as a colour."""
    if not recovery.layers:
        return []
    rows = [_row(report) for report in reversed(recovery.layers)]
    words = [
        sentence(report, recovery.halt, report.layer in recovery.features)
        for report in reversed(recovery.layers)
    ]
    head = "layer", "kind", "unknowns", "equations", "missing", "condition", "how"
    return [
        Table("Equations of the input of each layer, from the output down", head, rows),
        Text("In words:", words),
    ]


def _row(report: LayerReport) -> Sequence[Cell | str]:
    missing, known = report.nullity, report.joint_rank
    share = None if missing is None else missing / max(report.unknowns, 1)
    told = "" if missing is None else f"{missing} of {report.unknowns} equations are missing"
    condition = "–" if report.condition in (inf, 0.0) else f"{report.condition:.1e}"
    return (
        report.layer,
        report.kind,
        f"{report.unknowns:,}",
        "–" if known is None else f"{known:,}",
        Cell("–" if missing is None else f"{missing:,}", share, told),
        condition,
        _way(report),
    )


def _way(report: LayerReport) -> str:
    """How the input was found, or that it was not."""
    if report.route is Route.NOT_REACHED:
        return "not reached"
    return "equations fall short" if report.nullity else report.route.words


def _directions(recovery: Recovery) -> list[Part]:
    """Of the layer that falls short, where its null space was kept: one channel of each."""
    for report in reversed(recovery.layers):
        if not report.nullity:
            continue
        try:
            basis = recovery.null_space(report.layer, DIRECTIONS)
        except ValueError:
            return []
        made = []
        for number, direction in enumerate(basis):
            if direction.ndim != 4:  # of no maps
                return []
            sample = direction[int(direction.flatten(1).norm(dim=1).argmax())]
            channel = int(sample.flatten(1).norm(dim=1).argmax())
            one = sample if sample.shape[0] in (1, 3) else sample[channel : channel + 1]
            size = float(one.abs().max()) or 1.0
            words = f"direction {number}" + ("" if one is sample else f", channel {channel}")
            alt = f"Null {words}: it leaves the equations of this layer as they are"
            made.append(picture(one, (-size, size), words, alt))
        shown = pictures(made)
        text = (
            f"Adding any of these to the input of '{report.layer}' changes none of that layer's "
            f"equations; there are {report.nullity:,} such directions. Grey is zero."
        )
        return [Text(text), *shown] if shown else []
    return []
