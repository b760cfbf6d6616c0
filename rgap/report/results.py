"""A recovery on the terminal and in files."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from rgap.report.pictures import replacing, save_picture, save_tensors
from rgap.report.tables import PLAIN, numbers, recovery_table, status_text

if TYPE_CHECKING:
    from rich.console import Console
    from torch import Tensor

    from rgap.recovery import Recovery
    from rgap.update.update import Update

__all__ = ["check_target", "print_recovery", "write_recovery"]

TENSORS, PICTURE = ".safetensors", ".png"
_OURS = re.compile(r"recovery\.safetensors|(candidate-\d+-)?(picture|determined)-\d+\.png")


def print_recovery(console: Console, recovery: Recovery, *, explain: bool) -> None:
    """Status and reason, the table of equations, and with ``explain`` every layer in words."""
    _, _, words = recovery.explain().partition(": ") if explain else ("", "", recovery.reason)
    words = re.sub(r"recovery\.features\[.*?\]", "--output FILE.safetensors writes it", words)
    console.print(Text.assemble(status_text(recovery.status.name), f": {words}"), **PLAIN)
    if not explain:
        for warning in recovery.warnings:
            console.print(f"Note: {warning}", **PLAIN)
    if recovery.labels is not None:
        console.print(f"Labels: {numbers(recovery.labels)}", **PLAIN)
    if recovery.determined is not None and not explain:
        known = int(recovery.determined.sum())
        console.print(
            f"Determined: {known} of {recovery.determined.numel()} values (NaN elsewhere)", **PLAIN
        )
    if recovery.multiplicities is not None:
        console.print(f"Copies of each: {numbers(recovery.multiplicities)}", **PLAIN)
    if recovery.separation and not explain:
        console.print(f"Samples told apart: {recovery.separation}", **PLAIN)
    for number, candidate in enumerate(recovery.candidates):
        copies = candidate.multiplicities
        if not explain:
            console.print(
                f"Candidate {number}: labels {numbers(candidate.labels)}, "
                + (f"copies of each {numbers(copies)}, " if copies is not None else "")
                + f"replay residual {candidate.residual:.1e}",
                **PLAIN,
            )
    if recovery.layers:
        console.print(recovery_table(recovery))


def check_target(output: Path, update: Update, *, force: bool = False) -> None:
    """Refuse before the work what could not be written after it.

    Args:
        output: where a recovery goes.
        update: of which it is.
        force: a folder that holds a recovery and nothing else may be replaced.

    Raises:
        ValueError: a folder that holds something, a suffix for something else, inputs that are no
            pictures.
    """
    if not output.parent.is_dir():
        raise ValueError(f"--output: no folder {output.parent} to write to; create it first")
    if output.suffix.lower() == TENSORS:
        if output.is_dir():
            raise ValueError(f"--output: expected a file name, got the folder {output}")
        return
    shape = update.input_shape or ()
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise ValueError(
            f"--output: the inputs have shape {list(shape)} and are no pictures; write --output "
            f"{output.with_suffix(TENSORS)}"
        )
    if output.suffix.lower() == PICTURE:
        if output.is_dir():
            raise ValueError(f"--output: expected a file name, got the folder {output}")
        if update.batch_size not in (None, 1):
            raise ValueError(
                f"--output: the batch has {update.batch_size} pictures; write --output "
                f"{output.with_suffix('')} for a folder"
            )
    elif output.suffix:
        raise ValueError(
            f"--output: expected a folder, a .png or a .safetensors file, got {output}"
        )
    elif output.exists() and not output.is_dir():
        raise ValueError(f"--output: expected a folder, got the file {output}; name a new folder")
    elif output.is_dir() and (held := sorted(path.name for path in output.iterdir())):
        others = [name for name in held if not _OURS.fullmatch(name)]
        free = output.with_name(f"{output.name}-2")
        if others:
            raise ValueError(
                f"--output: {output} exists already and holds more than a recovery, {others[0]}; "
                f"write --output {free}"
            )
        if not force:
            raise ValueError(
                f"--output: {output} exists already, with a recovery in it; write --output {free} "
                "or, to replace it, --force"
            )


def write_recovery(
    recovery: Recovery,
    output: Path,
    value_range: tuple[float, float] | None,
    *,
    force: bool = False,
) -> Path | None:
    """Write the recovered pictures, or every candidate's; None if there is nothing to write.

    A ``.safetensors`` file has the certified inputs of layers as well, as ``features-NAME``; in
    its metadata stand status, reason, residual, what is certified and the error bounds.  A
    folder gets ``picture-0.png`` … and ``recovery.safetensors`` with ``inputs`` and ``labels``
    in full precision; for an ambiguous answer, and for the nearest batch of a completion that did
    not reproduce the update, ``candidate-0-picture-0.png`` … and the tensors of every candidate.
    Where only some values are determined they are written as ``partial`` (NaN elsewhere) with the
    mask ``determined``: ``picture-0.png`` with hatching in the open places and
    ``determined-0.png``, white where every channel is known.  With ``force`` a folder that is
    there is replaced as a whole.
    """
    suffix, bounds = output.suffix.lower(), value_range or (0.0, 1.0)
    tensors = _tensors(recovery)
    answered = recovery.inputs is not None or recovery.partial is not None
    if suffix == PICTURE:
        # One picture in place of several candidates would hide that they are several, and the
        # nearest batch that does not send the update is no recovery.
        writable = answered and len(recovery.candidates) < 2
    else:
        writable = bool(tensors) if suffix == TENSORS else answered or bool(recovery.candidates)
    if not writable:
        return None
    metadata = {"status": recovery.status.name, "reason": recovery.reason}
    metadata["certified"] = ", ".join(sorted(recovery.certified))
    for name in ("residual", "error_bound", "targets_error_bound"):
        if (value := getattr(recovery, name)) is not None:
            metadata[name] = repr(value)
    for number, candidate in enumerate(recovery.candidates):
        metadata[f"candidate-{number}-residual"] = repr(candidate.residual)
    if suffix == TENSORS:
        save_tensors(tensors, output, metadata)
    elif suffix == PICTURE:
        shown = recovery.partial if recovery.inputs is None else recovery.inputs
        assert shown is not None
        save_picture(shown[0], output, bounds)
        if recovery.determined is not None:
            save_picture(_mask(recovery.determined[0]), mask_beside(output))
    else:
        with replacing(output, force=force) as beside:
            beside.mkdir()
            save_tensors(tensors, beside / "recovery.safetensors", metadata)
            for name, pictures in tensors.items():
                if name == "determined":
                    for number, mask in enumerate(pictures):
                        save_picture(_mask(mask), beside / f"determined-{number}.png")
                if name.endswith(("inputs", "partial")):
                    prefix = name.removesuffix("inputs").removesuffix("partial")
                    for number, picture in enumerate(pictures):
                        save_picture(picture, beside / f"{prefix}picture-{number}.png", bounds)
    return output


def mask_beside(output: Path) -> Path:
    """Where the mask of what is determined is written, beside a picture."""
    return output.with_name(f"{output.stem}-determined{PICTURE}")


def _tensors(recovery: Recovery) -> dict[str, Tensor]:
    answers = (
        [
            (f"candidate-{n}-", c.inputs, c.labels, c.multiplicities)
            for n, c in enumerate(recovery.candidates)
        ]
        if recovery.candidates
        else [("", recovery.inputs, recovery.labels, recovery.multiplicities)]
    )
    tensors: dict[str, Tensor] = {}
    if recovery.partial is not None and recovery.determined is not None:
        tensors |= {"partial": recovery.partial, "determined": recovery.determined}
    tensors |= {f"features-{name}": value for name, value in recovery.features.items()}
    for prefix, inputs, labels, copies in answers:
        if inputs is not None:
            tensors[f"{prefix}inputs"] = inputs
        if labels is not None:
            tensors[f"{prefix}labels"] = labels
        if copies is not None:
            tensors[f"{prefix}multiplicities"] = copies
    return tensors


def _mask(determined: Tensor) -> Tensor:
    """Where every channel of a picture is known, [1, H, W] of 0 and 1."""
    return determined.all(0, keepdim=True).double()
