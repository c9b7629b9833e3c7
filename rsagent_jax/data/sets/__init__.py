"""Data sets, each read from its own format."""
