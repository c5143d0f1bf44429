"""The command line: `python -m qllama.demo.train --text DIR --out DIR`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from qllama.demo.train.run import make_demo
from qllama.demo.train.settings import Settings


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    defaults = Settings()
    parser = argparse.ArgumentParser(
        prog="python -m qllama.demo.train",
        description="Train the demo model on a folder of novels and write it as W4A16. "
        "Stopped and started again, it goes on where it was.",
    )
    parser.add_argument("--text", type=Path, required=True, help="folder of novels, *.txt")
    parser.add_argument("--out", type=Path, required=True, help="for checkpoints/ and model/")
    parser.add_argument(
        "--validation", default="persuasion.txt", help="the novel to validate on (%(default)s)"
    )
    parser.add_argument("--steps", type=int, default=defaults.steps, help="(%(default)s)")
    parser.add_argument(
        "--batch", type=int, default=defaults.batch, help="sequences a step (%(default)s)"
    )
    parser.add_argument(
        "--length", type=int, default=defaults.length, help="tokens a sequence (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=defaults.seed, help="(%(default)s)")
    args = parser.parse_args(arguments)
    settings = Settings(steps=args.steps, batch=args.batch, length=args.length, seed=args.seed)
    try:
        folder = make_demo(args.text, args.out, settings, validation=args.validation)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
