"""`qllama.inspect`: what it says of each fixture, and what it finds odd."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from drafts import Q_PROJ, Draft, draft, read_tensors
from qllama_convert.checkpoint import Checkpoint, open_checkpoint
from qllama_convert.inspection import Inspection, inspect
from qllama_convert.linear import read_linear
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_config import parse_quantization

import qllama
from qllama import demo
from qllama.cli.inspect import report
from qllama.errors import CheckpointError
from qllama.quantization.qtensor import QTensor

# What the fixtures' README says of each: method, scheme, format, activation order.
KINDS = {
    "autofp8_static": ("fp8", "FP8", "fp8", False),
    "ct_fp8_block": ("compressed-tensors", "FP8_BLOCK", "float-quantized", False),
    "ct_fp8_dynamic": ("compressed-tensors", "FP8_DYNAMIC", "float-quantized", False),
    "ct_fp8_static": ("compressed-tensors", "FP8", "float-quantized", False),
    "ct_fp8_static_kv_fp8": ("compressed-tensors", "FP8", "float-quantized", False),
    "ct_mxfp4a16": ("compressed-tensors", "FP4 g32, A16", "mxfp4-pack-quantized", False),
    "ct_nvfp4a16": ("compressed-tensors", "FP4 g16, A16", "nvfp4-pack-quantized", False),
    "ct_w4a16_asym_g128": ("compressed-tensors", "W4A16_ASYM", "pack-quantized", False),
    "ct_w4a16_g128": ("compressed-tensors", "W4A16", "pack-quantized", False),
    "ct_w4a16_g128_actorder_group": ("compressed-tensors", "W4A16", "pack-quantized", True),
    "ct_w4a16_g128_actorder_weight": ("compressed-tensors", "W4A16", "pack-quantized", False),
    "ct_w8a16": ("compressed-tensors", "W8A16", "pack-quantized", False),
    "ct_w8a8_int8": ("compressed-tensors", "W8A8", "int-quantized", False),
    "gptq_w4_g128_desc_act": ("gptq", "W4A16", "gptq", True),
    "gptq_w4_g128_no_desc_act_asym": ("gptq", "W4A16_ASYM", "gptq", False),
}
NUM_PARAMETERS = 2 * 768 * 256 + 4 * (2 * 256**2 + 2 * 128 * 256 + 3 * 256 * 512 + 2 * 256) + 256


@pytest.fixture
def w4a16(tiny_llama3: Callable[[str], Path]) -> Draft:
    """One layer of the W4A16 fixture, to be changed."""
    return draft(tiny_llama3("ct_w4a16_g128"))


def quantized_part(found: Inspection) -> set[tuple[str, str, bool]]:
    return {(m.scheme, m.format, m.act_order) for m in found.modules if m.format != "plain"}


def test_it_says_of_each_fixture_what_its_makers_say(
    tiny_llama3_dir: Path, tiny_llama3_kind: str
) -> None:
    found = inspect(tiny_llama3_dir)
    assert found.num_parameters == NUM_PARAMETERS
    assert not found.tied_head
    if tiny_llama3_kind == "bf16_original":
        assert found.quant_method is None
        assert {m.scheme for m in found.modules} == {"BF16"}
        assert found.ignored == found.anomalies == ()
        return
    method, *rest = KINDS[tiny_llama3_kind]
    assert found.quant_method == method
    assert quantized_part(found) == {tuple(rest)}
    assert found.ignored == ("lm_head",)
    assert any("activation order" in text for text in found.anomalies) == rest[-1]
    assert (found.kv_cache_scheme is not None) == tiny_llama3_kind.endswith("kv_fp8")
    # 4 layers, keys and values, 2 heads of 64.
    assert found.kv_cache_bytes == 4 * 2 * 2 * 64 * (1 if found.kv_cache_scheme else 2)


def test_every_byte_of_the_file_is_counted(tiny_llama3_dir: Path) -> None:
    file = tiny_llama3_dir / "model.safetensors"
    with file.open("rb") as stream:
        header = int.from_bytes(stream.read(8), "little")
    tensors = read_tensors(file)
    of_cache = sum(
        a.nbytes for name, a in tensors.items() if name.endswith((".k_scale", ".v_scale"))
    )
    assert inspect(tiny_llama3_dir).bytes_on_disk == file.stat().st_size - 8 - header - of_cache


def test_memory_is_what_loading_really_makes(tiny_llama3_dir: Path) -> None:
    found = {module.path: module for module in inspect(tiny_llama3_dir).modules}
    with open_checkpoint(tiny_llama3_dir) as checkpoint:
        shapes = linear_shapes(inspect(tiny_llama3_dir).config)
        quantization = parse_quantization(checkpoint, shapes)
        for path, shape in shapes.items():
            weight = read_linear(checkpoint, quantization, path, shape).weight
            assert isinstance(weight, QTensor) == (found[path].format != "plain")
            assert found[path].bytes_in_memory == weight.nbytes, path


def test_bits_per_weight_count_scales(tiny_llama3: Callable[[str], Path]) -> None:
    found = inspect(tiny_llama3("ct_w4a16_g128"))
    q_proj = next(module for module in found.modules if module.path == Q_PROJ)
    shape_tensor = 2 * 64 / math.prod(q_proj.shape)
    assert q_proj.bits_per_weight == pytest.approx(4 + 16 / 128 + shape_tensor)


def test_weights_are_not_read(tiny_llama3_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    whole = Checkpoint.read

    def spy(self: Checkpoint, name: str) -> np.ndarray:
        read.append(name.rpartition(".")[2])
        return whole(self, name)

    monkeypatch.setattr(Checkpoint, "read", spy)
    inspect(tiny_llama3_dir)
    assert set(read) <= {
        "weight_scale", "scales", "input_scale", "g_idx", "weight_g_idx", "k_scale", "v_scale",
    }  # fmt: skip


def test_the_embedded_model_and_the_public_name() -> None:
    found = qllama.inspect(demo.model_path())
    assert found.tied_head
    assert quantized_part(found) == {("W4A16", "pack-quantized", False)}
    assert found.anomalies == ()


def test_anomalies_of_scales(w4a16: Draft, tmp_path: Path) -> None:
    zero = w4a16.tensors[f"{Q_PROJ}.weight_scale"].copy()
    zero[:3, 0] = 0
    w4a16.tensors[f"{Q_PROJ}.weight_scale"] = zero
    name = "model.layers.0.mlp.up_proj"
    bad = w4a16.tensors[f"{name}.weight_scale"].copy()
    bad[5, 1] = np.inf
    w4a16.tensors[f"{name}.weight_scale"] = bad
    found = inspect(w4a16.save(tmp_path / "m"))
    assert any(f"{Q_PROJ} (3 of {zero.size})" in text for text in found.anomalies)
    assert any(name in text and "infinite" in text for text in found.anomalies)


def test_anomalies_of_tensors(w4a16: Draft, tmp_path: Path) -> None:
    del w4a16.tensors["model.layers.0.input_layernorm.weight"]
    w4a16.tensors["model.layers.7.mystery.weight"] = np.zeros(3, np.float32)
    text = "\n".join(inspect(w4a16.save(tmp_path / "m")).anomalies)
    assert "model.layers.0.input_layernorm" in text
    assert "model.layers.7.mystery.weight" in text


def test_anomalies_of_schemes(
    w4a16: Draft, tmp_path: Path, tiny_llama3: Callable[[str], Path]
) -> None:
    original = draft(tiny_llama3("bf16_original")).tensors
    eight_bit = draft(tiny_llama3("ct_w8a8_int8"))
    plain, int8 = "model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"
    for path, source in ((plain, original), (int8, eight_bit.tensors)):
        for name in [name for name in w4a16.tensors if name.startswith(path)]:
            del w4a16.tensors[name]
        w4a16.tensors |= {name: a for name, a in source.items() if name.startswith(path)}
    w4a16.quantization["ignore"].append(plain)
    w4a16.quantization["config_groups"]["group_1"] = eight_bit.group() | {
        "targets": [int8],
        "format": "int-quantized",
    }
    found = inspect(w4a16.save(tmp_path / "m"))
    assert found.ignored == (plain, "lm_head")
    assert any("mixed schemes: W4A16 (5 Linears), W8A8 (1 Linears)" in a for a in found.anomalies)
    assert any("1 Linears of decoder layers" in a and plain in a for a in found.anomalies)


def test_a_head_beside_tied_embeddings_and_a_dtype_that_differs(
    w4a16: Draft, tmp_path: Path
) -> None:
    w4a16.config["tie_word_embeddings"] = True
    norm = "model.norm.weight"
    w4a16.tensors[norm] = w4a16.tensors[norm].astype(np.float32)
    text = "\n".join(inspect(w4a16.save(tmp_path / "m")).anomalies)
    assert "lm_head is stored (BF16) although tie_word_embeddings is true" in text
    assert "1 modules are stored as F32, config.json says bfloat16" in text


def test_cache_scales_nobody_asks_for(tiny_llama3: Callable[[str], Path], tmp_path: Path) -> None:
    made = draft(tiny_llama3("ct_fp8_static"))
    for name in ("k_scale", "v_scale"):
        made.tensors[f"model.layers.0.self_attn.{name}"] = np.ones(1, ml_dtypes.bfloat16)
    assert any("FP8 key-value cache" in a for a in inspect(made.save(tmp_path / "m")).anomalies)


def test_warnings_of_the_config_become_anomalies(w4a16: Draft, tmp_path: Path) -> None:
    w4a16.quantization["novelty"] = 1  # issues a CheckpointWarning, which here would be an error
    assert any("novelty" in text for text in inspect(w4a16.save(tmp_path / "m")).anomalies)


def test_what_cannot_be_read_is_an_error(w4a16: Draft, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no such folder"):
        inspect(tmp_path / "nowhere")
    w4a16.quantization["config_groups"]["group_0"]["weights"]["num_bits"] = 5
    with pytest.raises(CheckpointError, match="num_bits"):
        inspect(w4a16.save(tmp_path / "m"))


def test_the_report_sums_up_layers_that_are_alike(tiny_llama3: Callable[[str], Path]) -> None:
    found = inspect(tiny_llama3("ct_w8a8_int8"))
    short, full = report(found), report(found, every=True)
    assert "layers 0-3, each" in short
    assert short.count("self_attn.q_proj") == 1
    assert full.count("self_attn.q_proj") == 4
    assert "layer 3" in full


def test_a_layer_that_differs_stands_alone(
    w4a16: Draft, tiny_llama3: Callable[[str], Path]
) -> None:
    whole = inspect(tiny_llama3("ct_w4a16_g128"))
    other = inspect(tiny_llama3("ct_w8a8_int8"))
    modules = tuple(
        theirs if ours.path.startswith("model.layers.1.") else ours
        for ours, theirs in zip(whole.modules, other.modules, strict=True)
    )
    text = report(Inspection(**{**vars(whole), "modules": modules}))
    assert [line for line in text.splitlines() if line.startswith("layer")] == [
        "layer 0",
        "layer 1",
        "layers 2-3, each",
    ]


def test_the_json_is_complete(tiny_llama3: Callable[[str], Path]) -> None:
    from qllama.cli.inspect import as_json

    found = inspect(tiny_llama3("ct_w4a16_g128"))
    read = json.loads(json.dumps(as_json(found)))
    assert read["bytes_on_disk"] == found.bytes_on_disk
    assert read["config"]["rope_scaling"]["rope_type"] == "llama3"
    assert len(read["modules"]) == len(found.modules)
