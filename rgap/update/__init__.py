"""What the client sent: the update, the loss it declares, its files, and what was done to it."""

from __future__ import annotations

from rgap.update.update import Update, view

__all__ = ["Update", "view"]
