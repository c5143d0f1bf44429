"""Exported checkpoints: the same bits in another folder, or no folder."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import small_checkpoints
from qllama_convert import writer
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.export import export_checkpoint
from qllama_convert.linear import LinearWeights, read_linear
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_config import parse_quantization
from qllama_convert.read_back import read_fingerprints

from qllama.config import LlamaConfig
from qllama.quantization.qtensor import QTensor
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS, QuantScheme

Q_PROJ, NORM = "model.layers.0.self_attn.q_proj", "model.norm"
ATTENTION = "model.layers.0.self_attn"


def round_to(out: Path, folder: Path, scheme: str | QuantScheme = "W4A16", **options: Any) -> Path:
    """The model in `folder`, its Linears but the head rounded, exported to `out`."""
    wanted = PRESETS[scheme] if isinstance(scheme, str) else scheme
    with open_checkpoint(folder) as source:
        shapes = linear_shapes(LlamaConfig.from_hf(source.config))

        def linears(path: str) -> LinearWeights:
            weight = read_linear(source, None, path, shapes[path]).weight
            assert isinstance(weight, np.ndarray)
            static = wanted.activations is not None and not wanted.activations.dynamic
            return LinearWeights(
                quantize_rtn(weight, wanted, input_scale=0.1 if static else None), None
            )

        given = {path: wanted for path in shapes if path != "lm_head"}
        made: dict[str, Any] = {"linears": linears, "schemes": given} | options
        return export_checkpoint(out, source=source, **made)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoints.make("plain", tmp_path_factory.mktemp("plain") / "plain")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its head is the embedding, and its attention has biases."""
    return small_checkpoints.make("tied", tmp_path_factory.mktemp("tied") / "tied")


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_bytes())


# What is written.


@pytest.mark.parametrize("scheme", PRESETS)
def test_every_scheme_reads_back(scheme: str, plain: Path, tmp_path: Path) -> None:
    out = round_to(tmp_path / "out", plain, scheme)
    with open_checkpoint(out) as written, open_checkpoint(plain) as source:
        shapes = linear_shapes(LlamaConfig.from_hf(written.config))
        quantization = parse_quantization(written, shapes)
        assert quantization is not None
        assert {path for path in shapes if path not in quantization.linears} == {"lm_head"}
        assert {spec.scheme for spec in quantization.linears.values()} == {PRESETS[scheme]}
        for path in quantization.linears:
            weight = read_linear(written, quantization, path, shapes[path]).weight
            assert isinstance(weight, QTensor)
            original = source.read(f"{path}.weight")
            expected = quantize_rtn(original, PRESETS[scheme])
            assert np.array_equal(weight.codes, expected.codes)
            assert np.array_equal(weight.scales, expected.scales)
            assert weight.scales.dtype == expected.scales.dtype
        for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
            assert written.read(name).tobytes() == source.read(name).tobytes()
        assert written.warnings == []
    assert "quantize_config.json" not in os.listdir(out)


def test_gptq_has_its_config_twice_and_half_precision_scales(plain: Path, tmp_path: Path) -> None:
    out = round_to(tmp_path / "out", plain, to="gptq", damp_percent=0.1)
    section = config_of(out)["quantization_config"]
    assert section == json.loads((out / "quantize_config.json").read_bytes())
    assert (section["damp_percent"], section["desc_act"]) == (0.1, False)
    with open_checkpoint(out) as written:
        assert written.tensors[f"{Q_PROJ}.scales"].dtype == "F16"


def test_scales_too_small_for_half_precision_are_kept(plain: Path, tmp_path: Path) -> None:
    tiny = quantize_rtn(np.full((128, 128), 1e-9, ml_dtypes.bfloat16), PRESETS["W4A16"])

    with open_checkpoint(plain) as source:
        shapes = linear_shapes(LlamaConfig.from_hf(source.config))

        def linears(path: str) -> LinearWeights:
            if path == Q_PROJ:
                return LinearWeights(tiny, None)
            return LinearWeights(
                quantize_rtn(source.read(f"{path}.weight"), PRESETS["W4A16"]), None
            )

        schemes = {path: PRESETS["W4A16"] for path in shapes if path != "lm_head"}
        out = export_checkpoint(
            tmp_path / "out", source=source, linears=linears, schemes=schemes, to="gptq"
        )
    with open_checkpoint(out) as written:
        assert np.array_equal(written.read(f"{Q_PROJ}.scales"), tiny.scales.T)


def test_biases_and_a_tied_head_come_along(tied: Path, tmp_path: Path) -> None:
    out = round_to(tmp_path / "out", tied)
    with open_checkpoint(out) as written, open_checkpoint(tied) as source:
        assert "lm_head.weight" not in written.tensors
        assert written.config["tie_word_embeddings"] is True
        assert written.config["quantization_config"]["ignore"] == ["lm_head"]
        bias = f"{Q_PROJ}.bias"
        assert written.read(bias).tobytes() == source.read(bias).tobytes()


def test_a_quantized_head_is_no_longer_tied(tied: Path, tmp_path: Path) -> None:
    with open_checkpoint(tied) as source:
        embedding = source.read("model.embed_tokens.weight")
        scheme = PRESETS["W8A16"]
        out = export_checkpoint(
            tmp_path / "out",
            source=source,
            linears=lambda path: LinearWeights(quantize_rtn(embedding, scheme), None),
            schemes={"lm_head": scheme},
        )
    assert config_of(out)["tie_word_embeddings"] is False
    assert "lm_head" not in config_of(out)["quantization_config"]["ignore"]


def test_norms_scales_of_the_cache_and_files(plain: Path, tmp_path: Path) -> None:
    norm = np.full(128, 0.5, np.float32)
    scales = {ATTENTION: (np.float32(0.03), np.array([0.25]))}
    out = round_to(
        tmp_path / "out",
        plain,
        "FP8",
        norms={NORM: norm},
        kv_scales=scales,
        files={"README.md": b"# A model\n"},
    )
    with open_checkpoint(out) as written:
        assert np.array_equal(written.read("model.norm.weight"), norm)
        found = {name: written.read(f"{ATTENTION}.{name}") for name in ("k_scale", "v_scale")}
        # 0.03 is no bfloat16, 0.25 is one.
        assert [a.dtype.name for a in found.values()] == ["float32", "bfloat16"]
        assert [float(a[0]) for a in found.values()] == [float(np.float32(0.03)), 0.25]
        scheme = written.config["quantization_config"]["kv_cache_scheme"]
        assert (scheme["type"], scheme["strategy"]) == ("float", "tensor")
    assert (out / "README.md").read_bytes() == b"# A model\n"

    legacy = round_to(tmp_path / "fp8", plain, "FP8", kv_scales=scales, to="fp8")
    assert config_of(legacy)["quantization_config"]["kv_cache_scheme"] == "static"
    heads = {ATTENTION: (np.array([0.5, 0.25]), np.array([1.0, 2.0]))}
    out = round_to(tmp_path / "heads", plain, "FP8", kv_scales=heads)
    with open_checkpoint(out) as written:
        assert written.read(f"{ATTENTION}.k_scale").shape == (2, 1, 1)


def test_tokenizer_and_licence_are_copied(tmp_path: Path) -> None:
    folder = small_checkpoints.make("tokenizer", tmp_path / "in")
    for name in ("LICENSE", "USE_POLICY.md", "tokenizer.safetensors", "notes.txt"):
        (folder / name).write_bytes(name.encode())
    out = round_to(tmp_path / "out", folder)
    copied = {path.name for path in out.iterdir()}
    assert copied == {
        "LICENSE", "USE_POLICY.md", "chat_template.jinja", "config.json", "generation_config.json",
        "model.safetensors", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    for name in copied - {"config.json", "model.safetensors"}:
        assert (out / name).read_bytes() == (folder / name).read_bytes()


def test_dequantized_weights_are_rounded_once(plain: Path, tmp_path: Path) -> None:
    out = round_to(tmp_path / "out", plain, "W8A16", to="bf16")
    assert "quantization_config" not in config_of(out)
    with open_checkpoint(out) as written, open_checkpoint(plain) as source:
        quantized = quantize_rtn(source.read(f"{Q_PROJ}.weight"), PRESETS["W8A16"])
        exact = quantized.codes.astype(np.float64) * np.repeat(
            quantized.scales.astype(float), 128, 1
        )
        assert np.array_equal(written.read(f"{Q_PROJ}.weight"), exact.astype(ml_dtypes.bfloat16))


def test_shards(plain: Path, tmp_path: Path) -> None:
    one = round_to(tmp_path / "one", plain)
    many = round_to(tmp_path / "many", plain, max_shard_bytes=20_000)
    assert len(list(many.glob("*.safetensors"))) > 3
    assert read_fingerprints(one) == read_fingerprints(many)


# What is refused, before anything is written.


def test_what_a_form_cannot_hold(plain: Path, tmp_path: Path) -> None:
    w4, w8a8, block = PRESETS["W4A16"], PRESETS["W8A8"], PRESETS["FP8_BLOCK"]
    linears = [f"model.layers.0.{name}" for name in (
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )]  # fmt: skip
    every = dict.fromkeys(linears, w4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"to": "gguf"}, "no form of a checkpoint; use compressed-tensors, gptq, fp8, bf16"),
        ({"schemes": {}}, "no Linear is quantized"),
        ({"schemes": {}, "to": "gptq"}, "no Linear is quantized"),
        ({"schemes": {"model.layers.7.mlp.up_proj": w4}}, "the model has no model.layers.7"),
        ({"schemes": every | {Q_PROJ: w8a8}}, "q_proj is W8A8.*k_proj is W4A16.*one scheme"),
        ({"schemes": {Q_PROJ: w4}}, "k_proj is unquantized"),
        (
            {"schemes": dict.fromkeys(linears, replace(w4, group_size=96))},
            "K=128, no multiple of the 96",
        ),
        ({"schemes": dict.fromkeys(linears, w8a8), "to": "gptq"}, "weight-only int4 and int8"),
        ({"schemes": every | {"lm_head": w4}, "to": "gptq"}, "see lm_head"),
        ({"schemes": dict.fromkeys(linears[:6], w4), "to": "gptq"}, "see model.layers.0.mlp.down"),
        (
            {"schemes": every | {linears[6]: block}, "to": "fp8"},
            "one scheme for all Linears, not FP8",
        ),
        ({"schemes": every, "to": "fp8"}, "quant_method fp8 holds FP8 per tensor"),
        ({"norms": {"model.layers.0": np.ones(128)}}, "norms: the model has no"),
        ({"norms": {NORM: np.ones(128)}}, "must be bfloat16, float16 or float32.*float64"),
        ({"norms": {NORM: np.full(128, np.nan, np.float32)}}, "infinite or NaN"),
        ({"kv_scales": {"model.layers.1.self_attn": (1, 1)}}, "every attention or for none"),
        ({"kv_scales": {ATTENTION: (np.ones(3), np.ones(3))}}, r"1 value each, or 2 each"),
        ({"kv_scales": {ATTENTION: (0.0, 1.0)}}, "finite and above zero"),
        ({"kv_scales": {ATTENTION: (1.0, 1.0)}, "to": "gptq"}, "cannot say that the cache"),
        ({"kv_scales": {ATTENTION: (1.0, 1.0)}, "to": "bf16"}, "cannot say that its cache"),
    ]

    def never(path: str) -> LinearWeights:
        raise AssertionError(f"{path} was computed")

    for options, message in cases:
        with open_checkpoint(plain) as source, pytest.raises(ValueError, match=message):
            export_checkpoint(
                tmp_path / "out",
                source=source,
                **{"linears": never, "schemes": every} | options,
            )
        assert list(tmp_path.iterdir()) == []


def test_linears_that_are_not_what_was_said(plain: Path, tmp_path: Path) -> None:
    zeros = np.zeros((128, 128), ml_dtypes.bfloat16)
    w4 = quantize_rtn(zeros, PRESETS["W4A16"])
    ordered = replace(w4, g_idx=np.zeros(128, np.int32))
    cases: list[tuple[Any, str, str]] = [
        (zeros, "compressed-tensors", "q_proj was to be W4A16, but its weight is bfloat16"),
        (quantize_rtn(zeros, PRESETS["W8A8"]), "compressed-tensors", "but its weight is W8A8"),
        (quantize_rtn(zeros[:64], PRESETS["W4A16"]), "gptq", r"has shape \[64, 128\]"),
        (replace(w4, scales=w4.scales * np.nan), "gptq", "scales are NaN"),
        (ordered, "compressed-tensors", "desc_act=True"),
        (ordered, "gptq", "desc_act=True"),
    ]
    for weight, to, message in cases:
        with pytest.raises(ValueError, match=message):
            round_to(
                tmp_path / "out",
                plain,
                to=to,
                linears=lambda path, w=weight: LinearWeights(w, None),
            )
        assert list(tmp_path.iterdir()) == []


def test_tensors_that_would_be_lost(plain: Path, tmp_path: Path) -> None:
    with open_checkpoint(plain) as source:
        tensors = {name: source.read(name) for name in source.tensors}
        tensors["model.layers.9.extra.weight"] = tensors["model.norm.other"] = np.ones(3)
        folder = writer.write_checkpoint(tmp_path / "in", config=source.config, tensors=tensors)
    with pytest.raises(
        ValueError, match=r"belong to no module of this Llama: model.layers.9.extra"
    ):
        round_to(tmp_path / "out", folder)


def test_a_bias_that_is_promised_and_missing(tied: Path, tmp_path: Path) -> None:
    with open_checkpoint(tied) as source:
        tensors = {name: source.read(name) for name in source.tensors}
        del tensors[f"{Q_PROJ}.bias"]
        folder = writer.write_checkpoint(tmp_path / "in", config=source.config, tensors=tensors)
    with pytest.raises(ValueError, match=r"q_proj\.bias is missing, but config\.json says"):
        round_to(tmp_path / "out", folder)
    assert list(tmp_path.iterdir()) == [folder]


def test_a_quantized_source_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = small_checkpoints.make("int8", tmp_path / "in")
    with open_checkpoint(folder) as source, pytest.raises(ValueError, match="given no scheme"):
        export_checkpoint(
            tmp_path / "out", source=source, linears=lambda path: pytest.fail(path), schemes={}
        )


# Whole, or not there.


@pytest.mark.parametrize("suffix", ["weight_packed", "weight_scale", "norm"])
def test_a_flipped_bit_is_found_before_the_folder_appears(
    suffix: str, plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def damage(folder: Path, tensors: Any, max_shard_bytes: int) -> None:
        def damaged() -> Any:
            for name, array in tensors:
                if name in (f"{Q_PROJ}.{suffix}", f"model.{suffix}.weight"):
                    array = array.copy()
                    array.reshape(-1).view(np.uint8)[5] ^= 1
                yield name, array

        write(folder, damaged(), max_shard_bytes)

    write = writer._write_weights
    monkeypatch.setattr(writer, "_write_weights", damage)
    with pytest.raises(OSError, match=r"reads back as something else: model\.") as caught:
        round_to(tmp_path / "out", plain)
    assert ("q_proj" in str(caught.value)) == (suffix != "norm")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_is_full(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    old = round_to(tmp_path / "out", plain, "W8A8")
    before = read_fingerprints(old)
    monkeypatch.setattr("qllama_convert.safetensors_file._write_all", full)
    with pytest.raises(OSError, match="No space left on device; nothing there was changed"):
        round_to(old, plain, overwrite=True)
    assert read_fingerprints(old) == before
    assert list(tmp_path.iterdir()) == [old]
    with pytest.raises(ValueError, match="exists; choose another folder"):
        round_to(old, plain)


def test_a_process_that_is_killed_leaves_the_old_folder(plain: Path, tmp_path: Path) -> None:
    old = round_to(tmp_path / "out", plain, "W8A8")
    before = read_fingerprints(old)
    script = """
        import os, signal, sys
        sys.path[:0] = sys.argv[3:]
        import test_export as t
        from qllama_convert import export
        fingerprint, calls = export.fingerprint_linear, []
        def fatal(linear):
            calls.append(linear)
            if len(calls) == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return fingerprint(linear)
        export.fingerprint_linear = fatal
        t.round_to(t.Path(sys.argv[2]), t.Path(sys.argv[1]), overwrite=True)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(plain), str(old), *sys.path],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert read_fingerprints(old) == before
    others = [path.name for path in tmp_path.iterdir() if path != old]
    assert len(others) == 1
    assert others[0].startswith(".out.")


def test_equal_models_give_equal_bytes(plain: Path, tmp_path: Path) -> None:
    folders = [round_to(tmp_path / name, plain) for name in ("a", "b")]
    one, two = ({path.name: path.read_bytes() for path in folder.iterdir()} for folder in folders)
    assert one == two


def test_every_kind_survives_as_what_it_is(
    tiny_llama3: Callable[[str], Path], tiny_llama3_kind: str, tmp_path: Path
) -> None:
    """Read, exported in its own form, read: codes, zeros, g_idx and scales to the bit."""
    folder = tiny_llama3(tiny_llama3_kind)
    with open_checkpoint(folder) as source:
        shapes = linear_shapes(LlamaConfig.from_hf(source.config))
        quantization = parse_quantization(source, shapes)
        specs = quantization.linears if quantization else {}
        if any("fp4" in spec.format for spec in specs.values()):
            pytest.skip("FP4 is read, not written")
        ordered = any(spec.act_order for spec in specs.values())
        method = quantization.method if quantization and not ordered else "gptq"
        attention = "model.layers.{}.self_attn.{}_scale".format
        layers = range(source.config["num_hidden_layers"])
        cached = attention(0, "k") in source.tensors
        out = export_checkpoint(
            tmp_path / "out",
            source=source,
            linears=lambda path: read_linear(source, quantization, path, shapes[path]),
            schemes={path: spec.scheme for path, spec in specs.items()},
            to=method if specs else "bf16",
            desc_act=ordered,
            kv_scales={
                f"model.layers.{i}.self_attn": tuple(source.read(attention(i, x)) for x in "kv")
                for i in (layers if cached else ())
            },
        )
        with open_checkpoint(out) as written:
            for name, info in source.tensors.items():
                # Zero points of version 1 of GPTQ become those of version 2.
                if name in written.tensors and not name.endswith(".qzeros"):
                    assert written.tensors[name].dtype == info.dtype
                    assert written.read(name).tobytes() == source.read(name).tobytes()
    assert read_fingerprints(out) == read_fingerprints(folder)
