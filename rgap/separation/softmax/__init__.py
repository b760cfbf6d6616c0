"""Separation at a softmax head alone."""
