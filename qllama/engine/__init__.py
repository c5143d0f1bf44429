"""Generating text: sampling on the device, stop conditions, incremental detokenizing."""
