"""From a folder of novels to a folder with a model, in two steps: train, then quantize.

The float model between them is a folder of its own, so that the second step can be done elsewhere.
"""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from qllama_convert.checkpoint import open_checkpoint

import qllama
from qllama.config import LlamaConfig
from qllama.demo.train.card import model_card
from qllama.demo.train.export import export, hf_config
from qllama.demo.train.facts import QuantizationFacts, TrainingFacts
from qllama.demo.train.settings import ARCHITECTURE, CALIBRATION_SEQUENCES, Settings
from qllama.demo.train.text import Novels, read_novels, sample_batch, tokenize, windows
from qllama.demo.train.tokenizer import train_tokenizer
from qllama.demo.train.training import train
from qllama.evaluate.perplexity import PerplexityResult
from qllama.gptq.report import PAGE_FILE, REPORT_FILE
from qllama.model.init import init_llama


def train_demo(
    text: Path,
    out: Path,
    settings: Settings,
    *,
    architecture: Mapping[str, Any] = ARCHITECTURE,
    validation: str = "persuasion.txt",
) -> Path:
    """Train on the novels in `text`, checkpoints in `out`, and export to `out/float`.

    Args:
        text: a folder of novels as `*.txt`.
        out: made if missing; a run that was stopped goes on from its last checkpoint.
        settings: see there.
        architecture: entries of config.json.
        validation: the file in `text` that is validated on, not trained on.

    Returns:
        The exported folder.

    Raises:
        ValueError: no novels, too short a validation text, or checkpoints of other settings.
    """
    novels = read_novels(text, validation)
    tokenizer = train_tokenizer((p for c in novels.chapters for p in c), settings.vocab_size)
    corpus = tokenize(novels.chapters, tokenizer)
    ids = tokenizer.encode(novels.held_out, add_special_tokens=False).ids
    validation_windows = windows(np.array(ids, np.int32), settings.length)
    print(f"{corpus.prose.size:,} tokens to train on, {validation_windows.size:,} to validate on")

    hf = hf_config(architecture, tokenizer, settings.length)
    config = LlamaConfig.from_hf(hf)
    state = train(config, settings, corpus, validation_windows, out / "checkpoints")
    graph, _ = nnx.split(nnx.eval_shape(lambda: init_llama(config, jax.random.key(0))))
    facts = TrainingFacts(
        settings=settings,
        novels=novels.names,
        validation=validation,
        train_tokens=corpus.prose.size,
        seconds=float(state.seconds),
        device=jax.devices()[0].device_kind,
    )
    return export(out / "float", nnx.merge(graph, state.best_params), hf, tokenizer, facts)


def quantize_demo(
    source: Path, text: Path, out: Path, *, sequences: int = CALIBRATION_SEQUENCES
) -> Path:
    """Quantize a model that `train_demo` made to W4A16 by GPTQ, measure it, and say so in its card.

    Args:
        source: its folder.
        text: the novels it was trained on and validated with.
        out: gets `model`, in place of one that may be there, and beside it the report.
        sequences: of the novels, to calibrate with.

    Returns:
        `out/model`.

    Raises:
        ValueError: other novels than those, or `qllama.quantize` refuses.
    """
    training = TrainingFacts.read(source)
    settings = training.settings
    novels = read_novels(text, training.validation)
    rows = _calibration_rows(source, novels, training, sequences)
    arguments: dict[str, Any] = {
        "scheme": "W4A16",
        "dataset": rows,
        "num_calibration_samples": sequences,
        "max_seq_length": settings.length,
        # Started anew it costs a minute; what another float model left is not in the way.
        "resume": False,
        "overwrite": True,
    }
    folder = out / "model"
    report = qllama.quantize(source, folder, **arguments)
    assert report.calibration is not None
    with tempfile.TemporaryDirectory() as scratch:
        nearest = Path(scratch, "rtn")
        qllama.quantize(source, nearest, scheme="W4A16", algorithm="rtn")
        print(f"predicting {training.validation} with three models", flush=True)
        bfloat16, rounded, gptq = (
            _perplexity(model, novels.held_out, settings.length)
            for model in (source, nearest, folder)
        )
    print(
        f"perplexity of {training.validation}: {bfloat16.perplexity:.2f} in bfloat16, "
        f"{rounded.perplexity:.2f} rounded to nearest, {gptq.perplexity:.2f} by GPTQ"
    )
    for name in (REPORT_FILE, PAGE_FILE):
        os.replace(folder / name, out / name)
    with open_checkpoint(source) as checkpoint:
        config = checkpoint.config
        shapes = [tensor.shape for tensor in checkpoint.tensors.values()]
    quantized = QuantizationFacts(
        sequences=report.calibration.sequences,
        tokens=report.calibration.tokens,
        validation_windows=gptq.windows,
        validation_tokens=gptq.tokens,
        bfloat16=bfloat16.perplexity,
        rounded=rounded.perplexity,
        gptq=gptq.perplexity,
    )
    parameters = sum(int(np.prod(shape)) for shape in shapes)
    card = model_card(config, parameters, training, quantized)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return folder


def _calibration_rows(
    source: Path, novels: Novels, training: TrainingFacts, sequences: int
) -> np.ndarray:
    """int32 `[sequences, length]`: what would be the inputs of one more step of training."""
    from tokenizers import Tokenizer

    corpus = tokenize(novels.chapters, Tokenizer.from_file(str(source / "tokenizer.json")))
    if (novels.names, corpus.prose.size) != (list(training.novels), training.train_tokens):
        raise ValueError(
            f"the model in {source} was trained on {training.train_tokens} tokens of "
            f"{', '.join(training.novels)}; --text has {corpus.prose.size} tokens of "
            f"{', '.join(novels.names)}"
        )
    settings = training.settings
    rng = np.random.default_rng((settings.seed, settings.steps))
    return sample_batch(corpus, rng, sequences, settings.length)[:, :-1]


def _perplexity(folder: Path, text: str, window: int) -> PerplexityResult:
    # On a GPU products of float32 are rounded to TF32 unless asked otherwise.
    with (
        jax.default_matmul_precision("highest"),
        qllama.LLM(folder, dtype="float32") as llm,
    ):
        return qllama.perplexity(llm, text, window=window)
