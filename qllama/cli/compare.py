"""`qllama compare`: how far a quantized model's predictions are from the original's."""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

from qllama.cli.options import add_engine_options, load_llm
from qllama.cli.texts import add_text, default_window, read_file

if TYPE_CHECKING:
    from qllama.evaluate.compare import ComparisonResult
    from qllama.gptq.report import QuantizationReport

SUMMARY = "measure how far one model's predictions are from another's"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="A", help="the original: a checkpoint folder, or a Hub id")
    parser.add_argument("b", metavar="B", help="what to compare with it: the quantized model")
    add_text(parser)
    parser.add_argument(
        "--report",
        type=Path,
        metavar="HTML",
        help="write B's quantization report, with these figures, as a page",
    )
    add_engine_options(parser)


def run(args: argparse.Namespace) -> None:
    from qllama_convert.hub import resolve

    from qllama.evaluate.compare import compare_with, remember

    text = read_file(args.text)
    args.revision = None
    args.model, other = resolve(args.a), resolve(args.b)
    report = None if args.report is None else _quantization_report(other)
    with load_llm(args) as llm:  # one after the other: both need not fit into memory
        window = default_window(llm) if args.window is None else args.window
        reference = remember(llm, text, window=window, limit=args.limit)
    args.model = other
    result = compare_with(reference, load_llm(args), text)
    _show(result, as_json=args.json)
    if report is not None:
        from qllama.gptq.report_page import report_page

        args.report.write_text(report_page(report, dataclasses.asdict(result)), encoding="utf-8")


def _show(result: "ComparisonResult", *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(dataclasses.asdict(result)))
        return
    change = result.perplexity_b / result.perplexity_a - 1
    print(f"KL(A || B)    mean {result.kl_mean:.6f}, 99th percentile {result.kl_p99:.6f} nats")
    print(f"same top-1    {result.top1_agreement:.2%}")
    print(f"perplexity A  {result.perplexity_a:.4f}")
    print(f"perplexity B  {result.perplexity_b:.4f} ({change:+.2%})")
    print(f"measured      {result.protocol}")


def _quantization_report(folder: Path) -> "QuantizationReport":
    from qllama.gptq.report import REPORT_FILE, QuantizationReport

    file = folder / REPORT_FILE
    if not file.is_file():
        raise ValueError(
            f"--report: {folder} has no {REPORT_FILE}, which 'qllama quantize' writes; leave the "
            "flag out"
        )
    return QuantizationReport.from_json(file.read_text(encoding="utf-8"))
