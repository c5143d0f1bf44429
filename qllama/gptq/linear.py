"""GPTQ for the Linears that read one input: scales, factor, codes, and what it cost.

Nothing fails silently. If the float32 factor does not hold, float64 is tried, then more damping,
and in the end round-to-nearest; a weight that GPTQ made worse than round-to-nearest keeps the
latter. Which of these happened, and why, is in the report that comes with every weight.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from qllama_kernels.packing import pack_int4
from qllama_kernels.xla import WITHOUT_TRITON

from qllama.gptq.hessian import (
    DampeningReference,
    Hessian,
    Moments,
    default_dampening_frac,
    energy,
    examine,
)
from qllama.gptq.scales import (
    Grid,
    Observer,
    choose_scales,
    code_dtype,
    dequantize_code,
    refit_scales,
    round_to_code,
    widen,
)
from qllama.gptq.solver import factor, solve
from qllama.quantization.activations import divide
from qllama.quantization.qtensor import Array, QTensor
from qllama.quantization.rtn import code_range, quantize_rtn
from qllama.quantization.scheme import QuantScheme

Rung = Literal["fp32", "fp64", "damped", "rtn"]

MAX_DAMPENING_FRAC = 0.3
# The recursion's own account of its error against the true one. With an accurate factor they
# differ by 1e-5; at 1e-2 float32 has lost the Hessian's small directions.
_ACCURACY = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTQOptions:
    """How weights are solved; the words are llm-compressor's."""

    actorder: Literal["static"] | None = "static"  # columns by falling diag H, or as they stand
    observer: Observer = "hdiag"  # how scales are chosen, see `choose_scales`
    dampening_frac: float | None = None  # None: by tokens per feature, `default_dampening_frac`
    dampening_reference: DampeningReference = "mean"
    refit: bool = False  # least-squares scales for the codes found

    def __post_init__(self) -> None:
        if self.actorder not in ("static", None):
            raise ValueError(
                f"actorder={self.actorder!r}: 'static' (also known as 'weight') and None are made; "
                "'group' is only read, because current readers refuse it"
            )
        if self.observer not in get_args(Observer):
            raise ValueError(f"observer={self.observer!r}; use one of {get_args(Observer)}")
        if self.dampening_reference not in get_args(DampeningReference):
            raise ValueError(
                f"dampening_reference={self.dampening_reference!r}; use one of "
                f"{get_args(DampeningReference)}"
            )
        if self.dampening_frac is not None and not 0 <= self.dampening_frac <= 1:
            raise ValueError(f"dampening_frac={self.dampening_frac}; it must be within [0, 1]")


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTQReport:
    """What became of one weight `[N, K]`, for the weight that was returned.

    Losses are means over the calibration tokens of the squared error of all outputs together,
    `|(W - Q) x|^2`, without damping. Where calibration was unusable (a note says so) the Hessian
    is the identity, and they are squared errors of the weight.
    """

    shape: tuple[int, int]
    tokens: int  # calibration tokens used
    dropped_tokens: int  # left out because they were not finite
    dead_columns: int  # features that were zero in every token; rounded to nearest
    diag_ratio: float  # largest over median diag H: massive channels
    dampening_frac: float  # as used; 0 with rung "rtn"
    damping: float  # what it added to diag H
    rung: Rung  # where the ladder ended
    loss: float
    rtn_loss: float  # of `quantize_rtn`
    output_energy: float  # mean of |W x|^2
    clipped: float  # share of weights more than half a step beyond their grid
    notes: tuple[str, ...]  # what did not go as asked, in sentences

    @property
    def loss_ratio(self) -> float:
        """The loss relative to round-to-nearest; 1.0 where neither loses anything."""
        return self.loss / self.rtn_loss if self.rtn_loss > 0 else 1.0

    @property
    def relative_error(self) -> float:
        """The loss relative to the energy of the output."""
        return self.loss / self.output_energy if self.output_energy > 0 else 0.0

    @property
    def sqnr_db(self) -> float:
        """Output signal over quantization noise, in decibels; infinite without noise."""
        return -10 * math.log10(self.relative_error) if self.relative_error > 0 else math.inf


@dataclass(frozen=True, kw_only=True, slots=True)
class GPTQResult:
    """A quantized weight, columns in their original order and without `g_idx`, and its report."""

    weight: QTensor
    report: GPTQReport
    factor_seconds: float = 0.0  # for the factor, which weights solved together share


def quantize_gptq(
    weights: Sequence[Array],
    hessian: Hessian,
    scheme: QuantScheme,
    options: GPTQOptions = GPTQOptions(),
    *,
    input_scale: Array | float | None = None,
    input_zero: Array | int | None = None,
) -> list[GPTQResult]:
    """Quantize weights `[N_i, K]` that read the same input, such as q, k and v, in one solve.

    Each gets the codes it would get alone. Rows may be spread over devices (NamedSharding, one
    axis), the Hessian being on all of them: they exchange nothing but whole weights to stack.

    Args:
        weights: all bfloat16, float16 or float32; scales get that dtype. numpy arrays give
            QTensors of numpy arrays.
        hessian: accumulated over the calibration tokens of that input.
        scheme: any that `quantize_rtn` takes. FP8 weights are usually rounded to nearest instead.
        options: see there.
        input_scale: float32 scalar, the calibrated scale of static activations; else None.
        input_zero: int8 scalar, where static activations are asymmetric; else None.

    Raises:
        ValueError: weights that are not finite or do not match each other, the Hessian or the
            scheme; `refit` with scales that several rows share.
    """
    _check(weights, hessian, scheme, options)
    moments = examine(hessian, options.dampening_reference)
    prepared = _prepare(
        [jnp.asarray(w) for w in weights],
        moments.matrix,
        input_scale,
        input_zero,
        scheme=scheme,
        observer=options.observer,
    )
    if bad := int(prepared.bad):
        raise ValueError(
            f"{bad} of {prepared.stacked.size} weights are NaN or infinite; there is nothing to "
            "round them to, look for a damaged checkpoint"
        )
    found = _climb(prepared, moments, scheme, options)
    refit = options.refit and found.rung != "rtn"
    finished = _finish(
        prepared,
        found.codes,
        found.losses.solved,
        moments.matrix,
        found.damping,
        scheme,
        refit=refit,
    )

    heights = [w.shape[0] for w in weights]
    parts = [slice(stop - n, stop) for n, stop in zip(heights, np.cumsum(heights), strict=True)]
    per_row = jax.device_get(
        {
            "loss": finished.loss,
            "rtn_loss": found.losses.nearest,
            "output_energy": found.losses.output,
            "clipped": finished.clipped,
        }
    )
    results = []
    for part, rounded, tensor in zip(parts, prepared.rounded, finished.solved, strict=True):
        sums = {name: _total(rows[part]) for name, rows in per_row.items()}
        report = GPTQReport(
            shape=tensor.shape,
            tokens=moments.tokens,
            dropped_tokens=moments.dropped,
            dead_columns=moments.dead_columns,
            diag_ratio=moments.diag_ratio,
            dampening_frac=found.dampening_frac,
            damping=found.dampening_frac * moments.reference,
            rung=found.rung,
            loss=sums["loss"],
            rtn_loss=sums["rtn_loss"],
            output_energy=sums["output_energy"],
            clipped=sums["clipped"] / math.prod(tensor.shape),
            notes=found.notes,
        )
        if report.loss > report.rtn_loss:
            tensor, report = rounded, _fall_back(report)
        if isinstance(weights[0], np.ndarray):
            tensor = jax.device_get(tensor)
        results.append(
            GPTQResult(weight=tensor, report=report, factor_seconds=found.factor_seconds)
        )
    return results


@dataclass(frozen=True, kw_only=True, slots=True)
class _Codes:
    codes: jax.Array  # int8 or float8 [N, K]
    losses: "_Losses"
    damping: jax.Array  # [K], of the rung that held
    rung: Rung
    dampening_frac: float
    notes: tuple[str, ...]
    factor_seconds: float  # on all rungs


def _climb(
    prepared: "_Prepared", moments: Moments, scheme: QuantScheme, options: GPTQOptions
) -> _Codes:
    """Solve on the first rung of the ladder that holds, else round to nearest."""
    weight, wide = prepared.stacked, prepared.wide
    k = weight.shape[1]
    notes = []
    if moments.dropped:
        notes.append(f"{moments.dropped} calibration tokens were not finite and were left out")
    if moments.trouble is not None:
        notes.append(f"rounded to nearest: {moments.trouble}")
    order = moments.order if options.actorder == "static" else jnp.arange(k)
    rows = weight.sharding if isinstance(weight.sharding, NamedSharding) else None
    first = options.dampening_frac
    if first is None:
        first = default_dampening_frac(moments.tokens, k)
    factor_seconds = 0.0
    for rung, frac in _rungs(first) if moments.trouble is None else ():
        damping = moments.damping(frac)
        begin = time.perf_counter()
        factors = factor(moments.matrix, damping, order, wide=rung != "fp32")
        jax.block_until_ready(factors)
        factor_seconds += time.perf_counter() - begin
        codes, account = solve(weight, factors, order, wide, scheme, rows=rows)
        losses = _losses(prepared, codes, moments.matrix, damping)
        expected, actual = _total(account), _total(losses.damped)
        if not math.isfinite(expected):
            notes.append(f"{rung}, damping {frac:g}: the Hessian is not positive definite")
        elif rung == "fp32" and abs(expected - actual) > _ACCURACY * actual:
            notes.append(f"fp32: inaccurate, the loss is {actual:.3g} instead of {expected:.3g}")
        else:
            break
    else:
        if moments.trouble is None:
            notes.append("rounded to nearest: no factor of the Hessian holds")
        rung, frac, damping = "rtn", 0.0, moments.damping(0.0)
        codes = _nearest_codes(weight, wide, scheme)
        losses = _losses(prepared, codes, moments.matrix, damping)
    return _Codes(
        codes=codes,
        losses=losses,
        damping=damping,
        rung=rung,
        dampening_frac=frac,
        notes=tuple(notes),
        factor_seconds=factor_seconds,
    )


def _rungs(frac: float) -> Iterator[tuple[Rung, float]]:
    yield "fp32", frac
    yield "fp64", frac
    for _ in range(2):
        if frac < MAX_DAMPENING_FRAC:
            frac = min(max(10 * frac, 0.01), MAX_DAMPENING_FRAC)
            yield "damped", frac


def _fall_back(report: GPTQReport) -> GPTQReport:
    worse = f"kept round-to-nearest: the solve lost {report.loss:.4g} against {report.rtn_loss:.4g}"
    return replace(
        report,
        rung="rtn",
        dampening_frac=0.0,
        damping=0.0,
        loss=report.rtn_loss,
        clipped=0.0,  # the smallest scale that reaches every weight
        notes=(*report.notes, worse),
    )


def _check(
    weights: Sequence[Array], hessian: Hessian, scheme: QuantScheme, options: GPTQOptions
) -> None:
    k = hessian.total.shape[0]
    if not weights:
        raise ValueError("no weight to quantize; give at least one")
    for w in weights:
        if w.ndim != 2 or w.shape[1] != k:
            raise ValueError(f"a weight is {list(w.shape)}, but the Hessian is of K={k} features")
    dtypes = sorted({w.dtype.name for w in weights})
    if len(dtypes) > 1:
        raise ValueError(f"the weights are {' and '.join(dtypes)}; solve each dtype by itself")
    if options.refit and scheme.strategy not in ("channel", "group"):
        raise ValueError(
            f"refit with one scale per {scheme.strategy}: rows that share a scale cannot be "
            "fitted one by one; use refit=False"
        )


# -- few programs, since each is compiled for every shape ------------------------------------------


class _Prepared(NamedTuple):
    """What is known of the weights before they are solved; N rows of them all, in turn."""

    stacked: jax.Array  # [N, K]
    bad: jax.Array  # int32 [], weights that are not finite
    rounded: list[QTensor]  # to nearest
    grids: list[Grid]
    wide: Grid


@partial(jax.jit, static_argnames=("scheme", "observer"), compiler_options=WITHOUT_TRITON)
def _prepare(
    weights: list[jax.Array],
    moments: jax.Array,
    input_scale: jax.Array | None,
    input_zero: jax.Array | None,
    *,
    scheme: QuantScheme,
    observer: Observer,
) -> _Prepared:
    stacked = jnp.concatenate(weights)
    rounded = [
        quantize_rtn(w, scheme, input_scale=input_scale, input_zero=input_zero) for w in weights
    ]
    grids = [choose_scales(w, scheme, observer, jnp.diagonal(moments)) for w in weights]
    return _Prepared(
        stacked=stacked,
        bad=jnp.sum(~jnp.isfinite(stacked)),
        rounded=rounded,
        grids=grids,
        wide=widen(grids, tuple(w.shape[0] for w in weights), scheme),
    )


class _Losses(NamedTuple):
    """Of each row, `[N]`: the mean squared error of its output over the calibration tokens."""

    solved: jax.Array  # with the codes found
    nearest: jax.Array  # rounded to nearest
    output: jax.Array  # with zeros for weights: the energy of the output
    damped: jax.Array  # `solved`, with damping


@partial(jax.jit, compiler_options=WITHOUT_TRITON)
def _losses(
    prepared: _Prepared, codes: jax.Array, moments: jax.Array, damping: jax.Array
) -> _Losses:
    weight = prepared.stacked.astype(jnp.float32)
    errors = _errors(weight, codes, prepared.wide)
    nearest = jnp.concatenate([tensor.dequantize() for tensor in prepared.rounded])
    # One after the other by the same instructions: equal errors have equal losses, to the last bit.
    solved, rounded, output = lax.map(
        partial(energy, moments=moments), jnp.stack([errors, weight - nearest, weight])
    )
    damped = solved + 0.5 * jnp.sum(damping * jnp.square(errors), axis=1)
    return _Losses(solved, rounded, output, damped)


class _Finished(NamedTuple):
    solved: list[QTensor]
    loss: jax.Array  # [N]
    clipped: jax.Array  # [N], weights more than half a step beyond their grid


@partial(jax.jit, static_argnames=("scheme", "refit"), compiler_options=WITHOUT_TRITON)
def _finish(
    prepared: _Prepared,
    codes: jax.Array,
    loss: jax.Array,
    moments: jax.Array,
    damping: jax.Array,
    scheme: QuantScheme,
    *,
    refit: bool,
) -> _Finished:
    heights = tuple(tensor.shape[0] for tensor in prepared.rounded)
    borders = list(np.cumsum(heights)[:-1])
    grids, wide = prepared.grids, prepared.wide
    if refit:
        damped = moments + jnp.diag(damping)
        each = zip(*(jnp.split(x, borders) for x in (prepared.stacked, codes)), grids, strict=True)
        grids = [refit_scales(w, part, grid, damped) for w, part, grid in each]
        wide = widen(grids, heights, scheme)
        loss = energy(_errors(prepared.stacked, codes, wide), moments)
    packed = jnp.split(pack_int4(codes) if scheme.bits == 4 else codes, borders)
    solved = [
        replace(rounded, codes=part, scales=grid.scales, zeros=grid.zeros)
        for rounded, part, grid in zip(prepared.rounded, packed, grids, strict=True)
    ]
    return _Finished(solved, loss, _clipped(prepared.stacked, wide, scheme))


def _errors(weight: jax.Array, codes: jax.Array, wide: Grid) -> jax.Array:
    """`W - Q`, float32 `[N, K]`."""
    q = _by_group(dequantize_code, codes.astype(jnp.float32), wide)
    return weight.astype(jnp.float32) - q


@partial(jax.jit, static_argnames="scheme")
def _nearest_codes(weight: jax.Array, wide: Grid, scheme: QuantScheme) -> jax.Array:
    def nearest(w: jax.Array, scales: jax.Array, zeros: jax.Array | None) -> jax.Array:
        return round_to_code(divide(w, scales), zeros, scheme)

    return _by_group(nearest, weight.astype(jnp.float32), wide).astype(code_dtype(scheme))


def _clipped(weight: jax.Array, wide: Grid, scheme: QuantScheme) -> jax.Array:
    """How many weights of each row lie more than half a step beyond their grid, `[N]`."""
    low, high = code_range(scheme)
    half = 16.0 if scheme.weight_dtype == "float8_e4m3fn" else 0.5  # of the outermost step

    def beyond(w: jax.Array, scales: jax.Array, zeros: jax.Array | None) -> jax.Array:
        position = w / scales if zeros is None else w / scales + zeros
        return (position < low - half) | (position > high + half)

    return jnp.sum(_by_group(beyond, weight.astype(jnp.float32), wide), axis=1)


def _by_group(
    function: Callable[[jax.Array, jax.Array, jax.Array | None], jax.Array],
    values: jax.Array,
    wide: Grid,
) -> jax.Array:
    """`function` of `values [N, K]` and the scale and zero of each, elementwise."""
    scales, zeros = jax.tree.map(lambda x: x.T[:, :, None], wide)
    grouped = values.reshape(*scales.shape[:2], -1)
    return function(grouped, scales, zeros).reshape(values.shape)


def _total(per_row: Array) -> float:
    return float(np.sum(np.asarray(per_row), dtype=np.float64))
