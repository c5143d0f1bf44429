"""Runs a small case of each kernel: under compute-sanitizer, which sees races and stray addresses.

    XLA_FLAGS=--xla_gpu_enable_command_buffer= compute-sanitizer --tool racecheck \
        --kernel-regex kns=mosaic python tests/small_cases.py

Also with `--tool memcheck`. `--backend interpret` simulates the kernels on a CPU.
"""

import argparse
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from qllama_kernels import pallas, rows, tuning
from qllama_kernels.attention import decode_attention
from qllama_kernels.batch_matmul import BatchConfig
from qllama_kernels.decode_matmul import DecodeConfig
from qllama_kernels.dequantize import dequantize
from test_kernels_gpu import weight

M, N, K = 5, 192, 512
DECODE = DecodeConfig(block_m=8, ctas=3, splits=2, warpgroups=2, blocks=1, stages=2)
BATCH = BatchConfig(block_m=8, warpgroups=1, blocks=1, stages=2, splits=2)
BLOCKWISE = BatchConfig(block_m=8, warpgroups=2, blocks=1, stages=2)


def small_cases(backend: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Names, and what runs them."""
    for scheme, group in (("w4a16", 128), ("w8a16", None), ("w8a8", None), ("fp8", None)):
        for config in (DECODE, BATCH):
            name = f"{type(config).__name__} {scheme}"
            yield name, lambda s=scheme, g=group, c=config: product(s, g, c, backend)
    yield "BatchConfig fp8_block", lambda: product("fp8_block", 128, BLOCKWISE, backend)
    for codes in (None, rows.Codes("int8"), rows.Codes("float8_e4m3fn")):
        name = "rows" if codes is None else f"rows {codes.dtype}"
        yield name, lambda c=codes: between_products(c, backend)
    for cached in ("bfloat16", "float8_e4m3fn"):
        yield f"decode_attention {cached}", lambda c=cached: attention(c, backend)
    yield "dequantize", lambda: dequantized(backend)


def product(
    scheme: tuning.Scheme,
    group: int | None,
    config: tuning.Config,
    backend: str,
) -> jax.Array:
    """One product of random numbers by `config`."""
    random = np.random.default_rng(0)
    blockwise = scheme == "fp8_block"
    coded = tuning.X_BYTES[scheme] == 1
    dtype = {"w8a8": "int8"}.get(scheme, "float8_e4m3fn") if coded else "bfloat16"
    *_, packed = weight(scheme, N, K, group)
    x = jnp.asarray(random.integers(-7, 8, (M, K)), dtype)
    return pallas.quantized_matmul(
        x,
        packed.codes,
        packed.scales,
        problem=tuning.Problem(scheme=scheme, m=M, n=N, k=K, group_size=group),
        input_scale=jnp.ones((M, K // 128 if blockwise else 1)) if coded else None,
        config=config,
        interpret=backend == "interpret",
    )


def dequantized(backend: str) -> jax.Array:
    """A 4-bit weight in 16. Not through `partial_sums`: under racecheck XLA's choice of a product
    for it fails."""
    *_, packed = weight("w4a16", N, K, 128)
    return dequantize(
        packed.codes,
        packed.scales,
        packed.zeros,
        n=N,
        k=K,
        group_size=128,
        dtype=jnp.bfloat16,
        interpret=backend == "interpret",
    )


def between_products(codes: rows.Codes | None, backend: str) -> object:
    """Norm, SwiGLU and, where there are codes, quantized rows."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 512)), jnp.bfloat16)
    sums = jnp.stack([x, x]).astype(jnp.float32)
    normed = rows.residual_norm(x, sums, x[0], eps=1e-5, codes=codes, backend=backend)
    gated = rows.swiglu(sums, dtype=x.dtype, codes=codes, backend=backend)
    return normed, gated, codes and rows.quantize(x, codes, backend=backend)


def attention(cached: str, backend: str) -> object:
    """Four queries to each of two heads, a long text, a short one and an empty row."""
    random = np.random.default_rng(0)
    qkv = jnp.asarray(random.normal(size=(3, (8 + 4) * 64)), jnp.bfloat16)
    angles = jnp.ones((3, 32), jnp.float32)
    cache = jnp.asarray(random.normal(size=(3, 2, 512, 64)), cached)
    positions = jnp.array([300, 0, 512], jnp.int32)
    return decode_attention(qkv, angles, angles, positions, cache, cache, backend=backend)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", default="pallas", choices=["pallas", "interpret"])
    backend = parser.parse_args().backend
    for name, run in small_cases(backend):
        for array in jax.tree.leaves(jax.device_get(run())):
            assert np.isfinite(np.asarray(array, np.float32)).all(), f"{name}: not finite"
        print(name, flush=True)


if __name__ == "__main__":
    main()
