"""benchmarks/make_checkpoint.py: what it writes is valid, of the shape and scheme asked for."""

import json
from pathlib import Path
from typing import Any

import bench_scripts
import numpy as np
import oracle
import pytest
from qllama_convert.checkpoint import Checkpoint, open_checkpoint
from qllama_convert.linear import read_linear
from qllama_convert.names import LM_HEAD, linear_shapes
from qllama_convert.quantization_config import Quantization, parse_quantization

from qllama import LLM, demo
from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.quantization.qtensor import QTensor
from qllama.quantization.rtn import quantize_rtn

make_checkpoint = bench_scripts.load("make_checkpoint")
RECIPES, SHAPES = make_checkpoint.RECIPES, make_checkpoint.SHAPES

TINY = {
    "head_dim": 64,
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
BY_COMPRESSED_TENSORS = [
    name for name, recipe in RECIPES.items() if recipe and recipe.method == "compressed-tensors"
]


def random_checkpoint(out: Path, scheme: str, **arguments: Any) -> Path:
    return make_checkpoint.random_checkpoint(out, shape=TINY, scheme=scheme, **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def parsed(checkpoint: Checkpoint) -> Quantization:
    shapes = linear_shapes(LlamaConfig.from_hf(checkpoint.config))
    quantization = parse_quantization(checkpoint, shapes)
    assert quantization is not None
    return quantization


@pytest.mark.parametrize("scheme", RECIPES)
def test_a_random_checkpoint_of_every_scheme_runs(scheme: str, tmp_path: Path) -> None:
    out = random_checkpoint(tmp_path / "out", scheme)
    recipe = RECIPES[scheme]
    with LLM(out, max_model_len=16) as llm:  # loads strictly, and warnings are errors
        config = llm.config
        for key, value in TINY.items():
            assert getattr(config, key) == value
        if recipe is None:
            assert llm.quantization is None
        else:
            assert llm.quantization is not None
            assert llm.quantization.method == recipe.method
            found = {path: spec.scheme for path, spec in llm.quantization.linears.items()}
            linears = [path for path in linear_shapes(config) if path != LM_HEAD]
            assert found == dict.fromkeys(linears, recipe.scheme)
        logits = llm.logits(np.arange(16) * 20)
    # What this initialisation gives: centred, with the spread of D products with N(0, 0.02²).
    assert np.isfinite(logits).all()
    assert abs(logits.mean()) < 0.05
    assert logits.std() == pytest.approx(0.02 * 256**0.5, rel=0.15)


@pytest.mark.parametrize("scheme", [name for name, recipe in RECIPES.items() if recipe])
def test_random_weights_are_spread_like_real_ones(scheme: str, tmp_path: Path) -> None:
    with open_checkpoint(random_checkpoint(tmp_path / "out", scheme)) as checkpoint:
        shapes = linear_shapes(LlamaConfig.from_hf(checkpoint.config))
        quantization = parsed(checkpoint)
        groups = []
        for path in quantization.linears:
            weight = read_linear(checkpoint, quantization, path, shapes[path]).weight
            assert isinstance(weight, QTensor)
            assert np.asarray(weight.dequantize()).std() == pytest.approx(0.02, rel=0.3)
            groups.append(weight.g_idx)
    reordered = RECIPES[scheme].desc_act
    assert all((g_idx is not None) == reordered for g_idx in groups)


def test_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    one, two, three = (
        random_checkpoint(tmp_path / str(i), "W4A16", seed=seed) for i, seed in enumerate([0, 0, 1])
    )
    assert contents(one) == contents(two) != contents(three)


@pytest.mark.parametrize("shape", SHAPES)
def test_published_shapes(shape: str, tmp_path: Path) -> None:
    """The sizes that Meta publishes: parameters of the whole model, from config.json alone."""
    parameters = {
        "llama-3.1-8b": 8_030_261_248,
        "llama-3.3-70b": 70_553_706_496,
        "llama-3.2-1b": 1_235_814_400,
    }
    config = LlamaConfig.from_hf(SHAPES[shape])
    count = sum(n * k for n, k in linear_shapes(config).values())
    count += 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size
    count += (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert count == parameters[shape]


def test_layers_vocabulary_and_tied_embeddings(tmp_path: Path) -> None:
    shape = TINY | {"tie_word_embeddings": True}
    out = make_checkpoint.random_checkpoint(
        tmp_path / "out", shape=shape, scheme="W8A8", layers=1, vocab=64, max_shard_bytes=100_000
    )
    with open_checkpoint(out) as checkpoint:
        assert checkpoint.tensors["model.embed_tokens.weight"].shape == (64, 256)
        assert "lm_head.weight" not in checkpoint.tensors
        assert "model.layers.0.mlp.up_proj.weight" in checkpoint.tensors
        assert "model.layers.1.mlp.up_proj.weight" not in checkpoint.tensors
    assert len(list(out.glob("*.safetensors"))) > 2
    with LLM(out, max_model_len=8) as llm:
        assert llm.tokenizer is None
        assert llm.logits([1, 2]).shape == (2, 64)


def test_tokenizers(tmp_path: Path) -> None:
    demo_vocab = 4096
    out = random_checkpoint(tmp_path / "1", "bf16", vocab=demo_vocab)
    with LLM(out, max_model_len=32) as llm, LLM(max_model_len=32) as original:
        assert llm.tokenizer.encode("It is a truth") == original.tokenizer.encode("It is a truth")
        assert llm.eos_token_ids == original.eos_token_ids
        assert llm.generate("It is a truth")[0].prompt_token_ids
    out = random_checkpoint(tmp_path / "2", "bf16", vocab=demo_vocab, tokenizer=out)
    assert (out / "tokenizer.json").is_file()
    with pytest.raises(ValueError, match="vocab=320 has no room for the 4096 tokens of"):
        random_checkpoint(tmp_path / "3", "bf16", tokenizer=demo.model_path())


# Rounding an existing model.


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unquantized model, with a tokenizer."""
    folder = tmp_path_factory.mktemp("source") / "model"
    out = random_checkpoint(folder, "bf16", vocab=4096, seed=5)
    (out / "generation_config.json").write_text('{"temperature": 0.5}')
    return out


ROUNDED = ["W4A16", "W4A16_ASYM", "W8A16", "W8A8", "FP8_DYNAMIC", "FP8_BLOCK", "gptq", "fp8-block"]


@pytest.mark.parametrize("scheme", ROUNDED)
def test_rounding_a_model(scheme: str, source: Path, tmp_path: Path) -> None:
    out = make_checkpoint.rounded_checkpoint(tmp_path / "out", source=source, scheme=scheme)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / name).read_bytes() == (source / name).read_bytes()
    with open_checkpoint(source) as original, open_checkpoint(out) as written:
        shapes = linear_shapes(LlamaConfig.from_hf(written.config))
        quantization = parsed(written)
        assert quantization.linears.keys() == shapes.keys() - {LM_HEAD}
        for path, spec in quantization.linears.items():
            weight = read_linear(written, quantization, path, shapes[path]).weight
            assert isinstance(weight, QTensor)
            expected = quantize_rtn(original.read(f"{path}.weight"), spec.scheme)
            np.testing.assert_array_equal(weight.dequantize(), expected.dequantize())
        for name in original.tensors:
            if name.removesuffix(".weight") not in quantization.linears:
                assert written.read(name).tobytes() == original.read(name).tobytes()


def test_what_rounding_cannot_make(source: Path, tmp_path: Path) -> None:
    def rounding(scheme: str, **arguments: Any) -> None:
        arguments = {"source": source, "scheme": scheme} | arguments
        make_checkpoint.rounded_checkpoint(tmp_path / "out", **arguments)

    for scheme in ("FP8", "autofp8", "gptq-desc-act"):
        with pytest.raises(ValueError, match=f"scheme {scheme} needs calibration"):
            rounding(scheme)
    with pytest.raises(ValueError, match="bf16 rounds nothing"):
        rounding("bf16")
    with pytest.raises(ValueError, match=r"is quantized already \(compressed-tensors\)"):
        rounding("W4A16", source=demo.model_path())
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        rounding("W4A16", source=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_do_not_fit(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"q_proj has K=192, no multiple of the 128 columns"):
        make_checkpoint.random_checkpoint(
            tmp_path / "out", shape=TINY | {"hidden_size": 192}, scheme="W4A16"
        )
    with pytest.raises(ValueError, match="W8A8 has no groups"):
        random_checkpoint(tmp_path / "out", "W8A8", group_size=64)
    for name, message in (("shape", "shape 'x' is unknown"), ("scheme", "scheme 'x' is unknown")):
        with pytest.raises(ValueError, match=message):
            make_checkpoint.random_checkpoint(tmp_path / "out", **{name: "x"})
    out = random_checkpoint(tmp_path / "out", "W4A16", group_size=64)
    with open_checkpoint(out) as checkpoint:
        assert {spec.scheme.group_size for spec in parsed(checkpoint).linears.values()} == {64}
    with pytest.raises(ValueError, match="exists; choose another folder"):
        random_checkpoint(tmp_path / "out", "W4A16")


def test_command_line(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[int, str, str]:
        status = make_checkpoint.main(["--out", str(tmp_path / "out"), *arguments])
        return status, *capsys.readouterr()

    sizes = {key: str(TINY[key]) for key in make_checkpoint._SIZES}
    flags = [part for key, size in sizes.items() for part in (f"--{key.replace('_', '-')}", size)]
    custom = ["--shape", "custom", "--layers", "1", "--vocab", "64", *flags]
    assert run(*custom, "--scheme", "FP8") == (0, f"{tmp_path / 'out'}: 0.00 GB\n", "")
    assert json.loads((tmp_path / "out" / "config.json").read_bytes())["hidden_size"] == 256
    status, _, message = run(*custom)
    assert status == 2
    assert message.startswith("make_checkpoint: ")
    assert "exists" in message
    assert run("--from", str(source), "--scheme", "gptq", "--overwrite")[0] == 0
    assert (tmp_path / "out" / "quantize_config.json").is_file()
    for wrong, message in ((custom[:4], "needs --hidden-size"), (flags, "for --shape custom")):
        with pytest.raises(SystemExit):
            run(*wrong)
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.oracle
def test_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    """compressed-tensors loads every scheme, and runs it as qllama does with its arithmetic."""
    ids = np.arange(1, 300, 23)
    schemes = ["bf16", *BY_COMPRESSED_TENSORS]
    folders = [random_checkpoint(tmp_path / name, name) for name in schemes]
    script = """
        from transformers import AutoModelForCausalLM
        for folder in folders.tolist():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            with torch.no_grad():
                logits = model(torch.from_numpy(ids)[None]).logits[0]
            out[folder.rpartition("/")[2]] = logits.float().numpy()
    """
    expected = oracle.run(script, folders=np.array([str(folder) for folder in folders]), ids=ids)
    for folder in folders:
        with LLM(
            folder,
            max_model_len=32,
            dtype="float32",
            backend="reference",
            activation_semantics="compressed-tensors",
        ) as llm:
            logits = llm.logits(ids)
        wanted = expected[folder.name]
        error = np.sqrt(np.mean((logits - wanted) ** 2) / np.mean(wanted**2))
        recipe = RECIPES[folder.name]
        exact = recipe is None or recipe.scheme.activations is None
        # Last bits flip roundings of activations, and each flip moves all that follows.
        assert error < (1e-4 if exact else 0.02), f"{folder.name}: {error}"
