"""How long GPTQ takes: for the Linears of one decoder layer, or for a whole model.

    python benchmarks/bench_gptq.py --shape llama-3.1-8b --json benchmarks/results/gptq-h100.json
    python benchmarks/bench_gptq.py --sizes 960,576 --group-size 64 --tokens 32768
    python benchmarks/bench_gptq.py --model DIR --dataset calib.txt --samples 128 --length 256

For a layer there is one record for each input, with the weights that read it: q, k and v are
solved together, and so are gate and up. Weights and activations are random, and the same chunk of
activations is summed again and again; time does not depend on their values. The model's forward
passes and its files are no part of this.

With `--model` it is one run of `qllama.quantize`, whose report says where the time went: exporting
is in it, compiling unless `--warm`, importing is not; `io` is waiting for weights and for the
journal. `--peer NAME=SECONDS` is what another took.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from qllama.gptq.hessian import Hessian, accumulate, examine
from qllama.gptq.linear import GPTQOptions, quantize_gptq
from qllama.gptq.plan import tokens_per_batch
from qllama.gptq.scales import choose_scales, widen
from qllama.gptq.solver import factor, solve
from qllama.quantization.scheme import PRESETS, QuantScheme

CHUNK = 16384  # tokens summed at a time


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The Linears that read one input: weights `[n, k]` for each n of `heights`."""

    name: str
    heights: tuple[int, ...]
    k: int


def stages(shape: dict[str, Any]) -> list[Stage]:
    """The four inputs of a decoder layer, from the keys of a `config.json`."""
    d, f = shape["hidden_size"], shape["intermediate_size"]
    q = shape["num_attention_heads"] * shape["head_dim"]
    kv = shape["num_key_value_heads"] * shape["head_dim"]
    return [
        Stage(name="qkv_proj", heights=(q, kv, kv), k=d),
        Stage(name="o_proj", heights=(d,), k=q),
        Stage(name="gate_up_proj", heights=(f, f), k=d),
        Stage(name="down_proj", heights=(d,), k=f),
    ]


def bench_stage(
    stage: Stage,
    scheme: QuantScheme,
    options: GPTQOptions,
    *,
    tokens: int,
    repeat: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Time one stage.

    Returns:
        A record. `value` is in seconds, for summing `tokens` tokens and quantizing; `parts` has
        `hessian` (the sum), `scales`, `factor` and `solve`, each by itself, and `rest`: the losses
        for the report and what lies between.
    """
    from records import new_record

    keys = jax.random.split(jax.random.key(seed), 1 + len(stage.heights))
    x = jax.random.normal(keys[0], (min(CHUNK, tokens), stage.k), jnp.bfloat16)
    weights = [
        0.02 * jax.random.normal(key, (n, stage.k), jnp.bfloat16)
        for key, n in zip(keys[1:], stage.heights, strict=True)
    ]
    seconds: dict[str, list[float]] = {}

    collected = Hessian.zeros(stage.k)
    for _ in range(repeat + 1):
        collected = _timed(seconds, "hessian", accumulate, collected, x)
    moments = examine(collected)
    damping = moments.damping(0.01)
    diagonal = jnp.diagonal(moments.matrix)
    order = moments.order if options.actorder else jnp.arange(stage.k)

    def choose() -> Any:
        grids = [choose_scales(w, scheme, options.observer, diagonal) for w in weights]
        return widen(grids, stage.heights, scheme)

    stacked = jnp.concatenate(weights)
    for _ in range(repeat + 1):
        grid = _timed(seconds, "scales", choose)
        factors = _timed(seconds, "factor", factor, moments.matrix, damping, order, wide=False)
        _timed(seconds, "solve", solve, stacked, factors, order, grid, scheme)
        _timed(seconds, "all", _quantize, weights, collected, scheme, options)

    # The first of each was compiled.
    parts = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    chunks = tokens / x.shape[0]
    spread = [chunks * parts["hessian"] + edge(seconds["all"][1:]) for edge in (min, max)]
    whole = parts.pop("all")
    parts["rest"] = whole - sum(parts[name] for name in ("scales", "factor", "solve"))
    parts["hessian"] *= chunks
    return new_record(
        "gptq_solver",
        module=stage.name,
        n=sum(stage.heights),
        k=stage.k,
        scheme=scheme.describe(),
        options=f"{options.observer}, {options.actorder}" + ", refit" * options.refit,
        tokens=tokens,
        metric="s",
        value=round(parts["hessian"] + whole, 4),
        spread=[round(edge, 4) for edge in spread],
        parts={name: round(value, 4) for name, value in parts.items()},
    )


def bench_run(
    model: Path,
    *,
    scheme: str,
    group_size: int | None = None,
    dataset: str = "random-tokens",
    samples: int = 512,
    length: int = 2048,
    devices: int = 1,
    warm: bool = False,
    scratch: Path | None = None,
    peers: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Time a run of `qllama.quantize` with its defaults; `warm`: after one that compiles it all.

    Returns:
        A record. `value` and `parts` are in seconds, `peak_bytes` those of host and device.
    """
    from records import new_record

    import qllama
    from qllama.gptq import pipeline

    exports: dict[str, list[float]] = {}
    write_output = partial(_timed, exports, "export", pipeline.write_output)

    def run(samples: int) -> tuple[Any, float]:
        begin = time.perf_counter()
        with (
            tempfile.TemporaryDirectory(dir=scratch) as folder,
            mock.patch.object(pipeline, "write_output", write_output),
        ):
            report = qllama.quantize(
                model,
                Path(folder, "quantized"),
                scheme=scheme,
                group_size=group_size,
                dataset=dataset,
                num_calibration_samples=samples,
                max_seq_length=length,
                data_parallel_size=devices,
            )
        return report, time.perf_counter() - begin

    if warm:  # several batches of the same shape on every device
        run(min(samples, 3 * devices * max(1, tokens_per_batch() // length)))
    report, took = run(samples)
    seconds = asdict(report.seconds) | {"export": exports["export"][-1]}
    parts = {name: round(value, 2) for name, value in seconds.items()}
    return new_record(
        "gptq",
        devices=devices,
        model=model.name,
        layers=len({linear.layer for linear in report.linears}),
        scheme=report.scheme,
        samples=samples,
        length=length,
        compiled="before" if warm else "within",
        metric="s",
        value=round(took, 1),
        parts=parts | {"rest": round(took - sum(parts.values()), 2)},
        peak_bytes={"host": report.peak_host_bytes, "device": report.peak_device_bytes},
        peers=peers or {},
    )


def _quantize(
    weights: list[jax.Array], hessian: Hessian, scheme: QuantScheme, options: GPTQOptions
) -> list[Any]:
    return [result.weight for result in quantize_gptq(weights, hessian, scheme, options)]


def _timed[T](
    seconds: dict[str, list[float]], name: str, function: Callable[..., T], *args: Any, **kw: Any
) -> T:
    begin = time.perf_counter()
    result = jax.block_until_ready(function(*args, **kw))
    seconds.setdefault(name, []).append(time.perf_counter() - begin)
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    from make_checkpoint import SHAPES
    from records import merge_records

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, metavar="OUT", help="merge the records into this file")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b", help="of the layer")
    parser.add_argument("--sizes", nargs="+", metavar="N,K", help="these weights instead")
    parser.add_argument("--scheme", choices=PRESETS, default="W4A16")
    parser.add_argument("--group-size", type=int, help="columns per scale, for schemes with groups")
    parser.add_argument("--observer", choices=["absmax", "mse", "hdiag"], default="hdiag")
    parser.add_argument("--no-actorder", action="store_true", help="columns as they stand")
    parser.add_argument("--refit", action="store_true")
    parser.add_argument("--tokens", type=int, default=512 * 2048)
    parser.add_argument("--repeat", type=int, default=5)
    run = parser.add_argument_group("a whole model")
    run.add_argument("--model", type=Path, metavar="DIR", help="a float checkpoint")
    run.add_argument("--dataset", default="random-tokens", help="see `qllama quantize`")
    run.add_argument("--samples", type=int, default=512)
    run.add_argument("--length", type=int, default=2048)
    run.add_argument("--devices", type=int, default=1, help="to spread the run over")
    run.add_argument("--warm", action="store_true", help="compile in a run before, of few samples")
    run.add_argument("--scratch", type=Path, metavar="DIR", help="where it is written")
    run.add_argument("--peer", action="append", default=[], metavar="NAME=SECONDS")
    args = parser.parse_args(arguments)
    if args.model is not None:
        peers = {name: float(took) for name, _, took in (p.partition("=") for p in args.peer)}
        record = bench_run(
            args.model,
            scheme=args.scheme,
            group_size=args.group_size,
            dataset=args.dataset,
            samples=args.samples,
            length=args.length,
            devices=args.devices,
            warm=args.warm,
            scratch=args.scratch,
            peers=peers,
        )
        print(json.dumps(record), flush=True)
        if args.json is not None:
            merge_records(args.json, [record])
        return
    scheme = PRESETS[args.scheme]
    if args.group_size is not None:
        scheme = QuantScheme(
            weight_dtype=scheme.weight_dtype,
            strategy="group",
            group_size=args.group_size,
            symmetric=scheme.symmetric,
        )
    options = GPTQOptions(
        observer=args.observer,
        actorder=None if args.no_actorder else "static",
        refit=args.refit,
    )
    measured = stages(SHAPES[args.shape])
    if args.sizes:
        sizes = [tuple(map(int, size.split(","))) for size in args.sizes]
        measured = [Stage(name="", heights=(n,), k=k) for n, k in sizes]
    for stage in measured:
        record = bench_stage(stage, scheme, options, tokens=args.tokens, repeat=args.repeat)
        print(json.dumps(record), flush=True)
        if args.json is not None:
            merge_records(args.json, [record])


if __name__ == "__main__":
    main()
