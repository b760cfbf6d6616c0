"""Tensors in a file that is whole or not there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def written(
    path: Path, tensors: Mapping[str, Tensor], told: Mapping[str, str] | None = None
) -> None:
    """The whole file or none.

    Args:
        path: of the file.
        tensors: by name.
        told: what else it says, by name.
    """
    partial = path.with_name(path.name + ".partial")
    save_file({n: t.detach().contiguous() for n, t in tensors.items()}, partial, dict(told or {}))
    partial.replace(path)
