"""The devices of this process: set up once, before JAX starts, and how much memory they have."""

import os
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

# What XLA's compiled programs may take for themselves while they run.
WORKSPACE = 1 << 30


def set_up_devices(gpu_memory_utilization: float) -> None:
    """Prepare JAX: how much GPU memory it takes, and where compiled programs are kept.

    The memory share has an effect only before JAX touches a device. Settings the user has made
    (environment or `jax.config`) are left alone.

    Raises:
        RuntimeError: JAX finds no device to run on.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(gpu_memory_utilization))
    if jax.config.jax_compilation_cache_dir is None:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        jax.config.update("jax_compilation_cache_dir", str(cache / "qllama" / "jax"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    try:
        jax.local_devices()
    except (RuntimeError, AssertionError) as error:  # a platform that is not installed: the latter
        platforms = jax.config.jax_platforms
        raise RuntimeError(
            f"JAX finds no device to run on (JAX_PLATFORMS={platforms or 'unset'})"
            + (f": {error}" if str(error) else "; unset it, or install what it names")
        ) from error


def compute_dtype(requested: str, stored: str) -> jnp.dtype:
    """The dtype to compute in: "auto" is the checkpoint's on a GPU and float32 on a CPU.

    XLA multiplies bfloat16 matrices by vectors 30 times slower than float32 ones on a CPU.
    """
    if requested == "auto":
        requested = stored if jax.default_backend() == "gpu" else "float32"
    return jnp.dtype(requested)


def device_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes that arrays may still take on each of `devices`.

    On a GPU: what JAX may allocate and has not, less a workspace. On a CPU: an equal share of what
    the system calls available.
    """
    statistics = [device.memory_stats() or {} for device in devices]
    if all("bytes_limit" in found for found in statistics):
        return min(f["bytes_limit"] - f["bytes_in_use"] for f in statistics) - WORKSPACE
    return available_host_memory() // len(devices)


def free_memory(devices: Sequence[jax.Device]) -> int:
    """Bytes on each of `devices` that a key-value cache may take, the weights being in place.

    On a CPU half of what there is, since other programs live there too.
    """
    free = device_memory(devices)
    return free // 2 if devices[0].platform == "cpu" else free


def peak_memory() -> int:
    """The most bytes this process has had in use: on the GPU, or resident on the host."""
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "peak_bytes_in_use" in statistics:
        return statistics["peak_bytes_in_use"]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def available_host_memory() -> int:
    """Bytes of host memory that the system calls available."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
