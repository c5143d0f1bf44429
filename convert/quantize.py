"""A model into a quantized checkpoint: python convert/quantize.py MODEL OUT --scheme W4A16 ..."""

import sys

from qllama.cli import main

if __name__ == "__main__":
    sys.exit(main(["quantize", *sys.argv[1:]]))
