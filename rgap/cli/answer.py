"""How a recovered batch leaves a command: into files, and onto the terminal or into JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from rgap.cli.console import print_json, say, stdout
from rgap.cli.options import Force, Json, optional

if TYPE_CHECKING:
    from rgap.recovery import Recovery
    from rgap.update.update import Update

__all__ = ["Answer"]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Where the pictures of a recovery go, and how its numbers are printed."""

    panel: ClassVar[str] = "Answer"
    output: Annotated[
        Path | None,
        optional(
            "Where the pictures go: a new folder, a .png (batch of one), or a .safetensors "
            "file with every digit.",
            "PATH",
            "--output",
            "-o",
        ),
    ] = None
    force: Force = False
    as_json: Json = False

    def check(self, update: Update) -> None:
        """Refuse before the work what could not be written after it."""
        from rgap.report.results import check_target

        if self.output is not None:
            check_target(self.output, update, force=self.force)

    def write(self, recovery: Recovery, update: Update, why_not: str) -> Path | None:
        """Write the pictures; where there are none, None and one line that says ``why_not``."""
        from rgap.report.results import write_recovery

        if self.output is None:
            return None
        written = write_recovery(recovery, self.output, update.value_range, force=self.force)
        if written is None:
            say(f"nothing written to {self.output}: {why_not}")
        return written

    def show(
        self,
        recovery: Recovery,
        numbers: dict[str, Any],
        written: Path | None,
        *,
        explain: bool = False,
        text: str = "",
    ) -> None:
        """Print ``numbers`` as JSON, or the recovery in words with ``text`` below it."""
        from rgap.report.results import print_recovery

        if self.as_json:
            print_json({**numbers, "output": None if written is None else str(written)})
            return
        console = stdout()
        print_recovery(console, recovery, explain=explain)
        if text:
            console.print(f"\n{text}", highlight=False, soft_wrap=True)
        if written is not None:
            console.print(f"Pictures: {written}", highlight=False, soft_wrap=True)
