"""Which model an inverse was trained for: its architecture, and how far weights are from its own.

The whole of the weights is not kept, only a hash θ ↦ h(θ) of 256 numbers: as it is linear and keeps
lengths in the mean, ‖h(θ) − h(θ′)‖ / ‖θ‖ is the relative distance of other weights θ′ to a tenth.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from rgap.learned.hashing import FeatureHash
from rgap.update.storage import digest

__all__ = ["Fingerprint"]

SKETCH = FeatureHash(256)


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A model, without its weights.

    What a ``forward`` does beyond its modules is not seen.

    Attributes:
        architecture: a line for every module and for every tensor with its shape.
        weights: digest of parameters and floating buffers.
        sketch: their hash, [256], float64.
        norm: ‖θ‖.

    >>> one, other = (Fingerprint.of(nn.Linear(3, 2)) for _ in range(2))
    >>> one.distance(one), one.distance(other) > 0.1
    (0.0, True)
    """

    architecture: tuple[str, ...]
    weights: str
    sketch: Tensor
    norm: float

    @classmethod
    def of(cls, model: nn.Module) -> Fingerprint:
        """That of a model; its mode and its device do not matter."""
        values = _values(model)
        norm = sum(float(value.square().sum()) for value in values) ** 0.5
        return cls(_architecture(model), digest(*values), SKETCH.of(values), norm)

    def distance(self, other: Fingerprint) -> float:
        """‖θ − θ′‖ / ‖θ‖ of two models of one architecture; exactly 0 for equal weights."""
        if self.weights == other.weights:
            return 0.0
        return float(torch.linalg.vector_norm(self.sketch - other.sketch)) / max(self.norm, 1e-300)

    def require(self, model: nn.Module, *, moved: bool) -> None:
        """Raise unless this is of a model.

        Args:
            model: that an update is of.
            moved: True: other weights are accepted.

        Raises:
            ValueError: another architecture, with the first line that differs; other weights, with
                their distance.
        """
        for own, its in zip_longest(self.architecture, _architecture(model), fillvalue="nothing"):
            if own != its:
                raise ValueError(
                    f"inverse: trained for a model with {own}, got one with {its}; write "
                    "rgap.learned.train(model, pictures, labels) for this one"
                )
        if moved or digest(*_values(model)) == self.weights:
            return
        raise ValueError(
            f"inverse: expected the weights that it was trained for, got others at a relative "
            f"distance of {self.distance(Fingerprint.of(model)):.2g}; write rgap.learned.adapt("
            "inverse, before, model, pictures, labels), or drift='allow' to use it as it is"
        )


def _architecture(model: nn.Module) -> tuple[str, ...]:
    """Modules with their options, tensors with their shapes."""
    modules = [
        f"{path or 'the model itself'}: {type(module).__name__}({module.extra_repr()})"
        for path, module in model.named_modules()
    ]
    held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (*modules, *(f"{name}: {list(tensor.shape)}" for name, tensor in held.items()))


def _values(model: nn.Module) -> list[Tensor]:
    """Parameters and floating buffers, float64; a zero for a model without any."""
    held = [*model.parameters(), *model.buffers()]
    values = [t.detach().cpu().double() for t in held if t.is_floating_point()]
    return values or [torch.zeros(1, dtype=torch.float64)]
