"""B = 1: the inputs at the lowest fully connected layer with a bias, whatever stands above it.

``G = k xᵀ`` and ``∂b = k`` give ``x = Gᵀ∂b/‖∂b‖²``; below it the recursion goes on with that k.
The inputs carry a certificate of their own.  The targets are certified only if the whole network
replays the update with one of them.
"""

from __future__ import annotations

from dataclasses import replace

from rgap.halt import Halt
from rgap.head.bias_attack import rank_one_residual
from rgap.head.features import features_from_bias, rank_one_tolerance
from rgap.head.target import Reading
from rgap.inversion import certificate, outcomes
from rgap.inversion.answer import Answer, cast_of, head_gradients, polished_from
from rgap.inversion.backing import of_prefix
from rgap.inversion.parts import in_parts
from rgap.inversion.problem import Problem
from rgap.inversion.trying import Trial, try_targets
from rgap.limits import REFUTED
from rgap.network.prefix import Prefix, reaches
from rgap.precision import Estimate
from rgap.progress import Progress
from rgap.recovery import Candidate, Recovery, Status
from rgap.recursion.descend import Descent

__all__ = ["from_prefix"]


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
    weight, bias = head_gradients(stage, problem, problem.gradients.original)  # block by block
    assert bias is not None
    bias = bias.to(stage.affine.weight)
    x, k = features_from_bias(stage.affine, weight, bias, problem.precision)
    misfit = rank_one_residual(weight, x.value[0], k.value[0])
    tolerance = rank_one_tolerance(stage.affine, weight, bias, x, problem.precision)
    if misfit > tolerance:
        if problem.stated is None:
            return None
        return outcomes.stopped(
            own,
            Status.INCONSISTENT,
            f"the gradient of '{stage.name}' is not of rank one (relative residual {misfit:.1e}, "
            f"where rounding and noise explain {tolerance:.1e}): it mixes several samples, does "
            "not come with this bias gradient, or has noise that was not stated",
            None,
            Halt.contradiction(stage.name),
        )
    descent = own.descend(stage.index, x, k, show.stage)
    if descent.refuted:
        return outcomes.contradiction(own, descent)

    def certified(whole: Descent) -> tuple[Recovery, None]:
        return _certified(problem, own, prefix, whole, k, above, show), None

    if descent.data is not None:
        return certified(descent)[0]
    found = in_parts(own, descent, certified)
    if found is not None:
        return found
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
    if certificate.excess(answer, own) > problem.slack:
        return outcomes.outside(own, descent, answer.inputs)
    status, why = certificate.verdict(own, answer)
    inputs = answer.inputs
    known = status is Status.EXACT and not prefix.argument
    if known and not reaches(problem.model, own.chain, inputs):
        status, why = (
            Status.UNDERDETERMINED,
            f"on the recovered input the model's own '{name}' takes in something else: its "
            "forward decides by the values of the data",
        )
    if status is not Status.EXACT:
        return outcomes.stopped(own, status, why, descent)
    show.stage("trying targets")
    trial = _trial(problem, prefix, answer.polished.data)
    answer = replace(answer, widened=of_prefix(problem, own, descent, polished.data, trial.labels))
    status, why = certificate.verdict(own, answer)
    if status is not Status.EXACT:
        said = f"{trial.reason}; " if trial.reason else ""
        return outcomes.stopped(own, status, f"{said}{why}", descent)
    return _recovery(problem, own, answer, trial, above)


def _trial(problem: Problem, prefix: Prefix, known: Estimate) -> Trial:
    if prefix.argument:
        return Trial(
            None, None, f"the model takes other inputs besides '{prefix.argument}', not known here"
        )
    bias = prefix.chain.stages[-1].affine.bias_name
    assert bias is not None
    return try_targets(problem, known, bias)


def _recovery(problem: Problem, own: Problem, answer: Answer, trial: Trial, above: str) -> Recovery:
    inputs, bound, name = answer.inputs, answer.bound, own.chain.stages[-1].name
    both = trial.labels is not None
    found = Recovery(
        inputs=inputs,
        labels=trial.labels,
        status=Status.EXACT if both else Status.UNDERDETERMINED,
        layers=outcomes.layer_reports(own, answer.descent),
        residual=trial.residual,
        predicted_error=answer.polished.data.error.square().flatten(2).mean((0, 2)).sqrt(),
        error_bound=bound,
        targets_error_bound=trial.bound,
        reason="",
        certified=frozenset({"inputs", "targets"} if both else {"inputs"}),
    )
    said = f"'{name}' gives its input, no entry of the data is off by more than {bound:.1e}"
    if both:
        return replace(
            found,
            reason=f"{said}; of all targets one alone reproduces the whole update ({above})",
        )
    if problem.stated is None:
        # Samples whose cotangents are parallel have a gradient of rank one as well.
        return replace(
            found,
            inputs=None,
            certified=frozenset(),
            candidates=(Candidate(inputs, None, float("nan")),),
            reason=f"if the batch holds one sample, or copies of one, {said}; state batch_size=1 "
            f"to have it certified (targets not certified: {trial.reason}; {above})",
        )
    return replace(
        found,
        reason=f"the inputs are certified: {said}; targets not certified: {trial.reason} ({above})",
    )
