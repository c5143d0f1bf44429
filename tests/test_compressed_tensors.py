"""The config of compressed-tensors: args, targets, formats, mixed recipes, what is refused."""

import json
import re
import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
from drafts import (
    LINEAR,
    Q_PROJ,
    Draft,
    compressed,
    draft,
    load,
    load_quantized,
    parse,
    single,
    words,
)
from qllama_convert.formats import LinearSpec, naive_quantized, pack_quantized
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_args import QuantizationArgs, parse_args
from qllama_convert.quantization_scheme import PRESETS
from qllama_convert.section import Section

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import PRESETS as SCHEMES
from qllama.quantization.scheme import ActivationScheme, QuantScheme

BF16, E4M3 = ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn
CHANNEL = {"num_bits": 8, "strategy": "channel"}
PER_TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
W4 = {"num_bits": 4, "group_size": 128}


def specs(config: dict[str, Any], folder: Path, paths: list[str]) -> dict[str, LinearSpec]:
    """What a config says about Linears at these paths, without any tensors."""
    made = Draft(
        {"quantization_config": config},
        {"x": np.zeros(1, np.float32)},
        dict.fromkeys(paths, (128, 128)),
    )
    quantization = parse(made, folder)
    assert quantization is not None
    return dict(quantization.linears)


def spec(config: dict[str, Any], folder: Path) -> LinearSpec:
    return specs(config, folder, [Q_PROJ])[Q_PROJ]


def refusal(config: dict[str, Any], folder: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        specs(config, folder, [Q_PROJ])
    message = str(caught.value)
    assert message.startswith(f"{folder / 'config.json'}: quantization_config")
    return message


# Args.


def args(**values: Any) -> QuantizationArgs:
    return parse_args(Section(values, "weights"))


def test_defaults_of_args() -> None:
    assert args() == QuantizationArgs(num_bits=8, type="int", symmetric=True, strategy="tensor")
    nulls = dict.fromkeys(["group_size", "block_structure", "actorder", "scale_dtype", "zp_dtype"])
    assert args(**nulls, observer="mse", observer_kwargs={"a": 1}, dynamic=False) == args()


def test_strategy_is_inferred_from_the_group_size() -> None:
    assert args(group_size=64).strategy == "group"
    assert args(group_size=-1).strategy == "channel"
    assert args(group_size=-1).group_size is None
    assert args(group_size=-1, strategy="channel").strategy == "channel"
    assert args(group_size=16, strategy="TENSOR_GROUP").strategy == "tensor_group"


@pytest.mark.parametrize(
    ("stated", "meaning"),
    [
        (None, None), (False, None), ("weight", "weight"), ("static", "weight"),
        ("group", "group"), ("dynamic", "group"), (True, "group"), ("GROUP", "group"),
    ],
)  # fmt: skip
def test_spellings_of_actorder(stated: Any, meaning: Any) -> None:
    assert args(actorder=stated).actorder == meaning


@pytest.mark.parametrize("stated", [[128, 64], "128x64"])
def test_spellings_of_block_structure(stated: Any) -> None:
    assert args(strategy="block", block_structure=stated).block_structure == (128, 64)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"num_bits": 0}, "num_bits must be 1 to 8"),
        ({"num_bits": 9}, "num_bits must be 1 to 8"),
        ({"num_bits": 5, "type": "float"}, "4, 6 or 8 for float"),
        ({"num_bits": True}, "num_bits must be an integer, found true"),
        ({"num_bits": "4"}, "num_bits must be an integer, found '4'"),
        ({"type": "fp8"}, "type must be int or float, found 'fp8'"),
        ({"symmetric": 1}, "symmetric must be true or false, found 1"),
        ({"strategy": "row"}, "strategy must be tensor or channel"),
        ({"dynamic": "global"}, "dynamic must be true, false or local"),
        ({"actorder": "random"}, "actorder must be weight or static"),
        ({"actorder": 1}, "actorder must be a string"),
        ({"strategy": "block", "block_structure": "128"}, "two positive integers"),
        ({"strategy": "block", "block_structure": [128, 0]}, "two positive integers"),
        ({"strategy": "block", "block_structure": [128, True]}, "two positive integers"),
        ({"block_structure": [128, 128]}, "belongs to strategy block"),
        ({"group_size": 10**400}, "between .* found 1000000"),
    ],
)
def test_args_that_make_no_sense(values: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        args(**values)


# Which group a module belongs to.


def grouped(groups: dict[str, list[str]], **others: Any) -> dict[str, Any]:
    """A config with W4 groups, told apart by their group sizes: 1, 2, 3, ..."""
    return compressed({}) | others | {
        "config_groups": {
            name: {"targets": targets, "weights": W4 | {"group_size": size}}
            for size, (name, targets) in enumerate(groups.items(), 1)
        }
    }  # fmt: skip


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ({"a": ["Linear"]}, 1),
        ({"a": ["linear"]}, 1),
        ({"a": ["Linear"], "b": ["re:.*q_proj"]}, 2),
        ({"a": ["re:.*q_proj"], "b": [Q_PROJ]}, 2),
        ({"a": [Q_PROJ], "b": ["re:.*q_proj"], "c": ["Linear"]}, 1),
        ({"a": ["Linear"], "b": ["re:q_proj"]}, 1),  # anchored at the start of the path
        ({"a": ["Linear"], "b": ["re:model[.]layers"]}, 2),  # not at its end
        ({"a": ["Linear"], "b": ["q_proj"]}, 1),  # a name is the whole path
    ],
)
@pytest.mark.filterwarnings("ignore:.*matches no module")
def test_names_beat_expressions_beat_classes(
    tmp_path: Path, groups: dict[str, list[str]], size: int
) -> None:
    assert spec(grouped(groups), tmp_path).scheme.group_size == size


@pytest.mark.parametrize("targets", [("re:.*q_proj", "re:.*self_attn.*"), ("Linear", "linear")])
def test_two_schemes_for_one_module_are_ambiguous(tmp_path: Path, targets: tuple[str, str]) -> None:
    message = refusal(grouped({"a": [targets[0]], "b": [targets[1]]}), tmp_path)
    assert all(text in message for text in (Q_PROJ, *targets))


def test_one_scheme_in_two_groups_is_not_ambiguous(tmp_path: Path) -> None:
    config = grouped({"a": ["re:.*q_proj"], "b": ["re:.*self_attn.*"]})
    config["config_groups"]["b"]["weights"]["group_size"] = 1
    assert spec(config, tmp_path).scheme.group_size == 1


@pytest.mark.parametrize(
    "ignore", [["lm_head"], ["re:lm_.*"], ["re:.*head", "missing.module"], ["lm_head", "Embedding"]]
)
def test_ignored_modules(tmp_path: Path, ignore: list[str]) -> None:
    found = specs(grouped({"a": ["Linear"]}, ignore=ignore), tmp_path, [Q_PROJ, "lm_head"])
    assert found.keys() == {Q_PROJ}


def test_nothing_ignored_and_everything_ignored(tmp_path: Path) -> None:
    nothing: tuple[Any, ...] = (None, [])
    for ignore in nothing:
        found = specs(grouped({"a": ["Linear"]}, ignore=ignore), tmp_path, [Q_PROJ, "lm_head"])
        assert found.keys() == {Q_PROJ, "lm_head"}
    assert not specs(grouped({"a": ["Linear"]}, ignore=["Linear"]), tmp_path, [Q_PROJ])


def test_a_target_without_a_module_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"'re:.*experts.*' matches no module"):
        spec(grouped({"a": ["Linear", "re:.*experts.*"]}), tmp_path)


def test_groups_of_attention_are_skipped_with_a_warning(tmp_path: Path) -> None:
    config = compressed(CHANNEL)
    config["config_groups"]["kv"] = {
        "targets": ["LlamaAttention"],
        "input_activations": {"type": "float", "strategy": "attn_head"},
    }
    with pytest.warns(UserWarning, match="quantizes attention itself"):
        assert spec(config, tmp_path).scheme.weight_dtype == "int8"


def test_an_unknown_key_of_the_config_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"quantization_config\.packing is unknown"):
        spec(compressed(CHANNEL, packing="dense"), tmp_path)


def test_informational_keys_are_left_alone(tmp_path: Path) -> None:
    config = compressed(
        CHANNEL, global_compression_ratio=1.24, run_compressed=True, version="0.6.0",
        sparsity_config={"format": "dense", "global_sparsity": 0.5}, transform_config={},
        moe_sparsity_config=None, kv_cache_scheme=None, ignore=[],
    )  # fmt: skip
    assert spec(config, tmp_path).format == "pack-quantized"


# Presets and schemes.


@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A8", "FP8", "FP8_DYNAMIC", "FP8_BLOCK"])
def test_presets_mean_the_scheme_of_that_name(tmp_path: Path, name: str) -> None:
    config = compressed({}) | {"config_groups": {name.lower(): ["Linear"]}}
    assert spec(config, tmp_path).scheme == SCHEMES[name]


def test_the_preset_of_no_quantization(tmp_path: Path) -> None:
    config = compressed({}) | {
        "config_groups": {"UNQUANTIZED": ["re:.*q_proj"], "W8A8": ["Linear"]}
    }
    assert specs(config, tmp_path, [Q_PROJ, "lm_head"]).keys() == {"lm_head"}


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (PER_TOKEN, ActivationScheme(dtype="int8", strategy="token")),
        ({"dynamic": True}, ActivationScheme(dtype="int8", strategy="token")),
        (
            PER_TOKEN | {"symmetric": False},
            ActivationScheme(dtype="int8", strategy="token", symmetric=False),
        ),
        ({}, ActivationScheme(dtype="int8", strategy="tensor", dynamic=False)),
        (
            {"symmetric": False},
            ActivationScheme(dtype="int8", strategy="tensor", dynamic=False, symmetric=False),
        ),
        (
            {"type": "float", "group_size": 64, "dynamic": True},
            ActivationScheme(dtype="float8_e4m3fn", strategy="group", group_size=64),
        ),
    ],
)
def test_activations(tmp_path: Path, inputs: dict[str, Any], expected: ActivationScheme) -> None:
    assert spec(compressed(CHANNEL, inputs), tmp_path).scheme.activations == expected


def test_blocks_of_activations_follow_the_blocks_of_weights(tmp_path: Path) -> None:
    weights = {"type": "float", "strategy": "block", "block_structure": [64, 64]}
    inputs = {"type": "float", "group_size": 128, "dynamic": True}
    activations = spec(compressed(weights, inputs), tmp_path).scheme.activations
    assert activations is not None
    assert activations.group_size == 64


@pytest.mark.parametrize(
    ("weights", "inputs", "message"),
    [
        (CHANNEL, {"num_bits": 4}, "4-bit activations are not supported"),
        (CHANNEL, {"group_size": 128, "dynamic": True}, "strategy group (dynamic, int8)"),
        (CHANNEL, {"strategy": "channel"}, "strategy channel (static, int8)"),
        (CHANNEL, {"type": "float", "symmetric": False}, "symmetric must be true"),
        (CHANNEL, PER_TOKEN | {"actorder": "weight"}, "actorder belongs to weights"),
        ({"type": "float"}, PER_TOKEN, "int activations with float weights"),
        ({"type": "float", "symmetric": False}, None, "symmetric must be true"),
        ({"num_bits": 3, "group_size": 128}, None, "num_bits 3 is not supported"),
        ({"num_bits": 6, "type": "float"}, None, "num_bits 6 is not supported"),
        (PER_TOKEN, None, "dynamic must be false"),
        (CHANNEL | {"strategy": "attn_head"}, None, "attn_head is not supported for weights"),
        (
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
            {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16,
             "dynamic": "local"},
            "FP4 weights run with unquantized activations only",
        ),
        (None, PER_TOKEN, "activations alone"),
    ],
)  # fmt: skip
def test_schemes_that_are_not_run(
    tmp_path: Path, weights: Any, inputs: dict[str, Any] | None, message: str
) -> None:
    config = compressed(weights, inputs)
    if weights and weights.get("num_bits") == 6:
        config["format"] = "naive-quantized"
    assert message in refusal(config, tmp_path)


# Formats.

FP4_16 = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
FP4_32 = {"num_bits": 4, "type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}
FP8 = {"type": "float", "strategy": "channel"}
FP8_TOKEN = PER_TOKEN | {"type": "float"}


@pytest.mark.parametrize("stated", [None, "mixed-precision", "fakequant"])
@pytest.mark.parametrize(
    ("weights", "inputs", "expected"),
    [
        (FP4_32, None, "mxfp4-pack-quantized"),
        (FP4_16, None, "nvfp4-pack-quantized"),
        (W4, None, "pack-quantized"),
        (CHANNEL, None, "pack-quantized"),
        (CHANNEL, PER_TOKEN, "int-quantized"),
        (W4, PER_TOKEN, "int-quantized"),
        (W4, FP8_TOKEN, "int-quantized"),
        (FP8, FP8_TOKEN, "float-quantized"),
        (FP8, None, "naive-quantized"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*but the weights are compressed")
def test_format_inferred_from_the_args(
    tmp_path: Path, weights: Any, inputs: Any, expected: str, stated: str | None
) -> None:
    assert spec(compressed(weights, inputs, format=stated), tmp_path).format == expected


def test_format_of_the_group_beats_that_of_the_file(tmp_path: Path) -> None:
    config = compressed(CHANNEL, PER_TOKEN, format="pack-quantized")
    assert spec(config, tmp_path).format == "pack-quantized"
    config["config_groups"]["group_0"]["format"] = "naive-quantized"
    assert spec(config, tmp_path).format == "naive-quantized"


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        (FP8, "pack-quantized"), (CHANNEL, "nvfp4-pack-quantized"), (FP4_16, "naive-quantized"),
        (FP4_16, "mxfp4-pack-quantized"), (FP4_32, "nvfp4-pack-quantized"),
    ],
)  # fmt: skip
def test_formats_that_cannot_hold_the_weights(tmp_path: Path, weights: Any, name: str) -> None:
    assert f"cannot be stored as {name}" in refusal(compressed(weights, format=name), tmp_path)


@pytest.mark.parametrize(
    "name",
    ["mxfp8-quantized", "mxfp6-pack-quantized", "marlin-24", "sparse-24-bitmask", "sparse-bitmask"],
)
def test_formats_that_are_not_read(tmp_path: Path, name: str) -> None:
    config = compressed(CHANNEL, format=name)
    assert f"format {name} is not supported" in refusal(config, tmp_path)
    config["format"] = "mixed-precision"
    config["config_groups"]["group_0"]["format"] = name
    assert f"group_0.format {name} is not supported" in refusal(config, tmp_path)


@pytest.mark.parametrize("weights", [{"num_bits": 6, "type": "float", "group_size": 32},
    {"type": "float", "group_size": 32, "scale_dtype": "torch.uint8"}])  # fmt: skip
def test_microscaling_formats_that_are_not_read_are_inferred_and_refused(
    tmp_path: Path, weights: Any
) -> None:
    assert re.search(r"format mxfp\d\S* is not supported", refusal(compressed(weights), tmp_path))


def test_mixed_recipe_reads_each_group_in_its_own_format(tmp_path: Path) -> None:
    shape, fp8_spec = (8, 8), FP8 | {"num_bits": 8}
    mlp = "model.layers.0.mlp.up_proj"
    config = compressed({}, format="mixed-precision", ignore=["lm_head"])
    config["config_groups"] = {
        "group_0": {
            "targets": ["re:.*self_attn.*"], "weights": fp8_spec, "input_activations": FP8_TOKEN,
            "format": "float-quantized",
        },
        "group_1": {
            "targets": ["re:.*mlp.*"], "weights": W4 | {"group_size": 4},
            "format": "pack-quantized",
        },
    }  # fmt: skip
    made = Draft(
        {"quantization_config": config},
        {
            f"{Q_PROJ}.weight": np.full(shape, 2, E4M3),
            f"{Q_PROJ}.weight_scale": np.ones((8, 1), BF16),
            f"{mlp}.weight_packed": np.broadcast_to(words(0xFEA98710), (8, 1)),
            f"{mlp}.weight_scale": np.ones((8, 2), BF16),
            f"{mlp}.weight_shape": np.array(shape),
            "lm_head.weight": np.ones(shape, BF16),
        },
        {Q_PROJ: shape, mlp: shape, "lm_head": shape},
    )
    attention, up = load_quantized(made, tmp_path, Q_PROJ), load_quantized(made, tmp_path, mlp)
    assert attention.scheme == SCHEMES["FP8_DYNAMIC"]
    assert up.scheme == QuantScheme(weight_dtype="int4", strategy="group", group_size=4)
    np.testing.assert_array_equal(attention.dequantize(), np.full(shape, 2))
    np.testing.assert_array_equal(up.dequantize(), [[-8, -7, -1, 0, 1, 2, 6, 7]] * 8)
    head = load(made, tmp_path, "lm_head").weight
    assert isinstance(head, np.ndarray)
    assert head.dtype == BF16


# Sections that cannot be run.


@pytest.mark.parametrize(
    ("section", "content", "message"),
    [
        ("sparsity_config", {"format": "sparse-24-bitmask", "targets": ["Linear"]}, "bitmask"),
        ("sparsity_config", {"targets": ["Linear"]}, "format null"),
        ("moe_sparsity_config", {"x": 1}, "moe_sparsity_config is set"),
        ("sparsity_config", [], "must be an object, found []"),
        ("transform_config", "hadamard", "must be an object"),
    ],
)
def test_sections_that_are_refused(
    tmp_path: Path, section: str, content: Any, message: str
) -> None:
    found = refusal(compressed(CHANNEL) | {section: content}, tmp_path)
    assert message in found
    assert section in found


def transforms(*locations: Any) -> dict[str, Any]:
    steps = [{"targets": ["Linear"], "location": where, "inverse": True} for where in locations]
    return {"config_groups": {"R1": {"type": "hadamard", "apply": steps}}}


def test_folded_transforms_need_nothing(tmp_path: Path) -> None:
    config = compressed(CHANNEL, transform_config=transforms("weight_input", "weight_output"))
    assert spec(config, tmp_path).format == "pack-quantized"


@pytest.mark.parametrize("location", ["input", "output", "k_cache", "q_attn", None])
def test_online_transforms_are_refused(tmp_path: Path, location: str | None) -> None:
    config = compressed(CHANNEL, transform_config=transforms("weight_input", location))
    message = refusal(config, tmp_path)
    assert "transform_config.config_groups.R1.apply[1].location" in message
    assert str(location or "null") in message


def test_quantized_outputs_are_refused(tmp_path: Path) -> None:
    config = compressed(CHANNEL)
    config["config_groups"]["group_0"]["output_activations"] = {"num_bits": 8}
    assert "group_0.output_activations is set" in refusal(config, tmp_path)


# Old files.


@pytest.fixture
def w8a8(tiny_llama3: Any) -> Draft:
    return draft(tiny_llama3("ct_w8a8_int8"))


def test_files_of_2024_call_compressed_weights_frozen(w8a8: Draft, tmp_path: Path) -> None:
    w8a8.quantization["quantization_status"] = "frozen"
    w8a8.group().pop("format")
    w8a8.quantization["format"] = "naive-quantized"
    with pytest.warns(UserWarning, match="quantization_status is 'frozen'"):
        weight = load_quantized(w8a8, tmp_path, Q_PROJ)
    assert weight.scheme == SCHEMES["W8A8"]


@pytest.mark.parametrize("name", ["int-quantized", "float-quantized", "naive-quantized"])
def test_the_type_of_the_args_counts_not_the_name_of_the_format(
    w8a8: Draft, tmp_path: Path, name: str
) -> None:
    w8a8.group()["format"] = w8a8.quantization["format"] = name
    weight = load_quantized(w8a8, tmp_path, Q_PROJ)
    np.testing.assert_array_equal(weight.codes, w8a8.tensors[f"{Q_PROJ}.weight"])


def test_the_config_may_be_called_compression_config(w8a8: Draft, tmp_path: Path) -> None:
    w8a8.config["compression_config"] = w8a8.config.pop("quantization_config")
    assert load_quantized(w8a8, tmp_path, Q_PROJ).scheme == SCHEMES["W8A8"]


def asymmetric(version: str | None, **tensors: np.ndarray) -> Draft:
    return single(
        (8, 8),
        compressed({"num_bits": 4, "strategy": "channel", "symmetric": False}, version=version),
        {
            "weight_packed": np.broadcast_to(words(0xFEA98710), (8, 1)),
            "weight_scale": np.ones((8, 1), BF16),
        }
        | tensors,
    )


@pytest.mark.parametrize("version", ["0.9.3", "0.6.0.20241004", "0.5.0", None])
def test_old_writers_dropped_zero_points_that_are_all_zero(
    tmp_path: Path, version: str | None
) -> None:
    weight = load_quantized(asymmetric(version), tmp_path)
    assert not np.asarray(weight.zeros).any()


@pytest.mark.parametrize("version", ["0.9.4", "0.10.0", "0.19.0", "1.0.0", "unknown"])
def test_later_writers_did_not(tmp_path: Path, version: str) -> None:
    with pytest.raises(CheckpointError, match="weight_zero_point is missing"):
        load_quantized(asymmetric(version), tmp_path)


def test_zero_points_before_0_9_4_are_plain_int8(tmp_path: Path) -> None:
    zeros = np.arange(-4, 4, dtype=np.int8)[:, None]
    weight = load_quantized(asymmetric("0.9.3", weight_zero_point=zeros), tmp_path)
    np.testing.assert_array_equal(weight.zeros, zeros)


def test_g_idx_of_actorder_group(tiny_llama3: Any, tmp_path: Path) -> None:
    made = draft(tiny_llama3("ct_w4a16_g128_actorder_group"))
    stored = made.tensors[f"{Q_PROJ}.weight_g_idx"]
    np.testing.assert_array_equal(load_quantized(made, tmp_path, Q_PROJ).g_idx, stored)
    # -1 says it was never set: groups are consecutive.
    made.tensors[f"{Q_PROJ}.weight_g_idx"] = np.where(stored == 1, -1, stored)
    assert load_quantized(made, tmp_path, Q_PROJ).g_idx is None
    made.tensors[f"{Q_PROJ}.weight_g_idx"] = stored
    made.group()["weights"]["actorder"] = None
    with pytest.warns(UserWarning, match="weight_g_idx reorders columns although"):
        np.testing.assert_array_equal(load_quantized(made, tmp_path, Q_PROJ).g_idx, stored)


def test_g_idx_that_says_nothing_new_is_dropped(tiny_llama3: Any, tmp_path: Path) -> None:
    made = draft(tiny_llama3("ct_w4a16_g128"))
    made.tensors[f"{Q_PROJ}.weight_g_idx"] = (np.arange(256) // 128).astype(np.int32)
    assert load_quantized(made, tmp_path, Q_PROJ).g_idx is None


def test_zero_points_of_symmetric_weights_may_be_stored_if_they_are_zero(
    w8a8: Draft, tmp_path: Path
) -> None:
    w8a8.tensors[f"{Q_PROJ}.weight_zero_point"] = np.zeros((256, 1), np.int8)
    assert load_quantized(w8a8, tmp_path, Q_PROJ).zeros is None


def test_weight_shape_is_optional_and_may_be_int32(tiny_llama3: Any, tmp_path: Path) -> None:
    made = draft(tiny_llama3("ct_w4a16_g128"))
    expected = load_quantized(made, tmp_path, Q_PROJ)
    for stored in (np.array([256, 256], np.int32), None):
        made.tensors.pop(f"{Q_PROJ}.weight_shape")
        if stored is not None:
            made.tensors[f"{Q_PROJ}.weight_shape"] = stored
        np.testing.assert_array_equal(load_quantized(made, tmp_path, Q_PROJ).codes, expected.codes)


# Against the library.


@pytest.mark.oracle
def test_presets_are_the_library_s() -> None:
    found = oracle.run(
        """
        import json
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
        for name in names:
            scheme = preset_name_to_scheme(str(name), ["Linear"])
            out[str(name)] = np.array(json.dumps(scheme.model_dump(mode="json")))
        """,
        names=np.array(list(PRESETS)),
    )
    for name, stored in found.items():
        theirs, ours = json.loads(str(stored)), Section(PRESETS[name], name)
        for key in ("weights", "input_activations"):
            section = ours.section(key)
            assert (theirs[key] is None) == (section is None), name
            if section is not None:
                # Microscaling of weights needs the dtype of its scales told apart, others do not.
                wanted, parsed = Section(theirs[key], f"{name}.{key}"), parse_args(section)
                expected = vars(parse_args(wanted)) | {"scale_dtype": parsed.scale_dtype}
                assert vars(parsed) == expected, (name, key)


KINDS = ("ct_w4a16_g128", "ct_w4a16_asym_g128", "ct_w8a16", "ct_w8a8_int8", "ct_fp8_static",
         "ct_fp8_dynamic", "ct_fp8_block")  # fmt: skip


@pytest.mark.oracle
@pytest.mark.parametrize("kind", KINDS)
def test_the_library_decompresses_what_is_written(
    tiny_llama3: Any, tmp_path: Path, kind: str
) -> None:
    made = draft(tiny_llama3(kind))
    weight = load_quantized(made, tmp_path, Q_PROJ)
    assert isinstance(weight, QTensor)
    writer = pack_quantized if "weight_packed" in " ".join(made.tensors) else naive_quantized
    arrays, dtypes = {}, {}
    for suffix, array in writer.write(weight).items():
        dtypes[suffix] = str(array.dtype)
        narrow = array.dtype in (BF16, E4M3)
        arrays[suffix] = array.view(f"u{array.itemsize}") if narrow else array
    found = oracle.run(
        """
        import json
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme
        scheme = QuantizationScheme(**json.loads(str(config)))
        state = {}
        for name, dtype in json.loads(str(dtypes)).items():
            array = torch.from_numpy(arrays[name].copy())
            state[name] = array.view(getattr(torch, dtype)) if dtype in (
                "bfloat16", "float8_e4m3fn") else array
        state["weight_scale"] = state["weight_scale"].float()
        compressor = BaseCompressor.get_value_from_registry(scheme.format)
        out["weight"] = compressor.decompress(state, scheme)["weight"].float().numpy()
        """,
        config=np.array(json.dumps(made.group())),
        dtypes=np.array(json.dumps(dtypes)),
        **arrays,
    )["weight"]
    np.testing.assert_array_equal(found, weight.dequantize())


def test_a_whole_fixture_config_of_every_kind_parses_without_a_word(
    tiny_llama3_dir: Path, tmp_path: Path
) -> None:
    made = draft(tiny_llama3_dir)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantization = parse(made, tmp_path)
    expected = set(linear_shapes(LlamaConfig.from_hf(made.config))) - {LINEAR}
    found = set(quantization.linears) if quantization else set()
    assert found == (set() if tiny_llama3_dir.name == "bf16_original" else expected)
