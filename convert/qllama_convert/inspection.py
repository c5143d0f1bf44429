"""What is in a checkpoint folder, told without loading it: headers, configs and scales are read."""

import math
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.model.kv_cache import cache_bytes
from qllama.quantization.scheme import QuantScheme
from qllama_convert.checkpoint import Checkpoint, CheckpointWarning, TensorInfo, open_checkpoint
from qllama_convert.files import first_few
from qllama_convert.formats import LinearSpec
from qllama_convert.formats.companions import is_reordered, stored_g_idx
from qllama_convert.hub_headers import glance
from qllama_convert.kv_scales import SUFFIXES_IN_LINEARS, ignore_kv_scales, read_kv_scales
from qllama_convert.names import (
    LM_HEAD,
    is_derived,
    layer_path,
    linear_shapes,
    module_shapes,
    split_name,
)
from qllama_convert.quantization_config import Quantization, parse_quantization
from qllama_convert.safetensors_file import DTYPES

_SCALES = ("weight_scale", "weight_scale_inv", "scales")
_INPUT_SCALES = ("input_scale", "activation_scale", "act_scale")


@dataclass(frozen=True, kw_only=True)
class ModuleSummary:
    """One module with a weight: the embedding, a Linear or a norm."""

    path: str  # such as "model.layers.0.mlp.up_proj"
    shape: tuple[int, ...]  # of the weight; (out_features, in_features) for a Linear
    scheme: str  # "W4A16", or the stored dtype of a float weight
    format: str  # "gptq", "pack-quantized", ...; "plain" for a float weight
    act_order: bool  # columns belong to groups out of order, by a stored g_idx
    bits_per_weight: float  # all that is stored for it, scales included, without bias
    bytes_on_disk: int
    bytes_in_memory: int  # as a GPU holds it: codes, scales, zeros; floats in the model's dtype


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What `inspect` found in a checkpoint folder."""

    folder: str  # or the Hub id, where only headers were fetched
    headers_only: bool  # a Hub id that is not downloaded: no values of its tensors were looked at
    config: LlamaConfig
    quant_method: str | None  # None: not quantized
    kv_cache_scheme: str | None  # None: the cache is in the model's dtype
    modules: tuple[ModuleSummary, ...]  # in the order they run
    ignored: tuple[str, ...]  # Linears that a quantized checkpoint leaves in floats
    anomalies: tuple[str, ...]  # what a user may want to know, most of it harmless

    @property
    def num_parameters(self) -> int:
        """Weights of all modules; a tied head counts once, biases do not."""
        return sum(math.prod(module.shape) for module in self.modules)

    @property
    def bytes_on_disk(self) -> int:
        """Tensor data of all modules."""
        return sum(module.bytes_on_disk for module in self.modules)

    @property
    def bytes_in_memory(self) -> int:
        """What the weights take on a GPU."""
        return sum(module.bytes_in_memory for module in self.modules)

    @property
    def bytes_as_float32(self) -> int:
        """What they take on a CPU, where every weight is widened to float32 once."""
        return 4 * self.num_parameters

    @property
    def kv_cache_bytes(self) -> int:
        """What one token takes in the key-value cache by default, on a GPU."""
        dtype = "float8_e4m3fn" if self.kv_cache_scheme else self.config.dtype
        return cache_bytes(self.config, jnp.dtype(dtype))

    @property
    def tied_head(self) -> bool:
        """Whether the output head is the embedding."""
        return all(module.path != LM_HEAD for module in self.modules)


def inspect(path: str | Path, *, revision: str | None = None) -> Inspection:
    """Look into a checkpoint folder without loading its weights.

    Whatever `open_checkpoint` and the quantization config tell is checked as a load does. Of the
    tensors, only scales and group indices are read; the rest is for a load to find.

    Args:
        path: the folder, or a Hub id. Of one that is not in the cache, only the JSON files and the
            headers of the weight files are fetched, and no tensor is looked into.
        revision: branch, tag or commit of a Hub id; None: its main branch.

    Raises:
        CheckpointError: a file is missing or malformed, or the config asks for what is not run.
    """
    with warnings.catch_warnings(), glance(path, revision) as (folder, sizes, name):
        warnings.simplefilter("ignore", CheckpointWarning)  # they become anomalies
        shown = str(folder) if name is None else name
        try:
            with open_checkpoint(folder, sizes=sizes) as checkpoint:
                found = _inspect(checkpoint)
        except CheckpointError as error:
            raise CheckpointError(str(error).replace(str(folder), shown)) from error
        anomalies = tuple(text.replace(str(folder), shown) for text in found.anomalies)
        return replace(found, folder=shown, anomalies=anomalies)


def _inspect(checkpoint: Checkpoint) -> Inspection:
    config = LlamaConfig.from_hf(checkpoint.config)
    shapes = linear_shapes(config)
    quantization = parse_quantization(checkpoint, shapes)
    specs = quantization.linears if quantization else {}
    by_module: dict[str, dict[str, TensorInfo]] = {}
    for name, info in checkpoint.tensors.items():
        module, suffix = split_name(name)
        by_module.setdefault(module, {})[suffix] = info

    modules = []
    missing = []
    for path, shape in module_shapes(config).items():
        tensors = by_module.pop(path, {})
        of_cache = SUFFIXES_IN_LINEARS if path.endswith((".k_proj", ".v_proj")) else ()
        tensors = {suffix: info for suffix, info in tensors.items() if suffix not in of_cache}
        if not tensors:
            if path != LM_HEAD or not config.tie_word_embeddings:
                missing.append(path)
            continue
        modules.append(_summary(checkpoint, config, path, shape, tensors, specs.get(path)))

    kv_cache = quantization.kv_cache if quantization else None
    ignored = tuple(path for path in shapes if path not in specs) if quantization else ()
    stored = {module.path for module in modules}
    ignored = tuple(path for path in ignored if path in stored)
    anomalies = [
        *_of_the_whole(config, modules, specs, ignored, missing),
        *(_of_unread_values() if checkpoint.headers_only else _of_scales(checkpoint, stored)),
        *_of_the_cache(checkpoint, config, quantization),
        *_of_strangers(checkpoint, by_module),
    ]
    return Inspection(
        folder=str(checkpoint.folder),
        headers_only=checkpoint.headers_only,
        config=config,
        quant_method=quantization.method if quantization else None,
        kv_cache_scheme=f"float8_e4m3fn per {kv_cache.strategy}" if kv_cache else None,
        modules=tuple(modules),
        ignored=ignored,
        anomalies=(*checkpoint.warnings, *anomalies),
    )


def _summary(
    checkpoint: Checkpoint,
    config: LlamaConfig,
    path: str,
    shape: tuple[int, ...],
    tensors: dict[str, TensorInfo],
    spec: LinearSpec | None,
) -> ModuleSummary:
    on_disk = sum(info.nbytes for info in tensors.values())
    bias = tensors["bias"].nbytes if "bias" in tensors else 0
    float_size = jnp.dtype(config.dtype).itemsize
    act_order = False
    if spec is None:
        scheme = tensors["weight"].dtype if "weight" in tensors else "unknown"
        in_memory = math.prod(shape) * float_size
    else:
        if checkpoint.headers_only:
            act_order = spec.act_order and stored_g_idx(checkpoint, path) is not None
        else:
            act_order = is_reordered(checkpoint, path, spec.scheme, shape)
        scheme = spec.scheme.describe()
        in_memory = _quantized_bytes(spec.scheme, shape, tensors, act_order)
    return ModuleSummary(
        path=path,
        shape=shape,
        scheme=scheme,
        format=spec.format if spec else "plain",
        act_order=act_order,
        bits_per_weight=8 * (on_disk - bias) / math.prod(shape),
        bytes_on_disk=on_disk,
        bytes_in_memory=in_memory + (shape[0] * float_size if bias else 0),
    )


def _quantized_bytes(
    scheme: QuantScheme, shape: tuple[int, ...], tensors: dict[str, TensorInfo], act_order: bool
) -> int:
    """Bytes of the `QTensor` that these tensors become."""
    n, k = shape
    grid = math.prod(scheme.scale_shape((n, k)))
    stored = next((tensors[suffix] for suffix in _SCALES if suffix in tensors), None)
    # Exponents and the two scales of NVFP4 become one float32.
    wide = stored is None or stored.dtype not in ("BF16", "F16")
    acts = scheme.activations
    static = acts is not None and not acts.dynamic
    return (
        n * -(-k * scheme.bits // 8)
        + grid * (4 if wide else 2)
        + (0 if scheme.symmetric else 2 * grid)
        + (4 * k if act_order else 0)
        + (4 if static else 0)
        + (1 if static and acts is not None and not acts.symmetric else 0)
    )


def _read_first(checkpoint: Checkpoint, path: str, suffixes: tuple[str, ...]) -> np.ndarray | None:
    """The tensor under the first of these names that the module has."""
    for suffix in suffixes:
        if f"{path}.{suffix}" in checkpoint.tensors:
            return checkpoint.read(f"{path}.{suffix}")
    return None


def _of_the_whole(
    config: LlamaConfig,
    modules: list[ModuleSummary],
    specs: Mapping[str, LinearSpec],
    ignored: tuple[str, ...],
    missing: list[str],
) -> Iterator[str]:
    if missing:
        yield f"{len(missing)} modules have no tensors, so this does not load: {first_few(missing)}"
    schemes = Counter(module.scheme for module in modules if module.path in specs)
    if len(schemes) > 1:
        counts = ", ".join(f"{scheme} ({count} Linears)" for scheme, count in schemes.items())
        yield f"mixed schemes: {counts}"
    inner = [path for path in ignored if path != LM_HEAD]
    if inner:
        yield f"{len(inner)} Linears of decoder layers are not quantized: {first_few(inner)}"
    reordered = sum(module.act_order for module in modules)
    if reordered:
        yield f"{reordered} Linears have their columns in activation order (g_idx)"
    head = next((module for module in modules if module.path == LM_HEAD), None)
    if head is not None and config.tie_word_embeddings:
        yield f"lm_head is stored ({head.scheme}) although tie_word_embeddings is true"
    code = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}[config.dtype]
    others = Counter(m.scheme for m in modules if m.path not in specs and m.scheme != code)
    for scheme, count in others.items():
        yield f"{count} modules are stored as {scheme}, config.json says {config.dtype}"


def _of_unread_values() -> Iterator[str]:
    yield (
        "it is not downloaded: scales were not looked at, and activation order is what the config "
        "says"
    )


def _of_scales(checkpoint: Checkpoint, paths: Collection[str]) -> Iterator[str]:
    """Scales that are zero, which blanks weights, or no scales at all, which no load accepts."""
    zero: list[str] = []
    broken: list[str] = []
    for path in paths:
        for suffixes in (_SCALES, _INPUT_SCALES):
            stored = _read_first(checkpoint, path, suffixes)
            if stored is None or stored.dtype.kind in "iu" or stored.dtype == DTYPES["F8_E8M0"]:
                continue
            values = stored.astype(np.float32)
            if not (np.isfinite(values) & (values >= 0)).all():
                broken.append(path)
            elif not values.all():
                zero.append(f"{path} ({np.count_nonzero(values == 0)} of {values.size})")
    if zero:
        yield f"scales are zero in {len(zero)} Linears: {first_few(zero)}"
    if broken:
        yield (
            f"scales are negative, infinite or NaN in {len(broken)} Linears, so this does not "
            f"load: {first_few(broken)}"
        )


def _of_the_cache(
    checkpoint: Checkpoint, config: LlamaConfig, quantization: Quantization | None
) -> Iterator[str]:
    found = 0
    for layer in range(config.num_hidden_layers):
        path = f"{layer_path(layer)}.self_attn"
        if checkpoint.headers_only:
            found += ignore_kv_scales(checkpoint, path)
            continue
        try:
            k_scale, _ = read_kv_scales(checkpoint, quantization, path, config.num_key_value_heads)
        except CheckpointError as error:
            yield f"{error}, so this does not load"
            return
        found += k_scale is not None
    if found and (quantization is None or quantization.kv_cache is None):
        yield (
            f"{found} layers have scales for an FP8 key-value cache that the config does not ask "
            "for; kv_cache_dtype='fp8' uses them"
        )


def _of_strangers(
    checkpoint: Checkpoint, by_module: Mapping[str, Mapping[str, TensorInfo]]
) -> Iterator[str]:
    """Tensors of no module of a Llama, but for those of the cache, which have been read."""
    unread = set(checkpoint.unread())
    names = [f"{module}.{suffix}" for module, tensors in by_module.items() for suffix in tensors]
    strangers = [name for name in names if name in unread and not is_derived(name)]
    if strangers:
        yield (
            f"{len(strangers)} tensors belong to no module of this Llama, so this does not load: "
            f"{first_few(strangers)}"
        )
