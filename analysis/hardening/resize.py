"""One layer of a network made narrower or coarser, and what reads it fitted to the new sizes."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from rgap.analysis.calls.layers import calls_of
from rgap.network.running import first_line
from rgap.network.watching import LayerCall, watched

__all__ = ["UnfitError", "called_layers", "with_channels", "with_stride"]


class UnfitError(ValueError):
    """The network does not run with that layer changed: another branch needs the old sizes."""


def called_layers(model: nn.Module, shape: tuple[int, ...]) -> list[tuple[str, nn.Module]]:
    """Fully connected and convolutional layers in the order of their first call.

    Args:
        model: in eval mode; left as it was.
        shape: of one sample.
    """
    modules = dict(model.named_modules())
    names = dict.fromkeys(call.name for call in calls_of(model, shape) if call.use is not None)
    return [(name, modules[name]) for name in names if _resizable(modules.get(name))]


def with_channels(
    model: nn.Module, layer: str, count: int, shape: tuple[int, ...], seed: int = 0
) -> nn.Module:
    """A copy in which ``layer`` has ``count`` outputs; its weights and its readers' drawn anew.

    Args:
        model: in eval mode; left as it was.
        layer: path of a fully connected or convolutional layer.
        count: its output channels or features.
        shape: of one sample.
        seed: of the weights.

    Raises:
        UnfitError: the network does not run with it.

    >>> net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).eval()
    >>> with_channels(net, "0", 5, (4,))[2]
    Linear(in_features=5, out_features=2, bias=True)
    """
    twin = copy.deepcopy(model)
    module: Any = twin.get_submodule(layer)
    if isinstance(module, nn.Linear):
        module.out_features = count
    else:
        if count % module.groups:
            raise UnfitError(f"'{layer}' has {module.groups} groups; {count} is no multiple")
        module.out_channels = count
    return _fitted(twin, shape, seed)


def with_stride(
    model: nn.Module, layer: str, stride: int, shape: tuple[int, ...], seed: int = 0
) -> nn.Module:
    """A copy in which the convolution ``layer`` has that stride; its readers fit what it gives.

    Args:
        model: in eval mode; left as it was.
        layer: path of a convolution.
        stride: in every dimension.
        shape: of one sample.
        seed: of weights that are drawn anew.

    Raises:
        UnfitError: the network does not run with it.
    """
    twin = copy.deepcopy(model)
    module: Any = twin.get_submodule(layer)
    module.stride = (stride,) * len(module.kernel_size)
    if isinstance(module.padding, str) and module.padding == "same" and stride > 1:
        raise UnfitError(f"'{layer}' has padding='same', which PyTorch allows at stride 1 only")
    return _fitted(twin, shape, seed)


def _resizable(module: nn.Module | None) -> bool:
    return isinstance(module, (nn.Linear, _ConvNd)) and not isinstance(module, _ConvTransposeNd)


def _fitted(twin: nn.Module, shape: tuple[int, ...], seed: int) -> nn.Module:
    """Run once; every layer that was changed or meets another width has its weights drawn anew."""
    layers = {
        name: module
        for name, module in twin.named_modules()
        if _resizable(module) or isinstance(module, _BatchNorm)
    }
    with torch.random.fork_rng(devices=[]), watched(layers, _fit):
        torch.manual_seed(seed)
        _run(twin, shape)
    return twin


def _fit(call: LayerCall) -> None:
    module: Any = call.module
    if isinstance(module, _BatchNorm):
        width = call.given.shape[1]
        if width != module.num_features:
            fresh = type(module)(width, eps=module.eps, affine=module.affine).to(call.given)
            module.num_features = width
            module._parameters, module._buffers = fresh._parameters, fresh._buffers
        return
    if isinstance(module, nn.Linear):
        width = call.given.shape[-1]
        module.in_features = width
        size: tuple[int, ...] = (module.out_features, width)
    else:
        width = call.given.shape[1]
        module.in_channels = width
        if width % module.groups:
            raise UnfitError(f"{width} channels meet {module.groups} groups")
        size = (module.out_channels, width // module.groups, *module.kernel_size)
    if tuple(module.weight.shape) == size:
        return
    if "weight" not in module._parameters:
        raise UnfitError("the weight of a layer is computed (weight norm, a parametrisation)")
    module.weight = nn.Parameter(module.weight.detach().new_zeros(size))
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias.detach().new_zeros(size[0]))
    module.reset_parameters()


def _run(twin: nn.Module, shape: tuple[int, ...]) -> None:
    parameter = next(twin.parameters())
    try:
        with torch.no_grad():
            twin(torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device))
    except UnfitError:
        raise
    except Exception as error:  # whatever a user's forward raises at a width it was not written for
        raise UnfitError(first_line(error)) from error
