"""Quantized products as plain XLA programs: correct on every device, fast where XLA fuses them.

Differs from the reference in what it keeps narrow: operands stay in the activations' dtype (or
8 bit) so that the device's matrix units can take them; sums and scales are float32.
"""

import jax
import jax.numpy as jnp
from jax import lax

from qllama_kernels.reference import (
    GroupSize,
    code_values,
    dequantize,
    dequantize_input,
    scales_follow_rows,
)

# Compiler options for programs of long products: many tokens, Hessians, float32 in full precision.
# XLA for GPUs tries out many of Triton's kernels for each, seconds of compiling, and what it chose
# never beat cuBLAS (one H100, jax 0.11.2): 2048 tokens in bfloat16, int8 and float8 took as long or
# up to 1.4 times, the Hessian of 14336 features 10.2 ms a chunk in place of 7.4.
WITHOUT_TRITON = {"xla_gpu_enable_triton_gemm": False}


def for_product(x: jax.Array) -> jax.Array:
    """`x` in a dtype that the device multiplies: XLA's CPU lacks some products of 16-bit floats.

    Widening changes no result: such products are summed in float32 anyway.
    """
    narrow = x.dtype in (jnp.bfloat16, jnp.float16)
    return x.astype(jnp.float32) if narrow and jax.default_backend() == "cpu" else x


def dot(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | type) -> jax.Array:
    """`x [..., K] · weight [N, K]ᵀ`, summed in float32 (int8 in int32), rounded once to
    `out_dtype`; at the ambient matmul precision."""
    x, weight = for_product(x), for_product(weight)
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    sums = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    # 16-bit products come rounded from cuBLAS, which sums in float32 all the same. To round its
    # float32 results takes a kernel more: 111 us after 600 us, for 28672x4096 and 2048 tokens.
    narrow = x.dtype == out_dtype
    product = lax.dot_general(
        x, weight, contract, preferred_element_type=out_dtype if narrow else sums
    )
    return product.astype(out_dtype)


def add_up(sums: jax.Array) -> jax.Array:
    """Partial sums `[S, ...]` -> their sum; what there is one of stays in its dtype."""
    return sums[0] if sums.shape[0] == 1 else jnp.sum(sums, axis=0, dtype=jnp.float32)


def quantized_matmul(
    x: jax.Array,
    codes: jax.Array,
    scales: jax.Array,
    zeros: jax.Array | None = None,
    *,
    weight_dtype: str,
    group_size: GroupSize = None,
    g_idx: jax.Array | None = None,
    input_scale: jax.Array | None = None,
    input_zero: jax.Array | None = None,
) -> jax.Array:
    """float32 `[..., N]`; arguments as `qllama_kernels.dispatch.quantized_matmul`."""
    k = x.shape[-1]
    row_scaled = zeros is None and scales_follow_rows(scales, codes.shape[0])
    if input_scale is None:
        if row_scaled:
            weight = code_values(codes, k, weight_dtype).astype(x.dtype)
            return dot(x, weight, jnp.float32) * scales[:, 0].astype(jnp.float32)
        weight = dequantize(
            codes, scales, zeros, k=k, weight_dtype=weight_dtype, group_size=group_size, g_idx=g_idx
        )
        return dot(x, weight.astype(x.dtype), jnp.float32)
    if row_scaled and input_scale.shape[-1:] in ((), (1,)):
        values = code_values(codes, k, weight_dtype)
        if x.dtype == jnp.int8 and values.dtype == jnp.int8:
            total = dot(x, values, jnp.int32)
            if input_zero is not None:
                columns = jnp.sum(values, axis=1, dtype=jnp.int32)
                total = total - input_zero.astype(jnp.int32) * columns
        else:
            total = dot(x, values.astype(x.dtype), jnp.float32)
        scaled = total.astype(jnp.float32) * input_scale.astype(jnp.float32)
        return scaled * scales[:, 0].astype(jnp.float32)
    weight = dequantize(
        codes, scales, zeros, k=k, weight_dtype=weight_dtype, group_size=group_size, g_idx=g_idx
    )
    return dot(dequantize_input(x, input_scale, input_zero), weight, jnp.float32)
