"""A network's weights from a file: all of them, or the network stays as it was."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["fill", "listed", "load_weights"]


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a file into ``model``, strictly: every tensor, and none besides.

    A file whose floating tensors are float64 turns the model into float64, so that no digit is
    lost.  Words that wrappers put before names are left out.

    Args:
        model: changed in place, but not at all if the file does not fit.
        path: safetensors, a state dict of ``torch.save`` (read with ``weights_only=True``), a
            checkpoint with one in it, or ``np.savez``; arrays without names are in the order of
            ``model.state_dict()``.

    Raises:
        ValueError: none of these, missing, unexpected or misshapen tensors (named).

    >>> import tempfile
    >>> import torch
    >>> from safetensors.torch import save_model
    >>> saved, model = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save_model(saved, f"{folder}/weights.safetensors")
    ...     load_weights(model, f"{folder}/weights.safetensors")
    >>> torch.equal(model.weight, saved.weight)
    True
    """
    from rgap.update.foreign import tensors
    from rgap.update.interop import arrays_by_name

    found = tensors(path)
    fill(model, arrays_by_name(model, found) if isinstance(found, list) else found, str(path))


def fill(model: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load tensors by name into ``model`` as :func:`load_weights` does; ``source`` in words.

    Counters of batch norm (``num_batches_tracked``), which older files lack, may be missing.

    Raises:
        ValueError: missing, unexpected or misshapen tensors (named).
    """
    import torch

    from rgap.update.naming import renamed, renaming

    expected = model.state_dict()
    tensors = renamed(tensors, renaming(tensors, expected))
    for name, tensor in tensors.items():
        if name in expected and tensor.shape != expected[name].shape:
            raise ValueError(
                f"weights: {name!r} has shape {tuple(tensor.shape)} in {source}, expected "
                f"{tuple(expected[name].shape)}; was it saved from a network with other options?"
            )
        if name in expected and expected[name].is_floating_point() != tensor.is_floating_point():
            raise ValueError(
                f"weights: {name!r} has dtype {tensor.dtype} in {source}, expected "
                f"{expected[name].dtype}; was it quantised, or saved from another network?"
            )
    stored = {name: _stored(name, expected, tensors) for name in expected}
    missing = sorted(
        name
        for name, other in stored.items()
        if other is None and name.rpartition(".")[2] != "num_batches_tracked"
    )
    unexpected = [name for name in tensors if name not in expected]
    if missing or unexpected:
        parts = [
            f"{what} {listed(names)}"
            for what, names in (("lacks", missing), ("has besides", unexpected))
            if names
        ]
        raise ValueError(
            f"weights: {source} does not fit the {type(model).__name__}: it {' and '.join(parts)}; "
            "write it with safetensors.torch.save_model(model, path)"
        )
    if {t.dtype for t in tensors.values() if t.is_floating_point()} == {torch.float64}:
        model.double()
    kept = {n: expected[n] if other is None else tensors[other] for n, other in stored.items()}
    model.load_state_dict(kept)


def listed(names: Iterable[str], most: int = 6) -> str:
    """Names in quotes, for an error message; the first ``most`` of many.

    >>> listed(["fc.weight", "fc.bias"], most=1)
    "'fc.weight' and 1 more"
    """
    every = list(names)
    more = f" and {len(every) - most} more" if len(every) > most else ""
    return (", ".join(map(repr, every[:most])) or "nothing") + more


def _stored(name: str, expected: dict[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """The name under which the file has a tensor: tied ones are stored once, under either name."""
    if name in tensors:
        return name
    wanted = expected[name]
    if wanted.numel() == 0:  # an address says nothing about what is empty
        return None
    for other in tensors:
        tensor = expected.get(other)
        if (
            tensor is not None
            and tensor.data_ptr() == wanted.data_ptr()
            and tensor.shape == wanted.shape
            and tensor.stride() == wanted.stride()
        ):
            return other
    return None
