"""Dense references by automatic differentiation; nothing here knows of structure."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

BORDERS = ("zeros", "zeros", "zeros", "reflect", "replicate", "circular")


@dataclass(frozen=True)
class Geometry:
    """A drawn convolution with its batch."""

    module: nn.Module
    shape: tuple[int, ...]
    batch: int
    seed: int


@st.composite
def layers(draw: st.DrawFn) -> Geometry:
    """Random layers: kernel, stride, padding, dilation, groups, channels, bias, B ≤ 4."""
    seed = draw(st.integers(0, 2**31 - 1))
    dims = draw(st.sampled_from([0, 1, 2, 2, 2, 3]))
    batch = draw(st.integers(1, 4))
    bias = draw(st.booleans())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if dims == 0:
            width, out = draw(st.integers(1, 12)), draw(st.integers(1, 12))
            return Geometry(nn.Linear(width, out, bias=bias).double(), (width,), batch, seed)
        groups = draw(st.integers(1, 2))
        channels = groups * draw(st.integers(1, 2))
        filters = groups * draw(st.integers(1, 3))
        limit = {1: 12, 2: 6, 3: 4}[dims]
        kernel = tuple(draw(st.integers(1, 3)) for _ in range(dims))
        stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
        dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
        same = draw(st.booleans()) and all(s == 1 for s in stride)
        padding = "same" if same else tuple(draw(st.integers(0, 2)) for _ in range(dims))
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
        space = tuple(max(draw(st.integers(2, limit)), r) for r in reach)
        make = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        most = [r // 2 for r in reach] if isinstance(padding, str) else padding
        fits = all(p < n for p, n in zip(most, space, strict=True))  # a reflection stays inside
        border = draw(st.sampled_from(BORDERS if fits else BORDERS[:1]))
        module = make(channels, filters, kernel, stride, padding, dilation, groups, bias, border)
        return Geometry(module.double(), (channels, *space), batch, seed)


def dense_blocks(module: nn.Module, k: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Dense K (gradient rows) and W (weight rows) in the unknown x [B, *shape], by autograd."""
    batch = len(k)
    size = batch * int(torch.tensor(shape).prod())
    basis = torch.eye(size, dtype=torch.float64).reshape(size, batch, *shape)
    weight = {"weight": module.weight.detach()}
    rest = {"bias": torch.zeros_like(module.bias)} if module.bias is not None else {}

    def gradient(x: Tensor) -> Tensor:
        def value(w: dict[str, Tensor]) -> Tensor:
            return (torch.func.functional_call(module, {**w, **rest}, (x,)) * k).sum()

        return torch.func.grad(value)(weight)["weight"]

    def forward(x: Tensor) -> Tensor:
        return torch.func.functional_call(module, {**weight, **rest}, (x,))

    columns = torch.func.vmap(gradient)(basis).flatten(1).T
    images = forward(basis.flatten(0, 1)).reshape(size, -1).T  # samples do not meet in a layer
    return columns, images.detach()


def dense_rank(matrix: Tensor) -> int:
    """NumPy's rank."""
    return int(torch.linalg.matrix_rank(matrix)) if matrix.numel() else 0


def dense_jacobian(model: nn.Module, x: Tensor, targets: Tensor, loss: str) -> dict[str, Tensor]:
    """∂(∂L/∂θ)/∂x of every trained parameter by two reverse passes, [entries, x.numel()]."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    data = x.clone().requires_grad_()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value = getattr(nn.functional, loss)(model(data), targets)
        gradients = torch.autograd.grad(
            value, list(trained.values()), create_graph=True, materialize_grads=True
        )
        rows = {}
        for name, gradient in zip(trained, gradients, strict=True):
            size = gradient.numel()
            if not gradient.requires_grad:
                rows[name] = x.new_zeros(size, x.numel())
                continue
            every = torch.eye(size, dtype=gradient.dtype).reshape(size, *gradient.shape)
            (found,) = torch.autograd.grad(
                gradient,
                data,
                every,
                retain_graph=True,
                is_grads_batched=True,
                materialize_grads=True,
            )
            rows[name] = found.reshape(size, -1)
    return rows
