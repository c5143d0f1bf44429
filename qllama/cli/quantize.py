"""`qllama quantize`: make a quantized checkpoint of a float one."""

import argparse
import inspect
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qllama.cli.tables import in_units, table

if TYPE_CHECKING:
    from qllama.gptq.report import QuantizationReport

SUMMARY = "quantize a model, with calibration where the scheme needs it"

_UNSET = argparse.SUPPRESS  # the function's default holds, or the recipe's


def configure_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="a float checkpoint folder, or a Hub id")
    parser.add_argument("output_dir", metavar="OUT", help="the folder to write")
    parser.add_argument(
        "--scheme",
        default=_UNSET,
        help="W4A16, W4A16_ASYM, W8A16, W8A8, FP8, FP8_DYNAMIC or FP8_BLOCK (default: W4A16)",
    )
    parser.add_argument(
        "--recipe",
        default=_UNSET,
        metavar="YAML",
        help="a recipe file, or the name of one that comes with qllama; flags beside it go before",
    )
    parser.add_argument(
        "--format",
        default=_UNSET,
        help="compressed-tensors, gptq, fp8 or bf16 (default: compressed-tensors)",
    )
    _add_calibration(parser.add_argument_group("calibration"))
    _add_method(parser.add_argument_group("method"))
    _add_run(parser.add_argument_group("run"))


def _add_calibration(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--dataset",
        default=_UNSET,
        metavar="DATA",
        help="a .txt, .jsonl or .parquet file, a Hub dataset, or random-tokens",
    )
    group.add_argument(
        "--num-calibration-samples",
        type=int,
        default=_UNSET,
        metavar="N",
        help="sequences to use (default: 512)",
    )
    group.add_argument(
        "--max-seq-length",
        type=int,
        default=_UNSET,
        metavar="N",
        help="tokens of the longest sequence (default: 2048)",
    )
    group.add_argument(
        "--seed", type=int, default=_UNSET, metavar="N", help="of random tokens (default: 0)"
    )


def _add_method(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--algorithm", default=_UNSET, help="gptq, or rtn: round to nearest (default: gptq)"
    )
    group.add_argument(
        "--group-size",
        type=int,
        default=_UNSET,
        metavar="N",
        help="columns per scale; -1: one scale per row (default: 128)",
    )
    group.add_argument(
        "--actorder",
        type=_none_or_text,
        default=_UNSET,
        metavar="ORDER",
        help="static: columns with large inputs first; none: as they stand (default: static)",
    )
    group.add_argument(
        "--observer",
        default=_UNSET,
        help="how scales are chosen: hdiag, mse or absmax (default: hdiag)",
    )
    group.add_argument(
        "--dampening-frac",
        type=float,
        default=_UNSET,
        metavar="X",
        help="added to the Hessian, relative to its mean diagonal (default: by tokens per feature)",
    )
    group.add_argument(
        "--smoothquant-strength",
        type=float,
        default=_UNSET,
        metavar="X",
        help="W8A8: move outliers of activations into the weights, 0 to 1 (default: 0.8 with GPTQ)",
    )
    group.add_argument(
        "--kv-cache-scheme",
        default=_UNSET,
        metavar="DTYPE",
        help="fp8: calibrate scales of keys and values too",
    )
    group.add_argument(
        "--ignore",
        action="append",
        default=_UNSET,
        metavar="TARGET",
        help="a Linear that stays as it is: a path, or re: and a regular expression; may be given "
        "several times (default: lm_head)",
    )


def _add_run(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "-dp",
        "--data-parallel-size",
        type=int,
        default=_UNSET,
        metavar="N",
        help="devices that share the calibration sequences and the solving (default: 1)",
    )
    group.add_argument(
        "--dry-run", action="store_true", help="show sizes and an estimate of the time, no more"
    )
    group.add_argument(
        "--no-resume",
        dest="resume",
        action="store_false",
        help="begin again instead of going on with an interrupted run",
    )
    group.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    group.add_argument("--json", action="store_true", help="write the report as JSON to stdout")


def _none_or_text(value: str) -> str | None:
    return None if value.lower() in ("none", "null") else value


def run(args: argparse.Namespace) -> None:
    from qllama.gptq.pipeline import quantize

    parameters = inspect.signature(quantize).parameters
    given = {name: value for name, value in vars(args).items() if name in parameters}
    report = quantize(**given)
    print(report.to_json() if args.json else summary(report, dry_run=args.dry_run), flush=True)


def summary(report: "QuantizationReport", *, dry_run: bool) -> str:
    """The report as a person reads it first."""
    rows = [("module", "tensors", "scheme", "before", "after")]
    rows += [
        (s.module, str(s.count), s.scheme, in_units(s.bytes_before), in_units(s.bytes_after))
        for s in report.sizes
    ]
    rows.append(("total", "", "", in_units(report.bytes_before), in_units(report.bytes_after)))
    lines = table(rows, (1, 3, 4))
    if not dry_run:
        lines += ["", *_outcome(report)]
    lines += [f"note: {note}" for note in report.notes]
    return "\n".join(lines)


def _outcome(report: "QuantizationReport") -> Iterator[str]:
    seconds = report.seconds
    yield f"{report.output}: {report.scheme}, {report.format}"
    measured = [linear for linear in report.linears if linear.figures.tokens]
    if report.calibration is not None:
        used = report.calibration
        yield f"calibrated on {used.tokens} tokens in {used.sequences} sequences of {used.source}"
    if measured:
        ratio = math.fsum(x.figures.loss for x in measured) / (
            math.fsum(x.figures.rtn_loss for x in measured) or 1.0
        )
        yield f"loss of all Linears together: {ratio:.1%} of what rounding to nearest loses"
    yield (
        f"{seconds.total:.0f} s: forward {seconds.forward:.0f}, statistics {seconds.hessian:.0f}, "
        f"factors {seconds.factor:.0f}, solving {seconds.solve:.0f}, "
        f"waiting for files {seconds.io:.0f}"
    )
    troubled = sum(bool(linear.figures.notes) for linear in report.linears)
    if troubled:
        yield f"{troubled} Linears have notes in the report, see {report.output}"
