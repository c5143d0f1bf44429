"""What is wrong with a checkpoint is a CheckpointError that says so, one test per known way.

The numbers are those of the project's list of malformed checkpoints; files that are broken as
files are tested with `checkpoint` and `safetensors_file`, whole models with the loader.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from drafts import Q_PROJ, Draft, draft, load
from qllama_convert.checkpoint import CheckpointWarning, open_checkpoint
from qllama_convert.kv_scales import read_kv_scales
from qllama_convert.quantization_config import parse_quantization

from qllama.errors import CheckpointError

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
N = K = 256  # of q_proj in the fixtures
ATTENTION = "model.layers.0.self_attn"

Edit = Callable[[Draft], None]


class Case:
    """One malformed checkpoint: a good one, what is done to it, words of the answer."""

    def __init__(self, row: int, base: str, name: str, edit: Edit, *expected: str) -> None:
        self.base = base
        self.edit = edit
        self.expected = expected
        self.id = f"{row}-{base}-{name}"


# Good checkpoints to spoil. Those of kinds outside the committed fixtures are made from these.


@pytest.fixture(scope="module")
def bases(tiny_llama3: Any) -> Callable[[str], Draft]:
    def base(name: str) -> Draft:
        made = draft(tiny_llama3(FIXTURE[name]))
        BASES.get(name, lambda made: None)(made)
        return made

    return base


def as_fp8(made: Draft, quantization: dict[str, Any], dtype: Any, *shape: int) -> None:
    """Turn int8 codes into float8 of the same bytes, and scales into others."""
    for path in made.shapes:
        weight = made.tensors[f"{path}.weight"]
        if weight.dtype == np.int8:
            made.tensors[f"{path}.weight"] = (weight & np.int8(0x3F)).view(E4M3)
            scale = np.full(shape, 0.01, dtype)
            made.tensors[f"{path}.weight_scale"] = scale
    made.config["quantization_config"] = quantization


def as_static(made: Draft) -> None:
    for path in made.shapes:
        if path != "lm_head":
            made.tensors[f"{path}.input_scale"] = np.array(0.1, np.float32)


def autofp8(made: Draft) -> None:
    as_fp8(made, {"quant_method": "fp8", "activation_scheme": "static",
                  "ignored_layers": ["lm_head"]}, np.float32)  # fmt: skip
    as_static(made)


def ct_fp8(made: Draft) -> None:
    quantization = made.quantization
    as_fp8(made, quantization, BF16, 1)
    as_static(made)
    for path in made.shapes:
        if path != "lm_head":
            made.tensors[f"{path}.input_scale"] = np.full(1, 0.1, BF16)
    fp8 = {"type": "float", "strategy": "tensor"}
    group = made.group()
    group.update(weights=dict(fp8), input_activations=dict(fp8), format="float-quantized")


def fbgemm(made: Draft) -> None:
    as_fp8(made, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
                  "modules_to_not_convert": ["lm_head"]}, np.float32)  # fmt: skip
    for path, (n, _) in made.shapes.items():
        if path != "lm_head":
            made.tensors[f"{path}.weight_scale"] = np.full((n, 1), 0.01, np.float32)


def awq(made: Draft) -> None:
    made.files.clear()
    made.config["quantization_config"] = {"quant_method": "awq", "bits": 4, "group_size": 128}
    for path, (n, k) in made.shapes.items():
        if path != "lm_head":
            del made.tensors[f"{path}.g_idx"]
            made.tensors[f"{path}.qweight"] = np.zeros((k, n // 8), np.int32)


def gptq_asym(made: Draft) -> None:
    made.quantization["sym"] = made.files["quantize_config.json"]["sym"] = False


def float4(weights: dict[str, Any], scale_dtype: Any, size: int) -> Edit:
    def edit(made: Draft) -> None:
        made.quantization["format"] = weights.pop("format", None)
        made.group().update(weights=weights, format=made.quantization["format"])
        for path, (n, k) in made.shapes.items():
            if path != "lm_head":
                del made.tensors[f"{path}.weight_shape"]
                made.tensors[f"{path}.weight_packed"] = np.zeros((n, k // 2), np.uint8)
                made.tensors[f"{path}.weight_scale"] = np.full((n, k // size), 1, scale_dtype)
                if size == 16:
                    made.tensors[f"{path}.weight_global_scale"] = np.array([2.0], np.float32)

    return edit


def nvfp4(made: Draft) -> None:
    args = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
    float4(args | {"format": "nvfp4-pack-quantized"}, E4M3, 16)(made)


def mxfp4(made: Draft) -> None:
    args = {"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}
    float4(args | {"format": "mxfp4-pack-quantized"}, np.uint8, 32)(made)


def w4_asym(made: Draft) -> None:
    made.group()["weights"]["symmetric"] = False
    for path, (n, k) in made.shapes.items():
        if path != "lm_head":
            made.tensors[f"{path}.weight_zero_point"] = np.zeros((n, k // 128), np.int8)


def w4a8(made: Draft) -> None:
    made.group()["weights"]["num_bits"] = 4
    for path in made.shapes:
        if path != "lm_head":
            made.tensors[f"{path}.weight"] = made.tensors[f"{path}.weight"] >> 4


FIXTURE = {
    "w4": "ct_w4a16_g128", "w4_asym": "ct_w4a16_g128", "w8a8": "ct_w8a8_int8",
    "w4a8": "ct_w8a8_int8", "ct_fp8": "ct_w8a8_int8", "autofp8": "ct_w8a8_int8",
    "fbgemm": "ct_w8a8_int8", "gptq": "gptq_w4_g128_desc_act",
    "gptq_asym": "gptq_w4_g128_desc_act", "awq": "gptq_w4_g128_desc_act",
    "nvfp4": "ct_w4a16_g128", "mxfp4": "ct_w4a16_g128",
}  # fmt: skip
BASES: dict[str, Edit] = {
    "w4_asym": w4_asym, "w4a8": w4a8, "ct_fp8": ct_fp8, "autofp8": autofp8, "fbgemm": fbgemm,
    "gptq_asym": gptq_asym, "awq": awq, "nvfp4": nvfp4, "mxfp4": mxfp4,
}  # fmt: skip


# What is done to them.


def config(**values: Any) -> Edit:
    """Set keys of the quantization config."""
    return lambda made: made.quantization.update(values)


def group(**values: Any) -> Edit:
    return lambda made: made.group().update(values)


def weights(**values: Any) -> Edit:
    return lambda made: made.group()["weights"].update(values)


def inputs(**values: Any) -> Edit:
    return lambda made: made.group()["input_activations"].update(values)


def put(suffix: str, array: Any, path: str = Q_PROJ) -> Edit:
    return lambda made: made.tensors.update({f"{path}.{suffix}": np.asarray(array)})


def drop(suffix: str) -> Edit:
    def edit(made: Draft) -> None:
        del made.tensors[f"{Q_PROJ}.{suffix}"]

    return edit


def change(suffix: str, function: Callable[[np.ndarray], Any]) -> Edit:
    def edit(made: Draft) -> None:
        name = f"{Q_PROJ}.{suffix}"
        made.tensors[name] = np.ascontiguousarray(function(made.tensors[name].copy()))

    return edit


def at(suffix: str, index: Any, value: Any) -> Edit:
    """Set one element."""

    def function(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change(suffix, function)


def both(*edits: Edit) -> Edit:
    def edit(made: Draft) -> None:
        for one in edits:
            one(made)

    return edit


def nan_byte(byte: int) -> Edit:
    """Put a byte into the codes."""

    def function(codes: np.ndarray) -> np.ndarray:
        codes.view(np.uint8)[2, 5] = byte
        return codes

    return change("weight", function)


def replace_config(value: Any) -> Edit:
    return lambda made: made.config.update(quantization_config=value)


def float_weight(made: Draft) -> None:
    """q_proj as in an unquantized checkpoint."""
    for name in [name for name in made.tensors if name.startswith(f"{Q_PROJ}.")]:
        del made.tensors[name]
    made.tensors[f"{Q_PROJ}.weight"] = np.ones((N, K), BF16)


def simulated(made: Draft) -> None:
    """q_proj as saved while its quantization was only simulated: float, with loose scales."""
    made.tensors[f"{Q_PROJ}.weight"] = np.ones((N, K), BF16)


def sidecar(**values: Any) -> Edit:
    return lambda made: made.files["quantize_config.json"].update(values)


def narrow(k: int) -> Edit:
    """Say that q_proj has fewer columns."""
    return lambda made: made.shapes.update({Q_PROJ: (N, k)})


SUPPORTED = "supported are compressed-tensors, gptq, awq, fp8, fbgemm_fp8"
MISSING = "is missing"

CASES = [
    Case(1, "w4", "list", replace_config([1]), "quantization_config must be an object, found [1]"),
    Case(1, "w4", "string", replace_config("int4"), "must be an object, found 'int4'"),
    Case(1, "w4", "no_method", config(quant_method=None), "quant_method", "found nothing"),
    Case(2, "w4", "method", config(quant_method="hqq"), "'hqq'", SUPPORTED),
    Case(2, "gptq", "format", config(checkpoint_format="marlin"), "'marlin'", SUPPORTED),
    Case(2, "awq", "version", config(version="gemv"), "version must be gemm", "'gemv'"),
    Case(3, "w8a8", "frozen", both(config(quantization_status="frozen"), simulated),
         "quantization_status 'frozen'", "not a compressed checkpoint"),
    Case(3, "w8a8", "fakequant",
         both(config(format="fakequant"), group(format=None), simulated),
         "format 'fakequant'", "not a compressed checkpoint"),
    Case(3, "w8a8", "loose_scale", simulated, Q_PROJ, "BF16 beside weight_scale",
         "not a compressed checkpoint"),
    Case(4, "w4", "scheme", group(group_size=128), "group_0.group_size is unknown"),
    Case(4, "w4", "args", weights(bits=4), "group_0.weights.bits is unknown", "num_bits"),
    Case(5, "w4", "no_size", weights(group_size=None), "group_0.weights.group_size", "positive"),
    Case(5, "w4", "zero", weights(group_size=0), "group_0.weights.group_size", "found 0"),
    Case(5, "w4", "negative", weights(group_size=-2), "group_0.weights.group_size", "found -2"),
    Case(5, "w4", "minus_one", weights(group_size=-1), "group_0.weights.group_size", "found -1"),
    Case(5, "w8a8", "channel", weights(group_size=128), "is 128, but strategy is channel"),
    Case(6, "w8a8", "token_static", inputs(dynamic=False),
         "input_activations.dynamic must be true"),
    Case(6, "w8a8", "channel_dynamic", weights(dynamic=True), "weights.dynamic must be false"),
    Case(6, "w8a8", "local", inputs(dynamic="local"), "local belongs to strategy tensor_group"),
    Case(6, "w8a8", "block", weights(strategy="block"), "weights.block_structure"),
    Case(7, "w4", "mixed", group(format="mixed-precision"), "group_0.format is mixed-precision"),
    Case(7, "w4", "unknown", group(format="packed"), "group_0.format must be one of", "'packed'"),
    Case(8, "gptq", "bits", both(config(bits=3), sidecar(bits=3)), "bits must be 4 or 8", "3"),
    Case(8, "gptq", "pack_dtype", config(pack_dtype="int16"), "pack_dtype must be int32"),
    Case(8, "w4", "num_bits", weights(num_bits=2), "weights.num_bits 2 is not supported"),
    Case(8, "w4", "num_bits_5", weights(num_bits=5), "weights.num_bits 5 is not supported"),
    Case(9, "w4", "sparsity", config(sparsity_config={"format": "sparse-bitmask"}),
         "sparsity_config", "sparse-bitmask"),
    Case(9, "w4", "transform",
         config(transform_config={"config_groups": {"R4": {"apply": [{"location": "input"}]}}}),
         "transform_config.config_groups.R4.apply[0].location"),
    Case(9, "w8a8", "outputs", group(output_activations={"num_bits": 8, "dynamic": False}),
         "group_0.output_activations"),
    Case(10, "w4", "float", float_weight, Q_PROJ, "only a BF16 weight", "ignored"),
    Case(10, "autofp8", "float", float_weight, Q_PROJ, "only a BF16 weight"),
    Case(10, "fbgemm", "float", float_weight, Q_PROJ, "only a BF16 weight"),
    Case(10, "gptq", "float",
         both(config(modules_in_block_to_quantize=["self_attn"]), float_weight),
         Q_PROJ, "only a BF16 weight"),
    Case(11, "w4", "packed", config(ignore=["lm_head", Q_PROJ]), Q_PROJ, "weight_packed"),
    Case(11, "w8a8", "int8", config(ignore=["lm_head", Q_PROJ]), Q_PROJ, "weight of dtype I8"),
    Case(11, "autofp8", "fp8", config(ignored_layers=["lm_head", Q_PROJ]), Q_PROJ, "F8_E4M3"),
    Case(11, "gptq", "dynamic", config(dynamic={"-:.*q_proj": {}}), Q_PROJ, "qweight"),
    Case(11, "awq", "excluded", config(modules_to_not_convert=["q_proj"]), Q_PROJ, "qweight"),
    *(Case(12, base, suffix, drop(suffix), Q_PROJ, f"tensor {suffix} {MISSING}")
      for base, suffix in (
          ("w4", "weight_packed"), ("w4", "weight_scale"), ("w8a8", "weight"),
          ("w8a8", "weight_scale"), ("ct_fp8", "weight_scale"), ("ct_fp8", "input_scale"),
          ("autofp8", "weight_scale"), ("autofp8", "input_scale"), ("fbgemm", "weight_scale"),
          ("gptq", "qweight"), ("gptq", "qzeros"), ("gptq", "scales"), ("awq", "qzeros"),
          ("awq", "scales"), ("nvfp4", "weight_global_scale"), ("nvfp4", "weight_scale"),
          ("mxfp4", "weight_scale"),
      )),
    Case(12, "w4_asym", "weight_zero_point", drop("weight_zero_point"), Q_PROJ, MISSING),
    Case(12, "gptq", "g_idx", drop("g_idx"), Q_PROJ, "tensor g_idx is missing"),
    Case(12, "w4", "weight_g_idx", weights(actorder="group"), "weight_g_idx is missing"),
    Case(13, "w8a8", "fp8", change("weight", lambda w: w.view(E4M3)), "F8_E4M3, expected I8"),
    Case(13, "ct_fp8", "int8", change("weight", lambda w: w.view(np.int8)), "I8, expected F8_E4M3"),
    Case(13, "ct_fp8", "fnuz", change("weight", lambda w: w.view(ml_dtypes.float8_e4m3fnuz)),
         "F8_E4M3FNUZ, expected F8_E4M3"),
    Case(13, "autofp8", "e5m2", change("weight", lambda w: w.view(ml_dtypes.float8_e5m2)),
         "F8_E5M2, expected F8_E4M3"),
    Case(13, "gptq", "i64", change("qweight", lambda w: w.astype(np.int64)), "I64, expected I32"),
    Case(13, "awq", "i64", change("qzeros", lambda w: w.astype(np.int64)), "I64, expected I32"),
    Case(13, "w4", "u8", change("weight_packed", lambda w: w.view(np.uint8)), "U8, expected I32"),
    Case(13, "nvfp4", "i32", change("weight_packed", lambda w: w.view(np.int32)),
         "I32, expected U8"),
    Case(13, "w8a8", "scale", change("weight_scale", lambda s: s.view(np.uint8)),
         "weight_scale", "[256, 2]"),
    Case(13, "w4", "scale", change("weight_scale", lambda s: s.astype(np.int32)),
         "I32, expected BF16 or F16 or F32"),
    Case(13, "mxfp4", "scale", change("weight_scale", lambda s: s.astype(BF16)),
         "BF16, expected U8"),
    Case(14, "w4", "columns", change("weight_packed", lambda w: w[:, 1:]),
         "[256, 31]", "[256, 32]"),
    Case(14, "w4", "rows", change("weight_packed", lambda w: w[1:]), "[255, 32]", "[256, 32]"),
    Case(14, "gptq", "rows", change("qweight", lambda w: w[1:]), "[31, 256]", "[32, 256]"),
    Case(14, "gptq", "awq_layout", change("qweight", lambda w: w.reshape(256, 32)),
         "[256, 32]", "[32, 256]"),
    Case(14, "awq", "gptq_layout", change("qweight", lambda w: w.reshape(32, 256)),
         "[32, 256]", "[256, 32]"),
    Case(14, "w8a8", "transposed", change("weight", lambda w: w[:, :128]), "[256, 128]"),
    Case(14, "mxfp4", "columns", change("weight_packed", lambda w: w[:, 1:]), "[256, 127]"),
    Case(15, "w4", "few", change("weight_scale", lambda s: s[:, :1]),
         "[256, 1]", "[256, 2]", "2 groups of 128"),
    Case(15, "w4", "config", weights(group_size=64), "[256, 2]", "[256, 4]", "4 groups of 64"),
    Case(15, "gptq", "scales", change("scales", lambda s: s[:1]), "scales", "[1, 256]"),
    Case(15, "gptq", "qzeros", change("qzeros", lambda s: s[:1]), "qzeros", "[1, 32]"),
    Case(15, "w4_asym", "zeros", change("weight_zero_point", lambda z: z[:, :1]), "[256, 1]"),
    Case(15, "w8a8", "channel", change("weight_scale", lambda s: s[1:]),
         "[255, 1]", "[256, 1] or [256]"),
    Case(15, "ct_fp8", "tensor", put("weight_scale", np.ones(2, BF16)), "[2]", "[] or [1]"),
    Case(15, "ct_fp8", "input", put("input_scale", np.ones(2, BF16)), "[2]", "a single value"),
    Case(16, "w4", "swapped", put("weight_shape", np.array([256, 512])),
         "[256, 512]", "[256, 256]"),
    Case(16, "w4", "three", put("weight_shape", np.array([1, 256, 256])), "weight_shape", "[3]"),
    Case(16, "w4", "float", put("weight_shape", np.array([256.0, 256.0], np.float32)),
         "weight_shape", "F32, expected I64"),
    Case(17, "w4", "k", weights(group_size=96), "K=256 is not divisible by the group size 96"),
    Case(17, "awq", "k", config(group_size=96), "K=256 is not divisible by the group size 96"),
    Case(17, "nvfp4", "k", narrow(250), "K=250 is not divisible by the group size 16"),
    Case(17, "mxfp4", "k", narrow(240), "K=240 is not divisible by the group size 32"),
    Case(17, "gptq", "k", narrow(252), "K=252 is not divisible by 8"),
    Case(17, "gptq", "n", lambda made: made.shapes.update({Q_PROJ: (252, K)}),
         "N=252 is not divisible by 8"),
    Case(17, "awq", "n", lambda made: made.shapes.update({Q_PROJ: (252, K)}),
         "N=252 is not divisible by 8"),
    Case(17, "ct_fp8", "activations",
         inputs(strategy="group", group_size=96, dynamic=True), "group size 96 of the activations"),
    *(Case(18, base, f"{suffix}_{value}", at(suffix, index, value), Q_PROJ, "1 of ", str(place))
      for value in (np.nan, np.inf, -np.inf, -1.0)
      for base, suffix, index, place in (
          ("w4", "weight_scale", (3, 1), [3, 1]), ("w8a8", "weight_scale", (3, 0), [3, 0]),
          ("gptq", "scales", (1, 3), [3, 1]), ("autofp8", "weight_scale", (), [0, 0]),
      )),
    Case(18, "w4", "zero", at("weight_scale", (3, 1), 0), "1 of 512 scales are zero", "[3, 12"),
    Case(18, "w8a8", "zero", at("weight_scale", (3, 0), 0), "1 of 256 scales are zero", "[3, "),
    Case(18, "nvfp4", "nan", at("weight_scale", (3, 1), np.nan), "scales are NaN", "[3, 1]"),
    Case(18, "nvfp4", "negative", at("weight_scale", (3, 1), -1), "negative", "[3, 1]"),
    *(Case(18, "nvfp4", f"global_{value}", at("weight_global_scale", 0, value),
           "weight_global_scale is", "finite and above zero") for value in (0, np.nan, np.inf, -1)),
    Case(18, "nvfp4", "tiny_global", at("weight_global_scale", 0, 1e-45), "infinite"),
    *(Case(18, base, f"input_{value}", at("input_scale", ..., value), Q_PROJ, "input_scale is")
      for base in ("ct_fp8", "autofp8") for value in (0.0, np.nan, np.inf, -1.0)),
    *(Case(19, base, hex(byte), nan_byte(byte),
           Q_PROJ, "1 NaN values, the first at [2, 5]")
      for base in ("ct_fp8", "autofp8", "fbgemm") for byte in (0x7F, 0xFF)),
    Case(19, "mxfp4", "exponent", at("weight_scale", (2, 5), 255), "1 NaN exponents", "[2, 5]"),
    Case(20, "gptq", "length", change("g_idx", lambda g: g[1:]), "g_idx", "[255]", "[256]"),
    Case(20, "gptq", "high", at("g_idx", 7, 2), "column 7 in group 2", "2 groups"),
    Case(20, "gptq", "negative", at("g_idx", 7, -1), "column 7 in group -1", "2 groups"),
    Case(20, "gptq", "crowded", change("g_idx", np.zeros_like), "256 columns in one group"),
    Case(20, "w4", "high", put("weight_g_idx", np.full(K, 9, np.int32)), "weight_g_idx", "group 9"),
    Case(20, "w4", "length", put("weight_g_idx", np.zeros(9, np.int32)), "weight_g_idx", "[9]"),
    Case(21, "gptq", "zeros", at("qzeros", (0, 0), 0x77777776), "sym is true", "7 (gptq)"),
    Case(22, "w4", "packed",
         put("weight_zero_point", np.full((32, 2), 0x7AAAAAAA, np.int32)),
         "weight_zero_point is not all zero", "symmetric"),
    Case(22, "w8a8", "int8", put("weight_zero_point", np.ones((256, 1), np.int8)),
         "weight_zero_point is not all zero", "symmetric"),
    Case(22, "ct_fp8", "input", put("input_zero_point", np.ones(1, np.int8)),
         "input_zero_point is not all zero", "symmetric"),
    Case(23, "w4_asym", "high", at("weight_zero_point", (3, 1), 8),
         "weight_zero_point has 1 values outside [-8, 7]", "[3, 1]: 8"),
    Case(23, "w4_asym", "low", at("weight_zero_point", (3, 1), -9), "outside [-8, 7]"),
    Case(24, "w4a8", "high", at("weight", (3, 1), 8),
         "weight has 1 values outside [-8, 7]", "[3, 1]: 8"),
    Case(24, "w4a8", "low", at("weight", (3, 1), -9), "weight has 1 values outside [-8, 7]"),
    Case(27, "gptq", "both", put("weight", np.ones((N, K), BF16)), "both weight and qweight"),
    Case(27, "w4", "both", put("weight", np.ones((N, K), BF16)), "both weight and weight_packed"),
    Case(27, "ct_fp8", "qweight", put("qweight", np.ones(1, np.int32)), "both weight and qweight"),
    Case(27, "autofp8", "scales", put("weight_scale_inv", np.ones((), np.float32)),
         "unexpected tensors weight_scale_inv"),
    Case(28, "w4", "transform", put("weight_R1", np.ones(1, BF16)), "unexpected tensors weight_R1"),
    Case(28, "w8a8", "several",
         both(put("act_scale", np.ones(1, BF16)), put("smooth", np.ones(1, BF16))),
         "unexpected tensors act_scale, smooth", "beside weight, weight_scale"),
    Case(28, "w8a8", "input_scale", put("input_scale", np.ones(1, BF16)), "input_scale"),
    Case(28, "w8a8", "kv", put("k_scale", np.ones(1, BF16)), "unexpected tensors k_scale"),
    Case(29, "w4", "expression", group(targets=["re:("]),
         "group_0.targets: '(' is no regular expression"),
    Case(29, "w4", "ignored", config(ignore=["re:["]), "ignore: '[' is no regular expression"),
    Case(29, "w4", "ambiguous",
         lambda made: made.quantization["config_groups"].update(
             a={"targets": ["re:.*q_proj"], "weights": {"num_bits": 8}},
             b={"targets": ["re:.*attn.*"], "weights": {"num_bits": 4}}),
         Q_PROJ, "re:.*q_proj", "re:.*attn.*"),
    *(Case(30, "gptq", key, sidecar(**{key: value}), f"quantization_config.{key} is",
           f"quantize_config.json: {key}")
      for key, value in (("bits", 8), ("group_size", 64), ("sym", False), ("desc_act", False))),
    Case(30, "gptq", "version", sidecar(checkpoint_format="gptq_v2"),
         "checkpoint_format is 'gptq'"),
    Case(30, "awq", "version",
         both(config(version="gemm"),
              lambda made: made.files.update({"quant_config.json": {"version": "gemv"}})),
         "version is 'gemm'", "quant_config.json"),
    Case(35, "autofp8", "scheme", config(activation_scheme="token"),
         "static or dynamic", "'token'"),
    Case(35, "autofp8", "block", config(activation_scheme="dynamic", weight_block_size=[128]),
         "weight_block_size must be two positive integers"),
    Case(35, "autofp8", "block_negative",
         config(activation_scheme="dynamic", weight_block_size=[128, -1]),
         "weight_block_size must be two positive integers"),
    Case(35, "autofp8", "static_block", config(weight_block_size=[128, 128]),
         "activation_scheme must be dynamic"),
]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_it_is_refused(case: Case, bases: Callable[[str], Draft], tmp_path: Path) -> None:
    made = bases(case.base)
    case.edit(made)
    with pytest.raises(CheckpointError) as caught:
        load(made, tmp_path, Q_PROJ)
    message = str(caught.value)
    assert message.startswith(str(tmp_path))
    for words in case.expected:
        assert words in message


@pytest.mark.parametrize("base", FIXTURE)
def test_without_the_edit_it_is_read(
    base: str, bases: Callable[[str], Draft], tmp_path: Path
) -> None:
    made = bases(base)
    for path in made.shapes:
        load(made, tmp_path, path)


# What is odd but harmless is read, with a warning.


def zero_scale(made: Draft) -> None:
    at("weight_scale", (3, 0), 0)(made)
    at("weight", 3, 0)(made)


def zero_scale_at_the_zero_point(made: Draft) -> None:
    at("weight_scale", (3, 1), 0)(made)
    at("weight_zero_point", (3, 1), 2)(made)
    packed = made.tensors[f"{Q_PROJ}.weight_packed"].copy()
    packed[3, 16:] = np.uint32(0xAAAAAAAA).view(np.int32)
    made.tensors[f"{Q_PROJ}.weight_packed"] = packed


def other_version(made: Draft) -> None:
    change("qzeros", lambda zeros: zeros + 0x11111111)(made)


HARMLESS = [
    Case(3, "w4", "frozen", config(quantization_status="frozen"), "'frozen'"),
    Case(3, "w4", "absent", config(quantization_status=None), "quantization_status is null"),
    Case(18, "w8a8", "zero", zero_scale, "1 of 256 scales are zero"),
    Case(18, "w4_asym", "zero", zero_scale_at_the_zero_point, "1 of 512 scales are zero"),
    Case(20, "gptq", "desc_act", both(config(desc_act=False), sidecar(desc_act=False)),
         "g_idx reorders columns although"),
    Case(21, "gptq", "other_version", other_version, "other version of the GPTQ format"),
    Case(23, "gptq_asym", "all_ones", at("qzeros", (0, 0), -1), "cannot store a zero point of 0"),
]  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS, ids=lambda case: case.id)
def test_it_is_read_with_a_warning(
    case: Case, bases: Callable[[str], Draft], tmp_path: Path
) -> None:
    made = bases(case.base)
    case.edit(made)
    with pytest.warns(CheckpointWarning) as caught:
        load(made, tmp_path, Q_PROJ)
    assert len(caught) == 1
    assert str(tmp_path) in str(caught[0].message)
    for words in case.expected:
        assert words in str(caught[0].message)


# Floats, beside and instead of quantized weights.


@pytest.mark.parametrize("dtype", [BF16, np.float16, np.float32])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_plain_weights_and_biases_are_finite(
    bases: Callable[[str], Draft], tmp_path: Path, value: float, dtype: Any
) -> None:
    made = bases("w8a8")
    path = "lm_head"
    weight = np.ones(made.shapes[path], dtype)
    made.tensors[f"{path}.weight"] = weight
    load(made, tmp_path, path)
    weight[500, 3] = value
    with pytest.raises(CheckpointError, match=r"weight has an infinite or NaN value at \[500, 3\]"):
        load(made, tmp_path, path)
    made.tensors[f"{Q_PROJ}.bias"] = np.full(N, value, dtype)
    with pytest.raises(CheckpointError, match=r"bias has an infinite or NaN value at \[0\]"):
        load(made, tmp_path, Q_PROJ)


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        (None, "tensor weight is missing"),
        (np.ones((768, 255), BF16), r"\[768, 255\], expected \[768, 256\]"),
        (np.ones((768, 256), np.int32), "weight of dtype I32"),
    ],
)
def test_a_wrong_head(
    bases: Callable[[str], Draft], tmp_path: Path, stored: np.ndarray | None, message: str
) -> None:
    made = bases("w8a8")
    del made.tensors["lm_head.weight"]
    if stored is not None:
        made.tensors["lm_head.weight"] = stored
    with pytest.raises(CheckpointError, match=message):
        load(made, tmp_path, "lm_head")


# Row 31: scales of the KV cache.


@pytest.mark.parametrize(
    ("strategy", "stored", "message"),
    [
        ("tensor", {"k_scale": np.ones(1, BF16)}, "v_scale is missing"),
        ("tensor", {"v_scale": np.ones(1, BF16)}, "k_scale is missing"),
        (None, {"v_scale": np.ones(1, BF16)}, "k_scale is missing"),
        ("tensor", {"k_scale": np.ones(2, BF16), "v_scale": np.ones(1, BF16)}, r"\[2\]"),
        ("tensor", {"k_scale": np.ones((2, 1, 1), BF16), "v_scale": np.ones(1, BF16)}, "expected"),
        ("attn_head", {"k_scale": np.ones((3, 1, 1), BF16)}, r"\[3, 1, 1\], expected"),
        ("attn_head", {"k_scale": np.ones(1, BF16)}, r"\[1\], expected .*\[2, 1, 1\]"),
        ("tensor", {"k_scale": np.ones(1, np.int8)}, "I8, expected BF16"),
        *(
            ("tensor", {"k_scale": np.full(1, value, BF16)}, "finite and above zero")
            for value in (0, -1, np.nan, np.inf)
        ),
    ],
)
def test_31_bad_kv_scales(
    bases: Callable[[str], Draft], tmp_path: Path, strategy: Any, stored: Any, message: str
) -> None:
    made = bases("w8a8")
    made.quantization["kv_cache_scheme"] = strategy and {"type": "float", "strategy": strategy}
    made.tensors |= {f"{ATTENTION}.{name}": array for name, array in stored.items()}
    with open_checkpoint(made.save(tmp_path)) as checkpoint:
        quantization = parse_quantization(checkpoint, made.shapes)
        with pytest.raises(CheckpointError, match=message):
            read_kv_scales(checkpoint, quantization, ATTENTION, 2)
