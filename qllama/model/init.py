"""Random Llamas: where training starts, and what tests of the architecture run on."""

import jax
import jax.numpy as jnp

from qllama.config import LlamaConfig
from qllama.model.dense import Dense, MergedDense
from qllama.model.llama import MLP, Attention, DecoderLayer, Llama, RMSNorm


def init_llama(config: LlamaConfig, key: jax.Array, dtype: jnp.dtype | type = jnp.float32) -> Llama:
    """Weights from N(0, 0.02²), output projections scaled by 1/√(2 layers) as GPT-2 does.

    Biases, where the config has them, start at zero and norms at one.
    """
    keys = iter(jax.random.split(key, 4 * config.num_hidden_layers + 2))
    hidden, inner = config.hidden_size, config.intermediate_size
    query = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    into_residual = 0.02 * (2 * config.num_hidden_layers) ** -0.5

    def normal(shape: tuple[int, int], std: float = 0.02) -> jax.Array:
        return (jax.random.normal(next(keys), shape, jnp.float32) * std).astype(dtype)

    def dense(n: int, k: int, bias: bool, std: float = 0.02) -> Dense:
        return Dense(normal((n, k), std), jnp.zeros(n, dtype) if bias else None)

    def norm() -> RMSNorm:
        return RMSNorm(jnp.ones(hidden, dtype), config.rms_norm_eps)

    def decoder_layer() -> DecoderLayer:
        qkv = dense(query + 2 * kv, hidden, config.attention_bias)
        return DecoderLayer(
            Attention(
                config,
                MergedDense([qkv], [query, kv, kv]),
                dense(hidden, query, config.attention_bias, into_residual),
            ),
            MLP(
                MergedDense([dense(2 * inner, hidden, config.mlp_bias)], [inner, inner]),
                dense(hidden, inner, config.mlp_bias, into_residual),
            ),
            norm(),
            norm(),
        )

    return Llama(
        config,
        normal((config.vocab_size, hidden)),
        [decoder_layer() for _ in range(config.num_hidden_layers)],
        norm(),
        None if config.tie_word_embeddings else Dense(normal((config.vocab_size, hidden))),
    )
