"""`qllama.quantize` on whole models: what others make of what it writes, and what it refuses."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from drafts import read_tensors as read_file
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.linear import read_linear
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_config import parse_quantization
from qllama_convert.writer import write_checkpoint
from quantize_cases import digests, float_checkpoint, float_tensors, token_ids
from small_checkpoints import CONFIG

import qllama
from qllama.config import LlamaConfig
from qllama.gptq import pipeline
from qllama.gptq.report import QuantizationReport
from qllama.gptq.walk import Placement
from qllama.llm import LLM
from qllama.quantization.qtensor import QTensor

# Too little data is warned of, and these tests have little.
pytestmark = pytest.mark.filterwarnings("ignore:.*calibration")

EXPORTS: dict[str, dict[str, Any]] = {
    "W4A16": {"scheme": "W4A16"},
    "W4A16 channel": {"scheme": "W4A16", "group_size": -1},
    "W4A16_ASYM": {"scheme": "W4A16_ASYM"},
    "W8A16": {"scheme": "W8A16", "group_size": 64, "actorder": None, "observer": "absmax"},
    "W8A8": {"scheme": "W8A8", "smoothquant_strength": 0.0},
    "W8A8 smooth": {"scheme": "W8A8"},
    "FP8": {"scheme": "FP8"},
    "FP8 cache": {"scheme": "FP8", "kv_cache_scheme": "fp8"},
    "FP8_DYNAMIC": {"scheme": "FP8_DYNAMIC"},
    "FP8_BLOCK": {"scheme": "FP8_BLOCK"},
    "mixed": {
        "recipe": {
            "scheme": "W4A16",
            "rules": [{"targets": ["re:.*down_proj"], "scheme": "W8A8"}],
            "ignore": ["lm_head", "re:model.layers.1.self_attn.*"],
        }
    },
}
CALIBRATED = [name for name in EXPORTS if name not in ("FP8_DYNAMIC", "FP8_BLOCK")]
# Each is compiled for anew. These show what the others show in a part.
SELDOM = ("W4A16 channel", "W8A16", "W8A8", "FP8", "FP8_DYNAMIC")


@pytest.fixture(scope="module")
def exported(
    tiny_llama3: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, QuantizationReport]]:
    """The tiny Llama, quantized in one of the ways of `EXPORTS`; each is made once."""
    folder = tmp_path_factory.mktemp("exports")
    source = tiny_llama3("bf16_original")
    made: dict[str, QuantizationReport] = {}

    def export(name: str) -> tuple[Path, QuantizationReport]:
        output = folder / name
        if name not in made:
            data = {"dataset": tiny_sequences()} if name in CALIBRATED else {}
            made[name] = qllama.quantize(source, output, **data, **EXPORTS[name])
        return output, made[name]

    return export


def tiny_sequences() -> list[list[int]]:
    """Of several lengths, so that some are padded."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, 700, length).tolist() for length in (64, 20, 64, 33, 50, 64, 41, 64)]


# -- what others make of it ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_ids(tiny_llama3: Callable[[str], Path]) -> np.ndarray:
    return read_file(tiny_llama3("bf16_original") / "expected.safetensors")["input_ids_2"]


@pytest.fixture(scope="module")
def their_logits(
    exported: Any, text_ids: np.ndarray, request: pytest.FixtureRequest
) -> dict[str, np.ndarray]:
    """Logits of every export that is tested, in one process: importing transformers takes long."""
    tests = (item for item in request.session.items if isinstance(item, pytest.Function))
    wanted = [t.callspec.params["name"] for t in tests if "their_logits" in t.fixturenames]
    return oracle.run(
        """
        from transformers import AutoModelForCausalLM, CompressedTensorsConfig
        for name, folder in zip(map(str, names), map(str, folders)):
            how = {}
            if "ASYM" in name:
                how["quantization_config"] = CompressedTensorsConfig(dequantize=True)
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **how)
            with torch.no_grad():
                out[name] = model(torch.from_numpy(ids)[None]).logits[0].numpy()
        """,
        names=np.array(wanted),
        folders=np.array([str(exported(name)[0]) for name in wanted]),
        ids=text_ids,
    )


@pytest.mark.oracle
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in SELDOM else []) for name in EXPORTS],
)
def test_transformers_has_the_same_logits(
    exported: Any, their_logits: dict[str, np.ndarray], text_ids: np.ndarray, name: str
) -> None:
    with LLM(
        exported(name)[0],
        dtype="float32",
        backend="reference",
        activation_semantics="compressed-tensors",
    ) as llm:
        found = llm.logits(text_ids)
    expected = their_logits[name]
    rel_rms = np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean())
    weight_only = name.startswith(("W4", "W8A16"))
    assert rel_rms < (1e-4 if weight_only else 1e-2)


@pytest.mark.oracle
@pytest.mark.parametrize("name", ["W4A16", "W8A8 smooth"])
def test_losses_are_those_on_the_inputs_of_the_finished_model(
    exported: Any, tiny_llama3: Callable[[str], Path], name: str
) -> None:
    """Every Linear is calibrated on what the quantized ones before it make: so its inputs are those
    that it has in the finished model, which transformers runs on the same texts."""
    folder, report = exported(name)
    sequences = tiny_sequences()
    paths = [linear.path for linear in report.linears]
    arrays = {f"s{i}": np.array(ids) for i, ids in enumerate(sequences)}
    found = oracle.run(
        """
        from transformers import AutoModelForCausalLM
        load = lambda path: AutoModelForCausalLM.from_pretrained(str(path), dtype=torch.float32)
        model, original = load(folder), load(source)
        total = {}
        def hook(path):
            def see(module, inputs):
                x = inputs[0].reshape(-1, inputs[0].shape[-1]).double()
                total[path] = total.get(path, 0) + x.T @ x
            return see
        for path in map(str, paths):
            model.get_submodule(path).register_forward_pre_hook(hook(path))
        tokens = 0
        with torch.no_grad():
            for i in range(int(count)):
                model(torch.from_numpy(arrays[f"s{i}"])[None])
                tokens += len(arrays[f"s{i}"])
        losses = []
        for path in map(str, paths):
            h = total[path] / tokens
            norm = {"q": "input", "k": "input", "v": "input",
                    "gate": "post_attention", "up": "post_attention"}.get(
                        path.rsplit(".", 1)[1].removesuffix("_proj"))
            w = original.get_submodule(path).weight.double()
            if norm is not None:  # SmoothQuant: what the norm was divided by
                name = ".".join(path.split(".")[:3]) + f".{norm}_layernorm"
                before = original.get_submodule(name).weight.double()
                w = (w * (before / model.get_submodule(name).weight.double())).bfloat16().double()
            d = w - model.get_submodule(path).weight.double()
            losses.append([((m @ h) * m).sum().item() for m in (d, w)])
        out["losses"] = np.array(losses)
        """,
        folder=np.array(str(folder)),
        source=np.array(str(tiny_llama3("bf16_original"))),
        paths=np.array(paths),
        count=np.array(len(sequences)),
        **arrays,
    )["losses"]
    ours = np.array([[x.figures.loss, x.figures.output_energy] for x in report.linears])
    assert {linear.figures.tokens for linear in report.linears} == {sum(map(len, sequences))}
    # int8 activations are rounded a little differently there.
    np.testing.assert_allclose(ours, found, rtol=2e-3 if name == "W4A16" else 3e-2)


# -- what is written -------------------------------------------------------------------------------


def read_tensors(folder: Path) -> dict[str, np.ndarray]:
    return read_file(folder / "model.safetensors")


def quantized(folder: Path) -> dict[str, QTensor]:
    with open_checkpoint(folder) as checkpoint:
        shapes = linear_shapes(LlamaConfig.from_hf(checkpoint.config))
        quantization = parse_quantization(checkpoint, shapes)
        weights = {
            path: read_linear(checkpoint, quantization, path, shape).weight
            for path, shape in shapes.items()
        }
    return {path: weight for path, weight in weights.items() if isinstance(weight, QTensor)}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return float_checkpoint(tmp_path_factory.mktemp("source") / "model")


def test_equal_arguments_give_equal_bytes(source: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        report = qllama.quantize(source, tmp_path / name / "out", dataset=token_ids())
    assert digests(tmp_path / "a" / "out") == digests(tmp_path / "b" / "out")
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["out"]  # no journal is left
    written = (tmp_path / "b" / "out" / "quantization_report.json").read_text()
    assert QuantizationReport.from_json(written).linears == report.linears
    files = [path.stat().st_size for path in (tmp_path / "b" / "out").glob("*.safetensors")]
    assert report.bytes_after == pytest.approx(sum(files), rel=0.1)  # and headers


@pytest.mark.parametrize("on_device", [True, False])
def test_where_arrays_lie_makes_no_difference(
    source: Path, tmp_path: Path, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    qllama.quantize(source, tmp_path / "kept", dataset=token_ids())
    placement = Placement(on_device=on_device, keep_swiglu=not on_device)
    monkeypatch.setattr(pipeline, "place", lambda *args: placement)
    report = qllama.quantize(source, tmp_path / "other", dataset=token_ids())
    expected, found = quantized(tmp_path / "kept"), quantized(tmp_path / "other")
    assert all(linear.figures.rung == "fp32" for linear in report.linears)
    for path, weight in expected.items():
        np.testing.assert_array_equal(found[path].codes, weight.codes)


def test_gptq_format_holds_the_same_weights(source: Path, tmp_path: Path) -> None:
    """Read as the format is described: eight codes to a word along K, low nibbles first, stored
    with an offset of 8, and zero points one too small."""
    qllama.quantize(source, tmp_path / "ct", dataset=token_ids())
    qllama.quantize(source, tmp_path / "gptq", dataset=token_ids(), format="gptq")
    tensors = read_tensors(tmp_path / "gptq")
    for path, weight in quantized(tmp_path / "ct").items():
        words = tensors[f"{path}.qweight"].view(np.uint32)
        codes = (words[:, None, :] >> (4 * np.arange(8, dtype=np.uint32))[None, :, None]) & 15
        codes = codes.reshape(-1, words.shape[1]).astype(np.float64)
        assert (tensors[f"{path}.qzeros"].view(np.uint32) == 0x77777777).all()
        scales = np.repeat(tensors[f"{path}.scales"].astype(np.float64), 128, axis=0)
        expected = np.asarray(weight.dequantize())
        np.testing.assert_allclose(((codes - 8) * scales).T, expected, rtol=1e-3, atol=1e-6)


def test_static_scales_are_the_largest_inputs(source: Path, tmp_path: Path) -> None:
    """Of the first layer, whose inputs need no model to be computed."""
    qllama.quantize(source, tmp_path / "out", scheme="FP8", algorithm="rtn", dataset=token_ids())
    tensors = {k: v.astype(np.float64) for k, v in read_tensors(source).items()}
    x = tensors["model.embed_tokens.weight"][np.concatenate(token_ids())]
    x /= np.sqrt((x**2).mean(axis=1, keepdims=True) + CONFIG["rms_norm_eps"])
    x *= tensors["model.layers.0.input_layernorm.weight"]
    found = quantized(tmp_path / "out")
    for name in ("q_proj", "k_proj", "v_proj"):
        weight = found[f"model.layers.0.self_attn.{name}"]
        np.testing.assert_allclose(weight.input_scale, np.abs(x).max() / 448, rtol=1e-6)


def test_smoothquant_changes_no_output_but_the_outliers(source: Path, tmp_path: Path) -> None:
    report = qllama.quantize(source, tmp_path / "out", scheme="W8A8", dataset=token_ids())
    before, after = read_tensors(source), read_tensors(tmp_path / "out")
    norm = "model.layers.0.input_layernorm.weight"
    gains = [tensors[norm].astype(np.float64) for tensors in (before, after)]
    assert np.abs(gains[1]).max() / np.median(gains[1]) < 0.3 * gains[0].max() / np.median(gains[0])
    # The norm and what reads it, taken together, are what they were, to the step of int8.
    weight = quantized(tmp_path / "out")["model.layers.0.self_attn.q_proj"]
    original = before["model.layers.0.self_attn.q_proj.weight"].astype(np.float64)
    error = np.asarray(weight.dequantize()) * gains[1] - original * gains[0]
    assert np.sqrt((error**2).mean() / ((original * gains[0]) ** 2).mean()) < 0.02
    plain = qllama.quantize(
        source, tmp_path / "plain", scheme="W8A8", smoothquant_strength=0, dataset=token_ids()
    )
    assert report.linears[0].figures.output_energy == pytest.approx(
        plain.linears[0].figures.output_energy, rel=1e-2
    )


def test_the_head_can_be_quantized_too(source: Path, tmp_path: Path) -> None:
    report = qllama.quantize(source, tmp_path / "out", dataset=token_ids(), ignore=())
    assert report.linears[-1].path == "lm_head"
    assert report.linears[-1].figures.loss_ratio < 0.9
    assert "lm_head" in quantized(tmp_path / "out")


def test_float16_and_biases_survive(tmp_path: Path) -> None:
    config = CONFIG | {"torch_dtype": "float16", "attention_bias": True}
    tensors = {k: v.astype(np.float16) for k, v in float_tensors(config).items()}
    rng = np.random.default_rng(1)
    for path, (n, _) in linear_shapes(LlamaConfig.from_hf(config)).items():
        if "self_attn" in path:
            tensors[f"{path}.bias"] = rng.normal(size=n).astype(np.float16)
    write_checkpoint(tmp_path / "in", config=config, tensors=tensors)
    qllama.quantize(tmp_path / "in", tmp_path / "out", dataset=token_ids())
    weights = quantized(tmp_path / "out")
    assert {weight.scales.dtype for weight in weights.values()} == {np.dtype(np.float16)}
    written = read_tensors(tmp_path / "out")
    for name, array in tensors.items():
        if name.endswith(".bias"):
            np.testing.assert_array_equal(written[name], array)
    with LLM(tmp_path / "out") as llm, LLM(tmp_path / "in") as original:
        found, expected = llm.logits([1, 2, 3, 4]), original.logits([1, 2, 3, 4])
    assert np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()) < 0.2


def test_dry_run_writes_nothing(source: Path, tmp_path: Path) -> None:
    report = qllama.quantize(source, tmp_path / "out", dataset=token_ids(), dry_run=True)
    assert not list(tmp_path.iterdir())
    assert report.linears == ()
    assert any("calibration tokens" in note for note in report.notes)
    done = qllama.quantize(source, tmp_path / "out", dataset=token_ids())
    assert done.sizes == report.sizes


# -- what is refused, before anything is computed --------------------------------------------------


def nothing_computed(*_: Any, **__: Any) -> None:
    pytest.fail("the run began")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"dataset": None}, "dataset"),
        ({"scheme": "W5A16"}, "W4A16, W4A16_ASYM"),
        ({"group_size": 96}, r"self_attn\.q_proj has K=128 .*group_size=96.*128, 64, 32"),
        ({"actorder": "group"}, "actorder .*'group'"),
        ({"observer": "minmax"}, "observer"),
        ({"format": "gguf"}, "gguf.*compressed-tensors, gptq, fp8"),
        ({"format": "gptq", "scheme": "W8A8"}, "GPTQ holds weight-only"),
        ({"format": "gptq", "kv_cache_scheme": "fp8"}, "GPTQ"),
        ({"ignore": ["re:.*q_proj", "lm_head"]}, "q_proj and .*k_proj would be quantized differ"),
        ({"ignore": ["re:.*"]}, "nothing to quantize"),
        ({"dataset": [[1, 2, 300]]}, "300"),
        ({"dataset": ["a text"]}, "no tokenizer"),
    ],
)
def test_impossible_wishes(
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setattr(pipeline, "_run", nothing_computed)
    with pytest.raises(ValueError, match=says):
        qllama.quantize(source, tmp_path / "out", **({"dataset": token_ids()} | arguments))
    assert not list(tmp_path.iterdir())


def test_a_quantized_model_is_refused(source: Path, tmp_path: Path) -> None:
    qllama.quantize(source, tmp_path / "once", scheme="FP8_DYNAMIC")
    with pytest.raises(qllama.CheckpointError, match=r"quantized already.*convert .* --to bf16"):
        qllama.quantize(tmp_path / "once", tmp_path / "twice", scheme="FP8_DYNAMIC")


def spoiled(tensors: dict[str, np.ndarray], how: str) -> dict[str, np.ndarray]:
    path = "model.layers.1.mlp.up_proj.weight"
    match how:
        case "missing":
            return {name: array for name, array in tensors.items() if name != path}
        case "shape":
            return tensors | {path: tensors[path][:-1]}
        case "stranger":
            return tensors | {"model.layers.2.mlp.up_proj.weight": tensors[path]}
        case _:
            broken = tensors[path].copy()
            broken[0, 0] = np.nan
            return tensors | {path: broken}


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("missing", "model.layers.1.mlp.up_proj.weight is missing"),
        ("shape", r"up_proj.weight is BF16 \[255, 128\]"),
        ("stranger", "belong to no module.*model.layers.2.mlp.up_proj.weight"),
        ("nan", r"model\.layers\.1\.mlp\.up_proj.*NaN"),
    ],
)
@pytest.mark.parametrize("scheme", ["W4A16", "FP8_DYNAMIC"])
def test_a_damaged_model_is_refused(tmp_path: Path, how: str, says: str, scheme: str) -> None:
    config = CONFIG | {"num_hidden_layers": 2}
    write_checkpoint(tmp_path / "in", config=config, tensors=spoiled(float_tensors(config), how))
    data = {"dataset": token_ids()} if scheme == "W4A16" else {}
    with pytest.raises(ValueError, match=says):
        qllama.quantize(tmp_path / "in", tmp_path / "out", scheme=scheme, **data)
    assert not (tmp_path / "out").exists()


def test_a_model_that_overflows_stops_the_run(tmp_path: Path) -> None:
    config = CONFIG | {"num_hidden_layers": 1}
    tensors = float_tensors(config)
    for name in ("post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj"):
        tensors[f"model.layers.0.{name}.weight"][:] = 6e4
    write_checkpoint(tmp_path / "in", config=config, tensors=tensors)
    with pytest.raises(ValueError, match=r"down_proj: .* make inputs that are NaN"):
        qllama.quantize(tmp_path / "in", tmp_path / "out", dataset=token_ids())
