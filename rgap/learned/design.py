"""What an inverse is: its hash and its networks, and the client that it inverts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rgap import validation
from rgap.learned.hashing import FeatureHash
from rgap.learned.networks import KINDS
from rgap.update.losses import Loss

__all__ = ["Client", "Design"]


@dataclass(frozen=True)
class Design:
    """Choices that an inverse is trained with, and that no update changes.

    Source: the defaults are those of Wu, Chen, Guo and Weinberger (2023), ``MLP-3000``, but for the
    hash, whose length they choose by the model.

    Attributes:
        batch_sizes: that it inverts, one network for all; a network that guesses the size from the
            gradient is trained beside it where there are several.
        hash_size: m, numbers that a gradient is hashed to; None: it is taken whole.
        network: ``"mlp"`` or ``"convolutional"``.
        hidden: units of each hidden layer.
        conditioned: divide each tensor of a gradient by the size that gradients of noise have under
            the weights of the day, before they are hashed together: those of small tensors drown in
            a bucket otherwise.
        scale_free: divide the hash by its length: an update may come with any positive factor.

    Raises:
        ValueError: no batch size, a size below 1, an unknown network.
        TypeError: batch sizes that are none.

    >>> Design(batch_sizes=(4, 1, 2)).batch_sizes
    (1, 2, 4)
    """

    batch_sizes: tuple[int, ...] = (1,)
    hash_size: int | None = 4096
    network: str = "mlp"
    hidden: int = 3000
    conditioned: bool = False
    scale_free: bool = False

    def __post_init__(self) -> None:
        given: object = self.batch_sizes  # whatever the caller gave
        if not isinstance(given, Iterable) or isinstance(given, str):
            raise TypeError(
                f"batch_sizes: expected whole numbers, one after another, got {given!r}; write "
                "batch_sizes=(1, 2)"
            )
        sizes = sorted({validation.count("batch_sizes", size) for size in self.batch_sizes})
        if not sizes:
            raise ValueError("batch_sizes: expected at least one, got none; write batch_sizes=(1,)")
        object.__setattr__(self, "batch_sizes", tuple(sizes))
        if self.hash_size is not None:
            validation.count("hash_size", self.hash_size)
        validation.count("hidden", self.hidden)
        if self.network not in KINDS:
            names = ", ".join(map(repr, KINDS))
            raise ValueError(
                f"network: expected one of {names}, got {self.network!r}; write network='mlp'"
            )

    def place(self, size: int) -> int:
        """Place of a batch size among those that are inverted.

        Raises:
            ValueError: it is none of them.
        """
        if size not in self.batch_sizes:
            known = ", ".join(map(str, self.batch_sizes))
            raise ValueError(
                f"batch_size: expected one that the inverse was trained for ({known}), got {size}; "
                f"write rgap.learned.train(..., design=Design(batch_sizes=({size},)))"
            )
        return self.batch_sizes.index(size)


@dataclass(frozen=True)
class Client:
    """What is known of every client's gradient.

    Attributes:
        loss: that it descends.
        shape: of one sample.
        value_range: of the data.
        names: of the parameters that it trains.
        seed: of the hash.
    """

    loss: Loss
    shape: tuple[int, ...]
    value_range: tuple[float, float]
    names: tuple[str, ...]
    seed: int

    def hashing(self, design: Design) -> FeatureHash:
        """The hash h."""
        return FeatureHash(design.hash_size, self.seed)
