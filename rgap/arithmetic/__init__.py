"""Floating-point arithmetic: float64 in blocks, rounding of formats, derivatives in reverse mode."""
