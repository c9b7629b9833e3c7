"""The embedded world of the quickstart: drawn scenes, a small vocabulary, a small policy."""
