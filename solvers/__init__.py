"""Numerics: operators, factorisations and ranks; knows nothing of networks or attacks."""
