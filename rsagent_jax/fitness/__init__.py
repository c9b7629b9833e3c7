"""Whether a machine is fit for a config: checks of `python -m rsagent_jax.doctor`, one file per kind."""
