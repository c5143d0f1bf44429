"""Training a small Llama from nothing on a few novels, resumably.

The novels are few and the model sees each page dozens of times, so what matters is not to learn
them by heart: dropout on what every block adds to the residual stream, and strong weight decay.
Kept is the state with the lowest validation loss.
"""

import json
import math
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from qllama.config import LlamaConfig
from qllama.demo.train.settings import Settings
from qllama.demo.train.text import Corpus, sample_batch
from qllama.model.init import init_llama
from qllama.model.llama import Llama


class TrainState(NamedTuple):
    """All that a resumed run needs; what orbax stores."""

    step: jax.Array
    params: nnx.State  # float32
    optimizer: optax.OptState
    best_params: nnx.State  # at the lowest validation loss so far
    best_loss: jax.Array
    seconds: jax.Array  # spent in training so far


def make_optimizer(settings: Settings) -> optax.GradientTransformation:
    """AdamW with a warmed-up cosine schedule and gradients clipped to norm 1."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0,
        settings.learning_rate,
        max(1, round(settings.warmup * settings.steps)),
        settings.steps,
        settings.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b1=0.9,
            b2=0.95,
            weight_decay=settings.weight_decay,
            mask=partial(jax.tree.map, lambda p: p.ndim == 2),  # norms are left alone
        ),
    )


class Dropped:
    """A Linear of whose results elements are dropped at random. Lives within one loss."""

    input_codes = None

    def __init__(self, dense: Any, rate: float, key: jax.Array) -> None:
        self.dense, self.rate, self.key = dense, rate, key

    def addends(self, x: jax.Array) -> jax.Array:
        """As `Dense.addends`."""
        out = self.dense(x)
        keep = jax.random.bernoulli(self.key, 1 - self.rate, out.shape)
        return jnp.where(keep, out / (1 - self.rate), 0).astype(out.dtype)[None]


def add_dropout(model: Llama, rate: float, key: jax.Array) -> None:
    """Drop, at random, elements of what each attention and MLP adds to the residual stream."""
    keys = jax.random.split(key, (len(model.layers), 2))
    for layer, (first, second) in zip(model.layers, keys, strict=True):
        attention: Any = layer.self_attn
        mlp: Any = layer.mlp
        attention.o_proj = Dropped(attention.o_proj, rate, first)
        mlp.down_proj = Dropped(mlp.down_proj, rate, second)


def mean_loss(model: Llama, tokens: jax.Array) -> jax.Array:
    """Mean negative log likelihood, in nats, of `tokens [B, T]` from the second on."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    positions = jnp.broadcast_to(jnp.arange(inputs.shape[1]), inputs.shape)
    hidden, _ = model(inputs, positions)
    logits = model.logits(hidden)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def make_step(graph: nnx.GraphDef[Llama], settings: Settings, dtype: jnp.dtype | type) -> Any:
    """The jitted `(params, optimizer state, tokens, key) -> (params, optimizer state, loss)`."""
    optimizer = make_optimizer(settings)

    def loss(params: nnx.State, tokens: jax.Array, key: jax.Array) -> jax.Array:
        model = nnx.merge(graph, jax.tree.map(lambda p: p.astype(dtype), params))
        add_dropout(model, settings.dropout, key)
        return mean_loss(model, tokens)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(
        params: nnx.State, opt_state: optax.OptState, tokens: jax.Array, key: jax.Array
    ) -> tuple[nnx.State, optax.OptState, jax.Array]:
        value, gradient = jax.value_and_grad(loss)(params, tokens, key)
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    return step


def make_evaluation(graph: nnx.GraphDef[Llama], batch: int) -> Any:
    """The jitted `(params, windows [n, T]) -> mean loss`, in the dtype of the parameters."""

    @jax.jit
    def evaluate(params: nnx.State, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graph, params)
        return jax.lax.map(lambda row: mean_loss(model, row[None]), tokens, batch_size=batch).mean()

    return evaluate


def train(
    config: LlamaConfig,
    settings: Settings,
    corpus: Corpus,
    validation: np.ndarray,
    checkpoints: Path,
) -> TrainState:
    """Train a model of `config`, going on from the latest of `checkpoints`; prints the loss curve.

    Args:
        config: `max_position_embeddings` is `settings.length`.
        settings: see there.
        corpus: to train on.
        validation: int32 `[n, T]`, windows of the text to validate on.
        checkpoints: a folder for orbax, made if it is missing.

    Raises:
        ValueError: the checkpoints come from other settings.
    """
    import orbax.checkpoint as ocp

    compute_dtype = jnp.bfloat16 if jax.default_backend() == "gpu" else jnp.float32
    graph, params = nnx.split(init_llama(config, jax.random.key(settings.seed)))
    state = TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=make_optimizer(settings).init(params),
        best_params=params,
        best_loss=jnp.array(math.inf, jnp.float32),
        seconds=jnp.zeros((), jnp.float32),
    )
    evaluate = make_evaluation(graph, settings.batch)
    take_step = make_step(graph, settings, compute_dtype)
    key = jax.random.key(settings.seed + 1)
    windows_on_device = jnp.asarray(validation)

    _same_settings(checkpoints, settings)
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    with ocp.CheckpointManager(checkpoints.resolve(), options=options) as manager:
        latest = manager.latest_step()
        if latest is not None:
            state = manager.restore(latest, args=ocp.args.StandardRestore(state))
            print(f"resuming at step {latest} of {settings.steps}", flush=True)
        print("   step   train    valid   perplexity   seconds", flush=True)
        start = time.monotonic() - float(state.seconds)
        losses: list[jax.Array] = []
        params, opt_state = state.params, state.optimizer
        best_params, best_loss = state.best_params, float(state.best_loss)
        for step in range(int(state.step), settings.steps):
            rng = np.random.default_rng((settings.seed, step))
            tokens = sample_batch(corpus, rng, settings.batch, settings.length)
            params, opt_state, loss = take_step(
                params, opt_state, jnp.asarray(tokens), jax.random.fold_in(key, step)
            )
            losses.append(loss)
            done = step + 1
            if done % settings.evaluate_every and done < settings.steps:
                continue
            judged = float(evaluate(params, windows_on_device))
            if judged < best_loss:
                best_params, best_loss = jax.tree.map(jnp.copy, params), judged
            seconds = time.monotonic() - start
            print(
                f"{done:7d} {np.mean(losses):7.3f} {judged:8.3f} {math.exp(judged):12.2f} "
                f"{seconds:9.0f}",
                flush=True,
            )
            losses.clear()
            state = TrainState(
                step=jnp.array(done, jnp.int32),
                params=params,
                optimizer=opt_state,
                best_params=best_params,
                best_loss=jnp.array(best_loss, jnp.float32),
                seconds=jnp.array(seconds, jnp.float32),
            )
            manager.save(done, args=ocp.args.StandardSave(state))
            manager.wait_until_finished()
    return state


def _same_settings(checkpoints: Path, settings: Settings) -> None:
    """Leave the settings beside the checkpoints, or compare with those that are there."""
    path = checkpoints / "settings.json"
    ours = json.dumps(asdict(settings), indent=2) + "\n"
    if not path.exists():
        checkpoints.mkdir(parents=True, exist_ok=True)
        path.write_text(ours)
    elif path.read_text() != ours:
        raise ValueError(
            f"{checkpoints} holds checkpoints of a run with other settings (see {path.name} "
            "there); use those settings, or another --out"
        )
