"""Conversions: what every form allows, bit for bit, against decoders written from the formats'
published descriptions; and what is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import small_checkpoints
from drafts import read_tensors
from qllama_convert.checkpoint import CheckpointWarning, open_checkpoint
from qllama_convert.convert import convert
from qllama_convert.export_section import FORMS
from qllama_convert.formats import gptq
from qllama_convert.read_back import read_fingerprints

from qllama.errors import CheckpointError
from qllama.llm import LLM
from qllama.quantization.qtensor import QTensor
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS

CT, GPTQ, FP8, BF16, NATIVE = FORMS
# Which forms hold a kind of the tiny model whole.
LOSSLESS = {
    "autofp8_static": {CT, FP8},
    "bf16_original": {BF16},
    "ct_fp8_block": {CT, FP8},
    "ct_fp8_dynamic": {CT},
    "ct_fp8_static": {CT, FP8},
    "ct_fp8_static_kv_fp8": {CT, FP8},
    "ct_mxfp4a16": {BF16},  # powers of two times four bits
    "ct_nvfp4a16": set(),
    "ct_w4a16_asym_g128": {CT, GPTQ},
    "ct_w4a16_g128": {CT, GPTQ},
    "ct_w4a16_g128_actorder_group": {GPTQ},
    "ct_w4a16_g128_actorder_weight": {CT, GPTQ},
    "ct_w8a16": {CT, GPTQ},
    "ct_w8a8_int8": {CT},
    "gptq_w4_g128_desc_act": {GPTQ},
    "gptq_w4_g128_no_desc_act_asym": {CT, GPTQ},
}
IDS = np.arange(1, 25)
MODULE = "model.layers.1.mlp.up_proj"


def decoded(tensors: dict[str, np.ndarray], path: str, config: dict[str, Any]) -> np.ndarray:
    """float64 `[N, K]` of one Linear, by the formulas of its format and one value at a time."""
    own = {n.removeprefix(f"{path}."): t for n, t in tensors.items() if n.startswith(f"{path}.")}
    if "qweight" in own:
        return decoded_gptq(own, config)
    if "weight_packed" in own:
        (group,) = config["config_groups"].values()
        return decoded_pack_quantized(own, group["weights"])
    scales = next(own[s] for s in ("weight_scale", "weight_scale_inv") if s in own)
    scales = scales.astype(np.float64)
    if scales.ndim == 2 and scales.shape[1] > 1:
        rows, columns = own["weight"].shape
        scales = np.repeat(np.repeat(scales, 128, 0)[:rows], 128, 1)[:, :columns]
    return own["weight"].astype(np.float64) * scales


def decoded_gptq(own: dict[str, np.ndarray], config: dict[str, Any]) -> np.ndarray:
    """AutoGPTQ: bits of a word from the lowest, rows are input columns, zeros minus one in v1."""
    bits, mask = config["bits"], 2 ** config["bits"] - 1
    shifts = np.arange(0, 32, bits)
    codes = (own["qweight"].view(np.uint32)[:, None, :] >> shifts[None, :, None]) & mask
    codes = codes.reshape(-1, own["qweight"].shape[1]).astype(np.float64)  # [K, N]
    zeros = (own["qzeros"].view(np.uint32)[:, :, None] >> shifts) & mask
    zeros = zeros.reshape(len(own["qzeros"]), -1).astype(np.float64)
    zeros += config["checkpoint_format"] == "gptq"
    groups = own["g_idx"]
    return ((codes - zeros[groups]) * own["scales"].astype(np.float64)[groups]).T


def decoded_pack_quantized(own: dict[str, np.ndarray], weights: dict[str, Any]) -> np.ndarray:
    """compressed-tensors: codes along K and zero points along N, both biased by half."""
    bits = weights["num_bits"]
    n, k = own["weight_shape"]
    shifts, mask = np.arange(0, 32, bits), 2**bits - 1
    codes = (own["weight_packed"].view(np.uint32)[:, :, None] >> shifts) & mask
    codes = codes.reshape(n, -1)[:, :k].astype(np.float64)
    zeros: Any = 2 ** (bits - 1)
    scales = own["weight_scale"].astype(np.float64)
    width = weights.get("group_size") or k
    if not weights["symmetric"]:
        packed = own["weight_zero_point"].view(np.uint32)
        zeros = ((packed[:, None, :] >> shifts[None, :, None]) & mask).reshape(-1, packed.shape[1])
        zeros = np.repeat(zeros[:n].astype(np.float64), width, 1)
    return (codes - zeros) * np.repeat(scales, width, 1)


@pytest.mark.parametrize("to", FORMS)
def test_what_a_form_holds_is_bit_exact(
    to: str, tiny_llama3_kind: str, tiny_llama3_dir: Path, tmp_path: Path
) -> None:
    allowed = LOSSLESS[tiny_llama3_kind] | {NATIVE}
    out = tmp_path / "out"
    if to not in allowed:
        with pytest.raises(ValueError, match=r"not|loses something|written|refuse"):
            convert(tiny_llama3_dir, out, to)
        assert list(tmp_path.iterdir()) == []
        return
    report = convert(tiny_llama3_dir, out, to)
    assert report.lossless
    assert report.output == str(out)
    found, expected = read_fingerprints(out), read_fingerprints(tiny_llama3_dir)
    if to == BF16 and report.schemes:
        found = {path: found[path] for path in found.keys() - report.schemes.keys()}
        expected = {path: expected[path] for path in found}
    assert found == expected
    if to == NATIVE:
        return
    # The same weights, by decoders that share no code with the readers.
    golden = read_tensors(tiny_llama3_dir / "expected.safetensors")
    tensors = read_tensors(out / "model.safetensors")
    config = json.loads((out / "config.json").read_bytes()).get("quantization_config")
    rows = [name for name in golden if name.startswith("dequant_rows_0_64.")]
    assert rows
    for name in rows:
        path = name.removeprefix("dequant_rows_0_64.").removesuffix(".weight")
        weight = tensors[f"{path}.weight"] if config is None else decoded(tensors, path, config)
        error = np.abs(weight[:64].astype(np.float64) - golden[name]).max()
        assert error <= 1e-6 * np.abs(golden[name]).max()


@pytest.mark.parametrize(
    ("kind", "path"),
    [
        ("gptq_w4_g128_no_desc_act_asym", [CT, GPTQ, NATIVE, CT]),
        ("gptq_w4_g128_desc_act", [NATIVE, GPTQ]),
        ("ct_w4a16_g128", [GPTQ, CT, NATIVE, GPTQ]),
        ("ct_fp8_static_kv_fp8", [FP8, CT, NATIVE, FP8]),
        ("autofp8_static", [CT, NATIVE, CT, FP8]),
        ("ct_fp8_block", [FP8, NATIVE, CT]),
    ],
)
def test_there_and_back(
    kind: str, path: list[str], tiny_llama3: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = start = tiny_llama3(kind)
    for step, to in enumerate(path):
        folder = Path(convert(folder, tmp_path / str(step), to).output)
    assert read_fingerprints(folder) == read_fingerprints(start)
    assert (folder / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()


def test_awq_becomes_asymmetric(tmp_path: Path) -> None:
    folder = small_checkpoints.make("awq", tmp_path / "in")
    for to in (CT, GPTQ):
        report = convert(folder, tmp_path / to, to)
        assert report.lossless
        assert read_fingerprints(tmp_path / to) == read_fingerprints(folder)
    section = json.loads((tmp_path / GPTQ / "config.json").read_bytes())["quantization_config"]
    assert (section["checkpoint_format"], section["sym"]) == ("gptq_v2", False)


def test_mixed_schemes_stay_mixed(tmp_path: Path) -> None:
    folder = small_checkpoints.make("mixed", tmp_path / "in")
    convert(folder, tmp_path / "out", CT)
    assert read_fingerprints(tmp_path / "out") == read_fingerprints(folder)
    with pytest.raises(
        ValueError, match="gptq has one scheme for all Linears, not FP8_DYNAMIC, W4"
    ):
        convert(folder, tmp_path / "gptq", GPTQ)


# What is lost.


def test_dequantizing_says_what_it_rounds(
    tiny_llama3: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, out = tiny_llama3("ct_w8a8_int8"), tmp_path / "out"
    with pytest.raises(ValueError, match=r"inputs of Linears.*28 Linears are rounded: .*--allow-l"):
        convert(folder, out, BF16)
    assert not out.exists()
    report = convert(folder, out, BF16, allow_lossy=True)
    assert not report.lossless
    assert set(report.rounded) == set(report.schemes)
    assert report.losses == ("inputs of Linears are not quantized any more",)
    source = read_tensors(folder / "model.safetensors")
    exact = source[f"{MODULE}.weight"].astype(np.float64) * source[f"{MODULE}.weight_scale"].astype(
        float
    )
    stored = read_tensors(out / "model.safetensors")[f"{MODULE}.weight"]
    assert np.array_equal(stored, exact.astype(ml_dtypes.bfloat16))
    with LLM(out, dtype="float32") as llm, LLM(folder, dtype="float32") as original:
        error = llm.logits(IDS) - original.logits(IDS)
        assert np.sqrt((error**2).mean() / (original.logits(IDS) ** 2).mean()) < 0.02


def test_scales_of_the_cache_that_have_no_place(
    tiny_llama3: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tiny_llama3("ct_fp8_static_kv_fp8")
    report = convert(folder, tmp_path / "out", BF16, allow_lossy=True)
    assert "the scales of the key-value cache are left out" in report.losses
    assert "k_scale" not in str(read_tensors(tmp_path / "out" / "model.safetensors").keys())


def test_scales_of_a_cache_that_is_not_asked_for(tmp_path: Path) -> None:
    folder = small_checkpoints.make("float8_kv", tmp_path / "in")
    with open_checkpoint(folder) as source:
        config = json.loads(json.dumps(source.config))
        del config["quantization_config"]["kv_cache_scheme"]
        rewrite(folder, config, {name: source.read(name) for name in source.tensors})
    with pytest.raises(ValueError, match="the scales of the key-value cache are left out"):
        convert(folder, tmp_path / "out", CT)
    report = convert(folder, tmp_path / "out", CT, allow_lossy=True)
    assert report.rounded == ()
    section = json.loads((tmp_path / "out" / "config.json").read_bytes())["quantization_config"]
    assert section["kv_cache_scheme"] is None


def test_the_bound_of_activations(tmp_path: Path) -> None:
    folder = small_checkpoints.make("plain", tmp_path / "in")
    with open_checkpoint(folder) as source:
        tensors = {name: source.read(name) for name in source.tensors}
        for name in [name for name in tensors if "_proj" in name]:
            weight = quantize_rtn(tensors[name].astype(np.float32), PRESETS["FP8_DYNAMIC"])
            tensors[name] = weight.codes
            tensors[f"{name}_scale"] = weight.scales
        section = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}
        rewrite(folder, source.config | {"quantization_config": section}, tensors)
    with pytest.raises(ValueError, match="upper bound of activations"):
        convert(folder, tmp_path / "out", CT)
    report = convert(folder, tmp_path / "out", CT, allow_lossy=True)
    assert set(report.schemes.values()) == {"FP8_DYNAMIC"}
    written = read_tensors(tmp_path / "out" / "model.safetensors")
    assert all(written[name].tobytes() == tensors[name].tobytes() for name in tensors)
    assert convert(folder, tmp_path / "native", NATIVE).lossless


def rewrite(folder: Path, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    from qllama_convert.writer import write_checkpoint

    write_checkpoint(folder, config=config, tensors=tensors, overwrite=True)


def test_a_zero_point_of_sixteen(tmp_path: Path) -> None:
    """GPTQ v1 can say it, nothing else can."""
    folder = small_checkpoints.make("gptq_v2", tmp_path / "in")
    with open_checkpoint(folder) as source:
        config = dict(source.config)
        config["quantization_config"] = config["quantization_config"] | {
            "checkpoint_format": "gptq"
        }
        tensors = {name: source.read(name) for name in source.tensors}
    path = "model.layers.0.mlp.down_proj"
    zeros = np.full((128, 2), 8, np.int16)
    scheme = PRESETS["W4A16_ASYM"]
    ones = QTensor(
        codes=np.zeros((128, 128), np.uint8),
        scales=np.ones((128, 2), np.float16),
        zeros=zeros,
        scheme=scheme,
        shape=(128, 256),
    )
    for suffix, array in gptq.write(ones, "gptq").items():
        tensors[f"{path}.{suffix}"] = array
    rewrite(folder, config, tensors)
    with (
        pytest.warns(CheckpointWarning),
        pytest.raises(ValueError, match=r"down_proj: a zero point"),
    ):
        convert(folder, tmp_path / "out", CT)
    with pytest.warns(CheckpointWarning):
        assert convert(folder, tmp_path / "native", NATIVE).lossless
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "native"]


# What is refused.


def test_arguments_that_do_not_fit(tmp_path: Path) -> None:
    plain = small_checkpoints.make("plain", tmp_path / "plain")
    with pytest.raises(ValueError, match="to='awq' is no form of a checkpoint; use compressed-t"):
        convert(plain, tmp_path / "out", "awq")
    with pytest.raises(ValueError, match="not quantized, and converting does not quantize"):
        convert(plain, tmp_path / "out", GPTQ)
    with pytest.raises(ValueError, match="exists; choose another folder, or pass overwrite=True"):
        convert(plain, plain, BF16)
    with pytest.raises(CheckpointError, match="there is no such folder"):
        convert(tmp_path / "nowhere", tmp_path / "out")
    assert list(tmp_path.iterdir()) == [plain]


def test_a_folder_converted_in_place(tmp_path: Path) -> None:
    folder = small_checkpoints.make("packed", tmp_path / "model")
    before = read_fingerprints(folder)
    convert(folder, folder, GPTQ, overwrite=True)
    assert read_fingerprints(folder) == before
    assert (folder / "quantize_config.json").exists()
    assert list(tmp_path.iterdir()) == [folder]


def test_a_damaged_source_writes_nothing(tmp_path: Path) -> None:
    folder = small_checkpoints.make("packed", tmp_path / "in")
    with open_checkpoint(folder) as source:
        tensors = {name: source.read(name) for name in source.tensors}
        tensors[f"{small_checkpoints.LM_HEAD}.weight"] = np.full((64, 128), np.nan, np.float32)
        rewrite(folder, source.config, tensors)
    with pytest.raises(CheckpointError, match="lm_head: tensor weight has an infinite or NaN"):
        convert(folder, tmp_path / "out", GPTQ)
    assert list(tmp_path.iterdir()) == [folder]


def test_split_schemes_are_for_native_alone(tmp_path: Path) -> None:
    folder = small_checkpoints.make("int8", tmp_path / "in")
    with open_checkpoint(folder) as source:
        tensors = {name: source.read(name) for name in source.tensors}
        path = "model.layers.0.self_attn.k_proj"
        del tensors[f"{path}.weight_scale"]
        tensors[f"{path}.weight"] = np.ones((64, 128), ml_dtypes.bfloat16)
        config = json.loads(json.dumps(source.config))
        config["quantization_config"]["ignore"].append(path)
        rewrite(folder, config, tensors)
    with pytest.raises(ValueError, match=r"k_proj is unquantized, .* so they need one scheme"):
        convert(folder, tmp_path / "out", CT)
    assert convert(folder, tmp_path / "out", NATIVE).lossless
    assert read_fingerprints(tmp_path / "out") == read_fingerprints(folder)


def test_the_card_says_what_it_became(tmp_path: Path) -> None:
    folder = small_checkpoints.make("tokenizer", tmp_path / "in")
    (folder / "README.md").write_text("---\nlicense: llama3.1\n---\n# The source\n")
    convert(folder, tmp_path / "out", NATIVE)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "license: llama3.1" in card
    assert "# out" in card
    assert "The source" not in card
    assert "llm.chat" in card


def test_notes_name_readers_that_do_not_take_it(tmp_path: Path) -> None:
    folder = small_checkpoints.make("gptq", tmp_path / "in")
    assert any("0.30.0" in note for note in convert(folder, tmp_path / "out", GPTQ).notes)
    assert replace(convert(folder, tmp_path / "n", NATIVE), notes=()).lossless
