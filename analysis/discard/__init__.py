"""Each layer alone at a batch: how much of its input its own equations leave open."""
