"""From an opened checkpoint to a model on its devices, one Linear at a time.

Strict: every tensor is read or known to be unneeded, and every value that can be checked is.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.model.dense import Dense, MergedDense, QuantDense, make_dense
from qllama.model.llama import MLP, Attention, DecoderLayer, Llama, RMSNorm
from qllama.parallel.layers import RowParallel, ShardedLlama
from qllama.parallel.mesh import MODEL, make_mesh
from qllama.parallel.placement import place
from qllama.parallel.sharding import (
    local_config,
    part_of,
    shard_bias,
    shard_kv_scales,
    shard_weight,
)
from qllama.quantization.activations import Semantics
from qllama.quantization.qtensor import QTensor
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.files import first_few
from qllama_convert.kv_scales import read_kv_scales
from qllama_convert.layers import look_ahead, read_layers, read_model_linear, stack
from qllama_convert.linear import LinearWeights
from qllama_convert.module_tensors import ModuleTensors
from qllama_convert.names import (
    EMBED_TOKENS,
    LM_HEAD,
    embedding_shape,
    is_derived,
    layer_path,
    linear_shapes,
)
from qllama_convert.quantization_config import Quantization


def load_model(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    quantization: Quantization | None,
    *,
    dtype: jnp.dtype | type,
    backend: str = "auto",
    semantics: Semantics = "vllm",
    on_layer: Callable[[int], None] = lambda done: None,
) -> Llama:
    """Build the model of `checkpoint`, its arrays on the default device.

    Args:
        checkpoint: open; its tensors are read lazily, host memory holds one decoder layer at most.
        config: of the model, from the checkpoint's config.json.
        quantization: how its Linears lie, from `parse_quantization`; None: all float.
        dtype: the compute dtype; float weights are cast to it.
        backend: of the quantized products, see `qllama.model.dense.make_dense`.
        semantics: of activation quantization.
        on_layer: called after each decoder layer with the number of layers loaded.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong dtype or shape, not finite.
    """
    (model,) = load_replicas(
        checkpoint,
        config,
        quantization,
        [make_mesh()],
        dtype=dtype,
        backend=backend,
        semantics=semantics,
        on_layer=on_layer,
    )
    return model


def load_replicas(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    quantization: Quantization | None,
    meshes: Sequence[Mesh],
    *,
    dtype: jnp.dtype | type,
    backend: str = "auto",
    semantics: Semantics = "vllm",
    on_layer: Callable[[int], None] = lambda done: None,
) -> list[Llama]:
    """As `load_model`, one model for each of `meshes`; the checkpoint is read once.

    Args:
        meshes: one row each and alike, see `qllama.parallel.mesh.replicas`. Over several devices,
            each receives its part of every weight and no more, and the model runs inside a
            `shard_map`; see `qllama.parallel.sharding.check_split` for what cannot be split.
    """
    build = _Builder(checkpoint, config, quantization, meshes, dtype, backend, semantics)
    with contextlib.closing(build):
        embed_tokens = build.embedding()
        layers: list[list[DecoderLayer]] = []
        for i in range(config.num_hidden_layers):
            layers.append(build.decoder_layer(layer_path(i)))
            # Else the host would run ahead and hold what many layers are made of.
            jax.block_until_ready(layers[-1])
            on_layer(i + 1)
        norm = build.norm("model.norm")
        lm_head = build.lm_head(embed_tokens)
        build.finish()
    kind = ShardedLlama if build.size > 1 else Llama
    models = [
        kind(build.config, embed_tokens[i], [layer[i] for layer in layers], norm[i], lm_head[i])
        for i in range(len(meshes))
    ]
    jax.block_until_ready(models)
    return models


class _Builder:
    """What every step of the building needs, held once. Its steps make one module a replica."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        quantization: Quantization | None,
        meshes: Sequence[Mesh],
        dtype: jnp.dtype | type,
        backend: str,
        semantics: Semantics,
    ) -> None:
        self.checkpoint = checkpoint
        self.whole = config
        self.quantization = quantization
        self.meshes = meshes
        self.dtype = dtype
        self.backend = backend
        self.semantics: Semantics = semantics
        self.shapes = linear_shapes(config)
        self.size = meshes[0].size
        self.config = local_config(config, self.size)  # of what one device runs
        self.ahead = look_ahead(
            read_layers(checkpoint, config, quantization, reorder=self.size > 1)
        )

    def close(self) -> None:
        """Read no further."""
        self.ahead.close()

    def place[T](self, build: Callable[[int], T]) -> list[T]:
        return [place(build, mesh) for mesh in self.meshes]

    def embedding(self) -> list[jax.Array]:
        shape = embedding_shape(self.whole)
        table = ModuleTensors(self.checkpoint, EMBED_TOKENS).read_floats("weight", shape)

        def of_device(rank: int) -> jax.Array:
            part = part_of(self.whole, EMBED_TOKENS, shape, rank, self.size)
            return self.cast(shard_weight(table, part))

        return self.place(of_device)

    def decoder_layer(self, path: str) -> list[DecoderLayer]:
        scales = read_kv_scales(
            self.checkpoint,
            self.quantization,
            f"{path}.self_attn",
            self.whole.num_key_value_heads,
        )
        kv_scales = self.place(
            lambda rank: [
                None
                if (part := shard_kv_scales(self.whole, scale, rank, self.size)) is None
                else jnp.asarray(part)
                for scale in scales
            ]
        )
        qkv = self.merged(next(self.ahead))
        o_proj, down_proj = f"{path}.self_attn.o_proj", f"{path}.mlp.down_proj"
        o = self.row_parallel(o_proj, next(self.ahead)[o_proj])
        mlp = next(self.ahead)
        down = self.row_parallel(down_proj, mlp.pop(down_proj))
        gate_up = self.merged(mlp)
        before, after = (
            self.norm(f"{path}.{name}") for name in ("input_layernorm", "post_attention_layernorm")
        )
        return [
            DecoderLayer(
                Attention(self.config, qkv[i], o[i], *kv_scales[i], backend=self.backend),
                MLP(gate_up[i], down[i], backend=self.backend),
                before[i],
                after[i],
            )
            for i in range(len(self.meshes))
        ]

    def norm(self, path: str) -> list[RMSNorm]:
        weight = ModuleTensors(self.checkpoint, path).read_floats(
            "weight", (self.whole.hidden_size,)
        )
        eps, backend = self.whole.rms_norm_eps, self.backend
        return self.place(lambda rank: RMSNorm(self.cast(weight), eps, backend=backend))

    def cast(self, array: np.ndarray) -> jax.Array:
        """A float weight on the device, in the compute dtype."""
        return jnp.asarray(array).astype(self.dtype)  # in this order, or numpy makes a copy

    def shard(self, path: str, linear: LinearWeights, rank: int) -> LinearWeights:
        """What device `rank` holds of a Linear; of one split by its inputs, the whole bias."""
        scheme = linear.weight.scheme if isinstance(linear.weight, QTensor) else None
        rows = scheme.block_size[0] if scheme is not None and scheme.block_size else 1
        part = part_of(self.whole, path, self.shapes[path], rank, self.size, rows)
        bias = None if linear.bias is None else shard_bias(linear.bias, part)
        return LinearWeights(shard_weight(linear.weight, part), bias)

    def layer(self, linear: LinearWeights, axis_name: str | None = None) -> Dense | QuantDense:
        bias = None if linear.bias is None else jnp.asarray(linear.bias)
        weight = jax.tree.map(jnp.asarray, linear.weight)
        return make_dense(
            weight,
            bias,
            dtype=self.dtype,
            backend=self.backend,
            semantics=self.semantics,
            axis_name=axis_name,
        )

    def merged(self, linears: Mapping[str, LinearWeights]) -> list[MergedDense]:
        """Linears that share an input, as one."""

        def of_device(rank: int) -> MergedDense:
            mine = [self.shard(path, linear, rank) for path, linear in linears.items()]
            sizes = [linear.weight.shape[0] for linear in mine]
            stacked = stack(mine)
            return MergedDense([self.layer(m) for m in ([stacked] if stacked else mine)], sizes)

        return self.place(of_device)

    def row_parallel(self, path: str, linear: LinearWeights) -> list[Any]:
        """A Linear that writes to the residual stream: `RowParallel` over several devices, else as
        it is."""

        def of_device(rank: int) -> Dense | QuantDense | RowParallel:
            mine = self.shard(path, linear, rank)
            if self.size == 1:
                return self.layer(mine)
            bias = None if mine.bias is None else self.cast(mine.bias)
            # vLLM's kernels see their own columns only; the other library knows no devices.
            axis_name = MODEL if self.semantics == "compressed-tensors" else None
            return RowParallel(self.layer(LinearWeights(mine.weight, None), axis_name), bias)

        return self.place(of_device)

    def lm_head(self, embed_tokens: list[jax.Array]) -> Sequence[Dense | QuantDense | None]:
        """None where the head is the embedding."""
        tied = [None] * len(self.meshes)
        stored = ModuleTensors(self.checkpoint, LM_HEAD).suffixes
        if not stored:
            if not self.whole.tie_word_embeddings:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: lm_head.weight is missing and "
                    "tie_word_embeddings is false in config.json"
                )
            return tied
        linear = read_model_linear(self.checkpoint, self.whole, self.quantization, LM_HEAD)
        heads = self.place(lambda rank: self.layer(self.shard(LM_HEAD, linear, rank)))
        head = heads[0]
        if not self.whole.tie_word_embeddings or isinstance(head, QuantDense):
            return heads
        if "weight" in stored and jnp.array_equal(head.weight[...], embed_tokens[0]):
            return tied
        if stored == {"weight"}:
            self.checkpoint.warn(
                "lm_head.weight differs from model.embed_tokens.weight although "
                "tie_word_embeddings is true; the stored head is used"
            )
        return heads

    def finish(self) -> None:
        """Raise for tensors that nobody asked for."""
        unread = [name for name in self.checkpoint.unread() if not is_derived(name)]
        if unread:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {len(unread)} unexpected tensors: {first_few(unread)}; "
                "they belong to no module of this Llama as its config.json describes it"
            )
