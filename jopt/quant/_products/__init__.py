"""Products of quantized operands: their rules, their implementations, and how one is chosen."""
