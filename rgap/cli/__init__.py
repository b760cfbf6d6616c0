"""The command line: one file a command, the options once."""

from __future__ import annotations

from rgap.cli.app import app, main

__all__ = ["app", "main"]
