"""Running a model without leaving traces in it, or without running it at all."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rgap.network.batch_statistics import without_running_statistics
from rgap.network.watching import LayerCall, watched


@contextmanager
def untouched(model: nn.Module, *, hooks: bool = True, seed: int | None = None) -> Iterator[None]:
    """Restore what a forward may write: attributes, buffers, lists on modules, random state.

    Args:
        model: the module that is about to run.
        hooks: False: its forward hooks do not run.
        seed: of what it draws; None: it draws on.
    """
    modules = [m for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    kept = [(m, dict(m.__dict__)) for m in modules]
    inside = [
        (value, _members(value))
        for m in modules
        for value in m.__dict__.values()
        if isinstance(value, (list, dict, set))
    ]
    tensors = [
        (t, t.detach().clone())
        for m in modules
        for t in (*m._buffers.values(), *m.__dict__.values())
        if isinstance(t, Tensor) and not t.is_meta
    ]
    if not hooks:
        for m in modules:
            for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks"):
                m.__dict__[name] = type(m.__dict__[name])()
    devices = {t.device for t in model.parameters() if t.is_cuda}
    try:
        with torch.random.fork_rng(devices=list(devices)):
            if seed is not None:
                _seed(seed, devices)
            yield
    finally:
        for module, attributes in kept:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for value, saved in inside:
            _refill(value, saved)
        with torch.no_grad():
            for tensor, before in tensors:
                if not torch.equal(tensor, before):
                    tensor.copy_(before)


def _seed(seed: int, devices: Iterable[torch.device]) -> None:
    """Of the processor and of these devices: ``torch.manual_seed`` reaches all that there could be.

    It formats its own stack for each kind that there is not, which takes longer than a small model.
    """
    torch.default_generator.manual_seed(seed)
    for device in devices:
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def _members(value: Any) -> tuple[Any, ...]:
    """Of a list, dict or set, those of a dict with their keys."""
    return tuple(value.items()) if isinstance(value, dict) else tuple(value)


def _refill(value: Any, saved: tuple[Any, ...]) -> None:
    """Give a list, dict or set the members it had; by identity, tensors have no ``==``."""
    members = _members(value)
    if isinstance(value, dict):
        same = [(k, id(v)) for k, v in members] == [(k, id(v)) for k, v in saved]
    else:
        same = [id(v) for v in members] == [id(v) for v in saved]
    if same:
        return
    value.clear()
    (value.extend if isinstance(value, list) else value.update)(saved)


def meta_copy(module: nn.Module) -> nn.Module:
    """The module without its values: its forward tells shapes, and no hook notices."""
    memo: dict[int, Any] = {}
    for m in module.modules():
        for value in (*m._parameters.values(), *m._buffers.values(), *vars(m).values()):
            if isinstance(value, nn.Parameter):
                memo[id(value)] = nn.Parameter(on_meta(value), requires_grad=False)
            elif isinstance(value, Tensor):
                memo[id(value)] = on_meta(value)
    return copy.deepcopy(module, memo)


def bare_copy(module: nn.Module, device: torch.device | str) -> nn.Module:
    """A copy in float64, :func:`without_hooks`, that writes no running statistics."""
    return without_running_statistics(without_hooks(copy.deepcopy(module).to(device).double()))


def without_hooks(module: nn.Module) -> nn.Module:
    """The module itself, the hooks on its forwards taken away."""
    for part in module.modules():
        part._forward_hooks.clear()
        part._forward_pre_hooks.clear()
    return module


def backward_hooks(model: nn.Module) -> list[str]:
    """Paths of the modules and parameters on whose gradients a hook runs."""
    parts: list[tuple[str, Any]] = [*model.named_modules(), *model.named_parameters()]
    kinds = "_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks"
    return [
        name or type(model).__name__
        for name, part in parts
        if any(getattr(part, kind, None) for kind in kinds)
    ]


def on_meta(value: Tensor) -> Tensor:
    """The shape of a tensor alone, in the precision of the chain."""
    dtype = torch.float64 if value.is_floating_point() else value.dtype
    return torch.empty(value.shape, dtype=dtype, device="meta")


@contextmanager
def plain_kernels() -> Iterator[None]:
    """Attention by its formula: the fused kernels have no second derivative."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


SMALL = 2**19  # multiply-adds of a convolution below which oneDNN costs more than it saves


def convolution_work(model: nn.Module, *inputs: Tensor) -> float:
    """Multiply-adds of a convolution of one forward, in the mean; 0 where there is none.

    >>> convolution_work(nn.Conv1d(2, 3, 4), torch.zeros(1, 2, 10)) == 7 * 3 * 2 * 4
    True
    """
    work: list[int] = []

    def note(call: LayerCall) -> None:
        assert isinstance(call.module, kinds)
        work.append(call.made.numel() * call.module.weight[0].numel())

    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, kinds)}
    with torch.no_grad(), watched(layers, leave=note):
        model(*inputs)
    return sum(work) / len(work) if work else 0.0


@contextmanager
def small_kernels(work: float) -> Iterator[None]:
    """Convolutions of little work in float32 on a processor without oneDNN's set-up.

    oneDNN prepares every call, which takes longer than a convolution below :data:`SMALL`; float64
    and other devices do not use it anyway.  Above, nothing changes.

    Args:
        work: of :func:`convolution_work`.
    """
    backend: Any = torch.backends.mkldnn
    usual = backend.enabled
    if 0 < work < SMALL:
        backend.enabled = False
    try:
        yield
    finally:
        backend.enabled = usual
