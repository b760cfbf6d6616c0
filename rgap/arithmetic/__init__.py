"""Floating-point arithmetic: float64 in blocks, rounding to formats, derivatives in reverse."""
