"""Floating-point arithmetic: float64 in blocks, rounding of formats, derivatives by reverse passes."""
