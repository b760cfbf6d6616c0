"""Weights and gradients in files that other libraries write.

State dicts of ``torch.save`` (Lightning's checkpoints and others around one among them),
safetensors, and arrays of NumPy, by name or in a row as Flower has them.  Pickles are read by
``torch.load(weights_only=True)`` alone, which makes tensors and plain containers and runs nothing;
arrays of objects are refused.
"""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgap.update.interop import tensor_of

__all__ = ["Tensors", "of_numpy", "tensors"]

Tensors = dict[str, Tensor] | list[Tensor]
"""By name, or in a row."""

WEIGHTS = "state_dict", "model_state_dict", "model"  # where checkpoints keep a state dict
GRADIENTS = "gradients", "gradient", "grads", "grad"
NUMBERS = frozenset(
    [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.bool, torch.uint8,
     torch.int8, torch.int16, torch.int32, torch.int64]
)  # fmt: skip
_SAVE = "torch.save(model.state_dict(), path)"


def tensors(
    path: str | os.PathLike[str],
    prefix: str = "",
    argument: str = "weights",
    within: Sequence[str] = WEIGHTS,
) -> Tensors:
    """What a file holds: tensors by name, or in a row where it has no names.

    Args:
        path: of the file; what it is its first bytes say, not its name.
        prefix: names that begin with it are taken, without it; others are left.
        argument: how a message calls the file.
        within: entries of a checkpoint that may hold what is looked for.

    Raises:
        ValueError: no file, none of these, objects besides tensors, or no name with that prefix.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     torch.save({"epoch": 3, "state_dict": {"net.w": torch.ones(2)}}, f"{folder}/a.ckpt")
    ...     tensors(f"{folder}/a.ckpt", "net.")
    {'w': tensor([1., 1.])}
    """
    file = Path(path)
    if file.is_dir():
        raise ValueError(
            f"{argument}: expected a file, got the folder {file}; write the name of the file in it"
        )
    if not file.is_file():
        raise ValueError(f"{argument}: no file {file}")
    found = _dense(_read(file, argument, within), file, argument)
    if not prefix:
        return found
    if isinstance(found, list):
        raise ValueError(
            f"{argument}: {file} holds {len(found)} arrays without names, so that no prefix "
            f"{prefix!r} chooses among them; leave it out"
        )
    kept = {n.removeprefix(prefix): t for n, t in found.items() if n.startswith(prefix)}
    if not kept:
        raise ValueError(
            f"prefix: expected the beginning of names in {file}, got {prefix!r}; the names are "
            f"{_listed(found)}"
        )
    return kept


def _dense(found: Tensors, file: Path, argument: str) -> Tensors:
    """Tensors of real numbers as they are; anything else is refused by its name."""
    pairs = found.items() if isinstance(found, dict) else enumerate(found)
    for name, tensor in pairs:
        odd = tensor.layout != torch.strided or tensor.is_meta or tensor.is_nested
        if odd or tensor.dtype not in NUMBERS:
            kind = "no values of its own" if odd else f"dtype {tensor.dtype}"
            raise ValueError(
                f"{argument}: {name!r} in {file} has {kind}, expected a dense tensor of real "
                "numbers; write tensor.to_dense().float() where the file comes from"
            )
    return found


def _read(file: Path, argument: str, within: Sequence[str]) -> Tensors:
    """By what the first bytes say."""
    with file.open("rb") as stream:
        start = stream.read(9)
    if start[:6] == b"\x93NUMPY":
        raise ValueError(
            f"{argument}: {file} is one array; write all of them to one file, as "
            "np.savez(path, *arrays)"
        )
    if start[:4] == b"PK\x03\x04" and of_numpy(file):
        return _arrays(file, argument)
    if start[8:9] != b"{" and (start[:1] == b"\x80" or start[:4] == b"PK\x03\x04"):
        return _unpickled(file, argument, within)
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{argument}: {file} is not a safetensors file ({_line(error)}), nor one of "
            f"torch.save or np.savez; write it with {_SAVE}"
        ) from error


def of_numpy(file: str | os.PathLike[str]) -> bool:
    """True for a zip of .npy files; their names alone are read."""
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except Exception:  # what is damaged ends in any error of the zip's reader
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _arrays(file: Path, argument: str) -> Tensors:
    """Of ``np.savez``: in a row where it was given them so."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            made = {name: tensor_of(name, stored[name]) for name in stored.files}
    except Exception as error:  # of the zip, its compression, or an array's own header
        raise ValueError(
            f"{argument}: {file} has an array that is none of numbers ({_line(error)}); write "
            "np.savez(path, *[v.cpu().numpy() for v in model.state_dict().values()])"
        ) from error
    numbers = {name: name.removeprefix("arr_") for name in made}
    if all(name.startswith("arr_") and n.isdigit() for name, n in numbers.items()):
        return [made[name] for name in sorted(made, key=lambda name: int(numbers[name]))]
    return made


def _unpickled(file: Path, argument: str, within: Sequence[str]) -> Tensors:
    """Of ``torch.save``, by the unpickler that knows tensors and plain containers alone."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        if "Unsupported" in str(error) or "weights_only" in str(error).lower():
            raise ValueError(
                f"{argument}: {file} holds Python objects besides tensors, which were not loaded, "
                f"because that runs code; write {_SAVE} where the file comes from"
            ) from error
        raise ValueError(
            f"{argument}: {file} is a damaged file of torch.save ({_line(error)}); copy it again"
        ) from error
    except Exception as error:  # a pickle of no sense ends in any error of the unpickler
        raise ValueError(
            f"{argument}: {file} is a pickle that torch.save did not write "
            f"({type(error).__name__}); write {_SAVE}"
        ) from error
    return _state(found, file, argument, within)


def _state(found: Any, file: Path, argument: str, within: Sequence[str]) -> Tensors:
    """The state dict that was saved, or is within what was."""
    if isinstance(found, Mapping):
        own = _named(found)
        if own is not None:
            return own
        inner = {key: _named(value) for key, value in found.items() if isinstance(value, Mapping)}
        states = {key: state for key, state in inner.items() if state is not None}
        likely = [key for key in within if key in states]
        if len(likely) == 1:
            return states[likely[0]]
        held = f"the entries {_listed(found)}"
    elif isinstance(found, Sequence) and found and all(isinstance(t, Tensor) for t in found):
        return [t.detach() for t in found]
    else:
        held = f"a {type(found).__name__}"
    raise ValueError(
        f"{argument}: {file} holds {held}, expected tensors by name, or a list of them, alone "
        f"or under one of {', '.join(within)}; write torch.save(found[name], path) of what is meant"
    )


def _named(found: Mapping[Any, Any]) -> dict[str, Tensor] | None:
    """A mapping as a state dict; None if it is none. Extra state of modules is no tensor."""
    kept = {k: v for k, v in found.items() if not str(k).endswith("_extra_state")}
    if kept and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in kept.items()):
        return {name: tensor.detach() for name, tensor in kept.items()}
    return None


def _listed(names: Mapping[Any, Any], most: int = 5) -> str:
    """The first names."""
    every = [repr(name) for name in names]
    return ", ".join(every[:most]) + (f" and {len(every) - most} more" if every[most:] else "")


def _line(error: Exception) -> str:
    """The first line of what went wrong."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
