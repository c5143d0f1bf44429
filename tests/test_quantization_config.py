"""Finding and routing the quantization config, those of GPTQ, AWQ and FP8, and the KV cache."""

import copy
import json
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from drafts import LINEAR, Q_PROJ, Draft, compressed, draft, load, load_quantized, parse, single
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.formats import LinearSpec
from qllama_convert.kv_cache_scheme import KVCacheScheme
from qllama_convert.kv_scales import read_kv_scales
from qllama_convert.quantization_config import parse_quantization

from qllama.errors import CheckpointError
from qllama.quantization.scheme import PRESETS, ActivationScheme, QuantScheme

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
K_PROJ = "model.layers.0.self_attn.k_proj"
UP_PROJ = "model.layers.0.mlp.up_proj"
ATTENTION = "model.layers.0.self_attn"
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}
FP8 = {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0,
          "modules_to_not_convert": ["lm_head"]}  # fmt: skip


def outline(config: Any, packed: list[str], plain: Sequence[str] = (), files: Any = None) -> Draft:
    """A checkpoint by tensor names alone: some Linears packed as by GPTQ and AWQ, some plain."""
    tensors = {f"{path}.qweight": np.zeros((1, 1), np.int32) for path in packed}
    tensors |= {f"{path}.qzeros": np.zeros((1, 1), np.int32) for path in packed}
    tensors |= {f"{path}.weight": np.zeros((1, 1), BF16) for path in plain}
    tensors["model.norm.weight"] = np.zeros(1, BF16)
    shapes = dict.fromkeys([*packed, *plain], (128, 128))
    named = {f"{name}.json": content for name, content in (files or {}).items()}
    return Draft({"quantization_config": config}, tensors, shapes, named)


def specs(made: Draft, folder: Path) -> dict[str, LinearSpec]:
    quantization = parse(made, folder)
    assert quantization is not None
    return dict(quantization.linears)


def refusal(made: Draft, folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        parse(made, folder)
    assert str(folder) in str(caught.value)
    return str(caught.value)


# Where the config is.


@pytest.mark.parametrize("absent", [None, {}])
def test_a_checkpoint_without_any_config_is_plain(tmp_path: Path, absent: Any) -> None:
    assert parse(outline(absent, [], [Q_PROJ]), tmp_path) is None


def test_the_first_config_that_is_there_counts(tmp_path: Path) -> None:
    made = outline({}, [Q_PROJ])
    made.config["text_config"] = {"quantization_config": GPTQ}
    made.config["compression_config"] = AWQ
    quantization = parse(made, tmp_path)
    assert quantization is not None
    assert quantization.method == "gptq"
    made.config["text_config"] = {}
    quantization = parse(made, tmp_path)
    assert quantization is not None
    assert quantization.method == "awq"


@pytest.mark.parametrize(
    ("name", "sidecar", "method"),
    [
        ("quantize_config", {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}, "gptq"),
        ("quantize_config", {"bits": 4, "group_size": 128, "version": "gemm"}, "awq"),
        ("quantize_config", AWQ, "awq"),
        ("quant_config", {"zero_point": True, "q_group_size": 128, "w_bit": 4, "version": "GEMM"},
         "awq"),
        ("quant_config", {"q_group_size": 128, "w_bit": 4}, "awq"),
    ],
)  # fmt: skip
def test_a_sidecar_alone_is_enough(
    tmp_path: Path, name: str, sidecar: dict[str, Any], method: str
) -> None:
    quantization = parse(outline(None, [Q_PROJ], files={name: sidecar}), tmp_path)
    assert quantization is not None
    assert quantization.method == method
    scheme = quantization.linears[Q_PROJ].scheme
    assert (scheme.weight_dtype, scheme.group_size) == ("int4", 128)


@pytest.mark.parametrize(
    ("key", "value"),
    [("bits", 8), ("group_size", 64), ("desc_act", True), ("sym", False)],
)
def test_config_and_sidecar_must_agree(tmp_path: Path, key: str, value: Any) -> None:
    message = refusal(
        outline(GPTQ, [Q_PROJ], files={"quantize_config": GPTQ | {key: value}}), tmp_path
    )
    assert f"quantization_config.{key} is" in message
    assert f"quantize_config.json: {key}" in message


def test_config_and_sidecar_may_spell_differently(tmp_path: Path) -> None:
    sidecar = {"w_bit": 4, "q_group_size": 128, "version": "GEMM"}
    assert specs(outline(AWQ, [Q_PROJ], files={"quant_config": sidecar}), tmp_path)
    message = refusal(
        outline(AWQ, [Q_PROJ], files={"quant_config": sidecar | {"w_bit": 8}}), tmp_path
    )
    assert "bits is 4" in message


# Which method.


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "load_in_4bit is set"),
        (GPTQ | {"load_in_8bit": True}, "load_in_8bit is set"),
        ({"quant_method": "marlin"}, "quant_method is 'marlin'"),
        (GPTQ | {"is_marlin_format": True}, "is_marlin_format is set"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        (GPTQ | {"format": "exllama"}, "format must be gptq or gptq_v2"),
        ({"config_groups": {}}, "quant_method must be one of"),
        ({"bits": 4}, "quant_method must be one of"),
        *(
            ({"quant_method": name}, f"quant_method is '{name}'")
            for name in ("modelopt", "quark", "torchao", "hqq", "auto-round", "mxfp4", "nvfp4",
                         "gguf", "bitnet")
        ),
    ],
)  # fmt: skip
def test_methods_that_are_not_read(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    found = refusal(outline(config, [Q_PROJ]), tmp_path)
    assert message in found
    assert "gptq" in found


@pytest.mark.parametrize("name", ["gptq", "GPTQ"])
def test_the_method_in_any_case(tmp_path: Path, name: str) -> None:
    assert specs(outline(GPTQ | {"quant_method": name}, [Q_PROJ]), tmp_path)


# GPTQ.


def test_tensors_decide_which_linears_gptq_quantized(tmp_path: Path) -> None:
    found = specs(outline(GPTQ, [Q_PROJ], [UP_PROJ, "lm_head"]), tmp_path)
    assert found == {
        Q_PROJ: LinearSpec(
            format="gptq",
            scheme=QuantScheme(weight_dtype="int4", strategy="group", group_size=128),
            zero_offset=1,
        )
    }


def test_gptq_without_packed_tensors_is_refused(tmp_path: Path) -> None:
    assert "no Linear has qweight" in refusal(outline(GPTQ, [], [Q_PROJ]), tmp_path)


@pytest.mark.parametrize(
    ("options", "act_order"),
    [
        ({}, False),
        ({"desc_act": True}, True),
        ({"desc_act": True, "static_groups": True}, False),
        ({"desc_act": True, "meta": {"static_groups": True}}, False),
        ({"desc_act": True, "meta": {"static_groups": False}}, True),
    ],
)
def test_act_order_of_gptq(tmp_path: Path, options: dict[str, Any], act_order: bool) -> None:
    assert specs(outline(GPTQ | options, [Q_PROJ]), tmp_path)[Q_PROJ].act_order is act_order


@pytest.mark.parametrize(
    ("options", "offset"),
    [
        ({}, 1),
        ({"checkpoint_format": "gptq"}, 1),
        ({"format": "gptq_v2"}, 0),
        ({"checkpoint_format": "gptq_v2", "format": "gptq_v2"}, 0),
    ],
)
def test_versions_of_gptq(tmp_path: Path, options: dict[str, Any], offset: int) -> None:
    assert specs(outline(GPTQ | options, [Q_PROJ]), tmp_path)[Q_PROJ].zero_offset == offset


def test_dynamic_overrides_take_the_first_match(tmp_path: Path) -> None:
    dynamic = {
        r"-:.*\.up_proj": {},
        r".*\.k_proj": {"bits": 8, "group_size": 32, "sym": False, "desc_act": True},
        r"+:.*self_attn": {"group_size": -1},
    }
    found = specs(outline(GPTQ | {"dynamic": dynamic}, [Q_PROJ, K_PROJ], [UP_PROJ]), tmp_path)
    assert found.keys() == {Q_PROJ, K_PROJ}
    assert found[Q_PROJ].scheme == QuantScheme(weight_dtype="int4", strategy="channel")
    assert found[K_PROJ].act_order
    assert found[K_PROJ].scheme == QuantScheme(
        weight_dtype="int8", strategy="group", group_size=32, symmetric=False
    )


@pytest.mark.parametrize("fragments", [["self_attn"], [["q_proj", "k_proj"], ["v_proj"]]])
def test_fragments_of_names_select_modules(tmp_path: Path, fragments: Any) -> None:
    config = GPTQ | {"modules_in_block_to_quantize": fragments}
    assert specs(outline(config, [Q_PROJ], [UP_PROJ]), tmp_path).keys() == {Q_PROJ}


@pytest.mark.parametrize("stated", [True, None])
def test_a_quantized_head_of_gptq(tmp_path: Path, stated: bool | None) -> None:
    made = outline(GPTQ | {"lm_head": stated}, [Q_PROJ, "lm_head"])
    assert specs(made, tmp_path).keys() == {Q_PROJ, "lm_head"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "bits must be 4 or 8"),
        ({"bits": 3}, "bits must be 4 or 8"),
        ({"bits": None}, "bits must be 4 or 8"),
        ({"bits": "4"}, "bits must be an integer"),
        ({"bits": 4.0}, "bits must be an integer"),
        ({"group_size": 0}, "group_size must be positive, or -1"),
        ({"group_size": None}, "group_size must be positive, or -1"),
        ({"group_size": 2**40}, "group_size must be an integer between"),
        ({"sym": "true"}, "sym must be true or false"),
        ({"desc_act": 1}, "desc_act must be true or false"),
        ({"pack_dtype": "int16"}, "pack_dtype must be int32"),
        ({"rotation": "hadamard"}, "rotation is set"),
        ({"checkpoint_format": "gptq", "format": "gptq_v2"}, "checkpoint_format differ"),
        ({"dynamic": ["-:.*"]}, "dynamic must be an object"),
        ({"dynamic": {"(": {}}}, "no regular expression"),
        ({"dynamic": {".*": 8}}, r"dynamic..* must be an object"),
        ({"modules_in_block_to_quantize": [["a"], "b"]}, "list of strings"),
        ({"lm_head": "no", "modules_in_block_to_quantize": None}, "lm_head must be true or false"),
    ],
)
def test_options_of_gptq_that_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        parse(outline(GPTQ | options, [Q_PROJ, "lm_head"]), tmp_path)


# AWQ.


def test_substrings_keep_modules_out_of_awq(tmp_path: Path) -> None:
    config = AWQ | {"modules_to_not_convert": ["self_attn", "lm_head"]}
    found = specs(outline(config, [UP_PROJ], [Q_PROJ, "lm_head"]), tmp_path)
    assert found.keys() == {UP_PROJ}
    assert found[UP_PROJ].scheme == PRESETS["W4A16_ASYM"]


@pytest.mark.parametrize("listed", [None, []])
def test_without_a_list_tensors_decide(tmp_path: Path, listed: Any) -> None:
    config = AWQ | {"modules_to_not_convert": listed}
    assert specs(outline(config, [UP_PROJ], [Q_PROJ]), tmp_path).keys() == {UP_PROJ}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({"version": name}, "version must be gemm")
          for name in ("gemv", "gemv_fast", "marlin", "exllama", "llm-awq")),
        ({"bits": 8}, "bits must be 4"),
        ({"group_size": -2}, "group_size must be positive"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of strings"),
        ({"zero_point": None, "format": "gemv"}, "format must be gemm"),
    ],
)  # fmt: skip
def test_options_of_awq_that_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    assert message in refusal(outline(AWQ | options, [Q_PROJ]), tmp_path)


def test_awq_without_zero_points_needs_them_all_the_same(tmp_path: Path) -> None:
    made = outline(AWQ | {"zero_point": False}, [Q_PROJ])
    assert specs(made, tmp_path).keys() == {Q_PROJ}
    del made.tensors[f"{Q_PROJ}.qzeros"]
    assert "zero_point is false" in refusal(made, tmp_path)


def test_awq_without_packed_tensors_is_refused(tmp_path: Path) -> None:
    assert "no Linear has qweight" in refusal(outline(AWQ, [], [Q_PROJ]), tmp_path)


# FP8.


def test_autofp8(tmp_path: Path) -> None:
    found = specs(outline(FP8, [], [Q_PROJ, "lm_head"]), tmp_path)
    assert found == {Q_PROJ: LinearSpec(format="fp8", scheme=PRESETS["FP8"])}
    found = specs(outline(FP8 | {"activation_scheme": "dynamic"}, [], [Q_PROJ]), tmp_path)
    assert found[Q_PROJ].scheme.activations == ActivationScheme(
        dtype="float8_e4m3fn", strategy="token"
    )


@pytest.mark.parametrize(
    "lists",
    [
        {"ignored_layers": [Q_PROJ]},
        {"ignored_layers": [], "modules_to_not_convert": [Q_PROJ]},
        {"modules_to_not_convert": [Q_PROJ, "q_proj", "self_attn"]},
        {"ignored_layers": [f"{ATTENTION}.qkv_proj"]},
    ],
)
def test_ignored_layers_are_whole_names_or_fused_ones(tmp_path: Path, lists: Any) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "static"} | lists
    made = outline(config, [], [Q_PROJ, K_PROJ, UP_PROJ])
    fused = "qkv_proj" in str(lists)
    assert specs(made, tmp_path).keys() == ({UP_PROJ} if fused else {K_PROJ, UP_PROJ})


@pytest.mark.parametrize("config", [FP8 | {"ignored_layers": None},
                                    FBGEMM | {"modules_to_not_convert": None}])  # fmt: skip
def test_the_head_is_quantized_when_it_is_stored_so(tmp_path: Path, config: Any) -> None:
    made = outline(config, [], [Q_PROJ, "lm_head"])
    assert specs(made, tmp_path).keys() == {Q_PROJ}
    made.tensors["lm_head.weight"] = np.zeros((1, 1), E4M3)
    assert specs(made, tmp_path).keys() == {Q_PROJ, "lm_head"}


def test_fine_grained_fp8(tmp_path: Path) -> None:
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3",
              "weight_block_size": [128, 128]}  # fmt: skip
    assert specs(outline(config, [], [Q_PROJ]), tmp_path)[Q_PROJ].scheme == PRESETS["FP8_BLOCK"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"activation_scheme": "none"}, "activation_scheme must be static or dynamic"),
        ({"activation_scheme": None}, "activation_scheme must be static or dynamic"),
        ({"activation_scheme": True}, "activation_scheme must be a string"),
        ({"weight_block_size": [128, 128]}, "activation_scheme must be dynamic"),
        ({"activation_scheme": "dynamic", "weight_block_size": [128]}, "two positive integers"),
        ({"activation_scheme": "dynamic", "weight_block_size": [0, 128]}, "two positive integers"),
        ({"activation_scheme": "dynamic", "weight_block_size": 128}, "two positive integers"),
        ({"fmt": "e5m2"}, "fmt must be e4m3"),
        ({"ignored_layers": "lm_head"}, "must be a list of strings"),
        ({"ignored_layers": [1]}, "must be a list of strings"),
        ({"kv_cache_scheme": "dynamic"}, "kv_cache_scheme must be an object"),
    ],
)
def test_options_of_fp8_that_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    assert message in refusal(outline(FP8 | options, [], [Q_PROJ]), tmp_path)


@pytest.mark.parametrize(
    "bound", [None, 0, -1.0, True, "1200", float("inf"), float("nan"), 10**400]
)
def test_fbgemm_needs_a_bound(tmp_path: Path, bound: Any) -> None:
    made = outline(FBGEMM | {"activation_scale_ub": bound}, [], [Q_PROJ])
    assert "activation_scale_ub must be a finite number above zero" in refusal(made, tmp_path)


# The KV cache.

KV = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def kv_checkpoint(scheme: Any, **tensors: Any) -> Draft:
    """A checkpoint with these tensors under `self_attn`; `__` in a name stands for a dot."""
    named = {
        f"{ATTENTION}.{name.replace('__', '.')}": np.asarray(value, np.float32)
        for name, value in tensors.items()
    }
    config = compressed({}, kv_cache_scheme=scheme, config_groups={})
    return Draft({"quantization_config": config}, named | {"x": np.zeros(1, BF16)}, {})


def kv_scales(made: Draft, folder: Path, heads: int = 2) -> tuple[Any, Any]:
    with open_checkpoint(made.save(folder)) as checkpoint:
        scales = read_kv_scales(checkpoint, parse_quantization(checkpoint, {}), ATTENTION, heads)
        unread = checkpoint.unread()
    assert unread == ["x"]
    return scales


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"k_scale": [0.5], "v_scale": [0.25]}, (0.5, 0.25)),
        ({"k_scale": 0.5, "v_scale": 0.25}, (0.5, 0.25)),
        ({"kv_scale": 0.5}, (0.5, 0.5)),
        ({"k_proj__output_scale": [0.5], "v_proj__output_scale": [0.25]}, (0.5, 0.25)),
        ({"k_proj__k_scale": 0.5, "v_proj__v_scale": 0.25}, (0.5, 0.25)),
        (
            {"k_scale": [0.5], "v_scale": [0.25], "k_zero_point": [0], "v_zero_point": [0],
             "q_scale": [1.0]},
            (0.5, 0.25),
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("scheme", [KV, None])
def test_names_of_kv_scales(
    tmp_path: Path, scheme: Any, stored: Any, expected: tuple[float, float]
) -> None:
    found = kv_scales(kv_checkpoint(scheme, **stored), tmp_path)
    for scale, value in zip(found, expected, strict=True):
        assert scale.dtype == np.float32
        assert scale.tolist() == [[value]]


def test_kv_scales_per_head(tmp_path: Path) -> None:
    stored = {"k_scale": [[[0.5]], [[0.25]]], "v_scale": [[[1]], [[2]]]}
    found = kv_scales(kv_checkpoint(KV | {"strategy": "attn_head"}, **stored), tmp_path)
    assert [scale.tolist() for scale in found] == [[[0.5], [0.25]], [[1], [2]]]


def test_without_scales_the_scheme_gets_ones_and_a_warning(tmp_path: Path) -> None:
    assert kv_scales(kv_checkpoint(None), tmp_path) == (None, None)
    for strategy, count in (("tensor", 1), ("attn_head", 2)):
        with pytest.warns(UserWarning, match=r"1\.0 is used"):
            found = kv_scales(kv_checkpoint(KV | {"strategy": strategy}), tmp_path)
        assert [scale.tolist() for scale in found] == [[[1.0]] * count] * 2


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [(KV, "tensor"), (KV | {"strategy": None}, "tensor"), (KV | {"strategy": "attn_head"},
     "attn_head")],
)  # fmt: skip
def test_kv_cache_scheme(tmp_path: Path, scheme: Any, expected: Any) -> None:
    quantization = parse(kv_checkpoint(scheme), tmp_path)
    assert quantization is not None
    assert quantization.kv_cache == KVCacheScheme(strategy=expected)


def test_kv_cache_scheme_of_autofp8_is_a_word(tmp_path: Path) -> None:
    quantization = parse(outline(FP8 | {"kv_cache_scheme": "static"}, [], [Q_PROJ]), tmp_path)
    assert quantization is not None
    assert quantization.kv_cache == KVCacheScheme(strategy="tensor")


@pytest.mark.parametrize(
    "change",
    [{"num_bits": 4}, {"type": "int"}, {"type": None}, {"symmetric": False}, {"dynamic": True},
     {"strategy": "channel"}, {"scale": 1}],
)  # fmt: skip
def test_kv_cache_schemes_that_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    assert "kv_cache_scheme" in refusal(kv_checkpoint(KV | change), tmp_path)


def test_kv_scales_of_a_fixture(tiny_llama3: Any, tmp_path: Path) -> None:
    made = draft(tiny_llama3("ct_fp8_static_kv_fp8"))
    with open_checkpoint(made.save(tmp_path)) as checkpoint:
        quantization = parse_quantization(checkpoint, made.shapes)
        scales = read_kv_scales(checkpoint, quantization, ATTENTION, 2)
    for name, scale in zip("kv", scales, strict=True):
        assert scale is not None
        assert scale.ravel() == made.tensors[f"{ATTENTION}.{name}_scale"].astype(np.float32)


@pytest.mark.parametrize("suffix", ["output_scale", "k_scale"])
def test_kv_scales_below_a_linear_are_no_part_of_it(tmp_path: Path, suffix: str) -> None:
    tensors = {
        f"{K_PROJ}.weight": np.ones((2, 2), np.int8),
        f"{K_PROJ}.weight_scale": np.ones((2, 1), BF16),
        f"{K_PROJ}.{suffix}": np.ones(1, BF16),
    }
    config = compressed({"strategy": "channel"}, format="int-quantized")
    made = Draft({"quantization_config": config}, tensors, {K_PROJ: (2, 2)})
    assert load_quantized(made, tmp_path, K_PROJ).shape == (2, 2)


# Whatever stands in the JSON, the answer is a model or a CheckpointError.

MANY = compressed(
    {"num_bits": 4, "type": "int", "group_size": 128, "strategy": "group", "symmetric": True,
     "actorder": "static", "dynamic": False, "block_structure": None, "scale_dtype": None},
    {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
    format="pack-quantized", version="0.19.0", ignore=["lm_head"], kv_cache_scheme=KV,
    sparsity_config={"format": "dense"},
    transform_config={"config_groups": {"R": {"apply": [{"location": "weight_input"}]}}},
)  # fmt: skip
BASES = {
    "compressed-tensors": MANY,
    "gptq": GPTQ | {
        "dynamic": {"+:.*q_proj": {"bits": 8}}, "meta": {"static_groups": False},
        "modules_in_block_to_quantize": [["q_proj"]], "checkpoint_format": "gptq",
        "lm_head": False, "pack_dtype": "int32", "rotation": None,
    },
    "awq": AWQ | {"modules_to_not_convert": ["lm_head"]},
    "fp8": FP8 | {"weight_block_size": None, "kv_cache_scheme": "static", "fmt": "e4m3"},
    "fbgemm_fp8": FBGEMM,
}  # fmt: skip
JUNK: st.SearchStrategy[Any] = st.sampled_from([
    None, True, False, 0, 1, -1, 2, 3, 128, 10**30, 10**4000, 0.5, float("nan"), float("inf"),
    "", "re:(", "re:.*", "group", "gptq", "\ud800", "Linear", [], [[]], [None], ["a"], [1, 2],
    {}, {"a": {}}, {"": None}, {"targets": None}, {"apply": 1},
])  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key in value if isinstance(value, dict) else range(len(value)):
            yield from places(value[key], (*path, key))


@given(data=st.data())
@settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.parametrize("name", BASES)
def test_a_config_with_junk_in_it_is_refused_in_good_form(
    name: str, tmp_path: Path, data: st.DataObject
) -> None:
    whole = {"quantization_config": copy.deepcopy(BASES[name])}
    for _ in range(data.draw(st.integers(1, 2))):
        *outer, last = data.draw(st.sampled_from(list(places(whole))[1:]))
        inner: Any = whole
        for key in outer:
            inner = inner[key]
        inner[last] = copy.deepcopy(data.draw(JUNK))
    made = outline(None, [Q_PROJ], ["lm_head"])
    folder = made.save(tmp_path)
    with open_checkpoint(folder) as checkpoint, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checkpoint.config = whole
        try:
            parse_quantization(checkpoint, made.shapes)
        except CheckpointError as error:
            message = str(error)
        else:
            return
    assert message.startswith(str(folder))
    assert len(message) < 1000


def test_the_bases_of_the_junk_test_are_good(tmp_path: Path) -> None:
    for config in BASES.values():
        assert specs(outline(json.loads(json.dumps(config)), [Q_PROJ]), tmp_path)


def test_a_plain_linear_keeps_its_dtype(tmp_path: Path) -> None:
    for dtype in (BF16, np.float16, np.float32):
        weight = np.ones((2, 3), dtype)
        found = load(single((2, 3), None, {"weight": weight}), tmp_path, LINEAR).weight
        assert isinstance(found, np.ndarray)
        assert found.dtype == dtype
