"""Decoding speed of whole models on a GPU, through `LLM.generate`, beside XLA and transformers.

    python benchmarks/bench_decode.py --shape llama-3.1-8b --scheme W4A16 FP8_DYNAMIC bf16 \
        --batch 1 16 --context 128 1024 --peer-python python3 --json benchmarks/results/decode.json

Each scheme is measured on a random checkpoint of the shape, made in `--scratch`. Every scheme,
backend and peer is a process of its own. As many at once as `--together` says, whose weights must
fit on the card, load and compile side by side and are then timed one after the other; the peer goes
before them, alone. A step is the difference between generating many tokens and a few, over the
difference in tokens, so that reading the prompt and the first dispatch cancel. `limit` is what the
card's measured read bandwidth allows: every weight and every key and value read once a step.
`parts` are microseconds of a step: matmuls, attention, other kernels, copies, and what is left,
gaps between them; a profiled kernel takes 0.1 us longer, so without gaps that is a little below 0.
"""

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

FEW, MANY = 9, 121  # tokens generated: whole bursts of eight steps after the first token
PEER = "transformers bf16 compiled"

_PEER = """
import json, sys, time, torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache
folder, cells, few, many, repeat = json.loads(sys.argv[1])
config = AutoConfig.from_pretrained(folder)
config.__dict__.pop("quantization_config", None)
torch.set_default_dtype(torch.bfloat16)
with torch.device("cuda"):
    model = AutoModelForCausalLM.from_config(config).eval()

# One cache for both lengths of a cell: with one of its own each would be compiled.
caches = {(batch, context): StaticCache(config=config, max_cache_len=context + many)
          for batch, context in cells}

def seconds(batch, context, count):
    cache = caches[batch, context]
    cache.reset()
    ids = torch.randint(0, config.vocab_size, (batch, context), device="cuda")
    torch.cuda.synchronize()
    begin = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                   min_new_tokens=count, do_sample=False, pad_token_id=0, past_key_values=cache)
    torch.cuda.synchronize()
    return time.perf_counter() - begin

for batch, context in cells:
    for count in (few, many, few, many):
        seconds(batch, context, count)
print("READY", flush=True)
input()
for batch, context in cells:
    for count in (few, many):
        seconds(batch, context, count)
    steps = [(seconds(batch, context, many) - seconds(batch, context, few)) / (many - few)
             for _ in range(repeat)]
    print("CELL" + json.dumps({"batch": batch, "context": context, "steps": steps}), flush=True)
"""


# -- a process that is measured --------------------------------------------------------------------


def measure(folder: Path, backend: str, cells: list[tuple[int, int]], repeat: int) -> None:
    """Time a decode step of `LLM(folder)` at every (batch, context), greedy, random tokens.

    Prints READY once everything is compiled, waits for a line, then prints a CELL for each.
    """
    from qllama import LLM, SamplingParams

    begin = time.perf_counter()
    llm = LLM(folder, backend=backend, max_model_len=max(context for _, context in cells) + MANY)
    loaded = time.perf_counter() - begin
    random = np.random.default_rng(0)

    def seconds(batch: int, context: int, count: int) -> float:
        ids = random.integers(0, llm.config.vocab_size, (batch, context))
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate([{"prompt_token_ids": row} for row in ids], params, use_tqdm=False)
        return time.perf_counter() - begin

    first = {}
    for cell in cells:
        first[cell] = seconds(*cell, MANY)
        seconds(*cell, FEW)  # with the rows and the room that the run before has left
    print("READY", flush=True)
    input()
    bandwidth, weights = read_bandwidth(), bytes_a_step(llm)
    for cell in cells:
        batch, context = cell
        seconds(*cell, MANY)
        steps = [(seconds(*cell, MANY) - seconds(*cell, FEW)) / (MANY - FEW) for _ in range(repeat)]
        few, many = (traced(lambda n=n, cell=cell: seconds(*cell, n)) for n in (FEW, MANY))
        many.subtract(few)
        kernels = {name: ns / (MANY - FEW) / 1e3 for name, ns in many.most_common()}
        parts: Counter[str] = Counter()
        for name, us in kernels.items():
            parts[kind(name)] += us
        if parts:
            parts["gaps"] = statistics.median(steps) * 1e6 - sum(parts.values())
        cache = batch * (context + (MANY + FEW) / 2) * bytes_a_token(llm)
        found = {
            "batch": batch,
            "context": context,
            "steps": steps,
            "limit": (weights + cache) / bandwidth,
            "parts": {name: round(us, 1) for name, us in parts.items()},
            "kernels": {name[:70]: round(us, 1) for name, us in list(kernels.items())[:24]},
            "load_s": round(loaded, 1),
            "first_s": round(first[cell], 1),
        }
        print("CELL" + json.dumps(found), flush=True)


def read_bandwidth() -> float:
    """Bytes a second that a sum over much more than the caches reads."""
    import jax
    import jax.numpy as jnp

    big = jnp.ones(1 << (28 if jax.default_backend() == "gpu" else 24), jnp.float32)
    total = jax.jit(jnp.sum)
    total(big).block_until_ready()
    begin = time.perf_counter()
    for _ in range(20):
        last = total(big)
    last.block_until_ready()
    return 20 * big.nbytes / (time.perf_counter() - begin)


def bytes_a_step(llm: Any) -> int:
    """What every decode step reads of the weights: all but the embedding, unless it is the head."""
    import jax
    from flax import nnx

    total = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(llm.model)))
    tied = llm.model.lm_head is None
    return total if tied else total - llm.model.embed_tokens[...].nbytes


def bytes_a_token(llm: Any) -> int:
    """What the cache holds for a token of one text."""
    from qllama.model.kv_cache import cache_bytes

    return cache_bytes(llm.config, llm.kv_cache_dtype)


def traced(run: Callable[[], object]) -> "Counter[str]":
    """Nanoseconds that each kernel on the GPU took while `run` ran; nothing on a CPU."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        profile = jax.profiler.ProfileData.from_file(str(file))
    spent: Counter[str] = Counter()
    for plane in profile.planes:
        if plane.name.startswith("/device:GPU:0"):
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    for event in line.events:
                        spent[event.name] += int(event.duration_ns)
    return spent


def kind(kernel: str) -> str:
    name = kernel.lower()
    if "attention" in name:
        return "attention"
    if "row_kernel" in name or "allreduce" in name:
        return "other kernels"
    if any(word in name for word in ("mosaic", "gemm", "gemv", "nvjet", "cutlass", "_dot")):
        return "matmuls"
    return "copies" if "memcpy" in name or "memset" in name else "other kernels"


# -- the parent ------------------------------------------------------------------------------------


def bench_decode(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One record for each scheme, batch and context, as they come; `value` in tokens a second."""
    cells = [(batch, context) for batch in options.batch for context in options.context]
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        with ThreadPoolExecutor() as pool:
            make = [pool.submit(_make, Path(scratch), name, options) for name in options.scheme]
            folders = dict(zip(options.scheme, [made.result() for made in make], strict=True))
        waves: list[dict[tuple[str, str], list[str]]] = []
        if options.peer_python:  # by itself: torch and JAX do not share a card's memory well
            one = next(iter(folders.values()))
            argument = json.dumps([str(one), cells, FEW, MANY, options.repeat])
            waves.append({("peer", PEER): [options.peer_python, "-c", _PEER, argument]})
        commands = {}
        for scheme, folder in folders.items():
            others = () if scheme == "bf16" else options.backends  # nothing to choose there
            for backend in (*others, "auto"):  # last, since it makes the record
                commands[scheme, backend] = [
                    *(sys.executable, __file__, "--measure", str(folder), "--backend", backend),
                    *("--batch", *map(str, options.batch)),
                    *("--context", *map(str, options.context)),
                    *("--repeat", str(options.repeat)),
                ]
        found: dict[tuple[str, str], dict[tuple[int, int], dict[str, Any]]] = {}
        waves += map(dict, itertools.batched(commands.items(), options.together))
        measurements = (run_in_turn(wave, options.timeout) for wave in waves)
        for key, measured in itertools.chain.from_iterable(measurements):
            found[key] = measured
            scheme, backend = key
            for cell, what in measured.items() if backend == "auto" else ():
                peers = {
                    other if of == "peer" else f"qllama {other}": round(
                        cell[0] / statistics.median(theirs[cell]["steps"]), 1
                    )
                    for (of, other), theirs in found.items()
                    if of in ("peer", scheme) and other != "auto" and cell in theirs
                }
                yield _record(scheme, what, peers, options)


def _make(scratch: Path, scheme: str, options: argparse.Namespace) -> Path:
    """A random checkpoint of `scheme`."""
    script = Path(__file__).with_name("make_checkpoint.py")
    command = [sys.executable, str(script), "--shape", options.shape, "--scheme", scheme]
    for name in ("layers", "vocab"):
        if getattr(options, name) is not None:
            command += [f"--{name}", str(getattr(options, name))]
    folder = scratch / scheme
    subprocess.run([*command, "--out", str(folder)], check=True, stdout=subprocess.DEVNULL)
    return folder


def run_in_turn[K](
    commands: dict[K, list[str]], timeout: float
) -> Iterator[tuple[K, dict[tuple[int, int], dict[str, Any]]]]:
    """Start all commands; once each is ready or dead, let one after the other measure.

    A command that fails or hangs costs its own cells alone.
    """
    begin = time.monotonic()
    deadline = begin + timeout
    environment = os.environ | {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    with contextlib.ExitStack() as stack:
        errors = {key: stack.enter_context(tempfile.TemporaryFile("w+")) for key in commands}
        running = {}
        for key, command in commands.items():
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors[key],
                text=True,
                env=environment,
            )
            running[key] = stack.enter_context(process)
            stack.callback(process.kill)
        with ThreadPoolExecutor(len(running)) as pool:
            waiting = {key: pool.submit(_until_ready, p) for key, p in running.items()}
            for key, future in waiting.items():
                try:
                    future.result(max(deadline - time.monotonic(), 0))
                except TimeoutError:
                    running[key].kill()
        print(f"{time.monotonic() - begin:.0f} s: all ready", file=sys.stderr, flush=True)
        for key, process in running.items():
            watchdog = threading.Timer(timeout, process.kill)
            watchdog.start()
            yield key, {(cell["batch"], cell["context"]): cell for cell in _cells(process)}
            watchdog.cancel()
            if process.wait() != 0:
                errors[key].seek(0)
                print(f"{key} failed:\n{errors[key].read()[-1500:]}", file=sys.stderr)


def _until_ready(process: "subprocess.Popen[str]") -> None:
    """Read what a process prints until it says READY, or ends."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("READY"):
            return


def _cells(process: "subprocess.Popen[str]") -> Iterator[dict[str, Any]]:
    """Let a process measure; what it finds, shown as it comes."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # it died: the loop below finds nothing
        process.stdin.write("\n")
        process.stdin.close()
    for line in process.stdout:
        if line.startswith("CELL"):
            print(line.rstrip(), file=sys.stderr, flush=True)
            yield json.loads(line.removeprefix("CELL"))


def _record(
    scheme: str, cell: dict[str, Any], peers: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    from records import new_record

    batch = cell["batch"]
    rates = sorted(batch / step for step in cell["steps"])
    record = new_record(
        "decode",
        model=options.shape,
        layers=options.layers,
        scheme=scheme,
        batch=batch,
        context=cell["context"],
        metric="tokens_per_second",
        value=round(statistics.median(rates), 1),
        spread=[round(rates[0], 1), round(rates[-1], 1)],
        limit=round(batch / cell["limit"], 1),
        parts=cell["parts"],
        peers=peers,
    )
    beside = ", ".join(f"{name} {rate}" for name, rate in peers.items())
    print(
        f"{scheme:12} batch {batch:3} context {cell['context']:5}: {record['value']:8} tokens/s, "
        f"{record['value'] / record['limit']:.0%} of the limit; {beside or 'no peer'}; loaded in "
        f"{cell['load_s']} s, first run {cell['first_s']} s; {cell['parts']}"
    )
    for name, us in cell["kernels"].items():
        print(f"    {us:8.1f} us  {name}")
    return record


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--vocab", type=int, help="another size than the shape's")
    parser.add_argument("--scheme", nargs="+", default=["W4A16", "W8A8", "FP8_DYNAMIC", "bf16"])
    parser.add_argument("--backends", nargs="*", default=["xla"], help="beside auto")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--context", nargs="+", type=int, default=[128, 1024])
    parser.add_argument("--repeat", type=int, default=5, help="(%(default)s)")
    parser.add_argument(
        "--together", type=int, default=4, help="processes on the card at once (%(default)s)"
    )
    parser.add_argument("--timeout", type=int, default=300, help="seconds to load and compile")
    parser.add_argument("--scratch", default=None, help="where checkpoints are made: fast, large")
    parser.add_argument("--peer-python", help="interpreter with torch and transformers")
    parser.add_argument("--json", type=Path, metavar="OUT", help="merge the records into this file")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--backend", default="auto", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.measure:
        cells = [(batch, context) for batch in options.batch for context in options.context]
        measure(options.measure, options.backend, cells, options.repeat)
        return
    for record in bench_decode(options):
        if options.json:
            from records import merge_records

            merge_records(options.json, [record])


if __name__ == "__main__":
    sys.exit(main())
