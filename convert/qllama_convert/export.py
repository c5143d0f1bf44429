"""A model as a checkpoint folder that others read: its Linears as given, all else of its source.

Streams: two Linears are held in memory, one being made and one being written. What was written is
read back and compared before the folder appears.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import QuantScheme
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.export_section import export_format, quantization_section
from qllama_convert.files import first_few
from qllama_convert.kv_scales import kv_cache_scheme, normal_kv_scales, write_kv_scales
from qllama_convert.linear import LinearWeights, check_bias, read_linear, write_linear
from qllama_convert.module_tensors import FLOATS, ModuleTensors
from qllama_convert.names import (
    EMBED_TOKENS,
    LM_HEAD,
    attention_paths,
    embedding_shape,
    is_derived,
    linear_shapes,
    module_shapes,
    norm_shapes,
    split_name,
)
from qllama_convert.quantization_config import parse_quantization
from qllama_convert.read_back import fingerprint, fingerprint_linear, read_fingerprints
from qllama_convert.safetensors_file import CODES
from qllama_convert.writer import check_output_folder, write_checkpoint

_QUANTIZATION_KEYS = ("quantization_config", "compression_config", "text_config")
_TELL_ORDER = ("compressed-tensors", "gptq")
_COPIED = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
    "*.jinja", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip


def export_checkpoint(
    folder: str | Path,
    *,
    source: Checkpoint,
    linears: Callable[[str], LinearWeights],
    schemes: Mapping[str, QuantScheme],
    to: str = "compressed-tensors",
    norms: Mapping[str, np.ndarray] | None = None,
    kv_scales: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    files: Mapping[str, bytes] | None = None,
    desc_act: bool = False,
    damp_percent: float | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint and check that it reads back bit for bit; only then it appears.

    Embedding, head, norms, biases, tokenizer, generation config, chat template and licence are
    those of the source, tensors in the dtype they have there.

    Args:
        folder: where; its parents are made.
        source: open; the model whose Linears were quantized.
        linears: gives the Linear at a path of `schemes` when its turn comes, each once, in the
            order they run. Without a bias of its own, it keeps the source's.
        schemes: module path -> scheme of every quantized Linear.
        to: a name in `qllama_convert.export_section.FORMS`. "bf16" dequantizes the Linears and
            rounds them once to the dtype that the source's config.json names.
        norms: module path -> weight, in place of the source's.
        kv_scales: attention path, such as "model.layers.0.self_attn", -> scales of keys and of
            values, one or one per KV head; of all layers or of none.
        files: file name -> what else goes in (README.md, ...).
        desc_act: some Linear has a `g_idx`, which "gptq", "bf16" and "native" take.
        damp_percent: for "gptq": the dampening that was used.
        max_shard_bytes: see `write_checkpoint`.
        overwrite: replace an existing checkpoint.

    Returns:
        The folder, as an absolute path.

    Raises:
        ValueError: the form cannot hold what it is to hold, or `folder` is in the way.
        CheckpointError: something is wrong with the source.
        OSError: as writing does, or what was written does not read back.
    """
    folder = check_output_folder(folder, overwrite=overwrite)
    export = _Export(source, linears, schemes, norms or {}, kv_scales or {}, to, desc_act)
    section = export.section(damp_percent)
    more: dict[str, bytes | Path] = {**copied_files(source.folder), **(files or {})}
    if to == "gptq":  # once more, where older readers look
        more["quantize_config.json"] = json.dumps(section, indent=2, sort_keys=True).encode()
    return write_checkpoint(
        folder,
        config=export.config(section),
        tensors=export.tensors(),
        files=more,
        container="orbax" if to == "native" else "safetensors",
        check=export.check_written,
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def copied_files(folder: Path) -> dict[str, Path]:
    """What goes along with a model unchanged: tokenizer, generation config, licence."""
    found = sorted(path for pattern in _COPIED for path in folder.glob(pattern))
    return {path.name: path for path in found if path.is_file() and path.suffix != ".safetensors"}


class _Export:
    """What is to be written, checked as far as it can be before it is computed."""

    def __init__(
        self,
        source: Checkpoint,
        linears: Callable[[str], LinearWeights],
        schemes: Mapping[str, QuantScheme],
        norms: Mapping[str, np.ndarray],
        kv_scales: Mapping[str, tuple[np.ndarray, np.ndarray]],
        to: str,
        desc_act: bool,
    ) -> None:
        self.source, self.linears, self.schemes = source, linears, schemes
        self.norms, self.to, self.desc_act = norms, to, desc_act
        self.llama = LlamaConfig.from_hf(source.config)
        shapes = linear_shapes(self.llama)
        quantization = parse_quantization(source, shapes)
        _check_paths("schemes", schemes, shapes)
        left = (quantization.linears.keys() if quantization else set()) - schemes.keys()
        if left:
            raise ValueError(f"{first_few(left)}: quantized in the source, and given no scheme")
        _check_norms(norms, self.llama)
        _refuse_strangers(source, self.llama)
        self.kv_scales = normal_kv_scales(kv_scales, self.llama)
        stores_head = LM_HEAD in schemes or _has_head_of_its_own(source, self.llama)
        self.linear_shapes = {
            path: shape for path, shape in shapes.items() if path != LM_HEAD or stores_head
        }
        self._written: dict[str, bytes] = {}  # path -> fingerprint

    def config(self, section: Mapping[str, Any] | None) -> dict[str, Any]:
        """The source's config with another quantization, or with none."""
        config = {k: v for k, v in self.source.config.items() if k not in _QUANTIZATION_KEYS}
        if self.llama.tie_word_embeddings and LM_HEAD in self.linear_shapes:
            config["tie_word_embeddings"] = False
        return config if section is None else config | {"quantization_config": section}

    def section(self, damp_percent: float | None) -> dict[str, Any] | None:
        """The `quantization_config`; None for an unquantized checkpoint."""
        return quantization_section(
            self.to,
            self.schemes,
            self.llama,
            kv_cache=kv_cache_scheme(self.kv_scales),
            desc_act=self.desc_act,
            damp_percent=damp_percent,
        )

    def tensors(self) -> Iterator[tuple[str, np.ndarray]]:
        """All tensors in the order they are used, those of the cache last."""
        self._written.clear()
        for path, shape in module_shapes(self.llama).items():
            if path in self.linear_shapes:
                linear = self._linear(path)
                check_bias(self.source, self.llama, path, linear)
                self._written[path] = fingerprint_linear(linear)
                scheme = self.schemes.get(path)
                format_name = None if scheme is None else export_format(self.to, scheme)
                try:
                    tensors = write_linear(path, linear, format_name)
                except ValueError as error:
                    raise ValueError(f"{path}: {error}") from error
                yield from tensors.items()
            elif path != LM_HEAD:
                weight = self.norms.get(path)
                if weight is None:
                    weight = ModuleTensors(self.source, path).read_floats("weight", shape)
                self._written[path] = fingerprint(weight)
                yield f"{path}.weight", weight
        for path, (k, v) in self.kv_scales.items():
            self._written[path] = fingerprint(k, v)
            yield from write_kv_scales(path, k, v, to=self.to, dtype=self.llama.dtype).items()

    def _linear(self, path: str) -> LinearWeights:
        """What to write at `path`."""
        shape = self.linear_shapes[path]
        if path not in self.schemes:
            return read_linear(self.source, None, path, shape)
        linear = self.linears(path)
        weight = linear.weight
        if not isinstance(weight, QTensor) or weight.scheme != self.schemes[path]:
            found = weight.scheme.describe() if isinstance(weight, QTensor) else str(weight.dtype)
            wanted = self.schemes[path].describe()
            raise ValueError(f"{path} was to be {wanted}, but its weight is {found}")
        if weight.shape != shape:
            raise ValueError(f"{path} has shape {list(weight.shape)}, the model {list(shape)}")
        if weight.g_idx is not None and not self.desc_act and self.to in _TELL_ORDER:
            raise ValueError(f"{path} has a g_idx; pass desc_act=True, so that the config says so")
        weight = jax.device_get(weight)
        weight.validate()
        bias = linear.bias
        tensors = ModuleTensors(self.source, path)
        if bias is None and "bias" in tensors:
            bias = tensors.read_floats("bias", shape[:1])
        if self.to == "bf16":
            return LinearWeights(np.asarray(weight.dequantize(jnp.dtype(self.llama.dtype))), bias)
        return LinearWeights(weight, bias)

    def check_written(self, folder: Path) -> None:
        """Raise `OSError` unless the checkpoint in `folder` is what was to be written."""
        try:
            found = read_fingerprints(folder)
        except CheckpointError as error:
            raise OSError(f"what was written does not read back: {error}") from error
        expected = self._written
        wrong = {path for path in found | expected if found.get(path) != expected.get(path)}
        if wrong:
            raise OSError(f"what was written reads back as something else: {first_few(wrong)}")


def _check_paths(name: str, given: Iterable[str], known: Collection[str]) -> None:
    unknown = set(given) - set(known)
    if unknown:
        raise ValueError(f"{name}: the model has no {first_few(unknown)}")


def _check_norms(norms: Mapping[str, np.ndarray], llama: LlamaConfig) -> None:
    shapes = norm_shapes(llama)
    _check_paths("norms", norms, shapes)
    for path, norm in norms.items():
        if CODES.get(norm.dtype) not in FLOATS or norm.shape != shapes[path]:
            raise ValueError(
                f"norms: {path} must be bfloat16, float16 or float32 {list(shapes[path])}, got "
                f"{norm.dtype} {list(norm.shape)}"
            )
        if not np.isfinite(norm.astype(np.float32)).all():
            raise ValueError(f"norms: {path} has values that are infinite or NaN")


def _refuse_strangers(source: Checkpoint, llama: LlamaConfig) -> None:
    """Raise for tensors that are neither copied nor replaced: they would be lost."""
    weights, with_more = module_shapes(llama), {*linear_shapes(llama), *attention_paths(llama)}
    strange = []
    for name in source.tensors:
        module, suffix = split_name(name)
        known = module in with_more or (module in weights and suffix == "weight")
        if not known and not is_derived(name):
            strange.append(name)
    if strange:
        raise CheckpointError(
            f"{source.folder}: {len(strange)} tensors belong to no module of this Llama: "
            f"{first_few(strange)}"
        )


def _has_head_of_its_own(source: Checkpoint, llama: LlamaConfig) -> bool:
    """Whether there is an unquantized `lm_head` that is more than a copy of the embedding."""
    stored = ModuleTensors(source, LM_HEAD).suffixes
    if not llama.tie_word_embeddings:
        return True  # if it is missing, reading it says so
    if stored != {"weight"}:
        return bool(stored)
    shape = embedding_shape(llama)
    embedding = ModuleTensors(source, EMBED_TOKENS).read_floats("weight", shape)
    return not np.array_equal(source.read(f"{LM_HEAD}.weight"), embedding)
