"""Products with first and second derivatives of a function, by reverse passes of autograd alone.

What :mod:`torch.func` and forward mode do here as well loads PyTorch's compiler on first use, two
seconds of every process.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["hessian_product", "pulled"]


def pulled(function: Callable[[Tensor], Tensor], x: Tensor, k: Tensor) -> Tensor:
    """``(D function(x))ᵀ k``, the shape of x; in the graph of x and k where they have one.

    >>> pulled(torch.square, torch.tensor([3.0]), torch.ones(1))
    tensor([6.])
    """
    graph = torch.is_grad_enabled() and (x.requires_grad or k.requires_grad)
    with torch.enable_grad():
        at = x if graph and x.requires_grad else x.detach().requires_grad_()
        out = function(at)
        if not out.requires_grad:  # it does not depend on x
            return torch.zeros_like(x)
        pull = torch.autograd.grad(out, at, k, create_graph=graph, materialize_grads=True)
    return pull[0]


def hessian_product(value: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor:
    """``∇²value(x) v``: it is symmetric, so the gradient of ``⟨∇value, v⟩``.

    >>> hessian_product(lambda x: (x**3).sum(), torch.tensor([2.0]), torch.ones(1))
    tensor([12.])
    """
    with torch.enable_grad():
        z = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(value(z), z, create_graph=True, materialize_grads=True)
        if not slope.requires_grad:
            return torch.zeros_like(z)
        return torch.autograd.grad((slope * direction).sum(), z, materialize_grads=True)[0]
