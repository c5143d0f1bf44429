"""From one form of a quantized checkpoint to another: codes, scales and zero points as they are.

Nothing is quantized here, and nothing is quantized again. What a form cannot say is refused, or
lost if the user agrees.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qllama.config import LlamaConfig
from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import QuantScheme
from qllama_convert.checkpoint import Checkpoint, open_checkpoint
from qllama_convert.export import export_checkpoint
from qllama_convert.export_section import FORMS, quantization_section, reader_notes
from qllama_convert.files import first_few
from qllama_convert.formats.companions import is_reordered
from qllama_convert.hub import resolve
from qllama_convert.kv_cache_scheme import KVCacheScheme
from qllama_convert.kv_scales import read_kv_scales
from qllama_convert.linear import LinearWeights, read_linear
from qllama_convert.model_card import has_chat_template, license_of, model_card
from qllama_convert.names import attention_paths, linear_shapes
from qllama_convert.quantization_config import Quantization, parse_quantization
from qllama_convert.writer import check_output_folder


@dataclass(frozen=True, kw_only=True)
class ConversionReport:
    """What `convert` did."""

    source: str  # folder
    output: str  # folder
    source_method: str | None  # the source's quant_method; None: not quantized
    to: str
    schemes: Mapping[str, str]  # path of each quantized Linear of the source -> its scheme
    rounded: tuple[str, ...]  # Linears whose weights were rounded when they were dequantized
    losses: tuple[str, ...]  # what the output does not say any more
    notes: tuple[str, ...]  # which readers do not take the output

    @property
    def lossless(self) -> bool:
        """Whether nothing was rounded or lost."""
        return not self.rounded and not self.losses


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "compressed-tensors",
    *,
    allow_lossy: bool = False,
    overwrite: bool = False,
    revision: str | None = None,
) -> ConversionReport:
    """Write the checkpoint `src` in another form, without quantizing anything again.

    Args:
        src: a checkpoint folder, or a Hub id.
        dst: the folder to write.
        to: "compressed-tensors", "gptq", "fp8" (AutoFP8's and fine-grained), "bf16" (not
            quantized, in the dtype that config.json names), or "native" (kept by orbax, for a
            quick restore by qllama).
        allow_lossy: also where something is rounded or left out.
        overwrite: replace an existing checkpoint.
        revision: branch, tag or commit of a Hub id.

    Raises:
        ValueError: `to` cannot hold this model, or only with a loss that was not allowed; the
            message says which. Nothing is written.
        CheckpointError: something is wrong with the source.
        OSError: as writing does, or what was written does not read back.
    """
    if to not in FORMS:
        raise ValueError(f"to={to!r} is no form of a checkpoint; use {', '.join(FORMS)}")
    check_output_folder(dst, overwrite=overwrite)
    with open_checkpoint(resolve(src, revision)) as source:
        model = _Source(source)
        if model.quantization is None and to not in ("bf16", "native"):
            raise ValueError(
                f"{source.folder} is not quantized, and converting does not quantize; "
                "`qllama quantize` does"
            )
        schemes = model.schemes(to)
        kv_cache = model.kv_cache if to in ("compressed-tensors", "fp8", "native") else None
        # Refuses what cannot be said before a pass over the weights.
        ordered = model.is_reordered()
        quantization_section(to, schemes, model.llama, kv_cache=kv_cache, desc_act=ordered)
        losses = [*model.losses(to, keeps_cache=kv_cache is not None)]
        rounded = [] if allow_lossy or to != "bf16" else model.rounded()
        if not allow_lossy and (losses or rounded):
            if rounded:
                losses.append(f"{len(rounded)} Linears are rounded: {first_few(rounded)}")
            raise ValueError(
                f"{source.folder} as {to} loses something: {'; '.join(losses)}. allow_lossy=True "
                "(--allow-lossy) accepts that"
            )

        def linears(path: str) -> LinearWeights:
            linear = model.read(path)
            assert isinstance(linear.weight, QTensor)
            if to == "bf16" and _rounds(linear.weight, model.llama.dtype):
                rounded.append(path)
            return dataclasses.replace(
                linear, weight=dataclasses.replace(linear.weight, scheme=schemes[path])
            )

        notes = tuple(reader_notes(to, schemes, desc_act=ordered))
        card = model_card(
            name=Path(dst).resolve().name,
            to=to,
            scheme=", ".join(dict.fromkeys(scheme.describe() for scheme in schemes.values())),
            base_model=None if os.path.lexists(src) else str(src),
            license_name=license_of(source.folder),
            notes=(*losses, *notes),
            chat=has_chat_template(source.folder),
        )
        output = export_checkpoint(
            dst,
            source=source,
            linears=linears,
            schemes=schemes,
            to=to,
            kv_scales=model.kv_scales() if kv_cache else None,
            files={"README.md": card.encode()},
            desc_act=ordered,
            overwrite=overwrite,
        )
        method = model.quantization.method if model.quantization else None
        return ConversionReport(
            source=str(source.folder),
            output=str(output),
            source_method=method,
            to=to,
            schemes={path: scheme.describe() for path, scheme in schemes.items()},
            rounded=tuple(rounded),
            losses=tuple(losses),
            notes=notes,
        )


class _Source:
    """The checkpoint that is converted, and what conversions ask of it."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.llama = LlamaConfig.from_hf(checkpoint.config)
        self.shapes = linear_shapes(self.llama)
        self.quantization: Quantization | None = parse_quantization(checkpoint, self.shapes)
        self.linears = self.quantization.linears if self.quantization else {}

    @property
    def kv_cache(self) -> KVCacheScheme | None:
        return self.quantization.kv_cache if self.quantization else None

    def read(self, path: str) -> LinearWeights:
        return read_linear(self.checkpoint, self.quantization, path, self.shapes[path])

    def schemes(self, to: str) -> dict[str, QuantScheme]:
        """The scheme of each quantized Linear, as far as the form `to` can say it."""
        schemes = {path: spec.scheme for path, spec in self.linears.items()}
        if to != "compressed-tensors":
            return schemes
        return {path: _unbounded(scheme) for path, scheme in schemes.items()}

    def is_reordered(self) -> bool:
        """Whether a Linear has its columns in activation order."""
        return any(
            is_reordered(self.checkpoint, path, spec.scheme, self.shapes[path])
            for path, spec in self.linears.items()
        )

    def kv_scales(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """The scales of each layer's cache, where any are stored or declared."""
        heads = self.llama.num_key_value_heads
        found = {}
        for path in attention_paths(self.llama):
            k, v = read_kv_scales(self.checkpoint, self.quantization, path, heads)
            if k is not None and v is not None:
                found[path] = k, v
        return found

    def losses(self, to: str, *, keeps_cache: bool) -> Iterator[str]:
        """What the form `to` does not say any more, as far as the config tells."""
        schemes = [spec.scheme for spec in self.linears.values()]
        if to == "bf16" and any(scheme.activations for scheme in schemes):
            yield "inputs of Linears are not quantized any more"
        if to != "native" and self.schemes(to) != {p: s.scheme for p, s in self.linears.items()}:
            yield "the upper bound of activations (activation_scale_ub) is left out"
        if not keeps_cache and self.kv_scales():
            yield "the scales of the key-value cache are left out"

    def rounded(self) -> list[str]:
        """The quantized Linears that the model's dtype does not hold exactly."""
        return [path for path in self.linears if _rounds(self.read(path).weight, self.llama.dtype)]


def _unbounded(scheme: QuantScheme) -> QuantScheme:
    if scheme.activations is None or scheme.activations.upper_bound is None:
        return scheme
    activations = dataclasses.replace(scheme.activations, upper_bound=None)
    return dataclasses.replace(scheme, activations=activations)


def _rounds(weight: np.ndarray | QTensor, dtype: str) -> bool:
    """Whether a dequantized weight changes when it is stored as `dtype`."""
    if not isinstance(weight, QTensor):
        return False
    exact = weight.dequantize()
    return not bool((exact.astype(dtype).astype(exact.dtype) == exact).all())
