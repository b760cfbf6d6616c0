"""Pages, tables and the demo: what people look at."""
