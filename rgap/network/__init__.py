"""A model read as a chain of stages, and why it is none where it is none."""

from __future__ import annotations

from rgap.network.chain import Barrier, Chain, Stage, parse

__all__ = ["Barrier", "Chain", "Stage", "parse"]
