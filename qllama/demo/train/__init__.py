"""How the demo model is made: `python -m qllama.demo.train --text DIR --out DIR`.

Trained as a float model, then quantized with `qllama.quantize`. On one GPU it takes minutes.
Nothing of this is needed to run the model.
"""
