"""Round-to-nearest with the same account as GPTQ gives."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from qllama.gptq.linear import GPTQReport, GPTQResult
from qllama.quantization.qtensor import Array, QTensor
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import QuantScheme


def quantize_nearest(
    weights: Sequence[Array],
    scheme: QuantScheme,
    *,
    input_scale: Array | float | None = None,
) -> list[GPTQResult]:
    """Each weight `[N_i, K]` rounded by `quantize_rtn`, with a report that has no tokens in it.

    Its losses are halved squared errors of the weight, what a Hessian of the identity gives.

    Raises:
        ValueError: weights that are not finite, and what `quantize_rtn` refuses.
    """
    results = []
    for weight in weights:
        rounded = _quantize_rtn(jnp.asarray(weight), scheme, input_scale=input_scale)
        sums = jax.device_get(_sums(jnp.asarray(weight), rounded))
        if sums["bad"]:
            raise ValueError(
                f"{sums['bad']} of {weight.size} weights are NaN or infinite; there is nothing to "
                "round them to, look for a damaged checkpoint"
            )
        loss, output_energy = (
            float(np.sum(sums[name], dtype=np.float64)) / 2 for name in ("loss", "energy")
        )
        report = GPTQReport(
            shape=rounded.shape,
            tokens=0,
            dropped_tokens=0,
            dead_columns=0,
            diag_ratio=1.0,
            dampening_frac=0.0,
            damping=0.0,
            rung="rtn",
            loss=loss,
            rtn_loss=loss,
            output_energy=output_energy,
            clipped=0.0,  # the smallest scale that reaches every weight
            notes=(),
        )
        results.append(GPTQResult(weight=jax.device_get(rounded), report=report))
    return results


_quantize_rtn = jax.jit(quantize_rtn, static_argnums=1)


@jax.jit
def _sums(weight: jax.Array, rounded: QTensor) -> dict[str, jax.Array]:
    weight = weight.astype(jnp.float32)
    return {
        "bad": jnp.sum(~jnp.isfinite(weight)),
        "loss": jnp.sum(jnp.square(weight - rounded.dequantize()), axis=1),
        "energy": jnp.sum(jnp.square(weight), axis=1),
    }
