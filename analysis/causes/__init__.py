"""Why this batch was not recovered: causes, ranked, each with its remedy."""
