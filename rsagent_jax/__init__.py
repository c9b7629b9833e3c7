"""RSAgent in JAX: a Qwen2.5-VL policy that segments what a sentence describes, with tools. Never imports torch."""

__version__ = "0.1.0"
