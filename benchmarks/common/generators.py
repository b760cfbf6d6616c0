"""The generator that benchmarks.training.generator has written."""

from __future__ import annotations

from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path

from rgap.priors.generator import Generator, convolutional
from rgap.update.storage import opened, require_whole

WRITER = "python -m benchmarks.training.generator --output FILE"


def trained_generator(path: Path | None, shape: Sequence[int]) -> Generator:
    """A generator of pictures of a shape; with random weights where no file is given.

    Args:
        path: of its weights; its sizes stand in the file.
        shape: [channels, 32, 32].

    Raises:
        SystemExit: no such file, one of other pictures, or another file.
    """
    if path is None:
        print("no --generator: its weights are random, as of one that was trained on nothing")
        return convolutional(shape)
    try:
        told, weights = opened(path, WRITER)
        require_whole(path, told, weights)
        own = tuple(literal_eval(told["shape"]))
        if own != tuple(shape):
            raise ValueError(f"{path}: it draws {list(own)}, expected {list(shape)}")
        made = convolutional(shape, int(told["latent"]), int(told["width"]))
        made.blocks.load_state_dict(weights)
    except KeyError as error:
        raise SystemExit(
            f"--generator: {path} does not say {error}; write it by {WRITER}"
        ) from error
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(f"--generator: {error}; write one by {WRITER}") from error
    return made
