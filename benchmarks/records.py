"""Benchmark records: what every script writes into `results/`, one flat object a measured cell."""

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax

Record = dict[str, Any]

# What was found, rather than what was asked: records that differ only here are of one cell.
_FOUND = (
    *("value", "spread", "limit", "parts", "peak_bytes", "peers", "max_rel_error"),
    *("kernel", "config", "compile_s", "jax", "revision", "date"),
)


def new_record(benchmark: str, **cell: Any) -> Record:
    """A record of `cell`, with the machine and the versions it was measured on."""
    return {
        "benchmark": benchmark,
        "device": device_name(),
        "devices": cell.pop("devices", 1),
        "jax": jax.__version__,
        "revision": _revision(),
        "date": datetime.date.today().isoformat(),
        **cell,
    }


def device_name() -> str:
    """The GPU's name, or the CPU's with its number of cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    name = next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), name)
    return f"{name}, {os.cpu_count()} cores"


def merge_records(path: Path, records: Iterable[Record]) -> None:
    """Write records into a file of them, in place of older ones of the same cell."""
    old = json.loads(path.read_text()) if path.exists() else []
    merged = {_cell(record): record for record in [*old, *records]}
    lines = ",\n".join(json.dumps(record) for record in merged.values())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[\n{lines}\n]\n")


def _cell(record: Record) -> str:
    return json.dumps({k: v for k, v in record.items() if k not in _FOUND}, sort_keys=True)


def _revision() -> str:
    """The commit of the source, "+" if it is changed; "" outside a checkout."""
    git = ["git", "-C", str(Path(__file__).parent)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return ""
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD"]).returncode
    return head.stdout.strip() + ("+" if changed else "")
