"""The same ranks as expressions in B and the sizes, with proofs.

Their public face is :mod:`rgap.analysis.symbolic`.
"""
