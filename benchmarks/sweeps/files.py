"""Damaged files of weights, gradients and updates: each is read or refused in one line.

    python -m benchmarks.sweeps.files --cases 20000            three minutes
    python -m benchmarks.sweeps.files --first 5 --cases 1000   other damage

Files that rgap and other libraries write (state dicts of torch.save in both formats, a checkpoint,
lists, safetensors, arrays by name and in a row, updates) with bytes changed, left out, put in and
cut off, are given to ``rgap.update.foreign.tensors``, which ``rgap import`` and ``--weights`` read
with, and to ``Update.load``.  A fault is another error than ValueError, a message of several lines,
or a file that appears beside the damaged one.  Exit status 1 if there is one.
"""

from __future__ import annotations

import io
import random
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save

from benchmarks.common.arguments import Arguments
from rgap.update import Update
from rgap.update.foreign import tensors

READERS: dict[str, Callable[[Path], Any]] = {"foreign": tensors, "update": Update.load}
MOST = 9  # bytes put in or left out at one place


def written() -> list[bytes]:
    """A file of each kind."""
    state = {"a.weight": torch.randn(4, 3), "a.bias": torch.randn(4), "n": torch.tensor(3)}
    arrays = {name: value.numpy() for name, value in state.items()}

    def pickled(what: object, zipped: bool = True) -> bytes:
        stream = io.BytesIO()
        torch.save(what, stream, _use_new_zipfile_serialization=zipped)
        return stream.getvalue()

    def of_numpy(*row: np.ndarray, **named: np.ndarray) -> bytes:
        stream = io.BytesIO()
        np.savez(stream, *row, **named)
        return stream.getvalue()

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "update.safetensors"
        Update({"a.weight": state["a.weight"]}, batch_size=2).save(path)
        update = path.read_bytes()
    return [
        pickled(state), pickled(state, False), pickled({"state_dict": state, "epoch": 3}),
        pickled(list(state.values())), save(state), of_numpy(*arrays.values()),
        of_numpy(**arrays), update,
    ]  # fmt: skip


def damaged(whole: bytes, draw: random.Random) -> bytes:
    """Up to twenty changes."""
    data = bytearray(whole)
    for _ in range(draw.choice((1, 1, 2, 5, 20))):
        kind, place = draw.random(), draw.randrange(len(data))
        if kind < 0.6:
            data[place] = draw.randrange(256)
        elif kind < 0.8:
            del data[place:]
        elif kind < 0.9:
            data[place:place] = draw.randbytes(draw.randrange(MOST))
        else:
            del data[place : place + draw.randrange(MOST)]
        data = data or bytearray(1)
    return bytes(data)


def fault(read: Callable[[Path], Any], path: Path) -> str | None:
    """What is wrong with how a file was read; "" where it was read, None where refused."""
    try:
        read(path)
    except ValueError as error:
        return "a message of several lines" if "\n" in str(error) else None
    except Exception as error:  # whatever else is raised is what is looked for
        return f"{type(error).__name__}: {error}"
    return ""


def main() -> int:
    """Run what the command line asks for."""
    parser = Arguments(__doc__, cases=200)
    parser.add_argument("--cases", type=int, default=20000, help="damaged files")
    parser.add_argument("--first", type=int, default=0, help="seed of the damage")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    draw, kinds, faults, taken = random.Random(options.first), written(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "damaged"
        for case in range(options.cases):
            path.write_bytes(damaged(draw.choice(kinds), draw))
            name = draw.choice(list(READERS))
            found = fault(READERS[name], path)
            taken += found == ""
            if len(list(Path(folder).iterdir())) > 1:
                found = "a file beside it"
            if found:
                faults += 1
                print(f"case {case}, {name}: {found}")
    print(f"{options.cases} damaged files: {taken} read, {faults} faults, the others refused")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
