"""What mends a mistake, for who calls the library and for who types a command."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

__all__ = [
    "AS_CLASSES",
    "FUNCTION",
    "GRADIENTS",
    "INVERTED",
    "LOCAL",
    "NAMED",
    "NUMBERED",
    "Remedy",
    "frozen",
    "frozen_where",
    "in_options",
    "trained",
]

_OPTIONS: ContextVar[bool] = ContextVar("options", default=False)


@dataclass(frozen=True)
class Remedy:
    """One move that mends a mistake; as text, in the words of whoever reads it.

    Attributes:
        python: the line; ``update`` and ``model`` are what was checked.
        option: what does the same on the command line.

    >>> remedy = Remedy("dataclasses.replace(update, batch_size=4)", "--batch-size 4")
    >>> f"write {remedy}"
    'write dataclasses.replace(update, batch_size=4)'
    >>> with in_options():
    ...     f"write {remedy}"
    'write --batch-size 4'
    """

    python: str
    option: str

    def then(self, words: str) -> Remedy:
        """Both with the same words behind them."""
        return Remedy(self.python + words, self.option + words)

    def __str__(self) -> str:
        return self.option if _OPTIONS.get() else self.python


@contextmanager
def in_options(yes: bool = True) -> Iterator[None]:
    """Remedies are written as options of a command inside, if ``yes``."""
    token = _OPTIONS.set(yes)
    try:
        yield
    finally:
        _OPTIONS.reset(token)


_ORDERED = "the tensors of UPDATE under the names and in the order of the model's parameters"
NAMED = Remedy(
    "dataclasses.replace(update, gradients={n: update.gradients[n] for n, _ in "
    "model.named_parameters()})",
    _ORDERED,
)
NUMBERED = Remedy(
    "dataclasses.replace(update, gradients=dict(zip(dict(model.named_parameters()), "
    "update.gradients.values())))",
    _ORDERED,
)
GRADIENTS = Remedy(
    "Update({n: p.grad for n, p in model.named_parameters()})",
    "the network that UPDATE was computed on as MODEL",
)
FUNCTION = Remedy(
    "dataclasses.replace(update, loss=the_function)",
    "--loss NAME of a loss that has one, or call rgap from Python with the function",
)
LOCAL = Remedy("local=rgap.LocalTraining(rate)", "--local-rate RATE").then(
    " with the client's learning rate"
)
AS_CLASSES = Remedy("Loss('cross_entropy')", "--loss cross_entropy")
INVERTED = Remedy("rgap.invert(model, update).labels", "rgap invert MODEL UPDATE")


def frozen(name: str) -> Remedy:
    """One parameter is declared frozen."""
    return Remedy(f"model.get_parameter({name!r}).requires_grad_(False)", "--frozen")


def frozen_where(condition: str) -> Remedy:
    """Parameters ``n`` of which ``condition`` is true are declared frozen."""
    return Remedy(
        f"[p.requires_grad_(False) for n, p in model.named_parameters() if {condition}]  #",
        "--frozen",
    ).then(" if the client froze these")


def trained(steps: object, rate: str, factor: object = None) -> Remedy:
    """The search for an update of several steps, ``factor`` times their mean if that is given."""
    shared, option = "", ""
    if factor is not None:
        shared = f"gradients={{n: g / {factor} for n, g in update.gradients.items()}}, "
        option = f"--factor {factor} "
    return Remedy(
        f"rgap.match(model, dataclasses.replace(update, {shared}local_steps={steps}), "
        f"local=rgap.LocalTraining({rate}))",
        f"rgap match MODEL UPDATE {option}--local-steps {steps} --local-rate {rate}",
    )
