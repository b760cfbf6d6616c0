"""Real pictures: those that ship with the library and those on disk."""

from __future__ import annotations

from rgap.photos.packaged import cifar10, folder, load, mnist, names

__all__ = ["cifar10", "folder", "load", "mnist", "names"]
