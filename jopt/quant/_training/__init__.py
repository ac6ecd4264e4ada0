"""Training with quantization: straight-through values, learned steps, noise, few bits."""
