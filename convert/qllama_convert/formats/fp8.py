"""fp8: float8_e4m3fn weights, in the dialects of AutoFP8 and of fine-grained (block) FP8.

Both store `weight` F8_E4M3 `[N, K]`. AutoFP8 adds scalars `weight_scale` and, for static
activations, `input_scale` (before June 2024 `act_scale`), F32 `[]`. Fine-grained FP8 adds
`weight_scale_inv` F32, one per block, a multiplier despite its name; without a block size the
same names are transformers' per-tensor dialect, `weight_scale_inv` and `activation_scale` `[]`.

Source: AutoFP8 `quantize.py`; vLLM `fp8.py`; transformers `finegrained_fp8.py`.
"""

from collections.abc import Collection, Mapping

import numpy as np

from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import ActivationScheme, QuantScheme
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.formats import LinearSpec, naive_quantized
from qllama_convert.module_tensors import FLOATS, ModuleTensors
from qllama_convert.names import LM_HEAD
from qllama_convert.section import Section

_SCALES = ("weight_scale", "weight_scale_inv")
_INPUT_SCALES = ("input_scale", "activation_scale", "act_scale")
_FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}


def parse(
    config: Section, checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]]
) -> dict[str, LinearSpec]:
    """The quantized Linears: all that are not listed as ignored; `lm_head` if it is stored so.

    Raises:
        CheckpointError: a value of the wrong type or meaning.
    """
    if config.string("fmt") not in (None, "e4m3"):
        raise config.wrong("fmt", "e4m3")
    dynamic = _is_dynamic(config)
    block = config.pair("weight_block_size")
    if block and not dynamic:
        raise config.error(
            "activation_scheme", "must be dynamic where weight_block_size is set, found static"
        )
    if block:
        activations = ActivationScheme(dtype="float8_e4m3fn", strategy="group", group_size=block[1])
    else:
        activations = ActivationScheme(
            dtype="float8_e4m3fn", strategy="token" if dynamic else "tensor", dynamic=dynamic
        )
    scheme = QuantScheme(
        weight_dtype="float8_e4m3fn",
        strategy="block" if block else "tensor",
        block_size=block,
        activations=activations,
    )
    ignored = config.strings("ignored_layers") or config.strings("modules_to_not_convert")
    spec = LinearSpec(format="fp8", scheme=scheme)
    return dict.fromkeys(quantized_paths(checkpoint, linears, ignored), spec)


def quantized_paths(
    checkpoint: Checkpoint, linears: Collection[str], ignored: Collection[str]
) -> list[str]:
    """All Linears but the ignored ones, named exactly (fused names stand for their parts).

    Exporters that never quantize `lm_head` do not list it: it counts when it is stored as FP8.
    """
    names = set(ignored)
    for name in ignored:
        parent, _, last = name.rpartition(".")
        names.update(f"{parent}.{part}" for part in _FUSED.get(last, ()))
    head = checkpoint.tensors.get(f"{LM_HEAD}.weight")
    if head is None or head.dtype in FLOATS:
        names.add(LM_HEAD)
    return [path for path in linears if path not in names]


def read(tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec) -> QTensor:
    """The weight `[N, K]` of one Linear, under any of the names for its scales."""
    exponents = ("F8_E8M0", "U8") if spec.scheme.strategy == "block" else ()
    return naive_quantized.read(
        tensors,
        shape,
        spec,
        scale=_present(tensors, _SCALES),
        scale_dtypes=(*FLOATS, *exponents),
        input_scale=_present(tensors, _INPUT_SCALES),
    )


def write(weight: QTensor, *, transformers_names: bool = False) -> dict[str, np.ndarray]:
    """The tensors of one Linear, scales in F32.

    Args:
        weight: float8_e4m3fn with one scale, or one per block.
        transformers_names: use transformers' names also for a weight with one scale.

    Raises:
        ValueError: another type of weight, or a scale per channel or group.
    """
    scheme = weight.scheme
    if scheme.weight_dtype != "float8_e4m3fn" or scheme.strategy not in ("tensor", "block"):
        raise ValueError(f"quant_method fp8 holds FP8 per tensor or block, not {scheme.describe()}")
    scales = np.asarray(weight.scales, np.float32)
    inverse = transformers_names or scheme.strategy == "block"
    arrays = {
        "weight": np.asarray(weight.codes),
        _SCALES[inverse]: scales.reshape(()) if scheme.strategy == "tensor" else scales,
    }
    if weight.input_scale is not None:
        arrays[_INPUT_SCALES[inverse]] = np.asarray(weight.input_scale, np.float32)
    return arrays


def _is_dynamic(config: Section) -> bool:
    scheme = config.string("activation_scheme")
    if scheme not in ("static", "dynamic"):
        raise config.wrong("activation_scheme", "static or dynamic")
    return scheme == "dynamic"


def _present(tensors: ModuleTensors, names: tuple[str, ...]) -> str:
    return next((name for name in names if name in tensors), names[0])
