"""What readers demand of a `quantization_config` and the tensors it speaks of, beyond our own."""

from collections.abc import Iterator
from dataclasses import dataclass

from qllama.config import LlamaConfig
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.export_section import reader_notes, refuse_split_schemes
from qllama_convert.files import first_few
from qllama_convert.names import LM_HEAD, has_bias, linear_shapes, merged_linears
from qllama_convert.quantization_config import Quantization
from qllama_convert.section import Section

_FLOAT_SCALES = {"tensor": "[1]", "channel": "[N, 1]"}
_GPTQ_KEYS = ("bits", "group_size", "desc_act", "sym")


@dataclass(frozen=True)
class Finding:
    """Something about a checkpoint, in a sentence."""

    text: str
    harmless: bool = False  # a note: the checkpoint is right, but not for every reader


def quantization_findings(
    checkpoint: Checkpoint, llama: LlamaConfig, quantization: Quantization
) -> Iterator[Finding]:
    """Where vLLM, transformers or compressed-tensors would refuse or misread the quantization."""
    yield from _of_merged_linears(llama, quantization)
    yield from _of_needless_biases(checkpoint, llama, quantization)
    # The sidecar alone is enough for qllama and vLLM.
    section = checkpoint.config.get("quantization_config")
    if section is None:
        yield Finding("config.json has no quantization_config; transformers reads no other", True)
        return
    config = Section(section, "config.json", "quantization_config")
    match quantization.method:
        case "compressed-tensors":
            yield from _of_compressed_tensors_config(config)
            yield from _of_compressed_tensors(checkpoint, quantization)
        case "gptq":
            yield from _of_gptq(config, checkpoint, quantization)
        case "fbgemm_fp8":
            if "modules_to_not_convert" not in config:
                yield Finding("vLLM needs modules_to_not_convert in fbgemm_fp8, an empty list too")
    form = "native" if quantization.method == "qllama" else quantization.method
    schemes = {path: spec.scheme for path, spec in quantization.linears.items()}
    desc_act = config.value("desc_act") is True
    for note in reader_notes(form, schemes, desc_act=desc_act):
        yield Finding(note, True)


def _of_merged_linears(llama: LlamaConfig, quantization: Quantization) -> Iterator[Finding]:
    schemes = {path: spec.scheme for path, spec in quantization.linears.items()}
    try:
        refuse_split_schemes(schemes, llama)
    except ValueError as error:
        yield Finding(str(error), quantization.method == "qllama")
    shapes = linear_shapes(llama)
    ragged = [
        f"{path} ({shapes[path][0]})"
        for paths in merged_linears(llama)
        for path in paths[:-1]
        if path in schemes
        and (block := schemes[path].block_size) is not None
        and shapes[path][0] % block[0]
    ]
    if ragged:
        yield Finding(
            "vLLM merges q, k, v and gate, up, and needs whole blocks of rows: "
            f"{first_few(ragged)}",
            quantization.method == "qllama",
        )


def _of_needless_biases(
    checkpoint: Checkpoint, llama: LlamaConfig, quantization: Quantization
) -> Iterator[Finding]:
    if quantization.method == "gptq":  # whose exporters always did; vLLM skips them
        return
    needless = [
        path
        for path in linear_shapes(llama)
        if f"{path}.bias" in checkpoint.tensors and not has_bias(llama, path)
    ]
    if needless:
        yield Finding(
            f"{len(needless)} Linears have a bias although config.json says they have none, so "
            f"vLLM has no place for it: {first_few(needless)}"
        )


def _of_compressed_tensors_config(config: Section) -> Iterator[Finding]:
    if config.value("quantization_status") != "compressed":
        yield Finding(
            f"{config.place('quantization_status')} is not 'compressed': transformers loads random "
            "weights, without an error"
        )
    groups = config.section_or_empty("config_groups")
    sections = [groups.section(name) for name in groups if isinstance(groups.value(name), dict)]
    formats = [config.value("format"), *(group.value("format") for group in sections if group)]
    if not any(formats):
        yield Finding(f"{config.place('format')} is missing, and vLLM chooses its kernels by it")
    for group in filter(None, sections):
        weights = group.section_or_empty("weights")
        if weights.value("actorder") in ("group", "dynamic", True):
            yield Finding(
                f"{weights.place('actorder')} is 'group', which compressed-tensors from 0.19.0 and "
                "vLLM from 0.30.0 on refuse; `qllama convert --to gptq` keeps the weights"
            )
    classes = [text for text in config.strings("ignore") if text == "Linear"]
    if classes:
        yield Finding(f"{config.place('ignore')} has the class 'Linear', which vLLM does not match")
    if config.value("ignore") is None:
        yield Finding(
            f"{config.place('ignore')} is null; list {LM_HEAD} if it is not quantized", True
        )


def _of_compressed_tensors(checkpoint: Checkpoint, quantization: Quantization) -> Iterator[Finding]:
    odd_shapes, odd_zeros, no_shape, old_zeros = [], [], [], []
    for path, spec in quantization.linears.items():
        own = {
            suffix: checkpoint.tensors[f"{path}.{suffix}"]
            for suffix in ("weight_scale", "weight_shape", "weight_zero_point", "input_scale")
            if f"{path}.{suffix}" in checkpoint.tensors
        }
        rank = {"tensor": 1, "channel": 2}.get(spec.scheme.strategy)
        for suffix, expected in (("weight_scale", rank), ("input_scale", 1)):
            if expected and suffix in own and len(own[suffix].shape) != expected:
                odd_shapes.append(f"{path}.{suffix} {list(own[suffix].shape)}")
        if spec.format == "pack-quantized" and "weight_shape" not in own:
            no_shape.append(path)
        zeros = own.get("weight_zero_point")
        if zeros is not None and spec.scheme.symmetric:
            odd_zeros.append(path)
        elif zeros is not None and (spec.format, zeros.dtype) == ("pack-quantized", "I8"):
            old_zeros.append(path)
    if odd_shapes:
        shapes = ", ".join(f"{shape} per {what}" for what, shape in _FLOAT_SCALES.items())
        yield Finding(
            f"transformers takes scales only as {shapes}: {len(odd_shapes)} are not, "
            f"{first_few(odd_shapes)}"
        )
    if no_shape:
        yield Finding(f"transformers needs weight_shape, which is missing: {first_few(no_shape)}")
    if odd_zeros:
        yield Finding(
            "symmetric weights have a weight_zero_point, for which vLLM has no place: "
            f"{first_few(odd_zeros)}"
        )
    if old_zeros:
        yield Finding(
            "zero points are not packed, as before compressed-tensors 0.9.4: "
            f"{first_few(old_zeros)}"
        )


def _of_gptq(
    config: Section, checkpoint: Checkpoint, quantization: Quantization
) -> Iterator[Finding]:
    missing = [key for key in _GPTQ_KEYS if key not in config]
    if missing:
        yield Finding(f"{config.place()} lacks {', '.join(missing)}, which vLLM demands")
    if checkpoint.sidecar is None:
        yield Finding("there is no quantize_config.json, where AutoGPTQ looks for the config", True)
    without = [path for path in quantization.linears if f"{path}.g_idx" not in checkpoint.tensors]
    if without:
        yield Finding(f"g_idx is missing, which AutoGPTQ wants: {first_few(without)}", True)
