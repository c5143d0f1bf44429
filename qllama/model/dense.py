"""Linear layers: plain, quantized, and several that read the same input merged into one.

Weights are `[N, K]` (out, in) as in the checkpoint; inputs `[..., K]`, results `[..., N]`.

Between two products lies a row operation (`qllama_kernels.rows`). It takes what a Linear gives as
`addends`, `[S, ..., N]`, and may hand the next one its input as that Linear's `input_codes` say.
"""

import contextlib
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from qllama_kernels import rows
from qllama_kernels.dispatch import kernels_run_here, quantized_matmul
from qllama_kernels.reference import dequantize_input
from qllama_kernels.rows import Codes, QuantizedInput
from qllama_kernels.xla import dot

from qllama.quantization.activations import Semantics, quantize_activations, row_codes
from qllama.quantization.qtensor import Array, QTensor
from qllama.quantization.scheme import ActivationScheme


class QuantParam(nnx.Variable):
    """A frozen quantized weight; not an `nnx.Param`, so optimisers never select it."""


type Input = jax.Array | QuantizedInput


class Dense(nnx.Module):
    """`x Wᵀ + b` with a float weight, summed in float32."""

    def __init__(self, weight: jax.Array, bias: jax.Array | None = None) -> None:
        self.weight = nnx.Param(weight)
        self.bias = None if bias is None else nnx.Param(bias)

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def input_codes(self) -> Codes | None:
        """The codes that the input may come as; None: floats only."""
        return None

    def addends(self, x: Input) -> jax.Array:
        """The result, `[1, ..., N]`."""
        return self(x)[None]

    def __call__(self, x: Input, out_dtype: jnp.dtype | type | None = None) -> jax.Array:
        assert not isinstance(x, QuantizedInput)
        out_dtype = out_dtype or x.dtype
        if self.bias is None:
            return dot(x, self.weight[...], out_dtype)
        out = dot(x, self.weight[...], jnp.float32) + self.bias[...].astype(jnp.float32)
        return out.astype(out_dtype)


class QuantDense(nnx.Module):
    """`x Wᵀ + b` with a quantized weight, the input quantized first where the scheme says so."""

    def __init__(
        self,
        weight: QTensor,
        bias: jax.Array | None = None,
        *,
        dtype: jnp.dtype | type,
        backend: str = "auto",
        semantics: Semantics = "vllm",
        axis_name: str | None = None,
    ) -> None:
        """`dtype` is that of the result where the input comes as codes; the rest as `make_dense`
        has it."""
        self.weight = QuantParam(weight)
        self.bias = None if bias is None else nnx.Param(bias)
        self.dtype = jnp.dtype(dtype)
        self.backend = backend
        self.semantics: Semantics = semantics
        self.axis_name = axis_name

    @property
    def out_features(self) -> int:
        return self.weight.get_value().shape[0]

    @property
    def input_codes(self) -> Codes | None:
        """As `Dense.input_codes`. An input that comes as floats all the same is quantized here."""
        weight = self.weight.get_value()
        return row_codes(
            weight.scheme.activations,
            input_scale=weight.input_scale,
            semantics=self.semantics,
            axis_name=self.axis_name,
        )

    def addends(self, x: Input) -> jax.Array:
        """What adds up to the result, `[S, ..., N]`: float32, or if S is 1 as the result itself."""
        if self.bias is not None:
            return self(x)[None]
        return self._product(x, None, partial_sums=True)

    def __call__(self, x: Input, out_dtype: jnp.dtype | type | None = None) -> jax.Array:
        return self._product(x, out_dtype)

    def _quantized(self, x: jax.Array) -> QuantizedInput:
        weight, codes = self.weight.get_value(), self.input_codes
        if codes is not None:
            return rows.quantize(x, codes, backend=self.backend)
        return quantize_activations(
            x,
            weight.scheme.activations,
            input_scale=weight.input_scale,
            input_zero=weight.input_zero,
            semantics=self.semantics,
            axis_name=self.axis_name,
        )

    def _product(
        self,
        x: Input,
        out_dtype: jnp.dtype | type | None,
        *,
        partial_sums: bool = False,
    ) -> jax.Array:
        weight = self.weight.get_value()
        if not isinstance(x, QuantizedInput):
            out_dtype = out_dtype or x.dtype
            if weight.scheme.activations is not None:
                x = self._quantized(x)
        x, input_scale, input_zero = x if isinstance(x, QuantizedInput) else (x, None, None)
        return quantized_matmul(
            x,
            weight.codes,
            weight.scales,
            weight.zeros,
            weight_dtype=weight.scheme.weight_dtype,
            group_size=weight.group_size,
            g_idx=weight.g_idx,
            columns=weight.columns,
            layout=weight.layout,
            input_scale=input_scale,
            input_zero=input_zero,
            bias=None if self.bias is None else self.bias[...],
            out_dtype=out_dtype or self.dtype,
            partial_sums=partial_sums,
            backend=self.backend,
        )


class DequantizedDense(Dense):
    """A `QuantDense` whose weight was dequantized once, for devices with no narrow matrix units.

    Its input is still quantized as the scheme says: the numbers are those of the scheme, only the
    product is done in the compute dtype.
    """

    def __init__(
        self,
        weight: jax.Array,
        bias: jax.Array | None = None,
        *,
        activations: ActivationScheme,
        input_scale: Array | None = None,
        input_zero: Array | None = None,
        semantics: Semantics = "vllm",
        axis_name: str | None = None,
    ) -> None:
        super().__init__(weight, bias)
        self.activations = activations
        self.input_scale = None if input_scale is None else nnx.Variable(input_scale)
        self.input_zero = None if input_zero is None else nnx.Variable(input_zero)
        self.semantics: Semantics = semantics
        self.axis_name = axis_name

    def __call__(self, x: Input, out_dtype: jnp.dtype | type | None = None) -> jax.Array:
        assert not isinstance(x, QuantizedInput)
        codes, scale, zero = quantize_activations(
            x,
            self.activations,
            input_scale=None if self.input_scale is None else self.input_scale[...],
            input_zero=None if self.input_zero is None else self.input_zero[...],
            semantics=self.semantics,
            axis_name=self.axis_name,
        )
        out_dtype = out_dtype or x.dtype
        return super().__call__(dequantize_input(codes, scale, zero).astype(x.dtype), out_dtype)


class MergedDense(nnx.Module):
    """Linears that read the same input, such as q, k and v: called once, answered separately.

    `parts` is one layer whose rows are those of all Linears stacked, where that is exact, or one
    layer for each.
    """

    def __init__(self, parts: Sequence[Dense | QuantDense], sizes: Sequence[int]) -> None:
        self.parts = nnx.List(parts)
        self.sizes = tuple(sizes)

    @property
    def input_codes(self) -> Codes | None:
        """As `Dense.input_codes`, where all parts take the same."""
        codes = [part.input_codes for part in self.parts]
        if len(codes) == 1:
            return codes[0]
        if any(c is None or c.scale is not None for c in codes):
            return None
        return codes[0] if len(set(codes)) == 1 else None

    def addends(self, x: Input) -> jax.Array:
        """What adds up to the results side by side, as `QuantDense.addends`."""
        if len(self.parts) == 1:
            return self.parts[0].addends(x)
        return jnp.concatenate([part(x) for part in self.parts], axis=-1)[None]

    def __call__(self, x: Input) -> list[jax.Array]:
        if len(self.parts) == len(self.sizes):
            return [part(x) for part in self.parts]
        borders = [sum(self.sizes[: i + 1]) for i in range(len(self.sizes) - 1)]
        return jnp.split(self.parts[0](x), borders, axis=-1)


def make_dense(
    weight: jax.Array | QTensor,
    bias: jax.Array | None = None,
    *,
    dtype: jnp.dtype | type,
    backend: str = "auto",
    semantics: Semantics = "vllm",
    axis_name: str | None = None,
) -> Dense | QuantDense:
    """The layer that runs `weight` on the present device.

    Args:
        weight: `[N, K]`, float or quantized.
        bias: `[N]` or None.
        dtype: the compute dtype; float weights are cast to it.
        backend: as `qllama_kernels.dispatch.quantized_matmul`. "auto" off the GPU dequantizes the
            weight here, once: XLA's narrow products are slower than float ones on a CPU. On a GPU
            with kernels, "auto" packs the weight for its kernel if it has one; "pallas" and
            "interpret" insist on one.
        semantics: of activation quantization.
        axis_name: see `qllama.quantization.activations.quantize_activations`.

    Raises:
        NotImplementedError: `backend` names the kernels, and there is none for this weight.
    """
    bias = None if bias is None else bias.astype(dtype)
    if not isinstance(weight, QTensor):
        return Dense(weight.astype(dtype), bias)
    if backend != "auto" or jax.default_backend() == "gpu":
        weight = _laid_out(weight, jnp.dtype(dtype), backend)
        return QuantDense(
            weight, bias, dtype=dtype, backend=backend, semantics=semantics, axis_name=axis_name
        )
    activations = weight.scheme.activations
    if activations is None:
        return Dense(weight.dequantize(dtype), bias)
    return DequantizedDense(
        weight.dequantize(dtype),
        bias,
        activations=activations,
        input_scale=weight.input_scale,
        input_zero=weight.input_zero,
        semantics=semantics,
        axis_name=axis_name,
    )


def _laid_out(weight: QTensor, dtype: jnp.dtype, backend: str) -> QTensor:
    """The weight packed for its kernel, where `backend` will use that."""
    if backend in ("pallas", "interpret"):
        return weight.packed()
    takes = dtype.itemsize == 2 or weight.scheme.activations is not None
    if backend == "auto" and kernels_run_here() and takes:
        with contextlib.suppress(NotImplementedError):
            return weight.packed()
    return weight
