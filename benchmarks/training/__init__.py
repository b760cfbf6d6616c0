"""What the package ships and was learned: scripts that learn it again."""
