"""One module per way a quantized Linear lies on disk, named as the field names it.

Each has `read(tensors, shape, spec) -> QTensor`, or where parts can be read by themselves, `view`
of the same form; `parse(config, checkpoint, linears)` where the format brings its own
`quantization_config` (those of compressed-tensors share one, see
`qllama_convert.compressed_tensors`); and `write(weight) -> {suffix: array}` where qllama exports
it. Reading raises `CheckpointError`; writing raises `ValueError` for a weight that the format
cannot hold. A weight is `[N, K]`, out and in features, whatever the file does.
"""

from dataclasses import dataclass

from qllama.quantization.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True)
class LinearSpec:
    """How one Linear lies in a checkpoint, as far as the config tells."""

    format: str  # "gptq", "awq", "fp8", "fbgemm_fp8", "native", or a format of compressed-tensors
    scheme: QuantScheme
    act_order: bool = False  # columns belong to groups by a stored g_idx, which must be there
    zero_offset: int = 0  # GPTQ v1 stores zero points minus 1
    zero_point_optional: bool = False  # early compressed-tensors left out all-zero zero points
