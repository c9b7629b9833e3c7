"""What holds for every test: the CPU, no network, and no deadline on one example (a busy machine is no failure)."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before jax is imported; subprocesses inherit it
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis

hypothesis.settings.register_profile("rsagent", deadline=None)
hypothesis.settings.load_profile("rsagent")
