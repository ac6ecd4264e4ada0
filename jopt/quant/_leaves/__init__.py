"""Typed leaves that hold quantized values, and what views, sums and caches of them are."""
