"""Speed on a CPU, beside transformers on the same file, in the same run, with the same threads.

    python benchmarks/bench_cpu.py MODEL --peer-python .venv-oracle/bin/python \
        --json benchmarks/results/cpu.json

MODEL is a bfloat16 checkpoint of SmolLM2-135M or the like. It is measured as it is, and rounded to
W4A16 with groups of 64. Decoding is greedy after 32 prompt tokens; prefill reads 512. transformers
runs in the dtype of the file and, because that is slow on a CPU without bfloat16 units, in float32;
for W4A16 it decompresses with compressed-tensors. qllama runs as its user would run it.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, STEPS, PREFILL, REPEAT = 32, 8, 512, 5
BATCHES = (1, 8)
GROUP_SIZE = 64

_PEER = """
import json, sys, time, statistics, torch
from transformers import AutoModelForCausalLM
folder, dtype = sys.argv[1:3]
threads, prompt, steps, prefill, repeat = map(int, sys.argv[3:])
torch.set_num_threads(threads)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
vocabulary = model.config.vocab_size
def generate(ids, count):
    begin = time.perf_counter()
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                   min_new_tokens=count, do_sample=False, pad_token_id=0)
    return time.perf_counter() - begin
results = {}
for batch in (1, 8):
    ids = torch.randint(0, vocabulary, (batch, prompt))
    generate(ids, 2)
    times = [(generate(ids, steps + 1) - generate(ids, 1)) / steps for _ in range(repeat)]
    results[f"decode {batch}"] = statistics.median(times)
ids = torch.randint(0, vocabulary, (1, prefill))
generate(ids, 1)
results["prefill"] = statistics.median(generate(ids, 1) for _ in range(repeat))
print("RESULT" + json.dumps(results))
"""


def measure_peer(python: str, folder: Path, dtype: str, repeat: int = REPEAT) -> dict[str, float]:
    """Seconds a decode step takes at each batch, and a prefill, in transformers.

    Raises:
        RuntimeError: the interpreter has no torch and transformers, or they cannot run the model.
    """
    sizes = [os.cpu_count() or 1, PROMPT, STEPS, PREFILL, repeat]
    command = [python, "-c", _PEER, str(folder), dtype, *map(str, sizes)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT"):
            return json.loads(line.removeprefix("RESULT"))
    raise RuntimeError(f"{python} did not measure transformers:\n{done.stderr[-2000:]}")


def measure_qllama(folder: Path, repeat: int = REPEAT) -> dict[str, float]:
    """The same figures for `LLM(folder)` with its defaults."""
    from qllama import LLM, SamplingParams

    llm = LLM(folder, max_model_len=PREFILL + STEPS + 2)
    random = np.random.default_rng(0)

    def seconds(batch: int, length: int, count: int) -> float:
        ids = random.integers(0, llm.config.vocab_size, (batch, length))
        prompts = [{"prompt_token_ids": row} for row in ids]
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
        begin = time.perf_counter()
        llm.generate(prompts, params, use_tqdm=False)
        return time.perf_counter() - begin

    def median(measure: Callable[[], float]) -> float:
        return statistics.median(measure() for _ in range(repeat))

    def step(batch: int) -> float:
        whole = seconds(batch, PROMPT, STEPS + 1)
        return (whole - seconds(batch, PROMPT, 1)) / STEPS

    results = {}
    for batch in BATCHES:
        seconds(batch, PROMPT, STEPS + 1)  # compiles
        results[f"decode {batch}"] = median(lambda batch=batch: step(batch))
    seconds(1, PREFILL, 1)
    results["prefill"] = median(lambda: seconds(1, PREFILL, 1))
    llm.close()
    return results


def bench_cpu(model: Path, peer_python: str | None, repeat: int = REPEAT) -> list[dict[str, Any]]:
    """One record for each scheme and phase; `value` in tokens per second, like its peers."""
    from make_checkpoint import rounded_checkpoint

    records = []
    with tempfile.TemporaryDirectory() as scratch:
        rounded = Path(scratch, "w4a16")
        rounded_checkpoint(rounded, source=model, scheme="W4A16", group_size=GROUP_SIZE)
        for scheme, folder in (("bf16", model), (f"W4A16 g{GROUP_SIZE}", rounded)):
            peers = {}
            for dtype in ("bfloat16", "float32") if peer_python else ():
                assert peer_python is not None
                peers[f"transformers {dtype}"] = measure_peer(peer_python, folder, dtype, repeat)
            ours = measure_qllama(folder, repeat)
            records += _records(model.name, scheme, ours, peers)
    return records


def _records(
    model: str, scheme: str, ours: Mapping[str, float], peers: Mapping[str, Mapping[str, float]]
) -> list[dict[str, Any]]:
    from records import new_record

    records = []
    for phase, took in ours.items():
        name, _, batch = phase.partition(" ")
        tokens = int(batch) if batch else PREFILL
        records.append(
            new_record(
                "cpu",
                model=model,
                scheme=scheme,
                phase=name,
                batch=int(batch or 1),
                metric="tokens_per_second",
                value=round(tokens / took, 1),
                peers={peer: round(tokens / times[phase], 1) for peer, times in peers.items()},
            )
        )
    return records


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of a bfloat16 checkpoint")
    parser.add_argument("--peer-python", help="interpreter with torch and transformers")
    parser.add_argument("--repeat", type=int, default=REPEAT, help="(%(default)s)")
    parser.add_argument("--json", type=Path, metavar="OUT", help="merge the records into this file")
    options = parser.parse_args(arguments)
    records = bench_cpu(options.model, options.peer_python, options.repeat)
    for record in records:
        ratios = {
            peer: round(record["value"] / value, 2) for peer, value in record["peers"].items()
        }
        print(
            f"{record['scheme']:10} {record['phase']:8} batch {record['batch']}: "
            f"{record['value']:8} tokens/s; times the speed of {ratios}"
        )
    if options.json:
        from records import merge_records

        merge_records(options.json, records)


if __name__ == "__main__":
    sys.exit(main())
