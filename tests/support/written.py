"""A network from a forward written on the spot."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn


class Written(nn.Module):
    """A network whose forward is a function of itself and x."""

    def __init__(self, forward: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> None:
        super().__init__()
        self.written = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.written(self, x)
