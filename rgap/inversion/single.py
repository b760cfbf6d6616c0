"""B = 1: the inputs at the lowest fully connected layer with a bias, whatever stands above it.

``G = k xᵀ`` and ``∂b = k`` give ``x = Gᵀ∂b/‖∂b‖²``; below it the recursion goes on with that k.
The inputs carry a certificate of their own.  The targets are certified only if the whole network
replays the update with one of them.

Where the recursion ends before the data, the inputs of layers above that place may be certified:
the layer's gradient is of rank one to the rounding of the update, and the layer above, whose input
its own gradient carries too, agrees: ``x_{i+1} = φ(W_i x_i + b_i)`` within the errors of both.  The
topmost of them has to give the head's cotangent.
"""

from __future__ import annotations

from dataclasses import replace
from math import hypot, isfinite

from rgap.halt import Halt
from rgap.head.target import Reading
from rgap.inversion import certificate, outcomes, verdict
from rgap.inversion.altered import OTHER, UNSEEN, heard_above, shows_changes
from rgap.inversion.answer import Answer, cast_of, polished_from
from rgap.inversion.backing import of_prefix, of_replay
from rgap.inversion.head_evidence import head_evidence, spread_of
from rgap.inversion.parts import in_parts
from rgap.inversion.problem import Problem
from rgap.inversion.targets import Trial, try_targets
from rgap.inversion.top import from_bias, risen
from rgap.limits import REFUTED, SAFETY, UNHEARD
from rgap.network.chain import Stage
from rgap.network.prefix import Prefix
from rgap.precision import Estimate
from rgap.progress import Progress
from rgap.recovery import Recovery, Status
from rgap.recursion.reached import Descent

__all__ = ["certified_features", "from_prefix"]


def from_prefix(problem: Problem, prefix: Prefix, above: str, show: Progress) -> Recovery | None:
    """The inputs of a single sample at the top of a prefix of its network.

    Args:
        problem: with a batch size of one, or none stated.
        prefix: from the data to a fully connected layer with a bias.
        above: why no equation covers what stands above it, in words.
        show: told how far it is.

    Returns:
        ``EXACT``, or ``UNDERDETERMINED`` with the inputs certified alone or in parts, or
        ``INCONSISTENT``; None where the gradient is that of several samples and no batch size was
        stated, or where the layers below end it and the network's other equations may go on.
    """
    chain = prefix.chain
    own = replace(problem, chain=chain)
    stage = chain.stages[-1]
    show.stage(f"bias attack at {stage.name}")
    x, k, mixed = from_bias(problem, stage)
    if mixed:
        return None if problem.stated is None else outcomes.not_of_rank_one(own, stage, mixed)
    descent = own.descend(stage.index, x, k, show.stage)
    if descent.refuted:
        return outcomes.contradiction(own, descent)

    def certified(whole: Descent) -> tuple[Recovery, None]:
        return _certified(problem, own, prefix, whole, k, above, show), None

    if descent.data is not None:
        return certified(descent)[0]
    partly = in_parts(own, descent, certified)
    if partly is not None:
        return partly
    if problem.chain.complete or problem.filling is not None:
        return None  # the equations of the whole network say more
    halt = descent.require_halt()
    status = Status.UNDERDETERMINED if halt.supported else Status.UNSUPPORTED
    return outcomes.stopped(own, status, halt.reason, descent)


def _certified(
    problem: Problem,
    own: Problem,
    prefix: Prefix,
    descent: Descent,
    k: Estimate,
    above: str,
    show: Progress,
) -> Recovery:
    """The certificate of the inputs, and the targets if a replay finds them."""
    show.stage("polish on the layers below")
    polished = polished_from(own, descent, k)
    answer = Answer(
        descent,
        polished,
        Reading(k.value, k.value.new_empty(0), 0.0, 0.0),
        cast=cast_of(own.precision),
    )
    name = own.chain.stages[-1].name
    if polished.misfit > REFUTED:
        worst = max(polished.misfits, key=polished.misfits.__getitem__)
        return outcomes.stopped(
            own,
            Status.UNDERDETERMINED if descent.doubt else Status.INCONSISTENT,
            f"no input reproduces '{worst}', which misses by {polished.misfit:.2g} standard "
            f"errors, together with what '{name}' takes in; "
            f"{descent.doubt or 'is the update from another model or precision?'}",
            descent,
            Halt.contradiction(name),
        )
    if own.excess(answer.inputs, answer.bound) > own.slack:
        return outcomes.outside(own, descent, answer.inputs)
    if prefix.argument:  # the model takes other inputs too, which are not known
        status, why = verdict.verdict(own, answer)
    else:
        status, why = verdict.verdict_followed(own, answer, name)
    if status is not Status.EXACT:
        return outcomes.stopped(own, status, why, descent)
    show.stage("trying targets")
    trial = _trial(problem, prefix, answer.polished.data)
    widened = of_prefix(problem, own, descent, polished.data, trial.labels)
    scaled = UNHEARD * problem.precision.unit if trial.refuted else 0.0
    if trial.labels is not None:
        scaled = of_replay(problem, own.chain.stages[-1], polished.data.value, trial.labels)
    answer = replace(answer, widened=widened, scaled=scaled)
    status, why = verdict.verdict(own, answer)
    if status is not Status.EXACT:
        said = f"{trial.reason}; " if trial.reason else ""
        return outcomes.stopped(own, status, f"{said}{why}", descent)
    recovery = _recovery(problem, own, answer, trial, above)
    if trial.labels is not None or (trial.refuted and shows_changes(own, descent)):
        return recovery
    heard = heard_above(problem, own.chain, polished.data)
    if heard or (heard is None and not trial.refuted):
        return recovery
    why = UNSEEN if trial.refuted else OTHER
    reason = f"{trial.reason} ({above}); {why.format(name)}"
    return replace(
        recovery,
        inputs=None,
        certified=frozenset(),
        candidates=(),
        predicted_error=None,
        error_bound=None,
        reason=reason,
    )


def _trial(problem: Problem, prefix: Prefix, known: Estimate) -> Trial:
    if prefix.argument:
        return Trial(
            None, None, f"the model takes other inputs besides '{prefix.argument}', not known here"
        )
    bias = prefix.chain.stages[-1].affine.bias_name
    assert bias is not None
    return try_targets(problem, known, bias)


def _recovery(problem: Problem, own: Problem, answer: Answer, trial: Trial, above: str) -> Recovery:
    name = own.chain.stages[-1].name
    said = f"'{name}' gives its input, no entry of the data is off by more than {answer.bound:.1e}"
    reason = f"the inputs are certified: {said}; targets not certified: {trial.reason} ({above})"
    recovery = certificate.inputs_only(own, answer, reason)
    recovery = replace(recovery, residual=trial.residual, targets_error_bound=trial.bound)
    if trial.labels is not None:
        return replace(
            recovery,
            labels=trial.labels,
            status=Status.EXACT,
            reason=f"{said}; of all targets one alone reproduces the whole update ({above})",
            certified=frozenset({"inputs", "targets"}),
        )
    if problem.stated is None:
        # Samples whose cotangents are parallel have a gradient of rank one as well.
        reason = (
            f"if the batch holds one sample, or copies of one, {said}; state batch_size=1 to have "
            f"it certified (targets not certified: {trial.reason}; {above})"
        )
        return certificate.as_candidate(recovery, reason)
    return recovery


def certified_features(problem: Problem, descent: Descent) -> tuple[dict[str, Estimate], str]:
    """The inputs that a recursion from a bias attack determined, from the lowest layer up.

    Args:
        problem: of one sample.
        descent: where the recursion went; it began at a bias attack whose gradient is of rank one.

    Returns:
        Inputs of affine maps by layer name, [1, *in_shape], with their errors, those above the
        start as their own gradients carry them; what contradicts them, or "".
    """
    stages = problem.chain.stages
    start = max(descent.features, default=None)
    if start is None or descent.refuted:
        return {}, ""
    known = {i: u for i, u in sorted(descent.features.items()) if bool(u.known.all())}
    for below, stage in zip(stages[start:], stages[start + 1 :], strict=False):
        own = _own(problem, stage) if below.index in known else None
        if own is None:
            break
        doubt = _contradiction(problem, below, stage, known[below.index], own)
        if doubt:
            return {}, doubt
        known[stage.index] = own[0]
    if not known:
        return {}, ""
    doubt, wider = head_evidence(problem, known)
    if not doubt and not isfinite(wider):
        doubt = f"no equation tests the input of '{stages[max(known)].name}'"
    if doubt:
        return {}, doubt
    return {stages[i].name: replace(u, error=wider * u.error) for i, u in known.items()}, ""


def _own(problem: Problem, stage: Stage) -> tuple[Estimate, str] | None:
    """The input that a layer's own gradient carries, and by how much that is not of rank one."""
    affine, sent = stage.affine, problem.precision.sent
    if affine.geometry is not None or affine.bias_name is None:
        return None
    if not sent(affine.bias_name) or not sent(affine.weight_name):
        return None
    if not bool((problem.gradients.original[affine.bias_name] != 0).any()):
        return None
    x, _, mixed = from_bias(problem, stage)
    return x, mixed


def _contradiction(
    problem: Problem, stage: Stage, above: Stage, u: Estimate, carries: tuple[Estimate, str]
) -> str:
    """Why the input of ``above``, read off its own gradient, is not what ``u`` makes; or ""."""
    precision, (read, mixed) = problem.precision, carries
    if mixed:
        return f"the gradient of '{above.name}' is not of rank one, as that of one sample is"
    made = risen(stage, above, u, precision)
    gap = float((made.value - read.value).norm())
    spread = hypot(spread_of(read), spread_of(made))
    if gap <= SAFETY * spread:
        return ""
    return (
        f"the input of '{above.name}' that its gradient carries is not what '{stage.name}' makes "
        f"of its own: they differ by {gap / max(float(read.value.norm()), 1e-300):.1e} of their "
        f"size, {gap / max(spread, 1e-300):.2g} standard errors"
    )
