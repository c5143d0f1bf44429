"""The architecture of a Llama model, read from a Hugging Face `config.json`.

Field names are Hugging Face's. Both dialects are read: transformers 4 (`rope_theta`,
`rope_scaling`, `torch_dtype`) and transformers 5 (`rope_parameters`, `dtype`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from reprlib import repr as shown
from typing import Any, Literal

from qllama.errors import CheckpointError

DTYPES = ("bfloat16", "float16", "float32")
MAX_LAYERS = 10_000  # a malformed number must not be met by listing that many layers


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the trained context (Hugging Face's names)."""

    rope_type: Literal["linear", "dynamic", "llama3"]
    factor: float
    low_freq_factor: float = 1.0  # llama3 only, like the two below
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class LlamaConfig:
    """Everything that shapes the computation. Hashable, so it can be a jit argument."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    dtype: str = "bfloat16"  # of the stored float weights
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @property
    def max_model_len(self) -> int:
        """The longest sequence the model is meant for, in tokens.

        Linear and dynamic scaling stretch the trained length by their factor; for llama3,
        `max_position_embeddings` already is the stretched length.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type == "llama3":
            return self.max_position_embeddings
        return int(self.max_position_embeddings * scaling.factor)

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """From the parsed `config.json` of a checkpoint.

        Raises:
            CheckpointError: another architecture, a missing or impossible value, two spellings
                of one setting that disagree, or a feature that is known but not run.
        """
        model_type = config.get("model_type")
        if model_type != "llama":
            names = config.get("architectures")
            raise CheckpointError(
                f"config.json: model_type={shown(model_type)} (architectures={shown(names)}); only "
                "model_type='llama' (LlamaForCausalLM) is supported"
            )
        activation = config.get("hidden_act", "silu")
        if activation not in ("silu", "swish"):
            raise CheckpointError(f"config.json: hidden_act={shown(activation)}; Llama uses 'silu'")
        hidden_size = _integer(config, "hidden_size")
        heads = _integer(config, "num_attention_heads")
        kv_heads = _integer(config, "num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json: num_attention_heads={heads} is not a multiple of "
                f"num_key_value_heads={kv_heads}"
            )
        if config.get("head_dim") is None and hidden_size % heads:
            raise CheckpointError(
                f"config.json: hidden_size={hidden_size} is not a multiple of "
                f"num_attention_heads={heads} and head_dim is not given"
            )
        head_dim = _integer(config, "head_dim", default=hidden_size // heads)
        if head_dim % 2:
            raise CheckpointError(f"config.json: head_dim={head_dim} is odd; rotary needs pairs")
        max_positions = _integer(config, "max_position_embeddings", default=2048)
        theta, scaling = _rope(config, max_positions)
        if head_dim == 2 and scaling is not None and scaling.rope_type == "dynamic":
            raise CheckpointError("config.json: 'dynamic' rotary scaling needs head_dim above 2")
        vocab_size = _integer(config, "vocab_size")
        return cls(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=_integer(config, "intermediate_size"),
            num_hidden_layers=_integer(config, "num_hidden_layers", largest=MAX_LAYERS),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=max_positions,
            rms_norm_eps=_number(config, "rms_norm_eps", default=1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            attention_bias=_boolean(config, "attention_bias"),
            mlp_bias=_boolean(config, "mlp_bias"),
            tie_word_embeddings=_boolean(config, "tie_word_embeddings"),
            dtype=_dtype(config),
            bos_token_id=next(iter(token_ids(config, "bos_token_id", vocab_size)), None),
            eos_token_ids=token_ids(config, "eos_token_id", vocab_size),
        )


def token_ids(
    config: Mapping[str, Any], key: str, vocab_size: int, *, file: str = "config.json"
) -> tuple[int, ...]:
    """The token ids under `key`: absent, one id, or (Llama 3's EOS) a list of them.

    Raises:
        CheckpointError: anything that is not an id below `vocab_size`.
    """
    value = config.get(key)
    ids = [] if value is None else value if isinstance(value, list) else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise CheckpointError(
                f"{file}: {key}={shown(value)} must be a token id below "
                f"vocab_size={vocab_size}, or a list of them"
            )
    return tuple(ids)


def _integer(
    config: Mapping[str, Any],
    key: str,
    default: int | None = None,
    path: str = "",
    largest: int = 2**31 - 1,
) -> int:
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json: {path}{key} is missing")
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= largest:
        raise CheckpointError(
            f"config.json: {path}{key}={shown(value)} must be an integer from 1 to {largest}"
        )
    return value


def _number(
    config: Mapping[str, Any],
    key: str,
    default: float | None = None,
    path: str = "",
    smallest: float = 1e-12,
    largest: float = 1e18,
) -> float:
    """The bounds keep all that is computed from such numbers finite in float32."""
    value = config.get(key)
    if value is None:
        value = default
    if value is None:
        raise CheckpointError(f"config.json: {path}{key} is missing")
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not smallest <= value <= largest:  # nor NaN
        raise CheckpointError(
            f"config.json: {path}{key}={shown(value)} must be a positive number from {smallest:g} "
            f"to {largest:g}"
        )
    return float(value)


def _boolean(config: Mapping[str, Any], key: str) -> bool:
    value = config.get(key)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key}={shown(value)} must be true or false")
    return value


def _dtype(config: Mapping[str, Any]) -> str:
    """transformers 5 writes `dtype`, transformers 4 `torch_dtype`."""
    names = [config[k] for k in ("dtype", "torch_dtype") if config.get(k) is not None]
    names = [n.removeprefix("torch.") if isinstance(n, str) else n for n in names]
    for name in names:
        if name not in DTYPES:
            raise CheckpointError(
                f"config.json: dtype={shown(name)}; use one of {', '.join(DTYPES)}"
            )
        if name != names[0]:
            raise CheckpointError(f"config.json: dtype={names[0]!r} but torch_dtype={name!r}")
    return names[0] if names else "bfloat16"


def _rope(config: Mapping[str, Any], max_positions: int) -> tuple[float, RopeScaling | None]:
    """`rope_theta` and the scaling from either dialect; both present must agree."""
    sections: list[tuple[str, Mapping[str, Any]]] = []
    for key in ("rope_parameters", "rope_scaling"):
        section = config.get(key)
        if section is None:
            continue
        if not isinstance(section, dict):
            raise CheckpointError(f"config.json: {key}={shown(section)} must be an object")
        sections.append((key, section))

    thetas = {
        _number(section, "rope_theta", path=f"{path}.", smallest=1)
        for path, section in sections
        if section.get("rope_theta") is not None
    }
    if config.get("rope_theta") is not None:
        thetas.add(_number(config, "rope_theta", smallest=1))
    if len(thetas) > 1:
        raise CheckpointError(f"config.json: rope_theta is given as {sorted(thetas)}")

    scalings = [_rope_scaling(path, section, max_positions) for path, section in sections]
    if len(scalings) == 2 and scalings[0] != scalings[1]:
        raise CheckpointError("config.json: rope_parameters and rope_scaling disagree")
    return (thetas.pop() if thetas else 10000.0), (scalings[0] if scalings else None)


def _rope_scaling(path: str, section: Mapping[str, Any], max_positions: int) -> RopeScaling | None:
    kinds = [section[k] for k in ("rope_type", "type") if section.get(k) is not None]
    kind: Any = kinds[0] if kinds else "default"
    if kinds and kinds[-1] != kind:
        raise CheckpointError(
            f"config.json: {path} names two types, {shown(kind)} and {shown(kinds[-1])}"
        )
    if section.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise CheckpointError(f"config.json: {path}.partial_rotary_factor is not supported")
    if kind == "default":
        return None
    if kind in ("linear", "dynamic"):
        return RopeScaling(
            rope_type=kind,
            factor=_factor(path, section),
            original_max_position_embeddings=max_positions,
        )
    if kind != "llama3":
        raise CheckpointError(
            f"config.json: {path}.rope_type={shown(kind)} is not supported; "
            "'default', 'linear', 'dynamic' and 'llama3' are"
        )
    low = _number(section, "low_freq_factor", path=f"{path}.")
    high = _number(section, "high_freq_factor", path=f"{path}.")
    if high <= low:
        raise CheckpointError(
            f"config.json: {path}.high_freq_factor={high} must exceed low_freq_factor={low}"
        )
    return RopeScaling(
        rope_type="llama3",
        factor=_factor(path, section),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_position_embeddings=_integer(
            section, "original_max_position_embeddings", path=f"{path}."
        ),
    )


def _factor(path: str, section: Mapping[str, Any]) -> float:
    """How many times the context is stretched; "dynamic" loses too many digits above a million."""
    return _number(section, "factor", path=f"{path}.", smallest=1, largest=1e6)
