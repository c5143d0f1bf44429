"""Quantized Llama 3 in JAX."""
