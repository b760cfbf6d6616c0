"""One step of stochastic gradient descent undone: the gradient from the weights around it.

``p' = p − η s (g + λ p)`` with learning rate η, weight decay λ and s = 1, or 1 + μ with Nesterov's
momentum μ.  The first step of plain momentum is a plain step, for its buffer begins as the gradient
(``torch.optim.SGD``, whose dampening leaves the first step alone too).  So
``g = (p − p')/(η s) − λ p``, up to rounding: p' lies on the grid of its format, and an error of a
whole spacing of it is divided by η.  That is far more than the gradient's own rounding, differs
from entry to entry, and is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rgap import validation
from rgap.arithmetic.rounding import UNIFORM, spacing

__all__ = ["Descent"]

# What the first step of other optimisers leaves of a gradient, by the name of the class.
_ADAPTIVE = "its step is close to lr·sign(g) on every entry, so the sizes of the gradient are gone"
_SCALED = "it divides every entry by a running size of its own, which the weights do not tell"
_OTHERS = {
    "adam": _ADAPTIVE, "adamw": _ADAPTIVE, "adamax": _ADAPTIVE, "nadam": _ADAPTIVE,
    "radam": _SCALED, "amsgrad": _ADAPTIVE, "rmsprop": _SCALED, "adagrad": _ADAPTIVE,
    "adadelta": _SCALED, "rprop": _ADAPTIVE, "sparseadam": _ADAPTIVE, "lion": _ADAPTIVE,
    "signsgd": _ADAPTIVE, "lamb": _SCALED, "lars": _SCALED, "adafactor": _SCALED,
    "muon": _SCALED, "yogi": _ADAPTIVE, "lbfgs": "its step follows a line search",
    "asgd": "it averages the weights of many steps",
}  # fmt: skip
# The option of a parameter group that only one family of optimisers has.
_MARKS = {"betas": "adam", "alpha": "rmsprop", "lr_decay": "adagrad", "rho": "adadelta",
          "etas": "rprop", "lambd": "asgd", "max_iter": "lbfgs"}  # fmt: skip
_INSTEAD = (
    "have the client send its gradients, {n: p.grad for n, p in model.named_parameters()}, or take "
    "one step of torch.optim.SGD"
)
_OPTIONS = ("weight_decay", "momentum", "nesterov", "dampening", "maximize")


@dataclass(frozen=True)
class Descent:
    """How a client turned gradients into weights.

    Attributes:
        lr: learning rate η.
        steps: steps between the two sets of weights.
        weight_decay: λ.
        momentum: μ.
        nesterov: whether the step looks ahead by μ.
        dampening: of the buffer, from the second step on.
        maximize: the client climbed.

    Raises:
        ValueError: a learning rate that is not positive, options that several steps mix up.
    """

    lr: float
    steps: int = 1
    weight_decay: float = 0.0
    momentum: float = 0.0
    nesterov: bool = False
    dampening: float = 0.0
    maximize: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "momentum", "dampening"):
            validation.real(name, getattr(self, name), 0.01)
        if not (math.isfinite(self.lr) and self.lr > 0):
            raise ValueError(
                f"lr: expected a positive learning rate, got {self.lr!r}; write lr=0.01"
            )
        steps = self.steps
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ValueError(
                f"steps: expected a whole number of local steps, at least 1, got {steps!r}; write "
                "steps=1"
            )
        for name in ("weight_decay", "momentum", "dampening"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name}: expected a number of at least 0, got {value!r}")
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError(
                "nesterov: expected a momentum above 0 and no dampening, as torch.optim.SGD does, "
                f"got momentum={self.momentum!r}, dampening={self.dampening!r}"
            )
        mixed = [n for n in ("momentum", "weight_decay") if getattr(self, n)]
        if self.steps > 1 and mixed:
            raise ValueError(
                f"{mixed[0]}: with steps={self.steps} each step adds to what the ones before it "
                "left, and the gradients cannot be told apart; expected one step (steps=1), or "
                f"plain SGD ({mixed[0]}=0.0)"
            )

    @classmethod
    def of(cls, lr: float | None, steps: int = 1, optimizer: Any = None, **options: Any) -> Descent:
        """From keywords, the name of an optimiser, an optimiser or its parameter groups.

        Args:
            lr: learning rate; None takes the optimiser's.
            steps: of the client.
            optimizer: ``"sgd"``, a ``torch.optim.SGD``, its ``state_dict()`` or ``param_groups``.
            **options: the other attributes.

        Raises:
            ValueError: an optimiser whose step does not give the gradient back, groups with
                different options, options that contradict those of the optimiser.
            TypeError: something that is no optimiser.
        """
        stated = {} if optimizer is None else _declared(optimizer)
        if lr is not None:
            options["lr"] = lr
        for name, value in options.items():
            if value is None:
                continue
            if name in stated and value and stated[name] != value:
                raise ValueError(
                    f"{name}: stated as {value!r}, but the optimiser has {stated[name]!r}; write "
                    "the one that the client used, once"
                )
            stated.setdefault(name, value)
        if "lr" not in stated:
            raise ValueError("lr: expected the client's learning rate, got none; write lr=0.01")
        return cls(steps=steps, **stated)

    @property
    def rate(self) -> float:
        """What the weights moved by, over the mean gradient: η s, times the steps."""
        look_ahead = 1.0 + self.momentum if self.nesterov else 1.0
        return self.lr * look_ahead * self.steps

    def gradient(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of one parameter and the standard deviation of its rounding.

        Args:
            before: p.
            after: p', of the same shape.
        """
        p, q = before.detach().double(), after.detach().double()
        sign = -1.0 if self.maximize else 1.0
        moved = (p - q) / self.rate  # in float64: only the client's own rounding is in it
        wide = torch.promote_types(before.dtype, torch.float32)
        std = self.rounding(before, after)
        return (sign * (moved - self.weight_decay * p)).to(wide), std.to(wide)

    def rounding(self, before: Tensor, after: Tensor) -> Tensor:
        """Standard deviation of what rounding leaves on each entry of the gradient, float64.

        Of the sum p', of the product η d before it, of ``d = g + λ p`` and, where the client's
        format is coarser than that of p, of p on its way there.
        """
        p, dtype = before.detach().double(), after.dtype
        direction = (p - after.detach().double()) / self.lr
        on_weights = (
            spacing(after, dtype).square() * self.steps
            + spacing(self.lr * direction, dtype).square()
        )
        if not torch.equal(p.to(dtype).double(), p):
            on_weights = on_weights + spacing(before, dtype).square()
        variance = on_weights / self.rate**2
        if self.weight_decay or self.nesterov:
            variance = variance + spacing(direction, dtype).square()
            variance = variance + spacing(self.weight_decay * p, dtype).square()
        return UNIFORM * variance.sqrt()


def _declared(optimizer: Any) -> dict[str, Any]:
    """Options of SGD that an optimiser states; raises for any other optimiser."""
    if isinstance(optimizer, str):
        _refuse(optimizer)
        return {}
    groups: Any = optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        if not isinstance(optimizer, torch.optim.SGD):
            _refuse(type(optimizer).__name__)
        groups = optimizer.param_groups
    elif isinstance(optimizer, Mapping):
        groups = optimizer.get("param_groups", [optimizer])
    if not isinstance(groups, Iterable) or not all(isinstance(g, Mapping) for g in groups):
        raise TypeError(
            f"optimizer: expected the name of an optimiser, an optimiser or its param_groups, got "
            f"{type(optimizer).__name__}; write optimizer='sgd'"
        )
    each = [_options(group) for group in groups]
    if not each or any(one != each[0] for one in each):
        raise ValueError(
            f"optimizer: expected the same options for all parameters, got {len(each)} groups "
            "with different ones; write one dict of gradients from Update.from_delta(...) of each "
            "group's parameters and Update(gradients)"
        )
    return each[0]


def _options(group: Mapping[str, Any]) -> dict[str, Any]:
    for mark, name in _MARKS.items():
        if mark in group:
            _refuse(name)
    options = {name: group[name] for name in _OPTIONS if group.get(name)}
    if "lr" in group:
        options["lr"] = float(group["lr"])
    return options


def _refuse(name: str) -> None:
    """Raise unless ``name`` is stochastic gradient descent."""
    key = "".join(c for c in name.lower() if c.isalnum())
    if key in ("sgd", "gd", "sgdmomentum", "sgdnesterov", "gradientdescent"):
        return
    why = _OTHERS.get(key, "what its step leaves of a gradient is not known here")
    raise ValueError(f"optimizer: {name!r} cannot be undone: {why}. Expected 'sgd'; {_INSTEAD}.")
