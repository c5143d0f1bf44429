"""Llama in Flax NNX: layers, rotary embedding, key-value cache, decoder."""
