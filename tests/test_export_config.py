"""Configs that are written: what the format's own library makes of them, and what is read back."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from drafts import LINEAR, Draft, parse
from qllama_convert.export_config import (
    compressed_tensors_config,
    compressed_tensors_format,
    fp8_config,
    gptq_config,
)
from qllama_convert.kv_cache_scheme import KVCacheScheme

from qllama import demo
from qllama.quantization.scheme import PRESETS, ActivationScheme, QuantScheme

Q_PROJ, K_PROJ, DOWN_PROJ = (
    f"model.layers.0.{name}" for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj")
)
INT8_STATIC = ActivationScheme(dtype="int8", strategy="tensor", dynamic=False, symmetric=False)
FP8_PER_TOKEN = ActivationScheme(dtype="float8_e4m3fn", strategy="token")
SCHEMES: dict[str, QuantScheme] = {
    **PRESETS,
    "W4A16 g64": replace(PRESETS["W4A16"], group_size=64),
    "W4A16 channel": QuantScheme(weight_dtype="int4", strategy="channel"),
    "W8A16 tensor": QuantScheme(weight_dtype="int8", strategy="tensor"),
    "W4A8": replace(PRESETS["W4A16"], activations=PRESETS["W8A8"].activations),
    "W4AFP8": replace(PRESETS["W4A16"], activations=FP8_PER_TOKEN),
    "W8A8 static": replace(PRESETS["W8A8"], activations=INT8_STATIC),
    "FP8 weight-only": QuantScheme(weight_dtype="float8_e4m3fn", strategy="channel"),
}
FORMATS = {
    "FP8": "float-quantized",
    "FP8 weight-only": "naive-quantized",
    "FP8_BLOCK": "float-quantized",
    "FP8_DYNAMIC": "float-quantized",
    "W4A16": "pack-quantized",
    "W4A16 channel": "pack-quantized",
    "W4A16 g64": "pack-quantized",
    "W4A16_ASYM": "pack-quantized",
    "W4A8": "int-quantized",
    "W4AFP8": "int-quantized",
    "W8A16": "pack-quantized",
    "W8A16 tensor": "pack-quantized",
    "W8A8": "int-quantized",
    "W8A8 static": "int-quantized",
}


def draft(config: dict[str, Any], *paths: str, stored: str = "weight_packed") -> Draft:
    """A checkpoint by names alone, to read a config back beside."""
    tensors: dict[str, np.ndarray] = {f"{path}.{stored}": np.zeros(1, np.int32) for path in paths}
    return Draft({"quantization_config": config}, tensors, dict.fromkeys(paths, (128, 128)))


@pytest.mark.parametrize("name", SCHEMES)
def test_compressed_tensors_is_read_back(name: str, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    config = compressed_tensors_config({Q_PROJ: scheme, DOWN_PROJ: scheme}, [LINEAR])
    assert config["format"] == compressed_tensors_format(scheme) == FORMATS[name]
    quantization = parse(draft(config, Q_PROJ, DOWN_PROJ, LINEAR), tmp_path)
    assert quantization is not None
    assert {path: spec.scheme for path, spec in quantization.linears.items()} == {
        Q_PROJ: scheme,
        DOWN_PROJ: scheme,
    }
    assert {spec.format for spec in quantization.linears.values()} == {FORMATS[name]}


def test_several_schemes_and_a_quantized_cache_are_read_back(tmp_path: Path) -> None:
    schemes = {Q_PROJ: PRESETS["W4A16"], K_PROJ: PRESETS["W4A16"], DOWN_PROJ: PRESETS["FP8"]}
    cache = KVCacheScheme(strategy="attn_head")
    config = compressed_tensors_config(schemes, [LINEAR], kv_cache=cache)
    assert config["format"] == "mixed-precision"
    targets = [group["targets"] for group in config["config_groups"].values()]
    assert targets == [[K_PROJ, Q_PROJ], [DOWN_PROJ]]
    quantization = parse(draft(config, *schemes, LINEAR), tmp_path)
    assert quantization is not None
    assert {path: spec.scheme for path, spec in quantization.linears.items()} == schemes
    assert quantization.kv_cache == cache


@pytest.mark.oracle
def test_the_library_understands_every_config() -> None:
    """compressed-tensors refuses unknown keys; what it fills in must be what was meant."""
    configs = {
        name: compressed_tensors_config({Q_PROJ: s}, ["lm_head"]) for name, s in SCHEMES.items()
    }
    configs["mixed"] = compressed_tensors_config(
        {Q_PROJ: PRESETS["W4A16"], DOWN_PROJ: PRESETS["FP8"]},
        ["lm_head"],
        kv_cache=KVCacheScheme(strategy="tensor"),
    )
    script = """
        import json
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
        found = {}
        for name, config in json.loads(str(configs)).items():
            parsed = QuantizationConfig.model_validate(config)
            found[name] = parsed.model_dump(mode="json")
            if name in presets.tolist():
                ours = parsed.config_groups["group_0"]
                theirs = preset_name_to_scheme(name, ["Linear"])
                for part in ("weights", "input_activations"):
                    pair = [getattr(ours, part), getattr(theirs, part)]
                    for args in filter(None, pair):  # how a quantizer finds scales is not said
                        args.observer, args.observer_kwargs = None, {}
                        args.scale_dtype = args.zp_dtype = None
                    assert pair[0] == pair[1], (name, part, pair)
        out["found"] = np.array(json.dumps(found))
    """
    names = {"configs": np.array(json.dumps(configs)), "presets": np.array([*PRESETS])}
    found = json.loads(str(oracle.run(script, **names)["found"]))
    assert found.keys() == configs.keys()
    for name, config in configs.items():
        for key in ("format", "ignore", "quantization_status", "quant_method"):
            assert found[name][key] == config[key]
        for group, scheme in config["config_groups"].items():
            for part in ("weights", "input_activations"):
                args, parsed = scheme[part], found[name]["config_groups"][group][part]
                assert args is None or args.items() <= parsed.items()


def test_the_demo_model_says_the_same() -> None:
    config = json.loads((demo.model_path() / "config.json").read_bytes())
    written = compressed_tensors_config({Q_PROJ: PRESETS["W4A16"]}, ["lm_head"])
    assert config["quantization_config"] == written


@pytest.mark.parametrize("desc_act", [True, False])
@pytest.mark.parametrize("name", ["W4A16", "W4A16_ASYM", "W8A16", "W4A16 g64", "W4A16 channel"])
def test_gptq_is_read_back(name: str, desc_act: bool, tmp_path: Path) -> None:
    scheme = SCHEMES[name]
    config = gptq_config(scheme, desc_act=desc_act, damp_percent=0.1)
    made = draft(config, Q_PROJ, stored="qweight")
    made.files["quantize_config.json"] = config
    quantization = parse(made, tmp_path)
    assert quantization is not None
    spec = quantization.linears[Q_PROJ]
    assert (spec.scheme, spec.act_order, spec.zero_offset) == (scheme, desc_act, scheme.symmetric)
    assert config["damp_percent"] == 0.1
    assert "damp_percent" not in gptq_config(scheme)


FP8_PER_TENSOR_DYNAMIC = replace(PRESETS["FP8"], activations=FP8_PER_TOKEN)


@pytest.mark.parametrize(
    "scheme", [PRESETS["FP8"], PRESETS["FP8_BLOCK"], FP8_PER_TENSOR_DYNAMIC], ids=str
)
def test_fp8_is_read_back(scheme: QuantScheme, tmp_path: Path) -> None:
    config = fp8_config(scheme, [LINEAR, DOWN_PROJ])
    quantization = parse(draft(config, Q_PROJ, DOWN_PROJ, LINEAR, stored="weight"), tmp_path)
    assert quantization is not None
    assert {path: spec.scheme for path, spec in quantization.linears.items()} == {Q_PROJ: scheme}


def test_what_cannot_be_said_is_refused() -> None:
    w4, fp8 = PRESETS["W4A16"], PRESETS["FP8"]
    bounded = replace(
        PRESETS["FP8_DYNAMIC"], activations=replace(FP8_PER_TOKEN, upper_bound=1200.0)
    )
    per_group = ActivationScheme(dtype="int8", strategy="group", group_size=128)
    fp4 = QuantScheme(weight_dtype="float4_e2m1fn", strategy="group", group_size=16)
    with pytest.raises(ValueError, match="no Linear is quantized"):
        compressed_tensors_config({}, ["lm_head"])
    with pytest.raises(ValueError, match="lm_head cannot be quantized and ignored at once"):
        compressed_tensors_config({"lm_head": w4}, ["lm_head"])
    with pytest.raises(ValueError, match="no upper bound"):
        compressed_tensors_config({Q_PROJ: bounded}, [])
    with pytest.raises(ValueError, match="int8 activations per group"):
        compressed_tensors_config({Q_PROJ: replace(w4, activations=per_group)}, [])
    with pytest.raises(ValueError, match="FP4 g16, A16 weights are read, not written"):
        compressed_tensors_config({Q_PROJ: fp4}, [])
    for scheme in (fp8, PRESETS["W8A8"], replace(w4, strategy="tensor", group_size=None)):
        with pytest.raises(ValueError, match="GPTQ holds weight-only int4 and int8"):
            gptq_config(scheme)
    for scheme in (w4, PRESETS["FP8_DYNAMIC"], replace(fp8, activations=None)):
        with pytest.raises(ValueError, match="quant_method fp8 holds FP8 per tensor"):
            fp8_config(scheme, [])
