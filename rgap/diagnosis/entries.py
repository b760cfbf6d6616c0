"""One entry that was changed: the only one without which a gradient has the rank of its batch.

The gradient of a fully connected layer with that of its bias beside it, ``N = Kᵀ [X | 1]``, has
rank B at most.  One changed entry adds ``δ e_i e_jᵀ``, rank B + 1; so do one more sample and one
more step.  But N less a multiple of ``e_i e_jᵀ`` has a rank less only if e_i is in its range and
e_j in its row space, ``‖U_i‖ = ‖V_j‖ = 1`` of the singular vectors ``N = U S Vᵀ`` with values above
rounding, and then for ``δ = 1/(V_j S⁻¹ U_i)`` alone.  Cotangents and features of a sample have more
than one entry, so that neither a sample nor a step does that.

Source: J. H. M. Wedderburn, "Lectures on Matrices" (1934), for the rank that a term takes away.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rgap.diagnosis.evidence import Evidence
from rgap.diagnosis.finding import MENDING, Finding, Kind
from rgap.diagnosis.noise import CLEAR

SPARE = 1  # rows and columns beyond the rank, without which every one is in the range
INSIDE = 1e-3  # share of e_i outside the range: random ones of n rows are √(1 − r/n) outside
SVD = 16 * torch.finfo(torch.float64).eps  # of the largest value, that others are known to


def read(evidence: Evidence) -> list[Finding]:
    """The entry, if there is one in one layer alone."""
    if evidence.batch is None or evidence.presumed:
        return []
    found = []
    evidence.tested.update((Kind.ENTRY,) if evidence.dense else ())
    for call, weight, bias in evidence.dense:
        columns = [weight] if bias is None else [weight, bias[:, None]]
        told = _entry(evidence, call.weight_name, torch.cat(columns, 1), evidence.batch)
        if told is not None:
            row, column, amount, left, rounding = told
            beside = column == weight.shape[1]
            name = call.bias_name if beside else call.weight_name
            place = f"[{row}]" if beside else f"[{row}, {column}]"
            noise = (evidence.update.noise or {}).get(name or "")
            at = row, 0 if beside else column
            own = 0.0 if noise is None else float(noise.reshape(len(weight), -1)[at])
            if not abs(amount) > CLEAR * own:
                continue  # as of pruning: an entry that is noise of its own size
            said = (
                f"the gradient of '{call.name}' has rank {evidence.batch + 1}, a batch of "
                f"{evidence.batch} at most {evidence.batch}; less {amount:.3g} at {place} of "
                f"'{name}' it has that, up to {left:.1e} of its size where rounding explains "
                f"{rounding:.1e}, as it has for no sample and no step"
            )
            strength = abs(amount) / max(left, rounding) / float(weight.norm())
            found.append(Finding(Kind.ENTRY, amount, said, str(MENDING[Kind.ENTRY]), strength))
    return found if len(found) == 1 else []


def _entry(
    evidence: Evidence, name: str, table: Tensor, batch: int
) -> tuple[int, int, float, float, float] | None:
    """Row, column and size of what was added, the rank left without it and what rounding explains.

    Args:
        evidence: of the update.
        name: of the weight.
        table: N, [m, n].
        batch: B.
    """
    rows, columns = (table != 0).any(1).nonzero()[:, 0], (table != 0).any(0).nonzero()[:, 0]
    own = table[rows][:, columns]
    if min(own.shape, default=0) < batch + 1 + SPARE:
        return None
    u, values, vh = torch.linalg.svd(own, full_matrices=False)
    m, n = own.shape

    def explained(largest: float) -> float:
        rounding = 2 * evidence.unit * largest * (batch / (m * n)) ** 0.5
        rounding = max(rounding, evidence.unit * evidence.usual.get(name, 0.0))
        noise = evidence.precision.noise_norm(name, evidence.gradients[name])
        return float(CLEAR * (rounding * (m**0.5 + n**0.5) + noise))

    rank = batch + 1
    if not values[batch] > explained(float(values[0])) or values[rank] > explained(
        float(values[0])
    ):
        return None
    u, vh = u[:, :rank], vh[:rank]
    lengths = u.square().sum(1), vh.square().sum(0)
    i, j = (int(length.argmax()) for length in lengths)
    if min(float(lengths[0][i]), float(lengths[1][j])) < 1.0 - INSIDE:
        return None
    slope = float((vh[:, j] / values[:rank]) @ u[i])
    if slope == 0.0:
        return None
    mended = own.clone()
    mended[i, j] -= 1.0 / slope
    left = torch.linalg.svdvals(mended)
    allowed = explained(float(left[0])) + SVD * float(values[0])
    if float(left[batch]) > allowed or not float(left[0]) > 0.0:
        return None
    size = float(left[0])
    place = int(rows[i]), int(columns[j])
    return *place, 1.0 / slope, float(left[batch]) / size, allowed / size
