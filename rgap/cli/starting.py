"""The batch that a search or a completion begins with, out of a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rgap.cli.options import optional

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["StartFile", "first_of"]

StartFile = Annotated[
    Path | None,
    optional(
        "Begin with the batch in this .safetensors file or folder, as rgap invert --output "
        "writes it.",
        "FILE",
    ),
]


def first_of(path: Path | None, size: int | None) -> Tensor | None:
    """The batch that ``--start`` names, of as many samples as the update has.

    Args:
        path: a file, or a folder with one; None: no start.
        size: of the update; None: it is not known.

    Raises:
        ValueError: no such file, no batch in it, or one of another size.
    """
    from rgap.update.storage import opened

    if path is None:
        return None
    path = path / "recovery.safetensors" if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"--start: no file {path}; write one with rgap invert --output")
    tensors = opened(path, "rgap invert --output")[1]
    near = "" if "inputs" in tensors else "candidate-0-"
    batch = tensors.get(f"{near}inputs")
    copies = tensors.get(f"{near}multiplicities")
    if batch is not None and copies is not None:
        batch = batch.repeat_interleave(copies, 0)
    if batch is not None and size in (None, len(batch)):
        return batch
    if batch is not None:
        raise ValueError(
            f"--start: expected a batch of {size}, as the update is, got one of {len(batch)} "
            f"in {path}; write --start with a file that rgap invert or rgap match made of this "
            "update"
        )
    raise ValueError(
        f"--start: expected a file with the tensor 'inputs', got {sorted(tensors)}; write one "
        "with rgap invert MODEL UPDATE --complete --output start.safetensors"
    )
