"""The published separation by sparsity, kept as the peer to compare with.

No part of the road from an update to its data.
"""
