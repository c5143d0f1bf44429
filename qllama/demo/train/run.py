"""From a folder of novels to a folder with a model: tokenize, train, measure, export."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qllama.config import LlamaConfig
from qllama.demo.train.card import TrainingFacts
from qllama.demo.train.export import export, hf_config
from qllama.demo.train.settings import ARCHITECTURE, Settings
from qllama.demo.train.text import read_novel, tokenize, windows
from qllama.demo.train.tokenizer import train_tokenizer
from qllama.demo.train.training import make_evaluation, round_weights, train
from qllama.model.init import init_llama


def make_demo(
    text: Path,
    out: Path,
    settings: Settings,
    *,
    architecture: Mapping[str, Any] = ARCHITECTURE,
    validation: str = "persuasion.txt",
) -> Path:
    """Train on the novels in `text`, checkpoints in `out`, and export to `out/model`.

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
    paths = [path for path in sorted(text.glob("*.txt")) if path.name != validation]
    if not paths or not (text / validation).is_file():
        raise ValueError(f"{text} must hold {validation} and at least one other .txt file")
    chapters = [chapter for path in paths for chapter in read_novel(path)]
    tokenizer = train_tokenizer((p for c in chapters for p in c), settings.vocab_size)
    corpus = tokenize(chapters, tokenizer)
    held_out = "\n\n".join(p for c in read_novel(text / validation) for p in c)
    ids = tokenizer.encode(held_out, add_special_tokens=False).ids
    validation_windows = windows(np.array(ids, np.int32), settings.length)
    print(f"{corpus.prose.size:,} tokens to train on, {validation_windows.size:,} to validate on")

    hf = hf_config(architecture, tokenizer, settings.length)
    config = LlamaConfig.from_hf(hf)
    state = train(config, settings, corpus, validation_windows, out / "checkpoints")

    graph, _ = nnx.split(nnx.eval_shape(lambda: init_llama(config, jax.random.key(0))))
    best = jax.tree.map(lambda p: p.astype(jnp.bfloat16).astype(jnp.float32), state.best_params)
    evaluate = make_evaluation(graph, settings.batch)
    with jax.default_matmul_precision("highest"):
        losses = [evaluate(params, validation_windows) for params in (best, round_weights(best))]
    perplexity, perplexity_w4a16 = (math.exp(loss) for loss in losses)
    print(f"perplexity of {validation}: {perplexity:.2f}, rounded to W4A16 {perplexity_w4a16:.2f}")
    facts = TrainingFacts(
        settings=settings,
        novels=[path.name for path in paths],
        validation=validation,
        train_tokens=corpus.prose.size,
        validation_tokens=validation_windows.size,
        seconds=float(state.seconds),
        device=jax.devices()[0].device_kind,
        perplexity=perplexity,
        perplexity_w4a16=perplexity_w4a16,
    )
    return export(out / "model", nnx.merge(graph, best), hf, tokenizer, facts)
