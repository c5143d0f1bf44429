"""What a model predicts, and how far a quantized one is from its original."""
