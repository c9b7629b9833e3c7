"""Every setting: what there is, what is allowed, and how a file and the command line become dataclasses."""
