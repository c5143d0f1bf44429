"""How a checkpoint says it is quantized: finding the config, and sending it to its own parser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qllama.errors import CheckpointError
from qllama_convert import compressed_tensors
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.formats import LinearSpec, awq, fbgemm_fp8, fp8, gptq, native
from qllama_convert.kv_cache_scheme import KVCacheScheme, parse_kv_cache_scheme
from qllama_convert.section import Section, shown

_Parser = Callable[[Section, Checkpoint, Mapping[str, tuple[int, int]]], dict[str, LinearSpec]]

METHODS: dict[str, _Parser] = {
    "compressed-tensors": compressed_tensors.parse,
    "gptq": gptq.parse,
    "awq": awq.parse,
    "fp8": fp8.parse,
    "fbgemm_fp8": fbgemm_fp8.parse,
    "qllama": native.parse,
}
"""Values of `quant_method` that are read."""

_WITH_SIDECAR = ("gptq", "awq")
_WITH_KV_CACHE = ("compressed-tensors", "fp8", "qllama")
_SPELLINGS = (
    ("bits", "w_bit"),
    ("group_size", "q_group_size"),
    ("desc_act",),
    ("sym",),
    ("version",),
    ("checkpoint_format", "format"),
)


@dataclass(frozen=True, kw_only=True)
class Quantization:
    """What a checkpoint's config says about its Linears and its KV cache."""

    method: str  # a key of METHODS
    linears: Mapping[str, LinearSpec]  # module path -> how it lies; quantized Linears only
    kv_cache: KVCacheScheme | None = None

    def linear(self, path: str) -> LinearSpec | None:
        """How the Linear at a module path is quantized; None: it is not."""
        return self.linears.get(path)


def parse_quantization(
    checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]]
) -> Quantization | None:
    """Find the quantization config of a checkpoint and decide for every Linear.

    Args:
        checkpoint: an open checkpoint; only names, dtypes and shapes of tensors are looked at.
        linears: module path -> `(N, K)` of every Linear of the model.

    Returns:
        None for a checkpoint without any quantization config.

    Raises:
        CheckpointError: the config is malformed, contradicts itself, its sidecar or the tensors,
            or asks for something that is not supported. The message names the JSON path.
    """
    config = _find(checkpoint)
    if config is None:
        return None
    method = _method(config)
    sidecar = _sidecar(checkpoint)
    if sidecar is not None and method in _WITH_SIDECAR:
        _refuse_conflict(config, sidecar)
    kv_cache = parse_kv_cache_scheme(config) if method in _WITH_KV_CACHE else None
    specs = METHODS[method](config, checkpoint, linears)
    return Quantization(method=method, linears=specs, kv_cache=kv_cache)


def _find(checkpoint: Checkpoint) -> Section | None:
    config = Section(checkpoint.config, str(checkpoint.folder / "config.json"))
    text_config = checkpoint.config.get("text_config")
    places = [config.section("quantization_config")]
    if isinstance(text_config, dict):
        places.append(config.child("text_config", text_config).section("quantization_config"))
    places.append(config.section("compression_config"))
    found = next((section for section in places if section), None)
    return found if found is not None else _sidecar(checkpoint)


def _sidecar(checkpoint: Checkpoint) -> Section | None:
    if not checkpoint.sidecar or checkpoint.sidecar_name is None:
        return None
    return Section(checkpoint.sidecar, str(checkpoint.folder / checkpoint.sidecar_name))


def _refuse_conflict(config: Section, sidecar: Section) -> None:
    """Other readers look at the sidecar first, so a difference means different models."""
    for spellings in _SPELLINGS:
        ours, theirs = config.spelling(*spellings), sidecar.spelling(*spellings)
        one, other = config.value(ours), sidecar.value(theirs)
        if isinstance(one, str) and isinstance(other, str):
            one, other = one.lower(), other.lower()
        if one is not None and other is not None and one != other:
            raise config.error(
                ours,
                f"is {shown(one)}, but {sidecar.place(theirs)} is {shown(other)}; delete the file "
                "that is wrong",
            )


def _method(config: Section) -> str:
    """The `quant_method`, stated or (in a sidecar) implied; refuses what is not read."""
    for key in ("load_in_4bit", "load_in_8bit"):
        if config.value(key):
            raise _unsupported(config, key, "is set: bitsandbytes weights")
    stated = config.string("quant_method")
    method = (stated or _implied_method(config)).lower()
    if config.value("is_marlin_format"):
        raise _unsupported(config, "is_marlin_format", "is set: a layout made for one kernel")
    layout = config.string("checkpoint_format")
    if layout not in (None, "gptq", "gptq_v2") and method != "awq":
        raise _unsupported(
            config, "checkpoint_format", f"is {shown(layout)}: a layout made for one kernel"
        )
    if method not in METHODS:
        raise _unsupported(config, "quant_method", f"is {shown(stated)}")
    return method


def _implied_method(config: Section) -> str:
    if config.file.endswith("quantize_config.json"):
        return "awq" if "version" in config else "gptq"
    if config.file.endswith("quant_config.json"):
        return "awq"
    raise config.wrong("quant_method", f"one of {', '.join(METHODS)}")


def _unsupported(config: Section, key: str, message: str) -> CheckpointError:
    return config.error(key, f"{message}; supported are {', '.join(METHODS)}")
