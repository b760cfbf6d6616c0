"""The adjoint dot test, and the comparison of an operator with the matrix that it stands for.

An operator A is known here by two functions, ``apply(x) = A x`` and ``adjoint(y) = Aᵀ y``.  What
goes in and comes out is a tensor of any shape, or a tuple, list or dict of such (None for a part
that is not there), with the inner product of all entries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["dense", "dense_test", "dot_test", "tolerance"]

Map = Callable[[Any], Any]
ROUNDING = 16.0  # times the unit, by the square root of the terms: five sums, as random walks


def tolerance(dtype: torch.dtype, size: int) -> float:
    """What rounding explains of a sum of so many terms, relative to their size.

    ``16 ε √size``: rounding errors of a sum add up as a random walk does.

    >>> tolerance(torch.float64, 100) < 1e-13
    True
    """
    return float(ROUNDING * torch.finfo(dtype).eps * max(size, 1) ** 0.5)


def dot_test(
    apply: Map,
    adjoint: Map,
    domain: Any,
    *,
    name: str = "operator",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    trials: int = 3,
    slack: float = 1.0,
) -> None:
    """Assert ``⟨A x, y⟩ = ⟨x, Aᵀ y⟩`` for random x and y.

    Equal up to ``tolerance(dtype, size)·(‖A x‖ ‖y‖ + ‖x‖ ‖Aᵀ y‖)``, size being the entries of x or
    of y, whichever are more.  A wrong entry of Aᵀ differs by far more in float64; in float32 an
    operator of a million entries hides small ones.

    Args:
        apply: ``x ↦ A x``, linear.
        adjoint: ``y ↦ Aᵀ y``.
        domain: the shape of x, or a value like x: a tensor, or a structure of tensors.
        name: of the operator, for the message.
        dtype: of x where ``domain`` is a shape.
        seed: of x and y; the global random state is not touched.
        trials: pairs (x, y).
        slack: factor on the tolerance: the condition number, for an operator that is an inverse.

    Raises:
        AssertionError: the two differ, Aᵀ y is not like x, or a number is not finite.

    Source: Claerbout (1992), *Earth Soundings Analysis*, section 5.

    >>> a = torch.randn(3, 5, dtype=torch.float64)
    >>> dot_test(lambda x: a @ x, lambda y: a.T @ y, (5,))
    >>> dot_test(lambda x: a @ x, lambda y: 1.01 * (a.T @ y), (5,), name="mine")
    Traceback (most recent call last):
    AssertionError: mine: the adjoint is not that of apply: <A x, y> = ..., <x, A' y> = ...
    """
    generator = torch.Generator().manual_seed(seed)
    for _ in range(trials):
        x = _drawn(_value(domain, dtype), generator)
        image = apply(x)
        y = _drawn(image, generator)
        back = adjoint(y)
        if _shapes(back) != _shapes(x):
            raise AssertionError(
                f"{name}: the adjoint gives {_shapes(back)}, expected {_shapes(x)} as x is"
            )
        own, other, ahead, behind = (_flat(part).cpu().double() for part in (image, y, x, back))
        for what, part in (("A x", own), ("A' y", behind)):
            if not bool(part.isfinite().all()):
                raise AssertionError(f"{name}: {what} of finite numbers is not finite")
        left, right = float(own @ other), float(ahead @ behind)
        size = max(len(own), len(ahead))
        scale = float(own.norm() * other.norm() + ahead.norm() * behind.norm())
        allowed = slack * tolerance(_dtype(image), size) * scale
        if not abs(left - right) <= allowed:
            raise AssertionError(
                f"{name}: the adjoint is not that of apply: <A x, y> = {left:.12g}, "
                f"<x, A' y> = {right:.12g}; they differ by {abs(left - right):.1e}, and rounding "
                f"of {size} terms in {_dtype(image)} explains {allowed:.1e}"
            )


def dense(apply: Map, domain: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    """The matrix A [m, n] of an operator, column by column; m and n count all entries.

    Args:
        apply: ``x ↦ A x``.
        domain: the shape of x, or a value like x.
        dtype: of x where ``domain`` is a shape.

    >>> dense(lambda x: x.flip(0), (2,)).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    like = _value(domain, dtype)
    zero = torch.zeros_like(_flat(like))
    columns = []
    for at in range(len(zero)):
        unit = zero.clone()
        unit[at] = 1.0
        columns.append(_flat(apply(_shaped(unit, like)[0])))
    return torch.stack(columns, 1)


def dense_test(
    apply: Map,
    reference: Tensor | Map,
    domain: Any,
    *,
    adjoint: Map | None = None,
    at: Any = None,
    name: str = "operator",
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    slack: float = 1.0,
) -> None:
    """Assert that ``apply`` is linear, that its matrix is the reference, and Aᵀ its transpose.

    Entries agree up to ``tolerance(dtype, size)`` times the largest one, size being the entries of
    x or of y, whichever are more.

    Args:
        apply: ``x ↦ A x``.
        reference: the matrix [m, n]; or a function of a value like x, whose Jacobian by automatic
            differentiation is the reference.
        domain: the shape of x, or a value like x.
        adjoint: ``y ↦ Aᵀ y``, where there is one.
        at: where the function is differentiated; default: at 0, for a linear one.
        name: of the operator, for the message.
        dtype: of x where ``domain`` is a shape.
        seed: of the x at which linearity is tried.
        slack: factor on the tolerance: the condition number, for an operator that is an inverse.

    Raises:
        AssertionError: it names the first of these that fails, the entry and both numbers.

    >>> x = torch.linspace(0, 1, 4, dtype=torch.float64)
    >>> dense_test(lambda v: x.cos() * v, torch.sin, (4,), at=x, adjoint=lambda v: x.cos() * v)
    >>> dense_test(lambda v: x.sin() * v, torch.sin, (4,), at=x, name="mine")
    Traceback (most recent call last):
    AssertionError: mine: entry [0, 0] of the matrix is 0, the reference has 1; ...
    """
    like = _value(domain, dtype)
    matrix = dense(apply, like)
    x = _drawn(like, torch.Generator().manual_seed(seed))
    _compare(name, "image of a random x", _flat(apply(x)), matrix @ _flat(x), matrix.shape, slack)
    if not isinstance(reference, Tensor):
        reference = _jacobian(reference, like if at is None else at, at is None)
    _compare(name, "matrix", matrix, reference.to(matrix), matrix.shape, slack)
    if adjoint is not None:
        image = apply(x)
        transposed = dense(adjoint, image)
        _compare(name, "adjoint", transposed, reference.to(matrix).T, matrix.shape, slack)


def _compare(
    name: str, what: str, own: Tensor, reference: Tensor, shape: Sequence[int], slack: float
) -> None:
    if own.shape != reference.shape:
        raise AssertionError(
            f"{name}: the {what} has the shape {list(own.shape)}, the reference "
            f"{list(reference.shape)}"
        )
    if not own.numel():
        return
    size = max(shape)
    largest = float(torch.maximum(own.abs().max(), reference.abs().max()))
    allowed = slack * tolerance(own.dtype, size) * largest
    gap = (own - reference).abs()
    if bool((gap <= allowed).all()):
        return
    place = int(gap.nan_to_num(torch.inf).argmax())
    entry = [int(i) for i in torch.unravel_index(torch.tensor(place), own.shape)]
    raise AssertionError(
        f"{name}: entry {entry} of the {what} is {float(own.flatten()[place]):.12g}, the reference "
        f"has {float(reference.flatten()[place]):.12g}; rounding of {size} terms in {own.dtype} "
        f"explains {allowed:.1e}"
    )


def _jacobian(function: Map, at: Any, zero: bool) -> Tensor:
    """``∂f/∂x`` [m, n] by automatic differentiation."""
    point = _flat(at).detach()
    point = torch.zeros_like(point) if zero else point

    def flat(x: Tensor) -> Tensor:
        return _flat(function(_shaped(x, at)[0]))

    matrix: Tensor = torch.autograd.functional.jacobian(flat, point)  # type: ignore[no-untyped-call]
    return matrix


def _value(domain: Any, dtype: torch.dtype) -> Any:
    """Zeros of a shape; a structure as it is."""
    if isinstance(domain, Sequence) and all(isinstance(n, int) for n in domain):
        return torch.zeros(tuple(domain), dtype=dtype)
    return domain


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return [value] if value is None or isinstance(value, Tensor) else list(value)


def _leaves(value: Any) -> list[Tensor]:
    """The tensors of a structure, in order."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for part in _parts(value) if part is not None for leaf in _leaves(part)]


def _flat(value: Any) -> Tensor:
    """All entries as one vector."""
    return torch.cat([leaf.flatten() for leaf in _leaves(value)])


def _shaped(vector: Tensor, like: Any) -> tuple[Any, Tensor]:
    """The first entries of a vector as a structure, and the rest."""
    if like is None:
        return None, vector
    if isinstance(like, Tensor):
        return vector[: like.numel()].reshape(like.shape), vector[like.numel() :]
    parts = []
    for part in _parts(like):
        shaped, vector = _shaped(vector, part)
        parts.append(shaped)
    if isinstance(like, Mapping):
        return dict(zip(like, parts, strict=True)), vector
    return (parts if isinstance(like, list) else tuple(parts)), vector


def _drawn(like: Any, generator: torch.Generator) -> Any:
    """Standard normal numbers in the shape of a structure."""
    flat = _flat(like)
    drawn = torch.randn(len(flat), generator=generator, dtype=torch.float64)
    return _shaped(drawn.to(flat), like)[0]


def _dtype(value: Any) -> torch.dtype:
    return _leaves(value)[0].dtype


def _shapes(value: Any) -> list[list[int]]:
    return [list(leaf.shape) for leaf in _leaves(value)]
