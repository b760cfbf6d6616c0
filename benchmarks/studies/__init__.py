"""The tables of the documentation: what is recovered, how exactly, and why not."""
