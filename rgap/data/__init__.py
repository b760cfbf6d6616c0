"""Real photographs, 64×64; ORIGINS.md says where each comes from and who made it."""
