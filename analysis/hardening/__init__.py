"""The smallest change of a network after which part of the data is gone."""
