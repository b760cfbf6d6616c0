"""Figures and tables of the documentation, drawn from runs."""
