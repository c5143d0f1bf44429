"""What the two steps of making the demo model leave for its card."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

from qllama.demo.train.settings import Settings

TRAINING_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """How a float model came about. Goes with it as a file, to wherever it is quantized."""

    settings: Settings
    novels: Sequence[str]  # names of the texts trained on
    validation: str  # name of the text validated on
    train_tokens: int
    seconds: float  # of training
    device: str

    def to_json(self) -> str:
        """JSON text."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Of the model in a folder.

        Raises:
            ValueError: the folder has no such file, or what is in it is something else.
        """
        path = folder / TRAINING_FILE
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            return cls(**{**value, "settings": Settings(**value["settings"])})
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"{path} does not say how the model was trained ({error}); name the folder float/ "
                "that training leaves"
            ) from error


@dataclass(frozen=True, kw_only=True)
class QuantizationFacts:
    """How it was quantized, and what that cost: perplexities of the validation text."""

    sequences: int  # of the calibration data
    tokens: int  # of them together
    validation_windows: int
    validation_tokens: int  # of them together
    bfloat16: float
    rounded: float  # to nearest
    gptq: float  # what is stored
