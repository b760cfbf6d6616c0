"""Files for updates: safetensors with the order and everything else as JSON in its metadata.

No pickle, in or out: an update comes from someone whom the reader has no reason to trust, and
unpickling runs code. A file is recognised by its first bytes before anything parses it.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgap.update.foreign import of_numpy
from rgap.update.losses import Loss

__all__ = [
    "declared", "described", "digest", "opened", "read", "require_folder", "require_whole",
    "unwritable", "write", "written",
]  # fmt: skip

FORMAT = "rgap.update"
VERSION = 1
DIGEST = "digest"  # of everything else in a file, in its metadata
_GROUPS = ("gradients", "buffers")
_NOISE = "noise"  # optional: files of version 1 that have no noise do not name the group
_KEYS = (*_GROUPS, "batch_size", "loss", "input_shape", "value_range", "dtype", "local_steps")


def write(path: str | os.PathLike[str], fields: dict[str, Any]) -> None:
    """Write an update's ``fields`` to ``path``.

    Written beside the target and renamed over it, so that a reader sees the old file or the whole
    new one, and an interrupted run leaves no half-written update.
    """
    tensors: dict[str, Tensor] = {}
    groups = _GROUPS if fields[_NOISE] is None else (*_GROUPS, _NOISE)
    for group in groups:
        for name, tensor in fields[group].items():
            tensors[f"{group}/{name}"] = tensor.contiguous()
    if fields["labels"] is not None:
        tensors["labels"] = fields["labels"].contiguous()
    loss: Loss = fields["loss"]
    header = {
        **{group: list(fields[group]) for group in groups},
        "batch_size": fields["batch_size"],
        "loss": described(loss),
        "input_shape": fields["input_shape"],
        "value_range": fields["value_range"],
        "dtype": str(fields["dtype"]).removeprefix("torch."),
        "local_steps": fields["local_steps"],
    }
    written(
        path, tensors, {"format": FORMAT, "version": str(VERSION), "update": json.dumps(header)}
    )


_OPTIONS = (
    "name", "reduction", "label_smoothing", "targets", "weight", "pos_weight", "gamma", "alpha",
)  # fmt: skip


def described(loss: Loss) -> dict[str, Any]:
    """A loss as JSON; of a function only the name, which whoever loads the file declares again."""
    if loss.own:
        return {"name": loss.name, "own": True}
    return {k: getattr(loss, k) for k in _OPTIONS if getattr(loss, k) is not None}


def declared(header: dict[str, Any]) -> Loss:
    """The loss that :func:`described` wrote; of a function what is left of it."""
    return Loss.lost(str(header["name"])) if header.get("own") else Loss(**header)


def written(
    path: str | os.PathLike[str], tensors: dict[str, Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file beside its target, then rename it; with the digest of it all."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = Path(path)
    require_folder(target)
    beside = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        beside.touch()
        mode = beside.stat().st_mode  # as every new file has; safetensors hides its own from others
        save_file(tensors, beside, {**metadata, DIGEST: _digest_of_file(metadata, tensors)})
        beside.chmod(mode)
        os.replace(beside, target)
    except (OSError, SafetensorError) as error:
        raise unwritable(target, error) from error
    finally:
        beside.unlink(missing_ok=True)


def require_whole(
    path: str | os.PathLike[str], metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    """Raise unless a file is as :func:`written` left it.

    Raises:
        ValueError: a number, a name or a word of it has changed since.
    """
    own = {name: value for name, value in metadata.items() if name != DIGEST}
    held = metadata.get(DIGEST)
    if held is not None and held != _digest_of_file(own, tensors):  # older files have none
        raise ValueError(
            f"{path}: damaged: it is not as it was written; copy it again, or, if it was edited on "
            f"purpose, leave {DIGEST!r} out of its metadata"
        )


def _digest_of_file(metadata: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """Of all that is in a file, in any order."""
    state = hashlib.sha256(json.dumps(sorted(metadata.items())).encode())
    for name, tensor in sorted(tensors.items()):
        state.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        plain = tensor.detach().cpu().contiguous().reshape(-1)
        state.update(plain.view(torch.uint8).numpy().data)
    return state.hexdigest()


def digest(*tensors: Tensor) -> str:
    """A short fingerprint of numbers: equal tensors have equal ones.

    >>> import torch
    >>> digest(torch.ones(2)) == digest(torch.ones(2)) != digest(torch.zeros(2))
    True
    """
    state = hashlib.sha256()
    for tensor in tensors:
        state.update(tensor.detach().double().cpu().contiguous().numpy().tobytes())
    return state.hexdigest()[:16]


def require_folder(target: Path) -> None:
    """Raise FileNotFoundError unless the folder of a file that is to be written is there."""
    if not target.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"no folder {target.parent} to write {target.name} to; write os.makedirs("
            f"{str(target.parent)!r}) first"
        )


def unwritable(path: Path, error: Exception) -> OSError:
    """What to raise for a file that could not be written: its own name, the system's reason."""
    reason = getattr(error, "strerror", None) or str(error)
    return OSError(
        f"{path}: expected a place that can be written to, got '{reason}'; write the name of a "
        "file or folder elsewhere"
    )


def opened(
    path: str | os.PathLike[str], again: str = "update.save(path)"
) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a safetensors file; ``again`` is the call that writes one.

    Raises:
        ValueError: a pickle or another file, or a damaged one.
        FileNotFoundError: no such file.
    """
    from safetensors import SafetensorError, safe_open

    if not os.path.exists(path):
        raise FileNotFoundError(
            f"{path}: no such file, expected one that {again} wrote; it is looked for in "
            f"{os.getcwd()}"
        )
    _refuse_foreign(path)
    try:
        with safe_open(os.fspath(path), framework="pt") as file:
            names = list(file.keys())
            return file.metadata() or {}, {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: damaged safetensors file ({error}); copy it again, or write it again with "
            f"{again}."
        ) from error


def read(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Fields of the update in ``path``; raises ValueError for anything that is not one."""
    metadata, tensors = opened(path)
    header = _header(path, metadata)
    present = (*_GROUPS, _NOISE) if _NOISE in header else _GROUPS
    wanted = {g: [f"{g}/{n}" for n in header[g]] for g in present}
    for key in (k for keys in wanted.values() for k in keys):
        if key not in tensors:
            raise ValueError(
                f"{path}: the tensor {key!r} that its metadata lists is missing; the file "
                "was edited. Write it again with update.save(path)."
            )
    groups = {g: {k.removeprefix(f"{g}/"): tensors[k] for k in wanted[g]} for g in wanted}
    try:
        fields = {**groups, "labels": tensors.get("labels"), **_decoded(path, header)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        require_whole(path, metadata, tensors)  # that it is damaged, before what is wrong in it
        raise ValueError(f"{path}: the metadata do not describe an update: {error}") from error
    require_whole(path, metadata, tensors)
    return fields


def _decoded(path: str | os.PathLike[str], header: dict[str, Any]) -> dict[str, Any]:
    dtype = getattr(torch, str(header["dtype"]), None)
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"{path}: unknown dtype {header['dtype']!r} in the metadata.")
    shape, value_range = header["input_shape"], header["value_range"]
    return {
        "batch_size": header["batch_size"],
        "loss": declared(header["loss"]),
        "input_shape": None if shape is None else tuple(shape),
        "value_range": None if value_range is None else tuple(value_range),
        "dtype": dtype,
        "local_steps": header["local_steps"],
    }


def _header(path: str | os.PathLike[str], metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("format") != FORMAT or "update" not in metadata:
        raise ValueError(
            f"{path}: a safetensors file without rgap's metadata (no format={FORMAT!r}): the "
            "parameters' order, the loss and the batch size are missing. Write "
            "Update(safetensors.torch.load_file(path), batch_size=..., loss=...) and save that."
        )
    version = metadata.get("version", "")
    if version != str(VERSION):
        raise ValueError(
            f"{path}: written in format version {version!r}, this rgap reads {VERSION}; upgrade "
            "rgap with pip install --upgrade."
        )
    try:
        header = json.loads(metadata["update"])
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: the metadata 'update' is not JSON ({error}).") from error
    absent = [k for k in _KEYS if not isinstance(header, dict) or k not in header]
    if absent:
        raise ValueError(f"{path}: the metadata lacks {', '.join(absent)}.")
    return dict(header)


def _refuse_foreign(path: str | os.PathLike[str]) -> None:
    if os.path.isdir(path):
        raise ValueError(f"{path}: a folder, expected one safetensors file; name the file in it.")
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        start = file.read(16)
    # A safetensors file is a 64-bit header length and JSON. Told apart by the brace, because the
    # length alone can spell a pickle's first bytes (640 is 80 02).
    if len(start) > 8 and start[8:9] == b"{" and start[4:8] == bytes(4):
        length = struct.unpack("<Q", start[:8])[0]
        if 8 + length > size:
            raise ValueError(
                f"{path}: truncated safetensors file: {size} bytes, its header alone needs "
                f"{8 + length}; copy it again."
            )
        return
    if start[:1] == b"\x80" or start[:4] == b"PK\x03\x04":
        kind, read = "a pickle or a zip of one (torch.save)", "torch.load(path, weights_only=True)"
        if of_numpy(path):
            kind = "arrays of NumPy (np.savez)"
            read = "{n: torch.as_tensor(a) for n, a in np.load(path).items()}"
        raise ValueError(
            f"{path}: {kind}, expected safetensors. It was not opened, because unpickling runs "
            f"code. If you trust it, write Update({read}, batch_size=..., loss=...)"
            ".save('update.safetensors')."
        )
    if len(start) < 9:
        raise ValueError(f"{path}: {size} bytes, too short for a safetensors file; copy it again.")
    raise ValueError(f"{path}: not a safetensors file; expected one that update.save(path) wrote.")
