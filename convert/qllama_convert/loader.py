"""From an opened checkpoint to a model on its devices, one Linear at a time.

Strict: every tensor is read or known to be unneeded, and every value that can be checked is.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from qllama.parallel.mesh import MODEL, local_ranks, make_mesh
from qllama.parallel.placement import place
from qllama.parallel.sharding import local_config, shard_kv_scales
from qllama.quantization.activations import Semantics
from qllama.threads import look_ahead
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.files import first_few
from qllama_convert.kv_scales import read_kv_scales
from qllama_convert.layers import (
    open_model_linear,
    part_of_linear,
    read_layers,
    stack,
)
from qllama_convert.linear import LinearWeights, StoredLinear, open_embedding
from qllama_convert.module_tensors import ModuleTensors
from qllama_convert.names import (
    EMBED_TOKENS,
    LM_HEAD,
    embedding_shape,
    is_derived,
    layer_path,
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
            each receives its part of every weight and no more, read by itself where the format
            allows it (see `read_layers`), and the model runs inside a
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
    for model, mesh in zip(models, meshes, strict=True):
        if isinstance(model, ShardedLlama) and backend in ("auto", "pallas"):
            model.connect(mesh)
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
        self.size = meshes[0].size
        self.ranks = local_ranks(meshes[0])
        self.config = local_config(config, self.size)  # of what one device runs
        self.ahead = look_ahead(
            read_layers(checkpoint, config, quantization, ranks=self.ranks, size=self.size)
        )

    def close(self) -> None:
        """Read no further."""
        self.ahead.close()

    def place[P, T](self, parts: Iterable[P], build: Callable[[P], T]) -> list[T]:
        return place(parts, build, self.meshes)

    def parts(self, path: str, linear: StoredLinear) -> Iterator[LinearWeights]:
        """What each device of this process holds of a Linear, or of the embedding."""
        for rank in self.ranks:
            yield linear.read(part_of_linear(self.whole, path, linear, rank, self.size))

    def next_parts(self) -> Iterator[dict[str, LinearWeights]]:
        """The same of the Linears that come next, by path."""
        return itertools.islice(self.ahead, len(self.ranks))

    def embedding(self) -> list[jax.Array]:
        table = open_embedding(self.checkpoint, embedding_shape(self.whole))
        return self.place(
            self.parts(EMBED_TOKENS, table), lambda part: self.cast(np.asarray(part.weight))
        )

    def decoder_layer(self, path: str) -> list[DecoderLayer]:
        scales = read_kv_scales(
            self.checkpoint,
            self.quantization,
            f"{path}.self_attn",
            self.whole.num_key_value_heads,
        )
        kv_scales = self.place(
            (
                [shard_kv_scales(self.whole, scale, rank, self.size) for scale in scales]
                for rank in self.ranks
            ),
            lambda mine: [None if scale is None else jnp.asarray(scale) for scale in mine],
        )
        o_proj, down_proj = f"{path}.self_attn.o_proj", f"{path}.mlp.down_proj"

        def mlp_of_device(linears: dict[str, LinearWeights]) -> MLP:
            gate_up = {name: linear for name, linear in linears.items() if name != down_proj}
            down = self.row_parallel(linears[down_proj])
            return MLP(self.merged(gate_up), down, backend=self.backend)

        qkv = self.place(self.next_parts(), self.merged)
        o = self.place(self.next_parts(), lambda linears: self.row_parallel(linears[o_proj]))
        mlp = self.place(self.next_parts(), mlp_of_device)
        before, after = (
            self.norm(f"{path}.{name}") for name in ("input_layernorm", "post_attention_layernorm")
        )
        return [
            DecoderLayer(
                Attention(self.config, qkv[i], o[i], *kv_scales[i], backend=self.backend),
                mlp[i],
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
        return self.place(
            (weight for _ in self.ranks),
            lambda weight: RMSNorm(self.cast(weight), eps, backend=backend),
        )

    def cast(self, array: np.ndarray) -> jax.Array:
        """A float weight on the device, in the compute dtype."""
        return jnp.asarray(array).astype(self.dtype)  # in this order, or numpy makes a copy

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

    def merged(self, linears: Mapping[str, LinearWeights]) -> MergedDense:
        """Linears that share an input, as one."""
        mine = list(linears.values())
        sizes = [linear.weight.shape[0] for linear in mine]
        stacked = stack(mine)
        return MergedDense([self.layer(m) for m in ([stacked] if stacked else mine)], sizes)

    def row_parallel(self, linear: LinearWeights) -> Any:
        """A Linear that writes to the residual stream: `RowParallel` over several devices, else as
        it is."""
        if self.size == 1:
            return self.layer(linear)
        bias = None if linear.bias is None else self.cast(linear.bias)
        # vLLM's kernels see their own columns only; the other library knows no devices.
        axis_name = MODEL if self.semantics == "compressed-tensors" else None
        return RowParallel(self.layer(LinearWeights(linear.weight, None), axis_name), bias)

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
        linear = open_model_linear(self.checkpoint, self.whole, self.quantization, LM_HEAD)
        heads = self.place(self.parts(LM_HEAD, linear), self.layer)
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
