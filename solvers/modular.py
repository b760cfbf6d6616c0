"""Rank of integer matrices modulo a prime: exact arithmetic at the speed of matrix products.

**What a rank modulo a prime proves.**  Let the entries of A be polynomials with integer
coefficients (here: single unknowns or 0), and let r be its rank for generic values.

* Never above: a minor that is not 0 modulo p is not the zero polynomial, so
  ``rank (A mod p) ≤ r`` for every prime and every point, without exception.
* Rarely below: some r×r minor is a polynomial f ≠ 0 of degree at most d.  It vanishes modulo p at
  a uniformly random point with probability at most d/p (Schwartz and Zippel), unless p divides
  every coefficient of f.  By Parseval's identity on the torus and Hadamard's inequality the
  coefficients are at most H = Π ‖row‖ over its r rows, every unknown taken as 1, so at most
  log H / log 2³⁰ primes above 2³⁰ divide one of them.  A prime drawn at random among the
  50,697,537 between 2³⁰ and 2³¹ is one of these with probability at most that over 50,697,537.

:func:`failure_bound` adds the two up.  The largest of the ranks at several independent primes and
points is wrong only if all of them are: their bounds multiply.

**How.**  :func:`skeleton` picks rows that span all others, ``A[bottom] = M A[top] (mod p)``, by
halving the columns: everything but single columns is a matrix product.  :func:`multiply` keeps
products exact in float64: one factor is split in two halves of 16 bits, so every partial sum of
128 terms stays below 2⁵³.  ``M`` is at once the left null space ``[−M, I]``.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Residues = NDArray[np.float64]
Rows = NDArray[np.intp]
BITS = 31  # primes lie in (2^30, 2^31)
PRIMES = 50_697_537  # number of primes in there
HALF = 2.0**15  # a residue is split there, so that products are exact
TERMS = 128  # 2^7 terms of 2^15 · 2^30 sum up to at most 2^52, and rounding off p stays below 2^53
SPARSE = 0.8  # share of rows that are not 0 below which the others are set aside
WITNESSES = (2, 3, 5, 7)  # decide primality below 3,215,031,751


@dataclass(frozen=True)
class Skeleton:
    """Rows that span all others modulo a prime: ``A[bottom] = factors @ A[top] (mod p)``.

    Attributes:
        top: indices of independent rows, [rank].
        bottom: indices of the other rows, [rows − rank].
        factors: M, [rows − rank, rank], residues between −p/2 and p/2.
    """

    top: Rows
    bottom: Rows
    factors: Residues

    @property
    def rank(self) -> int:
        """Number of independent rows."""
        return len(self.top)


def random_prime(rng: random.Random) -> int:
    """A prime uniformly at random between 2³⁰ and 2³¹.

    >>> random_prime(random.Random(0)).bit_length()
    31
    """
    while True:
        candidate = rng.randrange(2 ** (BITS - 1) + 1, 2**BITS, 2)
        if is_prime(candidate):
            return candidate


def is_prime(number: int) -> bool:
    """Whether ``number`` < 3,215,031,751 is prime, by the deterministic Miller-Rabin test.

    >>> [n for n in range(20) if is_prime(n)]
    [2, 3, 5, 7, 11, 13, 17, 19]
    """
    if number < 2 or any(number % w == 0 for w in WITNESSES):
        return number in WITNESSES
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for witness in WITNESSES:
        power = pow(witness, odd, number)
        if power in (1, number - 1):
            continue
        for _ in range(twos - 1):
            power = power * power % number
            if power == number - 1:
                break
        else:
            return False
    return True


def reduce(values: Residues, prime: int) -> Residues:
    """``values`` (whole, |value| ≤ 2⁵²) modulo the prime, in place, between −p/2 and p/2."""
    quotient = values * (1.0 / prime)
    np.rint(quotient, out=quotient)
    quotient *= prime
    values -= quotient
    return values


def residues(matrix: NDArray[Any], prime: int) -> Residues:
    """An integer matrix as residues in float64.

    Raises:
        TypeError: entries that are no integers.
        ValueError: a modulus that is no prime of at most 31 bits.

    >>> residues(np.array([[5, 8, -1]]), 7).tolist()
    [[-2.0, 1.0, -1.0]]
    """
    matrix = np.asarray(matrix)
    if matrix.dtype.kind not in "iub" or matrix.ndim != 2:
        raise TypeError(
            f"expected a matrix of integers, got {matrix.ndim} dimensions of {matrix.dtype}; round "
            "or scale the entries to whole numbers, then write matrix.astype(np.int64)"
        )
    if not (2 < prime < 2**BITS and is_prime(prime)):
        raise ValueError(
            f"expected an odd prime below 2^{BITS}, got {prime}; write "
            "random_prime(random.Random(seed))"
        )
    small = np.remainder(matrix.astype(object) if matrix.dtype == np.uint64 else matrix, prime)
    return reduce(small.astype(np.float64), prime)


def multiply(left: Residues, right: Residues, prime: int) -> Residues:
    """The product of two matrices of residues, exactly, between −p/2 and p/2.

    Args:
        left: [n, m], |entry| ≤ p/2.
        right: [m, q], |entry| ≤ p/2.
        prime: p < 2³¹.
    """
    total: Residues | None = None
    for start in range(0, left.shape[1], TERMS):
        a, b = left[:, start : start + TERMS], right[start : start + TERMS]
        high = np.rint(a * (1.0 / HALF))
        low = a - high * HALF
        product = reduce(high @ b, prime)
        product *= HALF
        product = reduce(product, prime)
        product += reduce(low @ b, prime)
        if total is not None:
            product += total
        total = reduce(product, prime)
    return np.zeros((left.shape[0], right.shape[1])) if total is None else total


def skeleton(matrix: Residues, prime: int) -> Skeleton:
    """Independent rows of a matrix of residues, and the others in terms of them.

    Args:
        matrix: [rows, columns], entries between −p/2 and p/2 (see :func:`residues`).
        prime: p.
    """
    rows, columns = matrix.shape
    eliminated = _eliminate(matrix, prime, True) if columns else _nothing()
    rest = np.ones(rows, dtype=np.bool_)
    rest[eliminated.top] = False
    bottom = np.flatnonzero(rest)
    factors = np.zeros((len(bottom), eliminated.rank))
    factors[np.searchsorted(bottom, eliminated.bottom)] = eliminated.factors
    return Skeleton(eliminated.top, bottom, factors)


def rank(matrix: NDArray[Any], prime: int) -> int:
    """Rank of an integer matrix modulo a prime.

    >>> rank(np.array([[1, 2], [3, 6]]), 101), rank(np.array([[1, 2], [3, 6 + 101]]), 101)
    (1, 1)
    """
    return residue_rank(residues(matrix, prime), prime)


def residue_rank(matrix: Residues, prime: int) -> int:
    """Rank of a matrix that is already in residues between −p/2 and p/2."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T
    return _eliminate(tall, prime, False).rank if tall.shape[1] else 0


def null_space(matrix: Residues, prime: int) -> Residues:
    """Columns that span {x : A x = 0 (mod p)}, [columns, columns − rank].

    >>> null_space(residues(np.array([[1, 2, 3]]), 101), 101).shape
    (3, 2)
    """
    pivots = skeleton(matrix.T, prime)
    basis = np.zeros((matrix.shape[1], len(pivots.bottom)))
    basis[pivots.top] = -pivots.factors.T
    basis[pivots.bottom, np.arange(len(pivots.bottom))] = 1.0
    return basis


def failure_bound(rank: int, degree: int, log2_norms: float, prime: int) -> float:
    """Probability that the rank modulo a random prime at a random point is below the generic rank.

    Args:
        rank: rows of the largest minor that could be missed (an upper bound on the generic rank).
        degree: of that minor as a polynomial in the unknowns.
        log2_norms: Σ log₂ ‖row‖ over its rows, with every unknown taken as 1.
        prime: the prime that was drawn.
    """
    if rank == 0:
        return 0.0
    return min(1.0, degree / prime + max(0.0, log2_norms) / (BITS - 1) / PRIMES)


def _eliminate(matrix: Residues, prime: int, wanted: bool) -> Skeleton:
    """Halve the columns: rows that span the left half, then what they leave of the right half.

    Rows that are 0 in all columns are in neither ``top`` nor ``bottom``: in a banded matrix these
    are most rows of most steps.
    """
    rows, columns = matrix.shape
    if columns == 1:
        return _column(matrix[:, 0], prime)
    live = np.flatnonzero(matrix.any(axis=1))
    if len(live) < SPARSE * rows:
        inner = _eliminate(matrix[live], prime, wanted) if len(live) else _nothing()
        return Skeleton(live[inner.top], live[inner.bottom], inner.factors)
    middle = columns // 2
    left = _eliminate(matrix[:, :middle], prime, True)
    if left.rank == 0:
        return _eliminate(matrix[:, middle:], prime, wanted)
    place = np.full(rows, -1)  # of a row among those that the left half leaves over
    rest = np.ones(rows, dtype=np.bool_)
    rest[left.top] = False
    others = np.flatnonzero(rest)
    place[others] = np.arange(len(others))
    right = matrix[others, middle:]
    touched = place[left.bottom]
    if len(touched):
        change = multiply(left.factors, matrix[left.top, middle:], prime)
        right[touched] = reduce(right[touched] - change, prime)
    inner = _eliminate(right, prime, wanted) if len(others) else _nothing()
    if inner.rank == 0:
        return left
    top = np.concatenate([left.top, others[inner.top]])
    if not wanted:
        return Skeleton(top, others[:0], np.zeros((0, 0)))
    return _joined(left, inner, others, top, prime)


def _joined(left: Skeleton, inner: Skeleton, others: Rows, top: Rows, prime: int) -> Skeleton:
    """The skeleton of a matrix from those of its left columns and of what they leave.

    A row R is ``M₁ A₁ + S``: A₁ the rows kept on the left, S its rest there.  That is ``M₂ S₂``
    with ``S₂ = A₂ − M₁₂ A₁`` for the rows A₂ kept of the rest, so ``R = (M₁ − M₂ M₁₂) A₁ + M₂ A₂``.
    """
    rows = len(others) + left.rank
    before = np.full(rows, -1)
    before[left.bottom] = np.arange(len(left.bottom))
    rest = np.zeros(rows, dtype=np.bool_)
    rest[left.bottom] = True
    rest[others[inner.bottom]] = True
    rest[others[inner.top]] = False
    bottom = np.flatnonzero(rest)
    place = np.full(rows, -1)
    place[bottom] = np.arange(len(bottom))
    factors = np.zeros((len(bottom), len(top)))
    known = before[bottom] >= 0
    factors[known, : left.rank] = left.factors[before[bottom[known]]]
    own = place[others[inner.bottom]]
    factors[own, left.rank :] = inner.factors
    shared = before[others[inner.top]]
    used = shared >= 0
    if used.any() and len(own):
        change = multiply(inner.factors[:, used], left.factors[shared[used]], prime)
        factors[own, : left.rank] = reduce(factors[own, : left.rank] - change, prime)
    return Skeleton(top, bottom, factors)


def _column(column: Residues, prime: int) -> Skeleton:
    used = np.flatnonzero(column)
    if not len(used):
        return _nothing()
    inverse = pow(int(column[used[0]]) % prime, -1, prime)
    centred = np.array([[float(inverse if inverse <= prime // 2 else inverse - prime)]])
    return Skeleton(used[:1], used[1:], multiply(column[used[1:], None], centred, prime))


def _nothing() -> Skeleton:
    none = np.zeros(0, dtype=np.intp)
    return Skeleton(none, none, np.zeros((0, 0)))
