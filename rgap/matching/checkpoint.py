"""Why a search stopped, what it says on its way, and what it needs to go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from torch import Tensor

from rgap.update.storage import opened, require_whole, written

__all__ = ["Checkpoint", "Ended", "Progress"]

FORMAT = "rgap.checkpoint"


class Ended(Enum):
    """Why a search stopped; the value says it in words."""

    DONE = "all iterations are done"
    STILL = "no progress any more"
    TIME = "the time is up"
    STOPPED = "the callback said so"
    EXPLODED = "steps exploded from every start, or led to where the objective is not finite"
    NOT_FINITE = "the objective is not finite at any start"


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """All that a search needs to go on to the result that it would have had.

    Attributes:
        settings: of the call that it belongs to; another call is refused.
        tensors: where the search stands.
    """

    settings: Mapping[str, str]
    tensors: Mapping[str, Tensor]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all."""
        tensors = {n: t.detach().cpu().clone().contiguous() for n, t in self.tensors.items()}
        written(path, tensors, {"format": FORMAT, "settings": json.dumps(dict(self.settings))})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: a file of another kind, or a damaged one.
            FileNotFoundError: no such file.
        """
        metadata, tensors = opened(path, "checkpoint.save(path)")
        if metadata.get("format") != FORMAT:
            raise ValueError(
                f"{Path(path)}: expected a checkpoint, got another safetensors file; name one that "
                "a search or a training wrote, or a file that is not there yet"
            )
        require_whole(path, metadata, tensors)
        return cls(json.loads(metadata["settings"]), tensors)

    def require(self, settings: Mapping[str, str]) -> None:
        """Raise unless this is of a call with these settings.

        Raises:
            ValueError: naming the first setting that differs.
        """
        for name, value in settings.items():
            held = self.settings.get(name)
            if held != value:
                raise ValueError(
                    f"checkpoint: of a call with {name}={held}, expected {name}={value}; write "
                    "the model, data and options of that call, or begin without checkpoint="
                )


@dataclass(frozen=True, eq=False)
class Progress:
    """What a callback is told.

    Attributes:
        what: counted: ``"iteration"`` or ``"step"``.
        number: of them, from 0.
        values: of the objective, one a start.
        best: the lowest so far.
        checkpoint: to go on from here.
    """

    what: str
    number: int
    values: Tensor
    best: float
    checkpoint: Checkpoint
