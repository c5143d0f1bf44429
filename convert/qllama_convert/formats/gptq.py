"""gptq: int4 or int8 codes in 32-bit words along K, the layout of AutoGPTQ and GPTQModel.

All tensors are transposed: `qweight` I32 `[K*b/32, N]` and `qzeros` I32 `[NG, N*b/32]` hold
unsigned codes in the bit stream of `qllama_convert.bits`, `scales` is `[NG, N]`, `g_idx` I32 `[K]`
names the group of every column, in original column order. Version "gptq" (v1) stores zero points
minus 1, "gptq_v2" as they are.

Source: AutoGPTQ `qlinear_cuda.py`; GPTQModel `utils/model.py`; vLLM `gptq_utils.py`.
"""

from collections.abc import Mapping
from typing import Literal

import numpy as np

from qllama.errors import CheckpointError
from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import QuantScheme, WeightDtype
from qllama_convert import bits
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.formats import LinearSpec
from qllama_convert.formats.companions import narrowed, read_g_idx
from qllama_convert.module_tensors import FLOATS, ModuleTensors
from qllama_convert.names import LM_HEAD
from qllama_convert.patterns import Pattern, compile_pattern
from qllama_convert.section import Section

CheckpointFormat = Literal["gptq", "gptq_v2"]

_WEIGHT_DTYPES: dict[int, WeightDtype] = {4: "int4", 8: "int8"}
_PACKED_SUFFIXES = ("qweight", "qzeros", "scales")


def parse(
    config: Section, checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]]
) -> dict[str, LinearSpec]:
    """The quantized Linears. Where the config has no say, the tensors of each module decide.

    Raises:
        CheckpointError: a value of the wrong type or out of range, or a feature that is not run.
    """
    _refuse_unsupported(config)
    zero_offset = 1 if _checkpoint_format(config) == "gptq" else 0
    overrides = _dynamic(config)
    fragments = _fragments(config)
    specs: dict[str, LinearSpec] = {}
    undecided = 0
    for path in linears:
        override = next((layer for pattern, layer in overrides if pattern.match(path)), config)
        if override is None or (fragments and not any(part in path for part in fragments)):
            continue
        if path == LM_HEAD and "lm_head" in config:
            quantized = config.boolean("lm_head", False)
        elif fragments:
            quantized = True
        else:
            quantized = is_packed(checkpoint, path)
            undecided += path != LM_HEAD
        if quantized:
            specs[path] = _spec(override, config, zero_offset)
    if undecided and not specs:
        raise CheckpointError(
            f"{config.place()} says GPTQ, but no Linear has {' or '.join(_PACKED_SUFFIXES)}"
        )
    return specs


def read(tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec) -> QTensor:
    """The weight `[N, K]` of one Linear."""
    (n, k), scheme = shape, spec.scheme
    for name, size in (("N", n), ("K", k)):
        if size * scheme.bits % 32:
            raise tensors.error(
                f"{name}={size} is not divisible by {32 // scheme.bits}, the number of "
                f"{scheme.bits}-bit codes in a word"
            )
    groups = scheme.scale_shape(shape)[1]
    qweight = tensors.read("qweight", dtypes=("I32",), shape=(k * scheme.bits // 32, n))
    qzeros = tensors.read("qzeros", dtypes=("I32",), shape=(groups, n * scheme.bits // 32))
    scales = tensors.read("scales", dtypes=FLOATS, shape=(groups, n))
    return QTensor(
        codes=bits.codes_from_words(qweight.T, scheme.bits, k),
        scales=np.ascontiguousarray(scales.T),
        zeros=_zeros(tensors, qzeros, n, spec),
        g_idx=read_g_idx(tensors, "g_idx", shape, spec),
        scheme=scheme,
        shape=shape,
    )


def write(
    weight: QTensor, checkpoint_format: CheckpointFormat | None = None
) -> dict[str, np.ndarray]:
    """The tensors of one Linear, scales in F16 where that is exact.

    Args:
        weight: int4 or int8, per group or channel, weight-only.
        checkpoint_format: "gptq" or "gptq_v2"; None: v1 if symmetric, v2 if not, because v1
            cannot store a zero point of 0.

    Raises:
        ValueError: the format cannot hold this weight.
    """
    scheme, k = weight.scheme, weight.shape[1]
    checkpoint_format = checkpoint_format or ("gptq" if scheme.symmetric else "gptq_v2")
    _check_can_hold(weight)
    zeros = _unsigned_zeros(weight, checkpoint_format)
    columns = np.arange(k) // scheme.scale_block(weight.shape)[1]
    words = bits.words_from_codes(np.asarray(weight.codes), scheme.bits, k)
    return {
        "qweight": np.ascontiguousarray(words.T),
        "qzeros": bits.pack_words(zeros, scheme.bits),
        "scales": np.ascontiguousarray(narrowed(np.asarray(weight.scales), np.float16).T),
        "g_idx": (columns if weight.g_idx is None else np.asarray(weight.g_idx)).astype(np.int32),
    }


def is_packed(checkpoint: Checkpoint, path: str) -> bool:
    """Whether a module has a tensor that only GPTQ and AWQ use."""
    return any(f"{path}.{suffix}" in checkpoint.tensors for suffix in _PACKED_SUFFIXES)


def _refuse_unsupported(config: Section) -> None:
    if config.string("pack_dtype") not in (None, "int32"):
        raise config.wrong("pack_dtype", "int32, the only width of words that is supported")
    if "rotation" in config:
        raise config.error(
            "rotation", "is set, but rotated weights are not supported; requantize without it"
        )


def _dynamic(config: Section) -> list[tuple[Pattern, Section | None]]:
    """Overrides per module, in order; None: the module is not quantized."""
    section = config.section_or_empty("dynamic")
    rules: list[tuple[Pattern, Section | None]] = []
    for key in section:
        pattern = compile_pattern(key.removeprefix("-:").removeprefix("+:"), section.place(key))
        rules.append((pattern, None if key.startswith("-:") else section.section_or_empty(key)))
    return rules


def _fragments(config: Section) -> tuple[str, ...]:
    """Parts of module paths, one of which every quantized module has; empty: no such rule."""
    key = "modules_in_block_to_quantize"
    blocks = config.value(key)
    if isinstance(blocks, list) and all(isinstance(block, list) for block in blocks):
        blocks = [fragment for block in blocks for fragment in block]
    return config.with_value(key, blocks).strings(key)


def _spec(layer: Section, config: Section, zero_offset: int) -> LinearSpec:
    def owner(key: str) -> Section:
        return layer if key in layer else config

    return LinearSpec(
        format="gptq",
        scheme=grouped_scheme(
            owner("bits"), owner("group_size"), owner("sym").boolean("sym", True)
        ),
        act_order=owner("desc_act").boolean("desc_act", False)
        and not _producer_option(config, "static_groups"),
        zero_offset=zero_offset,
    )


def _producer_option(config: Section, key: str) -> bool:
    """A flag of the producer: AutoGPTQ writes it beside the others, GPTQModel under `meta`."""
    meta = config.section("meta")
    return (meta if meta and key not in config else config).boolean(key, False)


def _checkpoint_format(config: Section) -> str:
    names = {key: config.string(key) for key in ("checkpoint_format", "format") if key in config}
    for key, name in names.items():
        if name not in ("gptq", "gptq_v2"):
            raise config.wrong(key, "gptq or gptq_v2, other layouts belong to one kernel")
    if len(set(names.values())) > 1:
        raise config.error("format", f"and checkpoint_format differ: {names}")
    return next(iter(names.values()), None) or "gptq"


def grouped_scheme(
    bits_owner: Section,
    group_owner: Section,
    symmetric: bool,
    widths: tuple[int, ...] = tuple(_WEIGHT_DTYPES),
) -> QuantScheme:
    """The scheme of `bits` and `group_size` (AWQ: `w_bit`, `q_group_size`); -1 is one group."""
    bits_key = bits_owner.spelling("bits", "w_bit")
    width = bits_owner.integer(bits_key)
    if width not in widths:
        supported = " or ".join(map(str, widths))
        raise bits_owner.wrong(bits_key, f"{supported}, the supported widths")
    group_key = group_owner.spelling("group_size", "q_group_size")
    group_size = group_owner.integer(group_key)
    if group_size is None or (group_size <= 0 and group_size != -1):
        raise group_owner.wrong(group_key, "positive, or -1 for one group")
    return QuantScheme(
        weight_dtype=_WEIGHT_DTYPES[width],
        strategy="channel" if group_size == -1 else "group",
        group_size=None if group_size == -1 else group_size,
        symmetric=symmetric,
    )


def _zeros(
    tensors: ModuleTensors, qzeros: np.ndarray, n: int, spec: LinearSpec
) -> np.ndarray | None:
    half = 2 ** (spec.scheme.bits - 1)
    stored = bits.unpack_words(qzeros, spec.scheme.bits, n)
    if not spec.scheme.symmetric:
        if spec.zero_offset and (qzeros == -1).any():
            tensors.warn(
                "qzeros has words of all ones; version 1 cannot store a zero point of 0, and "
                "producers that tried have spoiled eight channels"
            )
        zeros = stored.T.astype(np.int16) + np.int16(spec.zero_offset - half)
        return np.ascontiguousarray(zeros)
    if (stored == half - spec.zero_offset).all():
        return None
    if (stored == half - (1 - spec.zero_offset)).all():
        tensors.warn(
            "qzeros are those of the other version of the GPTQ format than checkpoint_format "
            f"says; with sym the zero point is {half} in both, so the weights are right",
            once=True,
        )
        return None
    raise tensors.error(
        f"sym is true, but qzeros are not all {half - 1} (gptq) or {half} (gptq_v2); "
        "if the weights are asymmetric, set sym to false",
        "qzeros",
    )


def _check_can_hold(weight: QTensor) -> None:
    scheme = weight.scheme
    problem = None
    if scheme.weight_dtype not in ("int4", "int8") or scheme.strategy not in ("group", "channel"):
        problem = f"holds int4 and int8 per group or channel, not {scheme.describe()}"
    elif scheme.activations is not None:
        problem = "is weight-only and cannot say how activations are quantized"
    elif any(size * scheme.bits % 32 for size in weight.shape):
        problem = f"needs N and K divisible by {32 // scheme.bits}, not {list(weight.shape)}"
    if problem:
        raise ValueError(f"the GPTQ format {problem}")


def _unsigned_zeros(weight: QTensor, checkpoint_format: CheckpointFormat) -> np.ndarray:
    """The zero points as stored, before packing: uint8 `[NG, N]`."""
    scheme = weight.scheme
    half, offset = 2 ** (scheme.bits - 1), 1 if checkpoint_format == "gptq" else 0
    if weight.zeros is None:
        return np.full(scheme.scale_shape(weight.shape)[::-1], half - offset, np.uint8)
    zeros = np.asarray(weight.zeros).T + np.int16(half - offset)
    if zeros.min(initial=0) < 0 or zeros.max(initial=0) >= 2 * half:
        low, high = offset, 2 * half - 1 + offset
        raise ValueError(
            f"{checkpoint_format} stores zero points from {low} to {high}, the weight has "
            f"{zeros.min() + offset} to {zeros.max() + offset}"
        )
    return zeros.astype(np.uint8)
