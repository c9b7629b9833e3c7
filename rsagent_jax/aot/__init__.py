"""Reads what the compiler made for a TPU that is not at hand: memory, floating-point work, traffic, a projected step."""
