"""fbgemm_fp8: float8_e4m3fn weights with a scale per row, of Meta's own FP8 releases.

`weight` F8_E4M3 `[N, K]` and `weight_scale` F32 `[N, 1]` (or `[N]`). Activations are quantized per
token, their largest magnitude capped at the config's `activation_scale_ub`.

Source: vLLM `fbgemm_fp8.py`; transformers `fbgemm_fp8.py`.
"""

from collections.abc import Mapping

from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import ActivationScheme, QuantScheme
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.formats import LinearSpec, naive_quantized
from qllama_convert.formats.fp8 import quantized_paths
from qllama_convert.module_tensors import ModuleTensors
from qllama_convert.section import Section


def parse(
    config: Section, checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]]
) -> dict[str, LinearSpec]:
    """The quantized Linears: all but `modules_to_not_convert`; `lm_head` if it is stored so.

    Raises:
        CheckpointError: a value of the wrong type or meaning.
    """
    scheme = QuantScheme(
        weight_dtype="float8_e4m3fn",
        strategy="channel",
        activations=ActivationScheme(
            dtype="float8_e4m3fn",
            strategy="token",
            upper_bound=config.positive_number("activation_scale_ub"),
        ),
    )
    ignored = config.strings("modules_to_not_convert")
    spec = LinearSpec(format="fbgemm_fp8", scheme=scheme)
    return dict.fromkeys(quantized_paths(checkpoint, linears, ignored), spec)


def read(tensors: ModuleTensors, shape: tuple[int, int], spec: LinearSpec) -> QTensor:
    """The weight `[N, K]` of one Linear."""
    tensors.ignore("input_scale_ub")  # the bound is the config's
    return naive_quantized.read(tensors, shape, spec)
