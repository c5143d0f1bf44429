"""What a Hugging Face Llama checkpoint calls its tensors, and the shapes they must have.

A tensor's name is the path of its module, a dot, and a suffix: `model.norm` + `.` + `weight`.
"""

from qllama.config import LlamaConfig

EMBED_TOKENS = "model.embed_tokens"
LM_HEAD = "lm_head"

# The Linears of a decoder layer that read one input, and that servers run as one product.
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
GATE_UP = ("mlp.gate_proj", "mlp.up_proj")

# Buffers of rotary embedding in old exports: computed from the config, never loaded.
_ROTARY_BUFFERS = ("inv_freq", "original_inv_freq", "cos_cached", "sin_cached")


def split_name(name: str) -> tuple[str, str]:
    """The module path and the suffix of a tensor name."""
    module, _, suffix = name.rpartition(".")
    return module, suffix


def layer_path(layer: int) -> str:
    """The path of one decoder layer, such as `model.layers.0`."""
    return f"model.layers.{layer}"


def linear_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Path -> (out_features, in_features) of every Linear, in the order they run, `lm_head` last.

    `lm_head` is there also with tied embeddings, where the checkpoint may leave it out.
    """
    hidden, intermediate = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    in_layer = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    shapes = {
        f"{layer_path(layer)}.{name}": shape
        for layer in range(config.num_hidden_layers)
        for name, shape in in_layer.items()
    }
    return shapes | {LM_HEAD: (config.vocab_size, hidden)}


def has_bias(config: LlamaConfig, path: str) -> bool:
    """Whether the Linear at `path` has a bias."""
    if ".self_attn." in path:
        return config.attention_bias
    return ".mlp." in path and config.mlp_bias


def norm_shapes(config: LlamaConfig) -> dict[str, tuple[int]]:
    """Path -> shape of the weight of every RMSNorm, in the order they run."""
    paths = [
        f"{layer_path(layer)}.{name}"
        for layer in range(config.num_hidden_layers)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    return dict.fromkeys([*paths, "model.norm"], (config.hidden_size,))


def embedding_shape(config: LlamaConfig) -> tuple[int, int]:
    """Shape of `model.embed_tokens.weight`."""
    return config.vocab_size, config.hidden_size


def attention_paths(config: LlamaConfig) -> list[str]:
    """The path of every attention, where the scales of a quantized cache are."""
    return [f"{layer_path(layer)}.self_attn" for layer in range(config.num_hidden_layers)]


def merged_linears(config: LlamaConfig) -> list[tuple[str, ...]]:
    """Paths of the Linears that have one input, and that servers run as one product."""
    return [
        tuple(f"{layer_path(layer)}.{name}" for name in names)
        for layer in range(config.num_hidden_layers)
        for names in (QKV, GATE_UP)
    ]


def module_shapes(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Path -> weight shape of every module with a weight, in the order they run."""
    linears, norms = linear_shapes(config), norm_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {EMBED_TOKENS: embedding_shape(config)}
    for layer in range(config.num_hidden_layers):
        prefix = f"{layer_path(layer)}."
        for kind in (norms, linears):
            shapes |= {path: shape for path, shape in kind.items() if path.startswith(prefix)}
    return shapes | {"model.norm": norms["model.norm"], LM_HEAD: linears[LM_HEAD]}


def weight_shapes(config: LlamaConfig) -> dict[str, tuple[int, int]]:
    """Path -> shape of every weight but those of norms; the head only where it is not tied."""
    shapes = {EMBED_TOKENS: embedding_shape(config), **linear_shapes(config)}
    if config.tie_word_embeddings:
        del shapes[LM_HEAD]
    return shapes


def is_derived(name: str) -> bool:
    """Whether a tensor is computed from the config, so that a loader drops it without a word."""
    module, suffix = split_name(name)
    return split_name(module)[1] == "rotary_emb" and suffix in _ROTARY_BUFFERS
