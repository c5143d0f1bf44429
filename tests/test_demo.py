"""The embedded demo model, and a small run of the program that makes it."""

import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.loader import load_model
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_config import parse_quantization

from qllama import demo
from qllama.config import LlamaConfig
from qllama.demo.train import export, run, training
from qllama.demo.train.__main__ import main
from qllama.demo.train.facts import TrainingFacts
from qllama.demo.train.settings import ARCHITECTURE, Settings
from qllama.demo.train.text import Corpus, read_novel, sample_batch, tokenize, windows
from qllama.demo.train.tokenizer import SPECIAL_TOKENS, tokenizer_files, train_tokenizer
from qllama.gptq.report import QuantizationReport
from qllama.model.init import init_llama
from qllama.model.llama import Llama
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import W4A16

NOVEL = """\
EMMA

By Somebody


VOLUME I

CHAPTER I

It was a _very_ fine day, and
everybody walked.

"I am happy,"  said she; "I am
indeed." [aside]

[End of the first volume.]

          * * * * *

Chapter 2.

They walked again.

FINIS
"""
CHAPTERS = [
    [
        "It was a very fine day, and everybody walked.",
        '"I am happy," said she; "I am indeed." [aside]',
    ],
    ["They walked again."],
]
TINY = {
    **ARCHITECTURE,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
SETTINGS = Settings(steps=6, batch=2, length=32, vocab_size=300, evaluate_every=3)


def load(folder: Path) -> Llama:
    with open_checkpoint(folder) as checkpoint:
        config = LlamaConfig.from_hf(checkpoint.config)
        quantization = parse_quantization(checkpoint, linear_shapes(config))
        return load_model(checkpoint, config, quantization, dtype=jnp.float32)


def logits(model: Llama, tokens: np.ndarray) -> np.ndarray:
    hidden, _ = model(jnp.asarray(tokens), jnp.arange(tokens.shape[1])[None])
    return np.asarray(model.logits(hidden))


@pytest.fixture(scope="module")
def packaged() -> Llama:
    return load(demo.model_path())


@pytest.fixture(scope="module")
def packaged_tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(demo.model_path()))


def write_texts(folder: Path) -> Path:
    folder.mkdir()
    (folder / "emma.txt").write_text(NOVEL * 10)
    (folder / "persuasion.txt").write_text(NOVEL)
    return folder


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "texts")


def test_packaged_model_is_small_and_complete() -> None:
    files = {path.name: path.stat().st_size for path in demo.model_path().iterdir()}
    assert sum(files.values()) <= 10 * 2**20
    assert files.keys() == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_packaged_model_is_w4a16_but_for_the_head() -> None:
    with open_checkpoint(demo.model_path()) as checkpoint:
        config = LlamaConfig.from_hf(checkpoint.config)
        quantization = parse_quantization(checkpoint, linear_shapes(config))
        assert quantization is not None
        specs = {path: quantization.linear(path) for path in linear_shapes(config)}
        assert specs.pop("lm_head") is None
        assert {(spec.format, spec.scheme) for spec in specs.values() if spec} == {
            ("pack-quantized", W4A16)
        }
        assert None not in specs.values()
        assert config.tie_word_embeddings
        assert config.rope_scaling is not None
        assert config.rope_scaling.rope_type == "llama3"


def test_packaged_model_has_a_perplexity(
    packaged: Llama, packaged_tokenizer: Any, fixtures_dir: Path
) -> None:
    text = (fixtures_dir / "eval_text.txt").read_text()
    ids = packaged_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
    loss = training.mean_loss(packaged, jnp.asarray(windows(np.array(ids, np.int32), 1024)))
    # transformers 5.17 with torch, float32, on these four windows. They hold the roll of names and
    # dates that the novel opens with; the card's figure is that of the whole novel.
    assert math.exp(loss) == pytest.approx(86.4632, rel=1e-4)
    card = (demo.model_path() / "README.md").read_text()
    assert re.search(r"GPTQ W4A16, as stored\*\* \| \*\*67\.03\*\*", card)


def test_packaged_tokenizer_is_like_llama_3(packaged_tokenizer: Any) -> None:
    begin, end, end_of_turn = (
        packaged_tokenizer.convert_tokens_to_ids(token)
        for token in ("<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>")
    )
    text = "“Très bien”, said\tshe -- 'tis 12345!\n\n It's  late 😀"
    ids = packaged_tokenizer.encode(text)
    assert ids[0] == begin
    assert packaged_tokenizer.decode(ids, skip_special_tokens=True) == text
    assert packaged_tokenizer.bos_token_id == begin
    generation = json.loads((demo.model_path() / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [end, end_of_turn]
    ordinary = len(packaged_tokenizer) - len(SPECIAL_TOKENS)
    assert packaged_tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS)) == list(
        range(ordinary, len(packaged_tokenizer))
    )


def test_packaged_chat_template_is_that_of_llama_3(packaged_tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " Who is she?\n"},
    ]
    rendered = packaged_tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )
    assert rendered == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho is she?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


def test_texts_are_split_as_the_tokenizer_of_the_tiny_llama_splits_them(
    packaged_tokenizer: Any, tiny_llama3: Any
) -> None:
    from tokenizers import Tokenizer

    theirs = Tokenizer.from_file(str(tiny_llama3("ct_w4a16_g128") / "tokenizer.json"))
    ours = packaged_tokenizer.backend_tokenizer
    text = "He'll pay £20,000 --\r\n  or 1234567 ; SHE'S “gone”...\n\n\t Yes!  été _x_"
    split = ours.pre_tokenizer.pre_tokenize_str(text)
    assert split == theirs.pre_tokenizer.pre_tokenize_str(text)


@pytest.mark.oracle
def test_packaged_model_gives_the_logits_of_transformers(packaged: Llama) -> None:
    tokens = np.random.default_rng(0).integers(0, 4096, (1, 300))
    reference = oracle.run(
        """
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        with torch.no_grad():
            out["logits"] = model(torch.from_numpy(tokens)).logits.numpy()
        """,
        tokens=tokens,
        folder=np.array(str(demo.model_path())),
    )
    np.testing.assert_allclose(logits(packaged, tokens), reference["logits"], atol=2e-3)


def test_a_novel_is_chapters_of_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "novel.txt").write_text(NOVEL)
    assert read_novel(tmp_path / "novel.txt") == CHAPTERS
    (tmp_path / "plain.txt").write_text("One\nline.\n\nAnother.\n")
    assert read_novel(tmp_path / "plain.txt") == [["One line.", "Another."]]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return tokenize(CHAPTERS, train_tokenizer((p for c in CHAPTERS for p in c), 300))


def test_both_streams_hold_the_chapters() -> None:
    tokenizer = train_tokenizer((p for c in CHAPTERS for p in c), 300)
    corpus = tokenize(CHAPTERS, tokenizer)

    def text(ids: np.ndarray) -> str:
        decoded: str = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        return decoded

    (first, second), (third,) = CHAPTERS
    assert text(corpus.prose) == (
        f"<|begin_of_text|>{first}\n\n{second}<|end_of_text|>"
        f"<|begin_of_text|>{third}<|end_of_text|>"
    )
    user, assistant = (
        f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")
    )
    assert text(corpus.chat) == (
        f"<|begin_of_text|>{user}{first}<|eot_id|>{assistant}{second}<|eot_id|><|end_of_text|>"
        f"<|begin_of_text|>{user}{third}<|eot_id|><|end_of_text|>"
    )
    assert text(corpus.prose[corpus.paragraphs[1] :]).startswith(second)
    assert text(corpus.chat[corpus.turns[1] :]).startswith(user + third)


def test_batches_follow_from_the_seed_and_begin_as_prompts_do(corpus: Corpus) -> None:
    first, again = (sample_batch(corpus, np.random.default_rng(3), 64, 16) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (64, 17)
    prompts = first[first[:, 0] == corpus.begin_of_text]
    assert 20 <= len(prompts) <= 50
    starts = {*corpus.prose[corpus.paragraphs], *corpus.chat[corpus.turns]}
    starts.add(corpus.begin_of_text)  # a window that happens to begin where a chapter does
    assert set(prompts[:, 1]) <= starts


def test_windows_leave_out_the_rest() -> None:
    assert windows(np.arange(11), 5).tolist() == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    with pytest.raises(ValueError, match="3 tokens do not fill one window of 5"):
        windows(np.arange(3), 5)


def test_tokenizer_files_are_those_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = train_tokenizer([NOVEL], 300)
    for name, content in tokenizer_files(tokenizer, 77).items():
        (tmp_path / name).write_text(content)
    theirs = AutoTokenizer.from_pretrained(str(tmp_path))
    assert theirs.model_max_length == 77
    assert theirs.encode("fine day") == tokenizer.encode("fine day").ids


def test_dropout_follows_its_key_and_zero_of_it_changes_nothing() -> None:
    config = LlamaConfig.from_hf(
        {"model_type": "llama", "vocab_size": 64, "max_position_embeddings": 32, **TINY}
    )
    tokens = np.arange(20)[None]

    def run_with(rate: float, seed: int) -> np.ndarray:
        model = init_llama(config, jax.random.key(0))
        training.add_dropout(model, rate, jax.random.key(seed))
        return logits(model, tokens)

    plain = logits(init_llama(config, jax.random.key(0)), tokens)
    np.testing.assert_array_equal(run_with(0.0, 1), plain)
    assert not np.array_equal(run_with(0.5, 1), run_with(0.5, 2))


def same(left: Any, right: Any) -> bool:
    pairs = zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_stopped_run_goes_on_to_the_same_model(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = LlamaConfig.from_hf(
        {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 32, **TINY}
    )
    held_out = windows(corpus.prose, 32)
    straight = training.train(config, SETTINGS, corpus, held_out, tmp_path / "straight")

    def power_cut(*arguments: Any) -> np.ndarray:
        calls.append(arguments)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return sample_batch(*arguments)

    calls: list[Any] = []
    monkeypatch.setattr(training, "sample_batch", power_cut)
    with pytest.raises(KeyboardInterrupt):
        training.train(config, SETTINGS, corpus, held_out, tmp_path / "stopped")
    monkeypatch.undo()
    resumed = training.train(config, SETTINGS, corpus, held_out, tmp_path / "stopped")
    assert same(straight._replace(seconds=0), resumed._replace(seconds=0))

    other = Settings(steps=7)
    with pytest.raises(ValueError, match="other settings"):
        training.train(config, other, corpus, held_out, tmp_path / "stopped")


def test_the_state_kept_has_the_loss_that_is_said(corpus: Corpus, tmp_path: Path) -> None:
    config = LlamaConfig.from_hf(
        {"model_type": "llama", "vocab_size": 300, "max_position_embeddings": 32, **TINY}
    )
    held_out = windows(corpus.prose, 32)
    state = training.train(config, SETTINGS, corpus, held_out, tmp_path)
    graph, _ = nnx.split(init_llama(config, jax.random.key(0)))
    evaluate = training.make_evaluation(graph, 2)
    assert evaluate(state.best_params, held_out) == pytest.approx(float(state.best_loss), rel=1e-5)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that a small run of all of it leaves."""
    folder = tmp_path_factory.mktemp("made")
    write_texts(folder / "texts")
    source = run.train_demo(folder / "texts", folder / "out", SETTINGS, architecture=TINY)
    assert source == folder / "out" / "float"
    run.quantize_demo(source, folder / "texts", folder / "out", sequences=8)
    return folder / "out"


def nll(model: Llama, folder: Path) -> float:
    """Of the held-out text, in the run's windows."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "\n\n".join(p for c in CHAPTERS for p in c)
    ids = np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.int32)
    return float(training.mean_loss(model, jnp.asarray(windows(ids, SETTINGS.length))))


def test_a_run_leaves_a_float_model_a_quantized_one_and_its_report(made: Path) -> None:
    assert {path.name for path in made.iterdir()} == {
        "checkpoints",
        "float",
        "model",
        "quantization_report.html",
        "quantization_report.json",
    }
    packaged_files = {path.name for path in demo.model_path().iterdir()}
    assert {path.name for path in (made / "model").iterdir()} == packaged_files
    for name in packaged_files - {"README.md", "config.json", "model.safetensors"}:
        assert (made / "float" / name).read_bytes() == (made / "model" / name).read_bytes()

    with open_checkpoint(made / "float") as checkpoint:
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"BF16"}
        assert "quantization_config" not in checkpoint.config
        vocab_size = checkpoint.config["vocab_size"]
        assert checkpoint.tensors["model.embed_tokens.weight"].shape == (vocab_size, 128)
    with open_checkpoint(made / "model") as checkpoint:
        shapes = linear_shapes(LlamaConfig.from_hf(checkpoint.config))
        quantization = parse_quantization(checkpoint, shapes)
    assert quantization is not None
    assert {quantization.linear(path) is not None for path in shapes if path != "lm_head"} == {True}

    report = QuantizationReport.from_json((made / "quantization_report.json").read_text())
    assert report.scheme == "W4A16"
    assert report.calibration is not None
    assert report.calibration.tokens == 8 * SETTINGS.length
    assert {linear.algorithm for linear in report.linears} == {"gptq"}


def rounded_linear(path: tuple[Any, ...], value: jax.Array) -> jax.Array:
    """A Linear's weight rounded to W4A16, anything else as it is."""
    if value.ndim < 2 or "embed_tokens" in jax.tree_util.keystr(path):
        return value
    return quantize_rtn(value.astype(jnp.bfloat16), W4A16).dequantize(value.dtype)


def test_the_card_has_the_perplexities_of_what_is_stored(made: Path) -> None:
    card = (made / "model" / "README.md").read_text()
    assert "Calibration data: 8 sequences of 32 tokens" in card
    figures = [float(cell) for cell in re.findall(r"^\|.*\| \**([\d.]+)\** \|$", card, re.M)]

    source = load(made / "float")
    graph, params = nnx.split(source)
    models = [
        source,
        nnx.merge(graph, jax.tree_util.tree_map_with_path(rounded_linear, params)),
        load(made / "model"),
    ]
    measured = [math.exp(nll(model, made / "float")) for model in models]
    assert figures == [pytest.approx(perplexity, rel=1e-4, abs=0.006) for perplexity in measured]
    assert len({f"{perplexity:.2f}" for perplexity in measured}) == 3, "no one stands for another"


def test_the_exported_weights_are_the_best_of_training(made: Path) -> None:
    with ocp.CheckpointManager(made / "checkpoints") as manager:
        stored = manager.restore(SETTINGS.steps, args=ocp.args.StandardRestore())
    embedding = np.asarray(stored["best_params"]["embed_tokens"]["value"])
    with open_checkpoint(made / "float") as checkpoint:
        exported = checkpoint.read("model.embed_tokens.weight")
    np.testing.assert_array_equal(exported, embedding.astype(jnp.bfloat16))


def test_a_float_model_alone_gives_the_same(made: Path, tmp_path: Path) -> None:
    texts, out = write_texts(tmp_path / "texts"), tmp_path / "out"
    source = shutil.copytree(made / "float", tmp_path / "carried")
    arguments = ["--text", str(texts), "--out", str(out), "--from-float", str(source)]
    main([*arguments, "--calibration", "8"])
    assert {path.name for path in out.iterdir()} == {
        "model",
        "quantization_report.html",
        "quantization_report.json",
    }
    for path in (made / "model").iterdir():
        assert (out / "model" / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "3", "--seed", "0"], "leave out --steps, --seed"),
        (["--calibration", "0"], "one sequence is the least"),
    ],
)
def test_a_float_model_is_not_trained_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    folders = [f"--{name}={tmp_path}" for name in ("text", "out", "from-float")]
    with pytest.raises(SystemExit):
        main([*folders, *arguments])
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_float_model_wants_the_texts_it_was_trained_on(made: Path, tmp_path: Path) -> None:
    texts = write_texts(tmp_path / "texts")
    (texts / "emma.txt").write_text(NOVEL)
    with pytest.raises(ValueError, match=r"was trained on \d+ tokens of emma\.txt; --text has"):
        run.quantize_demo(made / "float", texts, tmp_path / "out")
    with pytest.raises(ValueError, match="does not say how the model was trained"):
        run.quantize_demo(made / "model", texts, tmp_path / "out")


def test_a_float_model_is_in_small_files(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_SHARD_BYTES", 50_000)
    config = json.loads((made / "float" / "config.json").read_text())
    tokenizer = train_tokenizer([NOVEL], 300)
    facts = TrainingFacts.read(made / "float")
    folder = export.export(tmp_path / "float", load(made / "float"), config, tokenizer, facts)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    assert same(nnx.state(load(folder)), nnx.state(load(made / "float")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--validation", "sanditon.txt"], "must hold sanditon.txt"),
        (["--length", "100000"], "do not fill one window of 100000"),
    ],
)
def test_the_command_line_refuses_in_one_line(
    texts: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--text", str(texts), "--out", str(tmp_path / "out"), *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_the_command_line_trains_and_writes(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sizes = ["--steps", "2", "--batch", "1", "--length", "32"]
    main(["--text", str(texts), "--out", str(out), *sizes])
    card = (out / "model" / "README.md").read_text()
    assert "- 2 steps of 1 sequences" in card
    assert "Kept is the state\n  with the lowest validation loss.\n" in card
    assert load(out / "model").config.num_hidden_layers == ARCHITECTURE["num_hidden_layers"]
