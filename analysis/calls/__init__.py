"""What the forward of a network really does: its calls, its steps, its shared weights.

Recorded on a probe batch while it runs.
"""
