"""The segmenter side-car: gRPC server, client and back ends. Never imports jax or rsagent_jax."""
