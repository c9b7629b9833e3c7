"""Tools, views, overlays, the environment, its prompts and the oracle teacher: what a turn is made of, on the host."""
