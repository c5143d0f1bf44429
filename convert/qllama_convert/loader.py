"""From an opened checkpoint to a model on the device, one Linear at a time.

Strict: every tensor is read or known to be unneeded, and every value that can be checked is.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.model.dense import Dense, MergedDense, QuantDense, make_dense
from qllama.model.llama import MLP, Attention, DecoderLayer, Llama, RMSNorm
from qllama.quantization.activations import Semantics
from qllama.quantization.qtensor import QTensor, stack_rows
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.files import first_few
from qllama_convert.kv_scales import read_kv_scales
from qllama_convert.linear import LinearWeights, check_bias, read_linear
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
        checkpoint: open; its tensors are read lazily, host memory holds one layer at most.
        config: of the model, from the checkpoint's config.json.
        quantization: how its Linears lie, from `parse_quantization`; None: all float.
        dtype: the compute dtype; float weights are cast to it.
        backend: of the quantized products, see `qllama.model.dense.make_dense`.
        semantics: of activation quantization.
        on_layer: called after each decoder layer with the number of layers loaded.

    Raises:
        CheckpointError: a tensor is missing, unexpected, of the wrong dtype or shape, not finite.
    """
    build = _Builder(checkpoint, config, quantization, dtype, backend, semantics)
    embed_tokens = build.array(EMBED_TOKENS, embedding_shape(config))
    layers = []
    for i in range(config.num_hidden_layers):
        layers.append(build.decoder_layer(layer_path(i)))
        # Else the host would run ahead and hold what many layers are made of.
        jax.block_until_ready(nnx.state(layers[-1]))
        on_layer(i + 1)
    norm = build.norm("model.norm")
    lm_head = build.lm_head(embed_tokens)
    build.finish()
    model = Llama(config, embed_tokens, layers, norm, lm_head)
    jax.block_until_ready(nnx.state(model))
    return model


class _Builder:
    """What every step of the building needs, held once."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        config: LlamaConfig,
        quantization: Quantization | None,
        dtype: jnp.dtype | type,
        backend: str,
        semantics: Semantics,
    ) -> None:
        self.checkpoint = checkpoint
        self.config = config
        self.quantization = quantization
        self.dtype = dtype
        self.backend = backend
        self.semantics: Semantics = semantics
        self.shapes = linear_shapes(config)

    def decoder_layer(self, path: str) -> DecoderLayer:
        attn, mlp = f"{path}.self_attn", f"{path}.mlp"
        scales = read_kv_scales(
            self.checkpoint, self.quantization, attn, self.config.num_key_value_heads
        )
        k_scale, v_scale = jax.tree.map(jnp.asarray, scales)
        return DecoderLayer(
            Attention(
                self.config,
                self.merged([f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"]),
                self.dense(f"{attn}.o_proj"),
                k_scale,
                v_scale,
            ),
            MLP(
                self.merged([f"{mlp}.gate_proj", f"{mlp}.up_proj"]),
                self.dense(f"{mlp}.down_proj"),
            ),
            self.norm(f"{path}.input_layernorm"),
            self.norm(f"{path}.post_attention_layernorm"),
        )

    def norm(self, path: str) -> RMSNorm:
        return RMSNorm(self.array(path, (self.config.hidden_size,)), self.config.rms_norm_eps)

    def array(self, path: str, shape: tuple[int, ...]) -> jax.Array:
        """The float `weight` of the module at `path`, in the compute dtype, on the device."""
        weight = ModuleTensors(self.checkpoint, path).read_floats("weight", shape)
        return jnp.asarray(weight).astype(self.dtype)  # in this order, or numpy makes a copy

    def dense(self, path: str) -> Dense | QuantDense:
        return self.layer(self.read(path))

    def read(self, path: str) -> LinearWeights:
        linear = read_linear(self.checkpoint, self.quantization, path, self.shapes[path])
        check_bias(self.checkpoint, self.config, path, linear)
        return linear

    def layer(self, linear: LinearWeights) -> Dense | QuantDense:
        bias = None if linear.bias is None else jnp.asarray(linear.bias)
        weight = jax.tree.map(jnp.asarray, linear.weight)
        return make_dense(
            weight, bias, dtype=self.dtype, backend=self.backend, semantics=self.semantics
        )

    def merged(self, paths: Sequence[str]) -> MergedDense:
        linears = [self.read(path) for path in paths]
        sizes = [self.shapes[path][0] for path in paths]
        stacked = _stack(linears)
        if stacked is not None:
            return MergedDense([self.layer(stacked)], sizes)
        parts = [self.layer(linear) for linear in linears]
        return MergedDense(parts, sizes)

    def lm_head(self, embed_tokens: jax.Array) -> Dense | QuantDense | None:
        """None where the head is the embedding."""
        stored = ModuleTensors(self.checkpoint, LM_HEAD).suffixes
        if not stored:
            if not self.config.tie_word_embeddings:
                raise CheckpointError(
                    f"{self.checkpoint.folder}: lm_head.weight is missing and "
                    "tie_word_embeddings is false in config.json"
                )
            return None
        head = self.dense(LM_HEAD)
        if not self.config.tie_word_embeddings or isinstance(head, QuantDense):
            return head
        if "weight" in stored and jnp.array_equal(head.weight[...], embed_tokens):
            return None
        if stored == {"weight"}:
            self.checkpoint.warn(
                "lm_head.weight differs from model.embed_tokens.weight although "
                "tie_word_embeddings is true; the stored head is used"
            )
        return head

    def finish(self) -> None:
        """Raise for tensors that nobody asked for."""
        unread = [name for name in self.checkpoint.unread() if not is_derived(name)]
        if unread:
            raise CheckpointError(
                f"{self.checkpoint.folder}: {len(unread)} unexpected tensors: {first_few(unread)}; "
                "they belong to no module of this Llama as its config.json describes it"
            )


def _stack(linears: Sequence[LinearWeights]) -> LinearWeights | None:
    """The Linears as one, on the host, where that is exact; None where it is not."""
    biases = [linear.bias for linear in linears if linear.bias is not None]
    if biases and len(biases) < len(linears):
        return None
    if len({bias.dtype for bias in biases}) > 1:
        return None
    bias = np.concatenate(biases) if biases else None
    quantized = [linear.weight for linear in linears if isinstance(linear.weight, QTensor)]
    if quantized:
        if len(quantized) < len(linears):
            return None
        stacked = stack_rows(quantized)
        return None if stacked is None else LinearWeights(stacked, bias)
    floats = [linear.weight for linear in linears if not isinstance(linear.weight, QTensor)]
    if len({weight.dtype for weight in floats}) > 1:
        return None
    return LinearWeights(np.concatenate(floats), bias)
