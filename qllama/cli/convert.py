"""`qllama convert`: a quantized checkpoint in another form."""

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qllama_convert.convert import ConversionReport

SUMMARY = "write a checkpoint in another form, without quantizing it again"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a checkpoint folder, or a Hub id")
    parser.add_argument("output", metavar="DST", help="the folder to write")
    parser.add_argument(
        "--to",
        default="compressed-tensors",
        metavar="FORM",
        help="compressed-tensors (the default), gptq, fp8 (AutoFP8's and fine-grained), bf16 (not "
        "quantized, in the dtype of config.json) or native (kept by orbax, for qllama alone)",
    )
    parser.add_argument(
        "--allow-lossy", action="store_true", help="also where something is rounded or left out"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing checkpoint")
    parser.add_argument(
        "--revision", metavar="REF", help="branch, tag or commit of a Hub id (default: main)"
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def run(args: argparse.Namespace) -> None:
    from qllama_convert.convert import convert

    from qllama.progress import waiting_for

    with waiting_for(f"Converting to {args.to}"):
        done = convert(
            args.source,
            args.output,
            args.to,
            allow_lossy=args.allow_lossy,
            overwrite=args.overwrite,
            revision=args.revision,
        )
    as_json = dataclasses.asdict(done) | {"lossless": done.lossless}
    print(json.dumps(as_json, indent=2) if args.json else "\n".join(report(done)))


def report(done: "ConversionReport") -> Iterator[str]:
    """A conversion as lines of text."""
    schemes = Counter(done.schemes.values())
    listed = ", ".join(f"{scheme} ({count} Linears)" for scheme, count in schemes.items())
    before = "from " if done.to == "bf16" and listed else ""
    yield f"{done.output}: {done.to}, {before}{listed or 'not quantized'}"
    if done.lossless:
        yield "every weight, scale and zero point is that of the source, read back and compared"
    if done.rounded:
        yield f"rounded: {len(done.rounded)} of {len(done.schemes)} Linears"
    for loss in done.losses:
        yield f"lost: {loss}"
    for note in done.notes:
        yield f"note: {note}"
