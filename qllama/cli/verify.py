"""`qllama verify`: whether a checkpoint is what its readers expect."""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qllama_convert.verify import VerificationReport

SUMMARY = "check a checkpoint: its files, the rules of vLLM and transformers, its logits"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="DIR", help="a checkpoint folder, or a Hub id")
    parser.add_argument(
        "--revision", metavar="REF", help="branch, tag or commit of a Hub id (default: main)"
    )
    parser.add_argument(
        "--against",
        metavar="PROGRAM",
        help="transformers: load it there too, in float32 on the CPU, and compare logits",
    )
    parser.add_argument(
        "--python",
        metavar="PATH",
        help="an interpreter with torch, transformers and compressed-tensors (default: "
        "$QLLAMA_ORACLE_PYTHON, else this one)",
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def run(args: argparse.Namespace) -> None:
    from qllama_convert.verify import verify

    from qllama.progress import waiting_for

    with waiting_for("Verifying"):
        found = verify(args.model, against=args.against, python=args.python, revision=args.revision)
    as_json = dataclasses.asdict(found) | {"ok": found.ok}
    print(json.dumps(as_json, indent=2) if args.json else "\n".join(report(found)), flush=True)
    if not found.ok:
        raise ValueError(f"{found.folder} is not as it should be; what is wrong stands above")


def report(found: "VerificationReport") -> Iterator[str]:
    """What was found, as lines of text."""
    yield f"{found.folder}: {'good' if found.ok else 'not good'}"
    for problem in found.problems:
        yield f"wrong: {problem}"
    for note in found.notes:
        yield f"note: {note}"
    logits = found.comparison
    if logits is None:
        return
    yield f"{'right' if logits.ok else 'wrong'}: logits of {logits.tokens} tokens beside those of "
    yield f"  {', '.join(logits.against)} ({logits.compared_as}):"
    yield (
        f"  relative RMS {logits.relative_rms:.2g} (limit {logits.relative_rms_limit:g}), largest "
        f"difference {logits.max_difference:.2g}, same likeliest token "
        f"{logits.argmax_agreement:.1%} (limit {logits.argmax_limit:.0%})"
    )
