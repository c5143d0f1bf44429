"""Any checkpoint that qllama reads, into a form of Hugging Face's:

python convert/export_hf.py SRC DST [--to compressed-tensors | gptq | fp8 | bf16]
"""

import sys

from qllama.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
