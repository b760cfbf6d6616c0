"""Tests that every linear operator has to pass, of the library and of plugins."""

from __future__ import annotations

from rgap.testing.operators import dense, dense_test, dot_test, tolerance

__all__ = ["dense", "dense_test", "dot_test", "tolerance"]
