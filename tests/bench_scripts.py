"""Imports the programs of `benchmarks/`, which is a folder of scripts and no package."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

_FOLDER = str(Path(__file__).resolve().parent.parent / "benchmarks")


def load(name: str) -> ModuleType:
    """The module `benchmarks/NAME.py`; scripts find each other as they do when they are run."""
    if _FOLDER not in sys.path:
        sys.path.append(_FOLDER)
    return importlib.import_module(name)
