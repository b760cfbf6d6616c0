"""Batch norms that normalise by the statistics of the batch that they are given.

In train mode the mean and the variance of a channel are functions of the whole batch, and the
gradient is differentiated through them; the running statistics are written, never read.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["FEWEST", "mixes", "mixing", "without_running_statistics"]

FEWEST = 2  # samples of a trial batch: one value a channel has no spread to divide by


def mixes(module: nn.Module) -> bool:
    """True for a batch norm that mixes the samples: in train mode, or without other statistics.

    >>> [mixes(nn.BatchNorm1d(2, track_running_stats=kept).eval()) for kept in (True, False)]
    [False, True]
    >>> mixes(nn.BatchNorm2d(2)), mixes(nn.LayerNorm(2))
    (True, False)
    """
    return isinstance(module, _BatchNorm) and (module.training or module.running_mean is None)


def mixing(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Path and module of every batch norm of a model that :func:`mixes`."""
    return ((name, module) for name, module in model.named_modules() if mixes(module))


def without_running_statistics(model: nn.Module) -> nn.Module:
    """The module itself, whose batch norms in train mode forget what they would only write to.

    It computes what it did.  Nothing is written in a forward any more, so that it can be batched
    and differentiated by function transforms.

    Args:
        model: changed in place, so give a copy.

    >>> import torch
    >>> norm, x = nn.BatchNorm1d(2), torch.rand(3, 2)
    >>> before = norm(x)
    >>> bool(torch.equal(without_running_statistics(norm)(x), before)), norm.running_mean
    (True, None)
    """
    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.training:
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model
