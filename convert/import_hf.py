"""Any checkpoint that qllama reads, into the native form: python convert/import_hf.py SRC DST"""

import sys

from qllama.cli import main

if __name__ == "__main__":
    sys.exit(main(["convert", "--to", "native", *sys.argv[1:]]))
