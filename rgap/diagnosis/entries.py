"""A few entries that were changed, without which a gradient has the rank of its batch.

The gradient of a fully connected layer with that of its bias beside it, ``N = Kᵀ [X | 1]``, has
rank B at most.  Entries changed in k rows I and as many columns J add ``E_I Δ E_Jᵀ``, rank B + k;
so do k more samples, or steps.  But N less such a term has a rank less by k only if all of these
e_i are in its range and all e_j in its row space, ``‖U_i‖ = ‖V_j‖ = 1`` of the singular vectors
``N = U S Vᵀ`` with values above rounding, and then for ``Δ = (V_J S⁻¹ U_Iᵀ)⁻¹`` alone.  Cotangents
and features of a sample have more than one entry, so that neither a sample nor a step does that.

Source: J. H. M. Wedderburn, "Lectures on Matrices" (1934), for the rank that a term takes away.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import combinations, islice, product

import torch
from torch import Tensor

from rgap.diagnosis.evidence import Call, Evidence
from rgap.diagnosis.finding import MENDING, Finding, Kind
from rgap.diagnosis.noise import CLEAR

LARGEST = 10.0  # times the largest value, that an entry may be: a cancelling one is no entry
TRIED = 32  # sets of rows and columns
MOST = 8  # entries that are looked for in one layer
SPARE = 1  # rows and columns beyond the rank, without which every one is in the range
ROOM = 2  # rows a rank, from which on one in the range stands out
INSIDE = 1e-3  # share of e_i outside the range: random ones of n rows are √(1 − r/n) outside
SVD = 16 * torch.finfo(torch.float64).eps  # of the largest value, that others are known to


@dataclass(frozen=True)
class Changed:
    """Entries of N that were changed.

    Attributes:
        places: row and column of each.
        amounts: that were added.
        left: value B + 1 without them, over the largest.
        explained: what rounding explains of it.
    """

    places: list[tuple[int, int]]
    amounts: list[float]
    left: float
    explained: float


def read(evidence: Evidence) -> list[Finding]:
    """The entries, if there are any in one layer alone."""
    if evidence.batch is None or evidence.presumed:
        return []
    found = []
    evidence.tested.update((Kind.ENTRY,) if evidence.dense else ())
    for call, weight, bias in evidence.dense:
        columns = [weight] if bias is None else [weight, bias[:, None]]
        told = _entries(evidence, call.weight_name, torch.cat(columns, 1), evidence.batch)
        if told is None or not _above_noise(evidence, call, weight, told):
            continue
        width, where = weight.shape[1], []
        for (row, column), amount in zip(told.places, told.amounts, strict=True):
            beside = column == width
            name = call.bias_name if beside else call.weight_name
            place = f"[{row}]" if beside else f"[{row}, {column}]"
            where.append(f"{amount:.3g} at {place} of '{name}'")
        rank = evidence.batch + len(where)
        said = (
            f"the gradient of '{call.name}' has rank {rank}, a batch of {evidence.batch} at most "
            f"{evidence.batch}; less {' and '.join(where)} it has that, up to {told.left:.1e} of "
            f"its size where rounding explains {told.explained:.1e}, as it has for no sample and "
            "no step"
        )
        largest = max(told.amounts, key=abs)
        strength = abs(largest) / max(told.left, told.explained) / float(weight.norm())
        found.append(Finding(Kind.ENTRY, largest, said, str(MENDING[Kind.ENTRY]), strength))
    return found if len(found) == 1 else []


def _above_noise(evidence: Evidence, call: Call, weight: Tensor, told: Changed) -> bool:
    """False for an entry that is noise of its own size, as of pruning."""
    for (row, column), amount in zip(told.places, told.amounts, strict=True):
        beside = column == weight.shape[1]
        name = call.bias_name if beside else call.weight_name
        noise = (evidence.update.noise or {}).get(name or "")
        at = row, 0 if beside else column
        own = 0.0 if noise is None else float(noise.reshape(len(weight), -1)[at])
        if not abs(amount) > CLEAR * own:
            return False
    return True


@dataclass(frozen=True)
class _Beyond:
    """Of a gradient of rank r = B + k, the k rows and columns most in its range and row space.

    Attributes:
        factors: U [m, r], the values, Vᵀ [r, n].
        places: rows in the range, and columns in the row space, the nearest to it first.
        count: k.
    """

    factors: tuple[Tensor, Tensor, Tensor]
    places: tuple[list[int], list[int]]
    count: int


def in_line(evidence: Evidence) -> bool:
    """True if what a layer has beyond rank B may be all in a row, or column, for each rank."""
    for call, weight, bias in evidence.dense:
        table = weight if bias is None else torch.cat([weight, bias[:, None]], 1)
        own = table[(table != 0).any(1)][:, (table != 0).any(0)]
        if 0 in own.shape or evidence.batch is None:
            continue
        beyond = _beyond(evidence, call.weight_name, own, evidence.batch)
        if beyond is not None and any(
            len(inside) >= beyond.count and size >= ROOM * len(beyond.factors[1])
            for inside, size in zip(beyond.places, own.shape, strict=True)
        ):
            return True
    return False


def _explained(evidence: Evidence, name: str, own: Tensor, batch: int, largest: float) -> float:
    """The value that rounding and noise make of a gradient of rank B."""
    m, n = own.shape
    rounding = 2 * evidence.unit * largest * (batch / (m * n)) ** 0.5
    rounding = max(rounding, evidence.unit * evidence.usual.get(name, 0.0))
    noise = evidence.precision.noise_norm(name, evidence.gradients[name])
    return float(CLEAR * (rounding * (m**0.5 + n**0.5) + noise))


def _beyond(evidence: Evidence, name: str, own: Tensor, batch: int) -> _Beyond | None:
    """None where the rank is that of the batch, or there are too few rows and columns to say."""
    u, values, vh = torch.linalg.svd(own, full_matrices=False)
    explained = _explained(evidence, name, own, batch, float(values[0]))
    rank = int((values > explained).sum())
    count = rank - batch
    if not 0 < count <= MOST or rank + SPARE > len(values):
        return None
    u, values, vh = u[:, :rank], values[:rank], vh[:rank]
    lengths = u.square().sum(1), vh.square().sum(0)
    rows, columns = (
        length.argsort(descending=True)[: int((length > 1.0 - INSIDE).sum())].tolist()
        for length in lengths
    )
    return _Beyond((u, values, vh), (rows, columns), count)


def _entries(evidence: Evidence, name: str, table: Tensor, batch: int) -> Changed | None:
    """What was changed in k rows and k columns of a gradient of rank B + k.

    Args:
        evidence: of the update.
        name: of the weight.
        table: N, [m, n].
        batch: B.
    """
    rows, columns = (table != 0).any(1).nonzero()[:, 0], (table != 0).any(0).nonzero()[:, 0]
    own = table[rows][:, columns]
    beyond = None if 0 in own.shape else _beyond(evidence, name, own, batch)
    if beyond is None:
        return None
    # A picture of zeros has the column of the bias in the row space as well.
    tried = islice(product(*(combinations(p, beyond.count) for p in beyond.places)), TRIED)
    for i, j in tried:
        told = _without(evidence, name, own, beyond, (torch.tensor(i), torch.tensor(j)))
        if told is not None:
            places = [(int(rows[i]), int(columns[j])) for i, j in told.places]
            return replace(told, places=places)
    return None


def _without(
    evidence: Evidence, name: str, own: Tensor, beyond: _Beyond, inside: tuple[Tensor, Tensor]
) -> Changed | None:
    """What was changed in some rows and columns, if the rest has the rank of the batch.

    Args:
        evidence: of the update.
        name: of the weight.
        own: the gradient, without rows and columns of zeros.
        beyond: its rank.
        inside: numbers of the rows and the columns.
    """
    u, values, vh = beyond.factors
    batch = len(values) - beyond.count
    term, singular = torch.linalg.inv_ex(vh[:, inside[1]].T / values @ u[inside[0]].T)
    if bool(singular) or float(term.abs().max()) > LARGEST * float(values[0]):
        return None
    mended = own.clone()
    mended[inside[0][:, None], inside[1]] -= term
    left = torch.linalg.svdvals(mended)
    size = float(left[0])
    allowed = _explained(evidence, name, own, batch, size) + SVD * float(values[0])
    if float(left[batch]) > allowed or not size > 0.0:
        return None
    changed = (term.abs() > allowed).nonzero().tolist()
    places = [(int(inside[0][i]), int(inside[1][j])) for i, j in changed]
    amounts = [float(term[i, j]) for i, j in changed]
    return Changed(places, amounts, float(left[batch]) / size, allowed / size)
