"""Verification: good checkpoints are good, and each rule that is broken is named."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import oracle
import pytest
import small_checkpoints
from drafts import read_tensors
from qllama_convert import verify_logits
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.convert import convert
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_config import parse_quantization
from qllama_convert.verify import verify
from qllama_convert.writer import write_checkpoint

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError

Change = Callable[[dict[str, Any], dict[str, np.ndarray]], None]
UP = "model.layers.0.mlp.up_proj"


def with_tokenizer(folder: Path) -> Path:
    for name, content in small_checkpoints._tokenizer_files().items():
        (folder / name).write_bytes(content)
    return folder


def changed(kind: str, out: Path, change: Change) -> Path:
    """A small checkpoint with its config and tensors changed."""
    made = with_tokenizer(small_checkpoints.make(kind, out.with_name(f"{out.name}-source")))
    with open_checkpoint(made) as source:
        config = json.loads(json.dumps(source.config))
        tensors = {name: source.read(name) for name in source.tensors}
        change(config, tensors)
        names = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
        files: dict[str, bytes | Path] = {name: made / name for name in names}
        if (made / "quantize_config.json").exists():
            files["quantize_config.json"] = json.dumps(config["quantization_config"]).encode()
        write_checkpoint(out, config=config, tensors=tensors, files=files)
    shutil.rmtree(made)
    return out


def test_what_the_tools_wrote_is_good(tiny_llama3_kind: str, tiny_llama3_dir: Path) -> None:
    report = verify(tiny_llama3_dir)
    if tiny_llama3_kind == "ct_w4a16_g128_actorder_group":
        assert len(report.problems) == 1
        assert "actorder is 'group'" in report.problems[0]
    else:
        assert report.problems == ()
        assert report.ok
    assert report.comparison is None


@pytest.mark.parametrize("kind", ["gptq", "gptq_v2", "autofp8", "packed_asym", "mixed"])
@pytest.mark.parametrize("to", ["same", "native"])
def test_what_qllama_writes_is_good_without_a_word(kind: str, to: str, tmp_path: Path) -> None:
    folder = with_tokenizer(small_checkpoints.make(kind, tmp_path / "in"))
    form = {"gptq": "gptq", "gptq_v2": "gptq", "autofp8": "fp8"}.get(kind, "compressed-tensors")
    done = convert(folder, tmp_path / "out", "native" if to == "native" else form)
    report = verify(tmp_path / "out")
    assert report.ok
    assert report.notes == done.notes  # which readers do not take this form, and nothing else


def _set(*path: str, value: Any) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        for key in path[:-1]:
            config = config[key]
        config[path[-1]] = value

    return change


def _put(name: str, make: Callable[[np.ndarray | None], np.ndarray]) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = make(tensors.get(name))

    return change


def _drop(name: str) -> Change:
    def change(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        del tensors[name]

    return change


Q, GROUP = "quantization_config", ("quantization_config", "config_groups", "group_0")
ZEROS = np.zeros((256, 1), np.int8)
PROBLEMS: list[tuple[str, Change, str]] = [
    ("packed", _set(Q, "quantization_status", value="frozen"), "loads random weights"),
    ("packed", _set(Q, "format", value=None), "vLLM chooses its kernels by it"),
    ("packed", _set(*GROUP, "weights", "actorder", value="group"), "0.30.0 on refuse"),
    ("int8", _put(f"{UP}.weight_scale", lambda s: s[:, 0]), "takes scales only as"),
    ("packed", _drop(f"{UP}.weight_shape"), "needs weight_shape, which is missing: .*up_proj"),
    ("int8", _put(f"{UP}.weight_zero_point", lambda _: ZEROS), "vLLM has no place: .*up_proj"),
    ("packed_asym", _put(f"{UP}.weight_zero_point", lambda _: ZEROS), "not packed, as before"),
    ("packed", _put(f"{UP}.bias", lambda _: np.zeros(256, np.float32)), "vLLM has no place for it"),
    ("packed", _set(Q, "ignore", value=["lm_head", UP]), "says this Linear is not quantized"),
    ("packed", _drop(f"{UP}.weight_scale"), "tensor weight_scale is missing"),
    ("tied", _drop("model.layers.0.self_attn.q_proj.bias"), "q_proj.bias is missing"),
    ("packed", _put("model.extra", lambda _: ZEROS), "belong to no module of this Llama: model.ex"),
    ("packed", _set("model_type", value="qwen3"), "only model_type='llama'"),
    ("gptq", _set(Q, "sym", value=None), "lacks sym, which vLLM demands"),
    ("gptq", _put(f"{UP}.g_idx", lambda g: g + 9), "g_idx puts column"),
    ("autofp8", _put(f"{UP}.input_scale", lambda s: -s), "input_scale is -"),
    ("tied", _put("lm_head.weight", lambda _: np.ones((64, 128), np.float32)), "config.json ties"),
    ("float8_kv", _drop("model.layers.0.self_attn.v_scale"), "v_scale is missing"),
]


@pytest.mark.parametrize(("kind", "change", "message"), PROBLEMS)
def test_a_broken_rule_is_a_problem(
    kind: str, change: Change, message: str, tmp_path: Path
) -> None:
    import re

    report = verify(changed(kind, tmp_path / "out", change))
    assert not report.ok
    assert any(re.search(message, problem) for problem in report.problems), report.problems


def test_vllm_merges_whole_blocks_of_rows_and_equal_schemes(tmp_path: Path) -> None:
    # k and v have 64 rows, q has 128.
    report = verify(with_tokenizer(small_checkpoints.make("fp8_block", tmp_path / "in")))
    assert report.problems == (
        "vLLM merges q, k, v and gate, up, and needs whole blocks of rows: "
        "model.layers.0.self_attn.k_proj (64)",
    )

    def split(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        tensors[f"{UP}.weight"] = np.ones((256, 128), ml_dtypes.bfloat16)
        del tensors[f"{UP}.weight_scale"]
        config[Q]["ignore"].append(UP)

    report = verify(changed("int8", tmp_path / "out", split))
    assert any("up_proj is unquantized; vLLM runs them as one" in p for p in report.problems)


def test_all_problems_are_listed_not_the_first(tmp_path: Path) -> None:
    def change(config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
        config[Q]["quantization_status"] = "frozen"
        for name in ("q_proj", "o_proj"):
            del tensors[f"model.layers.0.self_attn.{name}.weight_scale"]
        tensors["model.norm.weight"] = np.full(128, np.nan, np.float32)
        tensors["extra.weight"] = ZEROS

    folder = changed("packed", tmp_path / "out", change)
    (folder / "tokenizer.json").unlink()
    report = verify(folder)
    wanted = (
        "quantization_status",
        "q_proj",
        "o_proj",
        "model.norm",
        "extra.weight",
        "no tokenizer",
    )
    for words in wanted:
        assert any(words in problem for problem in report.problems), words
    assert len(report.problems) == len(wanted)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "tokenizer.json").unlink(), "there is no tokenizer"),
        (lambda f: (f / "tokenizer.json").write_text("{"), "tokenizer.json: is not valid JSON"),
        (
            lambda f: (f / "tokenizer.json").write_text('{"added_tokens": [{"id": 99}]}'),
            "tokens 99 are beyond the 64",
        ),
        (lambda f: (f / "tokenizer.json").write_text('{"added_tokens": [1]}'), "no list of tokens"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "corrupt safetensors"),
        (lambda f: (f / "config.json").unlink(), "has no config.json"),
        (
            lambda f: (f / "config.json").write_text(
                (f / "config.json").read_text().replace("LlamaForCausalLM", "Llama")
            ),
            "vLLM finds no model",
        ),
    ],
)
def test_files_that_are_wrong(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    folder = with_tokenizer(small_checkpoints.make("packed", tmp_path / "in"))
    assert verify(folder).ok
    spoil(folder)
    report = verify(folder)
    assert [message in problem for problem in report.problems] == [True], report.problems


def test_index_and_metadata(tmp_path: Path) -> None:
    folder = with_tokenizer(small_checkpoints.make("mixed", tmp_path / "in"))
    assert not [note for note in verify(folder).notes if "total_size" in note]
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_bytes())
    content["metadata"]["total_size"] += 1
    index.write_text(json.dumps(content))
    report = verify(folder)
    assert report.ok
    assert any("total_size is" in note for note in report.notes)


# Beside transformers.


def test_an_interpreter_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = with_tokenizer(small_checkpoints.make("packed", tmp_path / "in"))
    monkeypatch.delenv(verify_logits.PYTHON_VARIABLE, raising=False)
    monkeypatch.setattr(verify_logits, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"there is no torch here .* --python or"):
        verify(folder, against="transformers")
    with pytest.raises(ValueError, match="is no interpreter"):
        verify(folder, against="transformers", python=tmp_path)
    with pytest.raises(ValueError, match=r"transformers cannot run in .*: exit status 0"):
        verify(folder, against="transformers", python=shutil.which("true"))
    monkeypatch.chdir("/")
    with pytest.raises(ValueError, match=r"transformers cannot run in .*: exit status 0"):
        verify(folder, against="transformers", python=os.path.relpath(shutil.which("true")))
    with pytest.raises(ValueError, match="against='vllm' is unknown; use transformers"):
        verify(folder, against="vllm")
    with pytest.raises(CheckpointError, match="there is no such folder"):
        verify(tmp_path / "nowhere")


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("kind", "compared_as"),
    [
        ("ct_w4a16_asym_g128", "the checkpoint itself"),
        ("autofp8_static", "converted to compressed-tensors, bit for bit"),
        ("gptq_w4_g128_desc_act", "dequantized to float32 here"),
    ],
)
def test_logits_are_those_of_transformers(
    kind: str, compared_as: str, tiny_llama3: Callable[[str], Path]
) -> None:
    report = verify(tiny_llama3(kind), against="transformers", python=oracle.interpreter())
    assert report.ok
    assert report.comparison is not None
    assert report.comparison.compared_as == compared_as
    assert report.comparison.tokens == 208
    exact = kind.startswith(("ct_w4", "gptq"))
    assert report.comparison.relative_rms < (1e-5 if exact else 1e-2)
    assert report.comparison.relative_rms_limit == (1e-4 if exact else 1e-2)


@pytest.mark.parametrize(("factor", "ok"), [(1.00001, True), (1.001, False)])
def test_another_model_is_noticed(
    factor: float, ok: bool, tiny_llama3: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny_llama3("ct_w4a16_g128")

    def other(python: str, stand_in: Path, ids: list[np.ndarray], temporary: Path) -> Any:
        llama = LlamaConfig.from_hf(json.loads((folder / "config.json").read_bytes()))
        with open_checkpoint(folder) as source:
            quantization = parse_quantization(source, linear_shapes(llama))
        logits = np.concatenate(verify_logits._our_logits(folder, llama, quantization, ids))
        return logits * np.float32(factor), ("another",)

    monkeypatch.setattr(verify_logits, "_their_logits", other)
    report = verify(folder, against="transformers", python=sys.executable)
    assert report.problems == ()
    assert report.ok == ok


@pytest.mark.oracle
def test_transformers_loads_every_export_with_the_golden_logits(
    tiny_llama3: Callable[[str], Path], tmp_path: Path
) -> None:
    """compressed-tensors' own forms as they are read and written again, AutoFP8 and GPTQ
    converted, and weights that were dequantized."""
    kinds = {
        "autofp8_static": "compressed-tensors",
        "bf16_original": "bf16",
        "ct_fp8_block": "compressed-tensors",
        "ct_fp8_dynamic": "compressed-tensors",
        "ct_fp8_static": "compressed-tensors",
        "ct_fp8_static_kv_fp8": "compressed-tensors",
        "ct_mxfp4a16": "bf16",
        "ct_w4a16_asym_g128": "compressed-tensors",
        "ct_w4a16_g128": "compressed-tensors",
        "ct_w8a16": "compressed-tensors",
        "ct_w8a8_int8": "compressed-tensors",
        "gptq_w4_g128_no_desc_act_asym": "compressed-tensors",
    }
    folders = []
    for kind, to in kinds.items():
        # By way of another form, where there is one, so that nothing is merely copied.
        source = tiny_llama3(kind)
        if to != "bf16":
            convert(source, tmp_path / f"{kind}-native", "native")
            source = tmp_path / f"{kind}-native"
        folders.append(convert(source, tmp_path / kind, to).output)
    golden = {kind: read_tensors(tiny_llama3(kind) / "expected.safetensors") for kind in kinds}
    ids = golden["bf16_original"]["input_ids_2"]
    script = """
        from transformers import AutoModelForCausalLM, CompressedTensorsConfig
        for folder in folders.tolist():
            options = {"dtype": torch.float32}
            if "asym" in folder:
                options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(folder, **options)
            with torch.no_grad():
                out[folder] = model(torch.from_numpy(ids).long()[None]).logits[0].numpy()
    """
    found = oracle.run(script, folders=np.array(folders), ids=ids)
    for kind, folder in zip(kinds, folders, strict=True):
        assert np.array_equal(golden[kind]["input_ids_2"], ids)
        expected = golden[kind]["logits_2"]
        limits = json.loads((tiny_llama3(kind) / "manifest.json").read_bytes())["tolerances"]
        error = np.sqrt(((found[folder] - expected) ** 2).mean() / (expected**2).mean())
        assert error <= limits["logits_fp32_compute"]["rel_rms"], kind
