"""What a quantized weight is: its scheme, its arrays, and how activations meet it."""
