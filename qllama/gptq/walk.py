"""Calibration tokens on their way through the model, each Linear already quantized when it runs.

A layer is walked in five stages, each one pass over all batches. Between stages, what reads the
input just computed is decided upon:

    input_layernorm                       -> q_proj, k_proj, v_proj
    attention                             -> o_proj
    o_proj, post_attention_layernorm      -> gate_proj, up_proj
    SwiGLU                                -> down_proj
    down_proj

So every Linear is calibrated on what the quantized ones before it make, and runs once. Nothing
waits for the device within a pass: batches on several devices run at once, and these exchange
nothing but what was observed, at its end.

Legend: B rows, T tokens, D hidden_size, H head_dim.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from qllama_convert.linear import LinearWeights
from qllama_convert.names import GATE_UP, QKV
from qllama_kernels.rows import swiglu
from qllama_kernels.xla import WITHOUT_TRITON

from qllama.config import LlamaConfig
from qllama.gptq.batches import Batch, Stream
from qllama.gptq.observers import InputObserver
from qllama.gptq.report import Seconds
from qllama.model.dense import MergedDense, make_dense
from qllama.model.kv_cache import Entries
from qllama.model.llama import RMSNorm, attention_context, project_heads
from qllama.model.rope import rotary_embedding

O_PROJ = ("self_attn.o_proj",)
DOWN = ("mlp.down_proj",)

Observe = Callable[[InputObserver | None], None]
"""Makes a pass, and shows what the next Linears read to the observer, if there is one."""


class Decisions(Protocol):
    """What the walk asks for on its way through one layer, names being those within the layer."""

    def linears(
        self, names: Sequence[str], observe: Observe, norm: str | None = None
    ) -> list[LinearWeights]:
        """The Linears that read one input. Calls `observe` once. `norm` names where the input
        comes from, if it is a norm; it may be changed along with them."""

    def norm(self, name: str) -> np.ndarray:
        """The weight `[D]` of a norm, as it is by now."""

    def kv_scales(
        self, observe: Callable[[], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Scales of a float8 cache, or None for no such cache. `observe` makes a pass and returns
        the largest magnitudes of keys and of values."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where the arrays of a walk lie."""

    on_device: bool  # the residual stream and what attention made of it; else in host memory
    keep_swiglu: bool  # its output is kept for down_proj to read, instead of made again


class Walk:
    """The residual stream of all calibration tokens, as it is before the next layer."""

    def __init__(
        self,
        config: LlamaConfig,
        batches: Sequence[Batch],
        embed_tokens: np.ndarray,
        *,
        dtype: jnp.dtype,
        placement: Placement,
    ) -> None:
        """
        Args:
            config: of the model.
            batches: all of them; the walk keeps one array `[B, T, D]` for each, on its device.
            embed_tokens: `[V, D]` on the host.
            dtype: the compute dtype.
            placement: see there.
        """
        self.config = config
        self.batches = batches
        self.devices = list(dict.fromkeys(batch.device for batch in batches))
        self.dtype = dtype
        self.placement = placement
        self.seconds = Seconds()
        self.hessian_shares: dict[Callable[..., Any], float] = {}  # of the time of each stage
        self.x = self._stream()
        # A row a token is much more to send than the table; there is room while nothing else runs.
        # From the host it is sent once, and from device to device.
        table = jax.device_put(embed_tokens, self.devices[0]).astype(dtype)
        tables = {device: jax.device_put(table, device) for device in self.devices}
        for i, batch in enumerate(batches):
            tokens = jax.device_put(batch.tokens, batch.device)
            self.x[i] = _embedded(tables[batch.device], tokens)
        self.x.finish()

    def layer(self, decisions: Decisions) -> None:
        """Take the stream through one layer."""
        x, norm = self.x, partial(self._norm, decisions)
        qkv = self._merged(
            decisions.linears(
                QKV,
                lambda observer: self._pass(_normed, [norm("input_layernorm")], [x], observer),
                norm="input_layernorm",
            )
        )
        before = [norm("input_layernorm"), qkv]
        kv_scales = decisions.kv_scales(lambda: self._largest_keys_and_values(before))
        attended = self._stream()
        attention = partial(self._pass, _attention, before, [x], store=attended)
        scales = [] if kv_scales is None else [jnp.asarray(scale) for scale in kv_scales]
        (o_proj,) = decisions.linears(O_PROJ, partial(attention, constants=scales))

        after = [self._dense(o_proj), norm("post_attention_layernorm")]
        gate_up = self._merged(
            decisions.linears(
                GATE_UP,
                partial(self._pass, _after_attention, after, [x, attended], store=x),
                norm="post_attention_layernorm",
            )
        )
        del attended
        mlp = [norm("post_attention_layernorm"), gate_up]
        hidden = self._stream() if self.placement.keep_swiglu else None
        (down_proj,) = decisions.linears(DOWN, partial(self._pass, _swiglu, mlp, [x], store=hidden))
        down = self._dense(down_proj)
        if hidden is not None:
            self._pass(_after_mlp, [down], [x, hidden], store=x)
        else:
            self._pass(_mlp, [*mlp, down], [x], store=x)

    def head(self, decisions: Decisions, name: str) -> None:
        """Show what the output head reads, after the last layer; nothing runs it."""
        norm = self._norm(decisions, "model.norm")
        decisions.linears([name], partial(self._pass, _normed, [norm], [self.x]))

    def take_seconds(self) -> Seconds:
        """Time spent in passes since this was last asked."""
        seconds, self.seconds = self.seconds, Seconds()
        return seconds

    def _pass(
        self,
        stage: Callable[..., tuple[jax.Array, ...]],
        modules: Sequence[nnx.Module],
        streams: Sequence[Stream],
        observer: InputObserver | None = None,
        *,
        store: Stream | None = None,
        constants: Sequence[jax.Array] = (),
    ) -> None:
        """Run a stage on every batch. Of the arrays it makes, the first is stored, and the last is
        observed."""
        if observer is None and store is None:
            return
        graphdef, copies = self._copies(modules, constants)
        seen = {} if observer is None else observer.spread(self.devices)
        # One batch of a stage, none that is compiled for, is waited for to see how its time
        # divides: devices idle meanwhile, and later layers divide theirs alike.
        sample = None
        if observer is not None and stage not in self.hessian_shares:
            sample = min(len(self.devices), len(self.batches) - 1)
        begin = time.perf_counter()
        for i, batch in enumerate(self.batches):
            arrays = [stream[i] for stream in streams]
            if i == sample:
                jax.block_until_ready(arrays)
                seen[batch.device].ready()
            start = time.perf_counter()
            here = copies[batch.device]
            made = _run(stage, self.config, graphdef, *here, batch.lengths, *arrays)
            if i == sample:
                jax.block_until_ready(made)
            middle = time.perf_counter()
            if observer is not None:
                seen[batch.device].see(made[-1], batch.mask)
                if i == sample:
                    seen[batch.device].ready()
                    end = time.perf_counter()
                    self.hessian_shares[stage] = (end - middle) / (end - start)
            if store is not None:
                store[i] = made[0]
        if observer is not None:
            for device in self.devices[1:]:
                observer.add(seen[device])
            observer.ready()
        if store is not None:
            store.finish()
        seconds = time.perf_counter() - begin
        share = 0.0 if observer is None else self.hessian_shares[stage]
        self.seconds += Seconds(forward=(1 - share) * seconds, hessian=share * seconds)

    def _largest_keys_and_values(
        self, modules: Sequence[nnx.Module]
    ) -> tuple[np.ndarray, np.ndarray]:
        begin = time.perf_counter()
        graphdef, copies = self._copies(modules, ())
        largest = []
        for i, batch in enumerate(self.batches):
            here = copies[batch.device]
            made = _run(_keys_and_values, self.config, graphdef, *here, batch.lengths, self.x[i])
            largest.append(_largest(batch.mask, made))
        keys, values = np.max(jax.device_get(largest), axis=0)
        self.seconds += Seconds(hessian=time.perf_counter() - begin)
        return keys, values

    def _copies(
        self, modules: Sequence[nnx.Module], constants: Sequence[jax.Array]
    ) -> tuple[nnx.GraphDef, dict[jax.Device, tuple[nnx.State, Sequence[jax.Array]]]]:
        """The modules' structure, and on every device their arrays and the constants."""
        graphdef, state = nnx.split(nnx.List(modules))
        arrays = state, constants
        return graphdef, {device: jax.device_put(arrays, device) for device in self.devices}

    def _stream(self) -> Stream:
        return Stream(self.batches, on_device=self.placement.on_device)

    def _norm(self, decisions: Decisions, name: str) -> RMSNorm:
        weight = jnp.asarray(decisions.norm(name)).astype(self.dtype)
        return RMSNorm(weight, self.config.rms_norm_eps)

    def _dense(self, linear: LinearWeights) -> Any:
        weight = jax.tree.map(jnp.asarray, linear.weight)
        bias = None if linear.bias is None else jnp.asarray(linear.bias)
        return make_dense(weight, bias, dtype=self.dtype)

    def _merged(self, linears: Sequence[LinearWeights]) -> MergedDense:
        return MergedDense(
            [self._dense(linear) for linear in linears],
            [linear.weight.shape[0] for linear in linears],
        )


@jax.jit
def _embedded(table: jax.Array, tokens: jax.Array) -> jax.Array:
    return table[tokens]


# -- stages: of modules, the lengths of rows [B], and arrays of one batch --------------------------


@partial(jax.jit, static_argnums=(0, 1, 2), compiler_options=WITHOUT_TRITON)
def _run(
    stage: Callable[..., tuple[jax.Array, ...]],
    config: LlamaConfig,
    graphdef: nnx.GraphDef,
    state: nnx.State,
    constants: Sequence[jax.Array],
    lengths: jax.Array,
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
    return stage(config, nnx.merge(graphdef, state), constants, lengths, *arrays)


def _normed(config: Any, modules: Any, _: Any, lengths: Any, x: jax.Array) -> tuple[jax.Array]:
    (norm,) = modules
    return (norm(x),)


def _attention(
    config: LlamaConfig,
    modules: Any,
    kv_scales: Sequence[jax.Array],
    lengths: jax.Array,
    x: jax.Array,
) -> tuple[jax.Array]:
    norm, qkv_proj = modules
    positions = _positions(x)
    rope = rotary_embedding(config, positions, lengths)
    if not kv_scales:
        return (attention_context(config, qkv_proj, norm(x), rope, positions)[0],)
    shape = (x.shape[0], config.num_key_value_heads, x.shape[1], config.head_dim)
    cache = Entries(*jnp.zeros((2, *shape), jnp.float8_e4m3fn))
    k_scale, v_scale = kv_scales
    attended, _ = attention_context(
        config, qkv_proj, norm(x), rope, positions, cache, k_scale=k_scale, v_scale=v_scale
    )
    return (attended,)


def _keys_and_values(
    config: LlamaConfig, modules: Any, _: Any, lengths: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array]:
    norm, qkv_proj = modules
    rope = rotary_embedding(config, _positions(x), lengths)
    return project_heads(config, qkv_proj, norm(x), rope)[1:]


def _after_attention(
    config: Any, modules: Any, _: Any, lengths: Any, x: jax.Array, attended: jax.Array
) -> tuple[jax.Array, jax.Array]:
    o_proj, norm = modules
    x = x + o_proj(attended)
    return x, norm(x)


def _swiglu(config: Any, modules: Any, _: Any, lengths: Any, x: jax.Array) -> tuple[jax.Array]:
    norm, gate_up_proj = modules
    return (_hidden(gate_up_proj, norm(x)),)


def _after_mlp(
    config: Any, modules: Any, _: Any, lengths: Any, x: jax.Array, hidden: jax.Array
) -> tuple[jax.Array]:
    (down_proj,) = modules
    return (x + down_proj(hidden),)


def _mlp(config: Any, modules: Any, _: Any, lengths: Any, x: jax.Array) -> tuple[jax.Array]:
    norm, gate_up_proj, down_proj = modules
    return (x + down_proj(_hidden(gate_up_proj, norm(x))),)


def _hidden(gate_up_proj: MergedDense, x: jax.Array) -> jax.Array:
    """What down_proj reads."""
    hidden = swiglu(gate_up_proj.addends(x), dtype=x.dtype, backend="xla")
    assert isinstance(hidden, jax.Array)  # no codes were asked for
    return hidden


def _positions(x: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])


@jax.jit
def _largest(mask: jax.Array, heads: Sequence[jax.Array]) -> jax.Array:
    """Largest magnitude of keys and of values `[B, T, heads, H]` where `mask [B, T]`: `[2]`."""
    counted = mask[:, :, None, None]
    return jnp.stack(
        [jnp.max(jnp.where(counted, jnp.abs(x.astype(jnp.float32)), 0.0)) for x in heads]
    )
