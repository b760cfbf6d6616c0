"""What the command line's options mean, read and checked before any work is done."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from rgap.update.update import Update

__all__ = [
    "check_output",
    "loaded",
    "memory_of",
    "shape_of",
    "targets_of",
    "usable_device",
    "whole_numbers",
]


def check_output(path: Path, suffix: str | None = None) -> None:
    """Refuse before the work what could not be written after it."""
    if suffix is not None and path.suffix.lower() != suffix:
        raise ValueError(
            f"--output: expected a {suffix} file, got {path}; write {path.with_suffix(suffix)}"
        )
    if path.is_dir():
        raise ValueError(f"expected a file name, got the folder {path}")
    if not path.parent.is_dir():
        raise ValueError(f"no folder {path.parent} to write {path.name} to; create it first")


def shape_of(text: str | None) -> tuple[int, ...] | None:
    """``3,32,32`` as the shape of one sample; None stays None."""
    return None if text is None else whole_numbers(text, "--input-shape", "3,32,32")


def loaded(path: Path, input_shape: str | None) -> Update:
    """The update in a file, of samples of another shape than it states where one is given."""
    from dataclasses import replace

    from rgap.update.update import Update

    if not path.is_file():
        raise ValueError(f"UPDATE: no file {path}; write one with rgap capture")
    sent = Update.load(path)
    return sent if input_shape is None else replace(sent, input_shape=shape_of(input_shape))


def whole_numbers(text: str, option: str, example: str) -> tuple[int, ...]:
    """Whole numbers of at least 1, separated by commas.

    >>> whole_numbers("1,2,4", "--batch-sizes", "1,2")
    (1, 2, 4)
    """
    try:
        numbers = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1:
        raise ValueError(f"{option}: expected whole numbers such as {example}, got {text!r}")
    return numbers


def targets_of(text: str, count: int | None, loss: str) -> Tensor:
    """``3,5`` as targets of ``loss`` for ``count`` pictures."""
    import torch

    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--labels: expected numbers such as 3,5, got {text!r}") from None
    if loss == "mse_loss":
        if count is not None and len(numbers) % count:
            raise ValueError(
                f"--labels: expected the same number of targets for each of {count} pictures, got "
                f"{len(numbers)} numbers"
            )
        return torch.tensor(numbers, dtype=torch.float64).reshape(count or 1, -1)
    if any(number != int(number) for number in numbers):
        raise ValueError(f"--labels: {loss} expects whole numbers such as 3,5, got {text!r}")
    if count is not None and len(numbers) != count:
        raise ValueError(f"--labels: expected {count}, one per picture, got {len(numbers)}")
    return torch.tensor([int(number) for number in numbers])


def memory_of(text: str | None) -> float | None:
    """``--memory-limit`` in bytes; None stays None.

    >>> memory_of("500MB")
    500000000.0
    """
    from rgap.memory import bytes_of

    return None if text is None else bytes_of(text, "--memory-limit")


def usable_device(name: str) -> str:
    """``name`` if a float64 tensor can be made there, which everything here needs.

    Raises:
        ValueError: the device is unknown, absent, or has no float64.
    """
    import torch

    try:
        torch.zeros(1, device=name, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device: {name!r} does not work here ({reason}); try cpu") from None
    return name
