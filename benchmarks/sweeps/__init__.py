"""Random networks, steps and idioms against what the library certifies."""
