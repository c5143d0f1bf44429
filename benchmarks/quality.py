"""What quantization costs: KL divergence, perplexity and time, for every scheme and option.

    python benchmarks/quality.py MODEL --calibration calib_text.txt --text eval_text.txt \\
        --tune calib_text.txt --tune-skip 32768 --peer-figures smollm2_peer.json \\
        --json benchmarks/results/quality-cpu.json

Each case is quantized, exported, loaded again and compared with the original, in float32, with
`qllama.compare`. Options are to be chosen by the figures of --tune, a text that is neither
calibrated with nor shown; those of --text say what the chosen ones are worth. The defaults fit
SmolLM2, whose 576 features groups of 128 do not divide, and the peers' figures for it.
"""

import argparse
import json
import re
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import qllama
from qllama.evaluate.compare import ComparisonResult, Reference, compare_with, remember
from qllama.llm import LLM


@dataclass(frozen=True, kw_only=True)
class Case:
    """A scheme and the settings of its recipe that are not the defaults."""

    scheme: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    peer: str | None = None  # its name among the peer's figures

    def name(self) -> str:
        """Such as "W4A16 observer=mse", as it is printed and recorded."""
        return " ".join([self.scheme, *(f"{key}={value}" for key, value in self.settings.items())])


RTN = {"algorithm": "rtn"}

UNSMOOTHED = {"smoothquant_strength": 0.0}
CASES = [
    Case(scheme="W4A16", settings=RTN, peer="rtn_w4a16_g64"),
    Case(scheme="W4A16", peer="gptq_w4a16_g64"),
    Case(scheme="W4A16", settings={"observer": "absmax"}, peer="gptq_w4a16_g64"),
    Case(scheme="W4A16", settings={"observer": "mse"}, peer="gptq_w4a16_g64"),
    Case(scheme="W4A16", settings={"refit": True}, peer="gptq_w4a16_g64"),
    Case(scheme="W4A16", settings={"actorder": None}, peer="gptq_w4a16_g64_noact"),
    Case(scheme="W4A16", settings={"dampening_frac": 0.1}, peer="gptq_w4a16_g64"),
    Case(scheme="W4A16", settings={"dampening_frac": 0.05}, peer="gptq_w4a16_g64"),
    Case(scheme="W4A16", settings={"dampening_reference": "clipmean"}, peer="gptq_w4a16_g64"),
    Case(scheme="W4A16_ASYM", settings=RTN),
    Case(scheme="W4A16_ASYM"),
    Case(scheme="W4A16_ASYM", settings={"observer": "absmax"}),
    Case(scheme="W4A16_ASYM", settings={"observer": "mse"}),
    Case(scheme="W4A16_ASYM", settings={"refit": True}),
    Case(scheme="W4A16_ASYM", settings={"dampening_reference": "clipmean"}),
    Case(scheme="W8A16", settings=RTN),
    Case(scheme="W8A16"),
    Case(scheme="W8A8", settings=RTN, peer="w8a8_rtn"),
    Case(scheme="W8A8", peer="w8a8_gptq"),
    Case(scheme="W8A8", settings=UNSMOOTHED, peer="w8a8_gptq"),
    Case(scheme="W8A8", settings={"smoothquant_strength": 0.5}, peer="w8a8_gptq"),
    Case(scheme="W8A8", settings={"observer": "absmax", **UNSMOOTHED}, peer="w8a8_gptq"),
    Case(scheme="W8A8", settings={"observer": "mse", **UNSMOOTHED}, peer="w8a8_gptq"),
    Case(scheme="FP8", settings=RTN, peer="fp8"),
    Case(scheme="FP8", peer="fp8"),
    Case(scheme="FP8", settings={"observer": "absmax"}, peer="fp8"),
    Case(scheme="FP8", settings={**RTN, "kv_cache_scheme": "fp8"}),
    Case(scheme="FP8", settings={"kv_cache_scheme": "fp8"}),
    Case(scheme="FP8_DYNAMIC", settings=RTN, peer="fp8_dynamic"),
    Case(scheme="FP8_DYNAMIC", peer="fp8_dynamic"),
    Case(scheme="FP8_BLOCK", settings=RTN),
    Case(scheme="FP8_BLOCK"),
]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A text that models are compared on, with what the original predicts there."""

    name: str
    ids: list[int]
    reference: Reference


def measured_text(llm: LLM, path: Path, *, skip: int, window: int, limit: int | None) -> Measured:
    """The windows of a text after its first `skip` tokens, and the original's predictions."""
    text = path.read_text(encoding="utf-8")
    ids = llm.tokenizer.encode(text, add_special_tokens=False, verbose=False)[skip:]
    reference = remember(llm, ids, window=window, limit=limit)
    name = f"{path.name}, {reference.windows.size} tokens from {skip}, windows of {window}"
    return Measured(name=name, ids=ids, reference=reference)


def measure(
    case: Case,
    model: Path,
    texts: Sequence[Measured],
    *,
    group_size: int | None,
    calibration: Mapping[str, Any],
    semantics: str,
) -> Iterator[tuple[Measured, ComparisonResult, dict[str, float]]]:
    """Quantize once, and compare on every text.

    Yields:
        The text, the comparison, and what quantizing cost: `seconds` of the whole call and of its
        parts, `MB` of the weight files.
    """
    groups = {"group_size": group_size} if case.scheme in ("W4A16", "W4A16_ASYM", "W8A16") else {}
    recipe = {"scheme": case.scheme, **groups, **case.settings}
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        report = qllama.quantize(model, f"{folder}/out", recipe=recipe, **calibration)
        cost = {"seconds": round(time.perf_counter() - begin, 2)}
        cost |= {
            name: round(getattr(report.seconds, name), 2)
            for name in ("forward", "hessian", "solve", "io")
        }
        cost["MB"] = round(report.bytes_after / 1e6, 2)
        with LLM(f"{folder}/out", dtype="float32", activation_semantics=semantics) as llm:
            for text in texts:
                yield text, compare_with(text.reference, llm, text.ids), cost


def to_record(
    case: Case,
    model: str,
    text: Measured,
    result: ComparisonResult,
    cost: Mapping[str, float],
    **cell: Any,
) -> dict[str, Any]:
    """One case on one text. `value` is the mean KL divergence in nats."""
    from records import new_record

    return new_record(
        "quality",
        model=model,
        scheme=case.scheme,
        settings=dict(case.settings),
        text=text.name,
        **cell,
        metric="kl",
        value=round(result.kl_mean, 6),
        parts={
            "kl_p99": round(result.kl_p99, 4),
            "top1_agreement": round(result.top1_agreement, 5),
            "perplexity": round(result.perplexity_b, 4),
            "perplexity_of_original": round(result.perplexity_a, 4),
            **cost,
        },
    )


def peer_figures(path: Path, case: Case) -> dict[str, float]:
    """What llm-compressor is quoted with for this case; empty where it is not."""
    results = json.loads(path.read_text(encoding="utf-8"))["results"]
    if case.peer not in results:
        return {}
    quoted = results[case.peer]
    return {
        "llm-compressor (quoted)": quoted["kl"],
        "llm-compressor perplexity (quoted)": quoted["ppl"],
        "llm-compressor seconds (quoted)": quoted["quantize_wall_s"],
    }


def row(case: Case, record: Mapping[str, Any]) -> str:
    """A line of the table."""
    parts = record["parts"]
    peer = record.get("peers", {}).get("llm-compressor (quoted)")
    share = "" if peer is None else f"  {record['value'] / peer:5.2f} x peer"
    return (
        f"{case.name():40}  KL {record['value']:.5f}  p99 {parts['kl_p99']:7.4f}  "
        f"top-1 {parts['top1_agreement']:.4f}  perplexity {parts['perplexity']:8.4f}  "
        f"{parts['seconds']:6.1f} s{share}"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from records import merge_records

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the original")
    parser.add_argument("--calibration", type=Path, required=True, metavar="FILE")
    parser.add_argument("--samples", type=int, default=128, help="calibration sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of each")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="what is shown")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--limit", type=int, default=8, help="windows of --text")
    parser.add_argument("--tune", type=Path, metavar="FILE", help="what options are chosen by")
    parser.add_argument("--tune-skip", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose names match")
    parser.add_argument("--activation-semantics", default="compressed-tensors", dest="semantics")
    parser.add_argument("--peer-figures", type=Path, metavar="FILE", help="of the same protocol")
    parser.add_argument("--json", type=Path, metavar="OUT", help="merge the records into this file")
    args = parser.parse_args(arguments)

    with LLM(args.model, dtype="float32") as llm:
        texts = [measured_text(llm, args.text, skip=0, window=args.window, limit=args.limit)]
        if args.tune is not None:
            texts.append(
                measured_text(llm, args.tune, skip=args.tune_skip, window=args.window, limit=None)
            )
    calibration = {
        "dataset": args.calibration,
        "num_calibration_samples": args.samples,
        "max_seq_length": args.length,
    }
    for case in CASES:
        if not re.search(args.only, case.name()):
            continue
        try:
            for text, result, cost in measure(
                case,
                args.model,
                texts,
                group_size=args.group_size,
                calibration=calibration,
                semantics=args.semantics,
            ):
                record = to_record(
                    case,
                    args.model.name,
                    text,
                    result,
                    cost,
                    group_size=args.group_size,
                    calibration=f"{args.samples} x {args.length}",
                    activation_semantics=args.semantics,
                )
                if args.peer_figures is not None and text is texts[0]:
                    record["peers"] = peer_figures(args.peer_figures, case)
                print(f"{'text' if text is texts[0] else 'tune'}  {row(case, record)}", flush=True)
                if args.json is not None:
                    merge_records(args.json, [record])
        except ValueError as error:  # a scheme that this model's sizes do not allow
            print(f"      {case.name():40}  {error}", flush=True)


if __name__ == "__main__":
    main()
