"""What layers of a network are given and what they return, noted while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class LayerCall:
    """One call of a module.

    Attributes:
        name: its path.
        module: the module.
        args, kwargs: what it was called with.
        made: what it returned; None before it has.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    made: Any = None

    @property
    def given(self) -> Any:
        """Its first argument, None where there is none."""
        return next(iter((*self.args, *self.kwargs.values())), None)

    @property
    def tensors(self) -> tuple[Tensor, Tensor] | None:
        """First argument and output, where both are tensors."""
        both = self.given, self.made
        return both if isinstance(both[0], Tensor) and isinstance(both[1], Tensor) else None


Note = Callable[[LayerCall], None]


@contextmanager
def watched(
    modules: Mapping[str, nn.Module], enter: Note | None = None, leave: Note | None = None
) -> Iterator[list[LayerCall]]:
    """Note the calls of some modules while the block runs; their hooks are gone afterwards.

    Args:
        modules: by path; scripted ones take no hooks and are passed over.
        enter: called before a module runs.
        leave: called when it has returned.

    Yields:
        Where neither is given, a list to which every call is added when it begins; it keeps what
        the calls were given and returned.

    >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh())
    >>> with watched(dict(net.named_children())) as calls:
    ...     _ = net(torch.ones(1, 2))
    >>> [(call.name, tuple(call.given.shape), tuple(call.made.shape)) for call in calls]
    [('0', (1, 2), (1, 3)), ('1', (1, 3), (1, 3))]
    """
    calls: list[LayerCall] = []
    running: list[LayerCall] = []
    begin = calls.append if enter is None and leave is None else enter
    hooks: list[Any] = []
    for path, module in modules.items():

        def before(own: nn.Module, args: Any, kwargs: Any, path: str = path) -> None:
            running.append(LayerCall(path, own, args, kwargs))
            if begin is not None:
                begin(running[-1])

        def after(_: nn.Module, args: Any, kwargs: Any, made: Any) -> None:
            call = running.pop()
            call.made = made
            if leave is not None:
                leave(call)

        if not isinstance(module, torch.jit.ScriptModule):
            hooks += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after, with_kwargs=True),
            ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
