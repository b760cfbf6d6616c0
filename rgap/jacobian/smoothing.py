"""Kinks of a network rounded off, and sharpened again: a way around its local minima.

The cotangent jumps where a unit of ReLU changes its sign or another entry wins a max-pool, so the
gradients below jump too, and a solution cannot be followed across.  With a sharpness β,

    relu(z) ≈ log(1 + e^{βz/s})·s/β,    max_i z_i ≈ Σ_i z_i e^{βz_i/s} / Σ_i e^{βz_i/s},

s the spread of the module's input, every unit has a say at first, and less with every step of β.

Source: deterministic annealing, Rose, Gurewitz and Fox (1990).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NEIGHBOURS = 0.3  # spread of the entries of one window over that of the whole input, about
FAR = 1e3  # multiples of the largest entry below all of them at which padding stands


def rounded_kink(z: Tensor, left: float | Tensor, right: float | Tensor, beta: float) -> Tensor:
    """Two lines through 0 of given slopes, with the kink between them rounded off.

    Args:
        z: input.
        left: slope for z < 0.
        right: slope for z > 0.
        beta: sharpness; the kink is about 1/β wide.

    >>> z = torch.tensor([-9.0, 0.0, 9.0])
    >>> [f"{x:.3f}" for x in rounded_kink(z, 0.5, 1.0, 4.0).tolist()]
    ['-4.500', '0.087', '9.000']
    """
    return left * z + (right - left) * F.softplus(z, beta)


class Sharpness:
    """The β that all softened modules of a network share; None: as the network is."""

    def __init__(self) -> None:
        self.value: float | None = None
        self.modules: list[Softened] = []

    def __bool__(self) -> bool:
        """True if there is anything to sharpen."""
        return bool(self.modules)


class Softened(nn.Module):
    """A module with kinks, or what stands for it while β is finite.

    Args:
        hard: ``nn.ReLU``, ``nn.LeakyReLU`` or a max-pool of one or two dimensions.
        sharpness: shared β.
    """

    def __init__(self, hard: nn.Module, sharpness: Sharpness) -> None:
        super().__init__()
        self.hard = hard
        self._sharpness = sharpness
        self._spread: float | None = None

    def forward(self, x: Tensor) -> Tensor:
        """φ(x), with its kinks rounded off while β is finite."""
        beta = self._sharpness.value
        if beta is None:
            hard: Tensor = self.hard(x)
            return hard
        if self._spread is None:  # once, so that the function stays the same along a line search
            self._spread = max(float(x.detach().std()), 1e-12)
        beta /= self._spread
        if isinstance(self.hard, (nn.MaxPool1d, nn.MaxPool2d)):
            return rounded_pool(self.hard, x, NEIGHBOURS * beta)
        slope = self.hard.negative_slope if isinstance(self.hard, nn.LeakyReLU) else 0.0
        return rounded_kink(x, slope, 1.0, beta)


def soften(model: nn.Module) -> Sharpness:
    """Replace the modules of a model that have kinks, in place; it computes what it did.

    Kinks that a forward computes by functions, not modules, stay as they are.

    >>> model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    >>> x = torch.randn(2, 4)
    >>> before, sharpness = model(x), soften(model)
    >>> bool(torch.equal(model(x), before)), len(sharpness.modules)
    (True, 1)
    >>> sharpness.value = 1e6
    >>> bool((model(x) - before).abs().max() < 1e-5)
    True
    """
    sharpness = Sharpness()
    replaced: dict[nn.Module, Softened] = {}
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if rounded(child):
                if child not in replaced:
                    replaced[child] = Softened(child, sharpness)
                setattr(parent, name, replaced[child])
    sharpness.modules = list(replaced.values())
    return sharpness


def rounded(module: nn.Module) -> bool:
    """True for the modules that :func:`soften` replaces."""
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d)):
        return not (module.ceil_mode or module.return_indices)
    # PReLU's slope is a parameter: moved into a child it would change its name.
    return type(module) in (nn.ReLU, nn.LeakyReLU)


def rounded_pool(pool: nn.MaxPool1d | nn.MaxPool2d, x: Tensor, beta: float) -> Tensor:
    """A max-pool of which every entry of a window has its share, the larger the more.

    Args:
        pool: one that :func:`rounded` allows.
        x: input, [B, C, *space].
        beta: sharpness: entries that are 1/β below the largest have a share of about 1/e.

    >>> x = torch.tensor([[[0.0, 1.0]]])
    >>> [f"{rounded_pool(nn.MaxPool1d(2), x, beta).item():.3f}" for beta in (0.0, 2.0, 20.0)]
    ['0.500', '0.881', '1.000']
    """
    flat = isinstance(pool, nn.MaxPool1d)
    size, stride, padding, dilation = (
        _pair(value, flat, rest)
        for value, rest in (
            (pool.kernel_size, 1), (pool.stride, 1), (pool.padding, 0), (pool.dilation, 1)
        )
    )  # fmt: skip
    image = x[..., None, :] if flat else x
    batch, channels, height, width = image.shape
    low = -FAR * float(x.detach().abs().max().clamp_min(1e-12))
    image = F.pad(image, (padding[1], padding[1], padding[0], padding[0]), value=low)
    spans = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, d, k, s in zip((height, width), padding, dilation, size, stride, strict=True)
    ]
    window = F.unfold(image, size, dilation, 0, stride)
    window = window.reshape(batch, channels, size[0] * size[1], *spans)
    out = (torch.softmax(beta * window, 2) * window).sum(2)
    return out[..., 0, :] if flat else out


def _pair(value: int | tuple[int, ...], flat: bool, rest: int) -> tuple[int, int]:
    """A size in two dimensions; ``rest`` for the one that a 1-d pool does not have."""
    numbers = (value, value) if isinstance(value, int) else value
    return (rest, numbers[0]) if flat else (numbers[0], numbers[-1])
