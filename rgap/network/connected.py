"""Fully connected layers that are written otherwise: a convolution with one place, ``[B, 1, n]``.

A kernel as large as its input falls on one place, and ``nn.Linear`` on ``[B, 1, n]`` is applied
once a sample: both are ``z = W u + b`` with a matrix between two reshapes, and their gradient is
``G = k uᵀ``.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from rgap.network.affine import Affine
from rgap.network.reshape import Reshape

__all__ = ["as_matrix", "fully_connected"]


def fully_connected(affine: Affine) -> bool:
    """True if every output of a sample is computed from all of its inputs, once.

    >>> import torch
    >>> from rgap.network.affine import convolution
    >>> w = torch.ones(4, 2, 3, 3)
    >>> fully_connected(convolution("conv", w, None, ("w", None), (2, 3, 3)))
    True
    >>> fully_connected(convolution("conv", w, None, ("w", None), (2, 4, 3)))
    False
    """
    geometry = affine.geometry
    if geometry is None:
        return True
    plain = geometry.groups == 1 and not any(geometry.pad_list())
    return plain and geometry.kernel == affine.in_shape[1:]


def as_matrix(affine: Affine) -> tuple[Reshape | Affine, ...]:
    """The layer as a matrix between reshapes, itself where it is one or is not fully connected.

    Its weight gradient takes the shape of the matrix: :meth:`Affine.sent`.
    """
    plain = len(affine.in_shape) == len(affine.out_shape) == 1
    if plain or not fully_connected(affine):
        return (affine,)
    inputs, outputs = (prod(affine.in_shape),), (prod(affine.out_shape),)
    matrix = replace(
        affine, weight=affine.weight.flatten(1), in_shape=inputs, out_shape=outputs, geometry=None
    )
    return (
        Reshape(affine.name, "flatten", affine.in_shape, inputs),
        matrix,
        Reshape(affine.name, "unflatten", outputs, affine.out_shape),
    )
