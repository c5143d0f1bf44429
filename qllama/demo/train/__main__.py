"""The command line: `python -m qllama.demo.train --text DIR --out DIR`."""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from qllama.demo.train.run import quantize_demo, train_demo
from qllama.demo.train.settings import CALIBRATION_SEQUENCES, Settings

_TRAINING = {  # field of Settings -> what it is
    "steps": "",
    "batch": "sequences a step",
    "length": "tokens a sequence",
    "seed": "",
}


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m qllama.demo.train",
        description="Train the demo model on a folder of novels (OUT/float), quantize it to W4A16 "
        "by GPTQ and measure it (OUT/model). Training that was stopped goes on where it was.",
    )
    parser.add_argument("--text", type=Path, required=True, help="folder of novels, *.txt")
    parser.add_argument(
        "--out", type=Path, required=True, help="for checkpoints/, float/, model/ and a report"
    )
    parser.add_argument(
        "--from-float", type=Path, metavar="DIR", help="quantize this float/ instead of training"
    )
    parser.add_argument(
        "--calibration",
        type=int,
        default=CALIBRATION_SEQUENCES,
        metavar="N",
        help="sequences of the novels to quantize with (%(default)s)",
    )
    # Left out, they are not there, so that it can be told whether someone asks for one.
    training = parser.add_argument_group("training", argument_default=argparse.SUPPRESS)
    training.add_argument("--validation", help="the novel to validate on (persuasion.txt)")
    for name, default in asdict(Settings()).items():
        if name in _TRAINING:
            explained = f"{_TRAINING[name]} ({default})".strip()
            training.add_argument(f"--{name}", type=int, metavar="N", help=explained)
    args = vars(parser.parse_args(arguments))
    text, out, source, sequences = (
        args.pop(name) for name in ("text", "out", "from_float", "calibration")
    )
    if source is not None and args:
        parser.error(f"--from-float is trained already: leave out --{', --'.join(args)}")
    if sequences < 1:
        parser.error(f"--calibration {sequences}: one sequence is the least")
    try:
        if source is None:
            novel = {name: args.pop(name) for name in ("validation",) if name in args}
            source = train_demo(text, out, Settings(**args), **novel)
            print(f"wrote {source}", flush=True)
        folder = quantize_demo(source, text, out, sequences=sequences)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
