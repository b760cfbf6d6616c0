"""The Cramér-Rao bound under noise and defences, and its measured counterpart."""
