"""Priors that know the network: the statistics that its batch norms have kept."""

from __future__ import annotations

from torch import Tensor, nn

from rgap.network.watching import LayerCall


class Statistics:
    """How far a batch is from the running statistics of every batch norm.

    ``Σ_l ‖mean(u_l) − μ_l‖ + ‖var(u_l) − σ²_l‖`` over the batch norms l with inputs u_l, statistics
    per channel.

    Args:
        model: the network.

    Source: Yin et al. (2021), section 3.3.

    >>> import torch
    >>> from rgap.network.watching import watched
    >>> model = nn.Sequential(nn.BatchNorm2d(2)).eval()
    >>> statistics, x = Statistics(model), torch.randn(8, 2, 16, 16)
    >>> def penalty(x):
    ...     with watched(statistics.norms) as calls:
    ...         _ = model(x)
    ...     return float(statistics.penalty(calls))
    >>> penalty(x) < 0.5 < penalty(3 * x + 1)
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self.norms = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats
        }
        self.kept = {
            name: (norm.running_mean, norm.running_var) for name, norm in self.norms.items()
        }

    def __bool__(self) -> bool:
        """True if there is any batch norm."""
        return bool(self.norms)

    def penalty(self, calls: list[LayerCall]) -> Tensor:
        """The distance of a batch from the statistics of norms that met it in ``calls``."""
        parts: list[Tensor] = []
        last = {call.name: call.given for call in calls}
        for name, statistics in self.kept.items():
            u = last[name]
            axes = [0, *range(2, u.ndim)]
            for own, kept in zip(
                (u.mean(axes), u.var(axes, correction=0)), statistics, strict=True
            ):
                assert kept is not None
                gap = (own - kept).square().sum()
                parts.append((gap + 1e-12).sqrt())  # a slope where the gap is 0
        return sum(parts[1:], start=parts[0])
