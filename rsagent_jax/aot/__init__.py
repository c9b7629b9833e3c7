"""What a compiler made for a TPU that is not at hand: memory, arithmetic, traffic, and a projected step."""
