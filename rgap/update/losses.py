"""Losses: their value, their cotangent in closed form, and the targets read back from it.

The cotangent k = dL/d(outputs) is where a gradient starts to talk about the labels.  With s the
scale of the reduction (1/B for a mean over samples, 1/numel over entries, 1 for a sum) and y the
targets:

=====================================  =============================  ==================
loss (``torch.nn.functional`` name)    cotangent                      options
=====================================  =============================  ==================
``cross_entropy``                      ``s (softmax(z) - y)``         ``weight``,
                                                                      ``label_smoothing``
``nll_loss`` of log-probabilities      ``-s w y``                     ``weight``
``focal_loss``                         ``s a F(q) (y - p)``           ``weight``, ``gamma``
``binary_cross_entropy_with_logits``   ``s (sigmoid(z) - y)``         ``pos_weight``
``binary_cross_entropy``               ``s (z - y) / (z (1 - z))``
``sigmoid_focal_loss``                 ``s a (2y - 1) H(r)``          ``alpha``, ``gamma``
``mse_loss``                           ``2 s (z - y)``
=====================================  =============================  ==================

The formulas in full are those of :mod:`rgap.update.loss_forms`.  A loss of one's own is a function
``loss(outputs, targets)`` that returns a scalar, and an unknown one is ``"unknown"``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, sqrt
from typing import Any

import torch
from torch import Tensor

from rgap.update import targets as admitted
from rgap.update.formula import Formula, Lost, Own
from rgap.update.loss_forms import FORMS
from rgap.update.loss_options import (
    OPTIONS,
    UNKNOWN,
    of_module,
    require_classes,
    require_none,
    require_reduction,
    settled,
)
from rgap.update.reduction import Reduction
from rgap.update.targets import BINARY, CLASSES, CROSS_ENTROPY, LOG_PROBABILITIES, SQUARED

__all__ = ["UNKNOWN", "Loss"]

_EQUATIONS = (CROSS_ENTROPY, BINARY, SQUARED)


@dataclass(frozen=True)
class Loss:
    """The loss a client minimised, with every option that changes its gradient.

    Args:
        name: name of the ``torch.nn.functional`` function, see the module's table; ``"unknown"``
            where it is not known.  Of a ``function`` any name.
        reduction: ``"mean"`` or ``"sum"``. Over the batch for losses of class indices (with
            ``weight`` by PyTorch's divisor, the weights of the batch), over all elements for the
            others, as in PyTorch.
        label_smoothing: PyTorch's, in [0, 1), cross-entropy only.
        targets: ``"index"`` for class indices [B] or ``[B, *positions]`` and 0/1 labels (binary),
            ``"probability"`` for soft targets of the outputs' shape. ``mse_loss`` always has
            ``"value"``: real numbers of the outputs' shape.
        weight: class weights, one a class: of cross-entropy, NLL and focal loss.
        pos_weight: weight of label 1 of the binary loss, one number or one a logit.
        gamma: focusing exponent of a focal loss, by default 2.
        alpha: weight of label 1 against label 0 of ``sigmoid_focal_loss``.
        function: a loss of one's own, ``function(outputs, targets) -> scalar``; outputs are what
            the model returns, a tuple or a dict too.

    Raises:
        ValueError: an option that PyTorch or this library does not have.

    Source: the cotangent of the cross-entropy is the identity behind iDLG (Zhao et al. 2020); the
    focal losses are those of Lin et al. 2017.

    Example:
        >>> import torch
        >>> loss = Loss("cross_entropy", label_smoothing=0.1)
        >>> outputs = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)
        >>> k = loss.cotangent(outputs, torch.tensor([0]))
        >>> labels, distance = loss.read(loss.targets_from(outputs, k))
        >>> labels.tolist(), distance < 1e-12
        ([0], True)
        >>> Loss("cross_entropy", weight=[1.0, 2.0, 4.0]).weight
        (1.0, 2.0, 4.0)
    """

    name: str = CROSS_ENTROPY
    reduction: str = "mean"
    label_smoothing: float = 0.0
    targets: str = "index"
    weight: tuple[float, ...] | None = None
    pos_weight: tuple[float, ...] | None = None
    gamma: float | None = None
    alpha: float | None = None
    function: Callable[[Any, Any], Tensor] | None = None

    def __post_init__(self) -> None:
        require_reduction(self.reduction)
        options = {option: getattr(self, option) for option in OPTIONS}
        if self.function is not None or self.name == UNKNOWN:
            require_none(self.name, self.label_smoothing, options)
            return
        declared = settled(self.name, self.label_smoothing, self.targets, options)
        for option, value in declared.items():
            object.__setattr__(self, option, value)

    @classmethod
    def of(cls, loss: object) -> Loss:
        """The `Loss` meant by a name, a `Loss`, one of PyTorch's loss modules, or a function.

        Args:
            loss: for instance ``"cross_entropy"``, ``nn.CrossEntropyLoss(label_smoothing=0.1)``, a
                function of outputs and targets, or None for one that is not known.

        Raises:
            ValueError: unknown name, ``ignore_index``, weights of places, ``reduction="none"``.
            TypeError: anything else.

        Example:
            >>> Loss.of("mse_loss").targets
            'value'
            >>> Loss.of(torch.nn.BCELoss()).name, Loss.of(None).known
            ('binary_cross_entropy', False)
        """
        if isinstance(loss, Loss):
            return loss
        if loss is None:
            return cls(UNKNOWN)
        if isinstance(loss, str):
            return cls(loss)
        options = of_module(loss)
        if options is not None:
            return cls(**options)
        if callable(loss) and not isinstance(loss, type):
            return cls(str(getattr(loss, "__name__", type(loss).__name__)), function=loss)
        raise TypeError(
            f"loss: expected one of {', '.join(map(repr, FORMS))}, a Loss or a function of "
            f"outputs and targets, got {type(loss).__name__}; write for instance "
            "Loss('cross_entropy')."
        )

    @classmethod
    def lost(cls, name: str) -> Loss:
        """A loss of one's own of which only the name is left, as a file has it."""
        return cls(name, function=Lost(name))

    @property
    def known(self) -> bool:
        """True if the loss of given outputs and targets can be computed."""
        return self.name != UNKNOWN and not isinstance(self.function, Lost)

    @property
    def own(self) -> bool:
        """True if it is a function of the caller's."""
        return self.function is not None

    @property
    def equations(self) -> bool:
        """True if the closed identities of the head hold: no weights, no focus, no other form.

        Where they do not, a single sample's targets are found by trying them.
        """
        plain = self.weight is None and self.pos_weight is None
        return self.name in _EQUATIONS and plain and not self.own

    @property
    def plain(self) -> bool:
        """True if ``outputs`` are what the model gives, not what steps of its own are yet to take.

        See :class:`rgap.head.behind.Behind`.
        """
        return True

    def outputs(self, classes: int) -> int:
        """Entries of a target of a sample with ``classes`` entries at the loss's argument."""
        return classes

    def magnitude(self, outputs: Tensor) -> float:
        """``|∂κ/∂y|``: what a change of one entry of a target moves its cotangent by.

        The same everywhere where :attr:`equations` hold.
        """
        scale = self._reduction.scale(outputs, torch.empty(0, device=outputs.device))
        assert isinstance(scale, float)
        smooth = (1.0 - self.label_smoothing) * scale
        return 2.0 * scale if self.name == SQUARED else smooth

    def longest(self, outputs: Tensor) -> float:
        """Largest ``‖∂ℓ/∂z‖`` of a sample in a sum, at any outputs ``[N, C, *positions]``.

        ``|p − y| ≤ √2`` of a class, ``≤ 1`` of a label; infinite where targets are any numbers.
        """
        if self.targets != "index" or not self.equations:
            return inf
        one = outputs[:1]
        return sqrt(2 * one[:, 0].numel() if self.name in CLASSES else one.numel())

    def open_at(self, outputs: Tensor) -> str:
        """Why a target does not follow from its cotangent; "" where it does."""
        return ""

    def rounding(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """What the cotangent of the client rounds with where it cancels: ``|∂κ/∂y| · 1[y ≠ 0]``.

        p − y rounds relative to 1 where y is not 0, and relative to p elsewhere.
        """
        y = self.dense(targets, outputs)
        present = (y != 0) | (self.label_smoothing > 0)
        return present.to(outputs) * self.magnitude(outputs)

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        """Scalar loss of ``outputs`` [B, C] against admissible or dense ``targets``.

        ``torch.nn.functional`` does the work in the outputs' own dtype, so a float32 loss is truly
        a float32 loss. Only shapes are checked here (this runs inside Jacobian products); values
        are checked by `check_targets`.
        """
        return self._formula.value(outputs, targets)

    def cotangent(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``dL / d outputs`` in closed form (table in the module's docstring), shape of outputs.

        That of a loss of one's own is autograd's.
        """
        return self._formula.cotangent(outputs, targets)

    def cotangent_jvp(
        self, outputs: Tensor, direction: Tensor, targets: Tensor | None = None
    ) -> Tensor:
        """``(d^2 L / d outputs^2) direction``; shapes of ``outputs`` and ``direction`` are equal.

        The same for every admissible target where :attr:`equations` hold: ``s (p * v - p <p, v>)``
        row by row for cross-entropy, ``s p (1 - p) v`` for the binary loss, ``2 s v`` for squared
        error. For the others ``targets`` have to be given.
        """
        if direction.shape != outputs.shape:
            raise ValueError(
                f"direction: expected the outputs' shape {tuple(outputs.shape)}, got "
                f"{tuple(direction.shape)}."
            )
        if targets is None and not self.equations:
            raise ValueError(
                f"targets: the curvature of {self.name} with these options depends on them; write "
                "loss.cotangent_jvp(outputs, direction, targets)."
            )
        return self._formula.curvature(outputs, targets, direction)

    def targets_from(self, outputs: Tensor, cotangent: Tensor) -> Tensor:
        """Dense targets, before label smoothing, whose cotangent at ``outputs`` is ``cotangent``.

        The inverse of `cotangent` in its second argument; shape of ``outputs``. Whether what comes
        out is admissible is `read`'s question. A focal loss is not affine in its targets: what
        comes out is exact at the admissible ones only.

        Raises:
            ValueError: a shape that differs; a loss without a formula.
        """
        if cotangent.shape != outputs.shape:
            raise ValueError(
                f"cotangent: expected the outputs' shape {tuple(outputs.shape)}, got "
                f"{tuple(cotangent.shape)}."
            )
        return self._formula.targets(outputs, cotangent)

    def read(self, dense: Tensor) -> tuple[Tensor, float]:
        """Nearest admissible targets to ``dense`` and the max-abs distance to the admissible set.

        Class indices (long, [B] or ``[B, *positions]``) for a loss of classes with
        ``targets="index"``; 0/1 labels (long, [B] for one logit, else the shape of ``dense``) for a
        binary one. Soft targets and real values are returned as they are; for soft targets the
        distance is how far they lie outside the probabilities, for real values it is 0. Anything
        not finite is at distance infinity.
        """
        return admitted.nearest(self.name, self.targets, dense)

    def admissible(self, classes: int) -> list[int] | list[tuple[int, ...]] | None:
        """Every target one sample can have with ``classes`` outputs, or None when continuous.

        Raises:
            ValueError: a multi-label loss with more than 16 logits (2**C label vectors); the sign
                of each entry of the cotangent gives them without a list, see `read`.

        Example:
            >>> Loss("cross_entropy").admissible(3)
            [0, 1, 2]
        """
        return admitted.admissible(self.name, self.targets, classes)

    def dense(self, targets: Tensor, outputs: Tensor) -> Tensor:
        """Targets in the shape and dtype of ``outputs`` (one-hot for indices), before smoothing.

        Targets that are dense already pass through. Targets [B] are taken for outputs [B, 1] by
        the binary and the squared loss, as labels usually come.
        """
        return admitted.dense(self.name, targets, outputs)

    def check_targets(self, outputs: Any, targets: Any) -> None:
        """Raise unless ``targets`` are admissible for ``outputs``: kind, shape and values.

        Those of a loss of one's own are its own affair.

        Raises:
            TypeError: a tensor of the wrong kind (soft targets for ``"index"`` and the reverse).
            ValueError: wrong shape, an index out of range, a probability outside [0, 1] or rows
                that do not sum to 1, NaN or infinity; outputs that are none of the loss's.
        """
        if isinstance(self._formula, Own):
            return
        admitted.check(self.name, self.targets, outputs, targets)
        admitted.require_probabilities(self.name, outputs)
        classes = outputs.shape[1] if outputs.ndim > 1 else 1
        require_classes("weight", self.weight, classes)
        require_classes("pos_weight", self.pos_weight, classes)

    def divisor(self, targets: Tensor, copies: Tensor) -> float:
        """What the mean divides by: of dense targets [R, C] that occur ``copies`` [R] times."""
        return self._reduction.divisor(targets, copies)

    @property
    def _reduction(self) -> Reduction:
        # PyTorch divides a mean by the weights of the batch's classes where it takes class indices.
        by_weight = self.targets == "index" and self.name in (CROSS_ENTROPY, LOG_PROBABILITIES)
        weight = self.weight if by_weight else None
        return Reduction(self.reduction == "mean", self.name in CLASSES, weight)

    @property
    def _formula(self) -> Formula | Own:
        if self.function is not None:
            return Own(self.name, self.function)
        return Formula(
            self.name, self._reduction, self.label_smoothing, self.weight, self.pos_weight,
            self.gamma, self.alpha,
        )  # fmt: skip
