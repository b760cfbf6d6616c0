"""A recovery as a page for people: what came back, how sure it is, and where equations ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import inf, log10
from typing import TYPE_CHECKING

from rgap.page import Cell, Page, Part, Section, Table, Text, Verdict, picture, pictures
from rgap.recovery.layers import LayerReport, Route, sentence

if TYPE_CHECKING:
    from torch import Tensor

    from rgap.recovery.result import Recovery

__all__ = ["page", "sections", "verdict"]

MOST = 32  # pictures of a batch on one page; more are counted
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
        return Verdict(
            name,
            "partly",
            f"This update leaves {len(recovery.candidates)} batches: one of those shown is the "
            "client's, and the update does not say which.",
        )
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
        share = float(recovery.determined.double().mean())
        return Verdict(
            name,
            "partly",
            f"This update gives {share:.0%} of the values of its data away; the others are not "
            "determined by it.",
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
    return [
        Section("What came back", _answer(recovery, originals, value_range)),
        Section("Layer by layer", _layers(recovery)),
        Section("Directions that no equation sees", _directions(recovery)),
        Section("Notes", [Text(items=recovery.warnings)] if recovery.warnings else []),
    ]


def _answer(recovery: Recovery, originals: Tensor | None, value_range: Range) -> list[Part]:
    """Pictures and numbers of the answer."""
    parts: list[Part] = [Text(f"{recovery.status.name}: {recovery.reason}")]
    shown, kind = recovery.inputs, "recovered"
    if shown is None and recovery.partial is not None:
        shown, kind = recovery.partial, "determined values, open ones hatched"
    elif shown is None and recovery.candidates:
        shown, kind = recovery.candidates[0].inputs, "candidate, not certified"
    elif recovery.searched:
        kind = "found by a search, not certified"
    elif recovery.status.name == "COMPLETED":
        kind = "completed: partly made up"
    if shown is not None:
        parts += _pictures(shown, recovery.nearest_labels, kind, originals, value_range)
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


def _pictures(
    shown: Tensor, labels: Tensor | None, kind: str, originals: Tensor | None, value_range: Range
) -> list[Part]:
    """Each beside the original that is nearest to it, where these are known."""
    made = []
    beside = None if originals is None else _nearest(shown, originals)
    plain = labels is not None and labels.ndim == 1 and len(labels) == len(shown)
    for number, sample in enumerate(shown[:MOST]):
        words = f"{number}: {kind}"
        if plain:
            assert labels is not None
            words += f", label {labels[number].item():g}"
        alt = f"Sample {number} of the batch, {kind}"
        if beside is not None and originals is not None:
            other = originals[beside[number]]
            error = float((other.double() - sample.double()).square().mean().sqrt())
            level = "equal" if error == 0 else f"{-20 * log10(error / _width(value_range)):.1f} dB"
            made.append(picture(other, value_range, f"{number}: original", f"Original {number}"))
            words += f", {level}" if sample.isfinite().all() else ""
        made.append(picture(sample, value_range, words, alt))
    more = f"{len(shown) - MOST} more are not shown." if len(shown) > MOST else ""
    return [*pictures(made), *([Text(more)] if more else [])]


def _width(value_range: Range) -> float:
    low, high = value_range or (0.0, 1.0)
    return high - low


def _nearest(shown: Tensor, originals: Tensor) -> list[int]:
    """The original that belongs to each sample, the order of a batch not being in its update."""
    import torch
    from scipy.optimize import linear_sum_assignment

    mine = shown.detach().double().nan_to_num(0.5).flatten(1)
    costs = torch.cdist(mine, originals.to(mine).flatten(1)).square()
    if len(originals) < len(shown):
        return [int(i) for i in costs.argmin(1)]
    return [int(i) for i in linear_sum_assignment(costs.numpy())[1]]


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
