"""Priors that know the network: the statistics that its batch norms have kept."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn


class Statistics:
    """How far a batch is from the running statistics of every batch norm.

    ``Σ_l ‖mean(u_l) − μ_l‖ + ‖var(u_l) − σ²_l‖`` over the batch norms l with inputs u_l, statistics
    per channel.

    Args:
        model: hooks on its batch norms note what they are given.

    Source: Yin et al. (2021), section 3.3.

    >>> import torch
    >>> model = nn.Sequential(nn.BatchNorm2d(2)).eval()
    >>> statistics, x = Statistics(model), torch.randn(8, 2, 16, 16)
    >>> _ = model(x)
    >>> near = float(statistics.penalty())
    >>> _ = model(3 * x + 1)
    >>> near < 0.5 < float(statistics.penalty())
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self._norms: list[nn.modules.batchnorm._BatchNorm] = []
        self._seen: dict[int, Tensor] = {}
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
                number = len(self._norms)
                self._norms.append(module)
                module.register_forward_pre_hook(partial(self._note, number), with_kwargs=True)

    def __bool__(self) -> bool:
        """True if there is any batch norm."""
        return bool(self._norms)

    def _note(
        self, number: int, _: nn.Module, args: tuple[Tensor, ...], named: dict[str, Tensor]
    ) -> None:
        self._seen[number] = args[0] if args else next(iter(named.values()))

    def penalty(self) -> Tensor:
        """The distance at the last batch that ran through a model that has batch norms."""
        parts: list[Tensor] = []
        for number, norm in enumerate(self._norms):
            u = self._seen[number]
            axes = [0, *range(2, u.ndim)]
            assert norm.running_mean is not None and norm.running_var is not None
            mean, var = u.mean(axes), u.var(axes, correction=0)
            for own, kept in ((mean, norm.running_mean), (var, norm.running_var)):
                gap = (own - kept).square().sum()
                parts.append((gap + 1e-12).sqrt())  # a slope where the gap is 0
        self._seen.clear()
        return sum(parts[1:], start=parts[0])
