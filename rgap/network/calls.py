"""One call in a traced forward, with the data's place in it marked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from rgap.network.modules import Names
from rgap.network.probing import Shape, Unsupported

DATA = object()  # stands for the data-dependent tensor among the arguments


@dataclass(frozen=True)
class Call:
    """A traced call of a function or method with exactly one data-dependent tensor.

    Attributes:
        name: of the node.
        target: the function, or the method's name.
        args: with :data:`DATA` in the data's place and a method's object first.
        kwargs: likewise.
        in_shape: of the data, without the batch dimension.
        names: parameter names by ``id``.
    """

    name: str
    target: Callable[..., Any] | str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    in_shape: Shape
    names: Names

    @property
    def kind(self) -> str:
        """Name of the function or method."""
        if isinstance(self.target, str):
            return self.target
        return getattr(self.target, "__name__", str(self.target))

    def options(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments after the data, which must come first."""
        if self.args and self.args[0] is DATA:
            return self.args[1:], self.kwargs
        if not self.args and self.kwargs.get("input") is DATA:
            return (), {k: v for k, v in self.kwargs.items() if k != "input"}
        raise Unsupported(f"{self.kind} with the data in another place than the first")

    def on(self, x: Tensor) -> Any:
        """The call with ``x`` as its data."""
        return evaluate(self.target, *substitute((self.args, self.kwargs), x))


def evaluate(target: Callable[..., Any] | str, args: Any, kwargs: Any) -> Any:
    """Call a function, or the method of its first argument."""
    if isinstance(target, str):
        return getattr(args[0], target)(*args[1:], **kwargs)
    return target(*args, **kwargs)


def substitute(value: Any, x: Tensor) -> Any:
    """``value`` with ``x`` for :data:`DATA` everywhere."""
    if value is DATA:
        return x
    if isinstance(value, (tuple, list)):
        return type(value)(substitute(v, x) for v in value)
    if isinstance(value, dict):
        return {k: substitute(v, x) for k, v in value.items()}
    return value
