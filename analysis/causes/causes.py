"""What stands between an update and its batch, one cause at a time, each with its number."""

from __future__ import annotations

from math import inf, isfinite, log10, prod

from torch import nn

from rgap.analysis.causes.cause import FIT, Cause, CauseKind, cause, sentence, sharper
from rgap.analysis.causes.head import Pair, head_causes
from rgap.analysis.causes.remedies import remedies
from rgap.analysis.discard.layer_ranks import counted_rows
from rgap.halt import Halt, HaltKind
from rgap.network.chain import Chain, parse
from rgap.recovery import LayerReport, Recovery, Route, Status
from rgap.update.compression import compression, terms_of
from rgap.update.update import Update

__all__ = ["causes"]


def causes(
    recovery: Recovery,
    model: nn.Module | None,
    update: Update | None,
    pairs: tuple[Pair, ...] = (),
) -> tuple[Cause, ...]:
    """Why a batch was not recovered: every cause that shows, the heaviest first.

    Args:
        recovery: the answer; an exact one has no causes.
        model: of the client, or None where it is not at hand.
        update: that was inverted, or None.
        pairs: samples of one class as the head saw them, where the batch is known.
    """
    if recovery.exact:
        return ()
    chain = None
    if model is not None and update is not None and update.input_shape is not None:
        chain = parse(model, update.input_shape, mixing=True)
    batch = _batch(recovery, update, chain)
    decided = [
        *_compressed(update, chain),
        *head_causes(recovery, update, chain, batch, pairs),
        *_no_inverse(recovery),
        *_missing(recovery, model, update, batch),
        *_uncounted(recovery, model, update, batch),
        *_several(recovery),
        *_precision(recovery, update),
    ]
    fits = all(one.kind not in (CauseKind.COMPRESSED, CauseKind.MISFIT) for one in decided)
    if recovery.status is Status.INCONSISTENT and fits:
        number = inf if recovery.residual is None else recovery.residual
        words = sentence(recovery.reason)
        words += "" if recovery.residual is None else f" The replay differs by {number:.1e}."
        decided.append(cause(CauseKind.MISFIT, "", number, words, FIT))
    if not decided and (recovery.certified or recovery.determined is not None):
        words = sentence(recovery.reason)
        decided.append(cause(CauseKind.PARTS, "", float(batch), words, _parts(recovery, update)))
    if not decided:
        late = recovery.halt is not None and recovery.halt.kind is HaltKind.LATE
        words = "the samples of the batch were not told apart: " if batch > 1 and not late else ""
        words = sentence(words + recovery.reason)
        changes = (*_APART, *sharper(update))
        decided.append(cause(CauseKind.NOT_SEPARATED, "", float(batch), words, changes))
    return tuple(sorted(decided, key=lambda one: -one.weight))


def _parts(recovery: Recovery, update: Update | None) -> tuple[str, ...]:
    """What would have what is open of an answer of which some is certified."""
    changes: list[str] = []
    if "targets" not in recovery.certified:
        if update is not None and not update.loss.known:
            changes.append("the loss declared, for the targets")
        elif update is not None and not update.loss.equations:
            changes.append("a batch of one, whose targets are tried, or cross_entropy")
        else:
            changes.append("a layer above that the equations cover, for the targets")
    if recovery.determined is not None:
        changes.append("strides that leave no row or column unread, for the data")
    return tuple(changes)


_APART = (
    "a smaller batch",
    "two fully connected layers in a row with biases, at least 2B − 1 wide",
    "labels that differ",
)


def _compressed(update: Update | None, chain: Chain | None) -> list[Cause]:
    if update is None:
        return []
    terms = {} if chain is None else terms_of(chain, update.batch_size)
    looks = compression(update.gradients, terms, update.noise)
    if looks is None:
        return []
    total = sum(g.numel() for g in update.gradients.values())
    sent = sum(int((g != 0).sum()) for g in update.gradients.values())
    words = f"the update looks compressed: {looks} ({sent:,} of {total:,} entries are not zero)."
    changes = (
        "the uncompressed update",
        "rgap.analysis.noise(..., defence=Prune(share) or Sign()) counts what such an update "
        "still determines",
    )
    return [cause(CauseKind.COMPRESSED, "", sent / total, sentence(words), changes)]


def _no_inverse(recovery: Recovery) -> list[Cause]:
    if recovery.status is not Status.UNSUPPORTED:
        return []
    reached = [i for i, r in enumerate(recovery.layers) if r.route is not Route.NOT_REACHED]
    below = recovery.layers[: reached[0] if reached else len(recovery.layers)]
    halt = recovery.halt
    place = "" if halt is None else halt.stage
    changes = (*(() if halt is None else _INSTEAD.get(halt.kind, ())), *_ALWAYS)
    reason = recovery.reason if halt is None else halt.reason
    words = sentence(f"{reason}. {len(below)} layers below it were not reached.")
    return [cause(CauseKind.NO_INVERSE, place, float(len(below)), words, changes)]


_INSTEAD = {
    HaltKind.POOL: ("a convolution of stride 2 in place of the max-pool",),
    HaltKind.AVERAGE: ("a strided convolution in place of the average",),
    HaltKind.ACTIVATION: ("an activation with an inverse: LeakyReLU, tanh, sigmoid, softplus",),
    HaltKind.BARRIER: ("a chain without branches",),
    HaltKind.HEAD: ("a fully connected last layer",),
}
_ALWAYS = (
    "rgap.analysis.identifiability tells whether the whole update determines the batch",
    "matching the whole update needs no inverse",
)


def _missing(
    recovery: Recovery, model: nn.Module | None, update: Update | None, batch: int
) -> list[Cause]:
    open_layers = []
    for report in recovery.layers:
        if not report.nullity or report.route is Route.NOT_REACHED:
            continue
        share = report.nullity / report.unknowns
        words = (
            f"'{report.layer}' ({report.kind}) has {report.joint_rank:,} independent equations for "
            f"{report.unknowns:,} unknowns: {report.nullity:,} are missing ({share:.1%})."
        )
        changes = _counted_changes(report, model, update, batch)
        if recovery.status is Status.COMPLETED:
            words += " A prior chose what they leave open."
        open_layers.append(
            cause(
                CauseKind.MISSING, report.layer, float(report.nullity), sentence(words),
                (*changes, "equations of the layers below, which this count leaves out"), share,
            )
        )  # fmt: skip
    halt = recovery.halt
    if not open_layers and halt is not None and halt.kind is HaltKind.DEFICIENT and halt.missing:
        # A step between layers, such as a pool of what it takes in.
        words = sentence(recovery.reason)
        open_layers.append(cause(CauseKind.MISSING, halt.stage, float(halt.missing), words, _STEP))
    return open_layers


_STEP = ("a smaller pooling window", "a strided convolution in place of the pool")


def _counted_changes(
    report: LayerReport, model: nn.Module | None, update: Update | None, batch: int
) -> tuple[str, ...]:
    """What would give a layer its equations: counted where the model is at hand."""
    changes: tuple[str, ...] = ()
    if model is not None and update is not None and update.input_shape is not None:
        changes = remedies(model, update.input_shape, batch, report.layer, update.loss.name)
    general = ("a smaller batch",) if batch > 1 else ()
    return changes or (*general, *_more(report))


def _uncounted(
    recovery: Recovery, model: nn.Module | None, update: Update | None, batch: int
) -> list[Cause]:
    """A layer whose rank nobody measured: what its sizes alone say of it."""
    halt = recovery.halt
    if halt is None or not _unsolved(halt):
        return []
    words = f"the rank of '{halt.stage}' was not measured: {halt.reason}"
    changes: tuple[str, ...] = ("a larger memory_budget, with which the rank is measured",)
    rows = []
    if model is not None and update is not None and update.input_shape is not None:
        try:
            counts, _ = counted_rows(model, update.input_shape, (batch,), update.loss.name)
            rows = [row for row in counts if row.layer == halt.stage]
        except ValueError:
            words += ". Its sizes are those of no layer that is counted"
    if not rows or rows[0].nullity == 0:
        words += ". Counting its sizes finds no equation missing, which is no proof" if rows else ""
        number = float(halt.unknowns or 0)
        changes = (*changes, *sharper(update))
        return [cause(CauseKind.UNCOUNTED, halt.stage, number, sentence(words), changes)]
    row = rows[0]
    words += (
        f". Counted from its sizes, {'' if row.exact else 'at least '}{row.nullity:,} of "
        f"{row.unknowns:,} equations are missing ({row.discard:.1%})"
    )
    report = recovery.layer(halt.stage)
    changes = (*_counted_changes(report, model, update, batch), *changes)
    return [
        cause(CauseKind.MISSING, halt.stage, float(row.nullity), sentence(words), changes,
              row.discard)
    ]  # fmt: skip


def _more(report: LayerReport) -> tuple[str, ...]:
    if report.kind.startswith("conv"):
        return ("more output channels", "a smaller stride")
    return ("more output features",)


def _several(recovery: Recovery) -> list[Cause]:
    if recovery.status is not Status.AMBIGUOUS:
        return []
    count = max(len(recovery.candidates), 1)
    words = f"{recovery.reason}: {count} answers send this update."
    changes = (
        "a bias at the head",
        "more than two classes",
        "a narrower value_range",
        "stated labels",
    )
    return [cause(CauseKind.SEVERAL, "", float(count), sentence(words), changes)]


def _precision(recovery: Recovery, update: Update | None) -> list[Cause]:
    """Ranks are full, yet the answer is not fixed well enough."""
    known = [r for r in recovery.layers if r.route is not Route.NOT_REACHED]
    halt = recovery.halt
    imprecise = halt is not None and halt.kind is HaltKind.ILL_CONDITIONED
    told = imprecise or (recovery.error_bound is not None and not _unsolved(halt))
    if recovery.status is not Status.UNDERDETERMINED or not known or not told:
        return []
    if recovery.certified or recovery.determined is not None:  # precise enough: some of it is open
        return []
    if any(r.nullity for r in known):
        return []
    finite = [r for r in known if isfinite(r.condition)]
    worst = max(finite, key=lambda r: r.condition, default=known[0])
    bound = recovery.error_bound
    words = (
        f"every layer has enough equations, but not at this precision: the condition of "
        f"'{worst.layer}' is {worst.condition:.1e}"
    )
    if bound is not None:
        words += f" and an entry may be off by {bound:.1e}"
    if recovery.predicted_error is not None:
        rms = float(recovery.predicted_error.max())
        words += f"; the predicted error is {rms:.1e} rms"
        words += f", {-20 * log10(rms):.0f} dB" if rms > 0 else ""
    changes = (
        "less noise: the error is proportional to it",
        *sharper(update),
        "weights that saturate fewer units",
    )
    number = worst.condition if bound is None else bound
    return [cause(CauseKind.PRECISION, worst.layer, number, sentence(words + "."), changes)]


def _unsolved(halt: Halt | None) -> bool:
    return halt is not None and halt.kind is HaltKind.UNSOLVED


def _batch(recovery: Recovery, update: Update | None, chain: Chain | None) -> int:
    if update is not None and update.batch_size is not None:
        return update.batch_size
    if recovery.inputs is not None:
        return len(recovery.inputs)
    if chain is not None and chain.stages and recovery.layers:
        return max(1, recovery.layers[-1].unknowns // prod(chain.stages[-1].affine.in_shape))
    return 1
