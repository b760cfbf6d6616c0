"""One layer's rank counted three ways: in numbers, modulo a prime, by matchings."""
