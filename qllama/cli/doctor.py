"""`qllama doctor`: what this machine is, what runs here and how, and what would make it faster."""

import argparse
import dataclasses
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qllama.cli.devices import Link, Plan, link_rows, links, plan, plan_rows
from qllama.cli.tables import in_units, table

if TYPE_CHECKING:
    from qllama.quantization.qtensor import QTensor
    from qllama.quantization.scheme import QuantScheme

SUMMARY = "report devices, versions and backends, and what is slow on this machine"

_PACKAGES = ("qllama", "jax", "jaxlib", "jax-cuda13-plugin", "flax", "transformers")
_MEMORY_SETTINGS = (
    "XLA_PYTHON_CLIENT_MEM_FRACTION",
    "XLA_PYTHON_CLIENT_PREALLOCATE",
    "XLA_PYTHON_CLIENT_ALLOCATOR",
)
_LARGE_CACHE = 10 << 30  # bytes


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device of JAX."""

    kind: str  # such as "NVIDIA H100 80GB HBM3"
    platform: str  # "gpu" or "cpu"
    compute_capability: str | None  # of a GPU
    memory: int | None  # bytes JAX may use of it; None on a CPU


@dataclass(frozen=True, kw_only=True)
class SchemeBackend:
    """What `backend="auto"` chooses for a scheme here."""

    scheme: str
    how: str
    why: str


@dataclass(frozen=True, kw_only=True)
class CompileCache:
    """Where compiled programs are kept."""

    folder: str
    files: int
    size: int  # bytes
    writable: bool


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that makes qllama slow here, and what to do about it."""

    problem: str
    remedy: str


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """All that `diagnose` knows about this machine."""

    versions: dict[str, str | None]  # None: not installed
    driver: str | None  # of NVIDIA
    system: str
    cpus: int  # that this process may use
    host_memory: int  # bytes available
    devices: tuple[Device, ...]
    device_error: str | None  # why JAX has no devices
    links: tuple[Link, ...]  # between GPUs
    plan: Plan | None  # of the model that was asked about
    backends: tuple[SchemeBackend, ...]
    compile_cache: CompileCache | None  # None: switched off
    memory_settings: dict[str, str | None]
    findings: tuple[Finding, ...]


def configure_parser(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write one JSON object")
    parser.add_argument(
        "--model", metavar="MODEL", help="say how this checkpoint would lie on the devices"
    )
    parser.add_argument(
        "-tp",
        "--tensor-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="with --model: devices that each weight is split over (default: 1)",
    )
    parser.add_argument(
        "-dp",
        "--data-parallel-size",
        type=int,
        default=1,
        metavar="N",
        help="with --model: replicas of the model (default: 1)",
    )


def run(args: argparse.Namespace) -> None:
    found = diagnose()
    if args.model is not None and found.devices:
        layout = plan(args.model, args.tensor_parallel_size, args.data_parallel_size)
        found = dataclasses.replace(found, plan=layout)
    if args.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    else:
        print(report(found))


def diagnose() -> Diagnosis:
    """Look at this machine as `LLM` with its defaults would find it. Never raises for its state."""
    from qllama.device import available_host_memory, set_up_devices

    set_by_user = {name: os.environ.get(name) for name in _MEMORY_SETTINGS}
    devices: tuple[Device, ...] = ()
    error = None
    try:
        set_up_devices(0.9)
        devices = tuple(_devices())
    except RuntimeError as found:
        error = str(found)
    compile_cache = _compile_cache()
    driver = _driver()
    connections = links()
    return Diagnosis(
        versions={name: _version(name) for name in _PACKAGES}
        | {"python": platform.python_version()},
        driver=driver,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        host_memory=available_host_memory(),
        devices=devices,
        device_error=error,
        links=connections,
        plan=None,
        backends=tuple(_backends()) if devices else (),
        compile_cache=compile_cache,
        memory_settings=set_by_user,
        findings=tuple(findings(devices, driver, compile_cache, set_by_user, connections)),
    )


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The version of NVIDIA's driver, also where JAX cannot use it."""
    try:
        words = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        words = ""
    if found := re.search(r"\s(\d+\.\d+(?:\.\d+)?)\s", words):
        return found[1]
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.split()), None)


def _devices() -> Iterator[Device]:
    import jax

    for device in jax.local_devices():
        yield Device(
            kind=device.device_kind,
            platform=device.platform,
            compute_capability=getattr(device, "compute_capability", None),
            memory=(device.memory_stats() or {}).get("bytes_limit"),
        )


def _backends() -> Iterator[SchemeBackend]:
    """Asked of the layers that a checkpoint of each scheme would get, built very small."""
    import jax

    from qllama.cli.backends import describe
    from qllama.config import DTYPES
    from qllama.device import compute_dtype
    from qllama.model.dense import make_dense
    from qllama.quantization.scheme import PRESETS

    gpu = jax.default_backend() == "gpu"
    why = (
        "the Pallas kernels are for Hopper GPUs, and for groups of 32, 64 or 128 columns or none"
        if gpu
        else "a CPU multiplies floats faster than it unpacks codes"
    )
    dtype = compute_dtype("auto", DTYPES[0])
    for name, scheme in PRESETS.items():
        layer = make_dense(_blank(scheme), dtype=dtype)
        yield SchemeBackend(scheme=name, how=describe(layer, quantized=True), why=why)


def _blank(scheme: "QuantScheme") -> "QTensor":
    """A weight of zeros, one block of the scheme each way."""
    import jax.numpy as jnp

    from qllama.quantization.qtensor import QTensor

    shape = (128, 128)
    grid = scheme.scale_shape(shape)
    acts = scheme.activations
    packed = scheme.bits == 4
    return QTensor(
        codes=jnp.zeros((128, 64), jnp.uint8)
        if packed
        else jnp.zeros(shape, jnp.dtype(scheme.weight_dtype)),
        scales=jnp.ones(grid, jnp.bfloat16),
        zeros=None if scheme.symmetric else jnp.zeros(grid, jnp.int16),
        input_scale=jnp.ones((), jnp.float32) if acts and not acts.dynamic else None,
        scheme=scheme,
        shape=shape,
    )


def _compile_cache() -> CompileCache | None:
    import jax

    folder = jax.config.jax_compilation_cache_dir
    if not folder or not jax.config.jax_enable_compilation_cache:
        return None
    sizes = []
    for path in Path(folder).glob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:
            continue  # another process has just replaced it
    nearest = next(p for p in (Path(folder), *Path(folder).absolute().parents) if p.exists())
    writable = nearest.is_dir() and os.access(nearest, os.W_OK)
    return CompileCache(folder=str(folder), files=len(sizes), size=sum(sizes), writable=writable)


def findings(
    devices: tuple[Device, ...],
    driver: str | None,
    cache: CompileCache | None,
    memory: dict[str, str | None],
    connections: tuple[Link, ...] = (),
) -> Iterator[Finding]:
    import jax

    gpus = [device for device in devices if device.platform == "gpu"]
    if not devices:
        yield Finding(
            problem="JAX finds no device, so nothing runs",
            remedy="see the error above; JAX_PLATFORMS may name a platform that is not installed",
        )
    elif not gpus and driver:
        yield Finding(
            problem=f"there is an NVIDIA driver ({driver}), but JAX runs on the CPU",
            remedy="pip install 'qllama[cuda]', and leave JAX_PLATFORMS unset",
        )
    elif not gpus:
        yield Finding(
            problem="without a GPU all weights are widened to float32: 4 bytes a weight (32 GB for "
            "8B), each read once for every token",
            remedy="use models up to about 1B parameters here, or a machine with an NVIDIA GPU",
        )
    for kind, capability in {(gpu.kind, gpu.compute_capability) for gpu in gpus}:
        if capability and float(capability) < 8.9:
            yield Finding(
                problem=f"{kind} (compute capability {capability}) has no FP8 units",
                remedy="prefer W4A16 and W8A8 checkpoints to FP8 ones on it",
            )
    apart = [f"{link.first}-{link.second}" for link in connections if not link.is_nvlink]
    if apart and len(gpus) > 1:
        yield Finding(
            problem=f"no NVLink between {', '.join(apart)}: sums over them cross PCIe, twice a "
            "layer and token",
            remedy="prefer data_parallel_size where the model fits on one GPU",
        )
    if cache is None:
        yield Finding(
            problem="compiled programs are not kept, so every start compiles them again",
            remedy="unset JAX_ENABLE_COMPILATION_CACHE, or set JAX_COMPILATION_CACHE_DIR",
        )
    elif not cache.writable:
        yield Finding(
            problem=f"{cache.folder} cannot be written, so every start compiles again",
            remedy="set JAX_COMPILATION_CACHE_DIR to a folder that can",
        )
    elif cache.size > _LARGE_CACHE:
        yield Finding(
            problem=f"the compile cache has grown to {in_units(cache.size)}",
            remedy=f"delete {cache.folder}; what is needed is compiled again",
        )
    if gpus and memory["XLA_PYTHON_CLIENT_ALLOCATOR"] == "platform":
        yield Finding(
            problem="XLA_PYTHON_CLIENT_ALLOCATOR=platform asks the driver for every array",
            remedy="unset it",
        )
    for setting in ("jax_disable_jit", "jax_debug_nans", "jax_enable_x64"):
        if getattr(jax.config, setting):
            yield Finding(
                problem=f"{setting.upper()} is set, which is for debugging and slows everything",
                remedy=f"unset {setting.upper()}",
            )


def report(found: Diagnosis) -> str:
    """The diagnosis as text."""
    rows = [["versions"]]
    rows += [[f"  {name}", version or "not installed"] for name, version in found.versions.items()]
    rows += [["  NVIDIA driver", found.driver or "none"], ["machine"], ["  system", found.system]]
    rows.append(["  CPUs", f"{found.cpus}, {in_units(found.host_memory)} of memory available"])
    for i, device in enumerate(found.devices):
        facts = [device.kind]
        if device.compute_capability:
            facts.append(f"compute capability {device.compute_capability}")
        if device.memory:
            facts.append(f"{in_units(device.memory)} for JAX")
        rows.append([f"  {device.platform}:{i}", ", ".join(facts)])
    rows += link_rows(found.links)
    if found.device_error:
        rows.append(["  no devices", found.device_error])
    rows += plan_rows(found.plan) if found.plan else []
    rows.append(["backend chosen by 'auto'"])
    rows += [[f"  {b.scheme}", b.how] for b in found.backends]
    rows += [["  because", why] for why in dict.fromkeys(b.why for b in found.backends)]
    rows.append(["settings"])
    cache = found.compile_cache
    rows.append(
        [
            "  compile cache",
            f"{cache.folder}: {cache.files} files, {in_units(cache.size)}" if cache else "off",
        ]
    )
    rows += [[f"  {name}", value or "unset"] for name, value in found.memory_settings.items()]
    lines = table(rows)
    lines += ["", "what is slow here, and what to do:" if found.findings else "nothing is wrong"]
    for finding in found.findings:
        lines += [f"  - {finding.problem}", f"    {finding.remedy}"]
    return "\n".join(lines)
