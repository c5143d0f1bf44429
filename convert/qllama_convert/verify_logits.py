"""A checkpoint run here and by transformers, on the same tokens, in float32."""

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from qllama.config import LlamaConfig
from qllama.model.kv_cache import KVCache, init_cache
from qllama.model.llama import Llama
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.convert import convert
from qllama_convert.export import export_checkpoint
from qllama_convert.linear import read_linear
from qllama_convert.loader import load_model
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_config import Quantization, parse_quantization
from qllama_convert.weight_files import ORBAX

PYTHON_VARIABLE = "QLLAMA_ORACLE_PYTHON"
"""Names the interpreter where none is given."""

_LENGTHS = (16, 64, 128)
_TIMEOUT = 3600  # seconds: eight billion parameters in float32 on a CPU take their time
_PROGRAM = Path(__file__).with_name("transformers_logits.py")


@dataclass(frozen=True, kw_only=True)
class LogitsComparison:
    """How far the logits of two programs are apart, over all positions."""

    against: tuple[str, ...]  # the other's libraries, with versions
    compared_as: str  # what the other one loaded
    tokens: int
    relative_rms: float  # of the difference, to the other's logits
    max_difference: float
    argmax_agreement: float  # share of positions with the same likeliest token
    relative_rms_limit: float
    argmax_limit: float

    @property
    def ok(self) -> bool:
        """Whether both programs read the same model."""
        near = self.relative_rms <= self.relative_rms_limit
        return near and self.argmax_agreement >= self.argmax_limit


def compare_with_transformers(folder: Path, python: str | Path | None = None) -> LogitsComparison:
    """Run the checkpoint in `folder` here, with the activation semantics of compressed-tensors, and
    in transformers, and compare the logits of three sequences of random tokens.

    What transformers cannot load on a CPU is given to it in another form: where that is bit-exact,
    as compressed-tensors, else (columns in activation order, FP4) dequantized to float32.

    Args:
        folder: of the checkpoint, which loads.
        python: interpreter with torch, transformers and compressed-tensors; None:
            `$QLLAMA_ORACLE_PYTHON`, else this one.

    Raises:
        ValueError: there is no such interpreter, or it cannot load the checkpoint.
    """
    interpreter = _interpreter(python)
    with open_checkpoint(folder) as checkpoint:
        llama = LlamaConfig.from_hf(checkpoint.config)
        quantization = parse_quantization(checkpoint, linear_shapes(llama))
    rng = np.random.default_rng(0)
    lengths = [min(length, llama.max_model_len) for length in _LENGTHS]
    ids = [rng.integers(0, llama.vocab_size, length, np.int32) for length in lengths]
    with tempfile.TemporaryDirectory(prefix="qllama-verify-") as temporary:
        stand_in, compared_as = _stand_in(folder, quantization, Path(temporary, "stand-in"))
        theirs, libraries = _their_logits(interpreter, stand_in, ids, Path(temporary))
    ours = np.concatenate(_our_logits(folder, llama, quantization, ids))
    if theirs.shape != ours.shape:
        raise ValueError(f"transformers gives logits {theirs.shape}, expected {ours.shape}")
    loose = _quantizes_as_it_runs(quantization)
    return LogitsComparison(
        against=libraries,
        compared_as=compared_as,
        tokens=len(ours),
        relative_rms=float(np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2))),
        max_difference=float(np.abs(ours - theirs).max()),
        argmax_agreement=float((ours.argmax(-1) == theirs.argmax(-1)).mean()),
        # A last-bit difference can flip a rounding of an activation, and that spreads.
        relative_rms_limit=1e-2 if loose else 1e-4,
        argmax_limit=0.95 if loose else 0.99,
    )


def _interpreter(python: str | Path | None) -> str:
    named = python or os.environ.get(PYTHON_VARIABLE)
    if named:
        if not os.access(named, os.X_OK) or os.path.isdir(named):
            raise ValueError(f"{named} is no interpreter; name one that has torch and transformers")
        return str(named)
    if find_spec("torch") is None:
        raise ValueError(
            "there is no torch here to compare with; name an interpreter that has torch, "
            f"transformers and compressed-tensors by --python or ${PYTHON_VARIABLE}"
        )
    return sys.executable


def _stand_in(folder: Path, quantization: Quantization | None, temporary: Path) -> tuple[Path, str]:
    """A checkpoint that transformers loads on a CPU, and what it is."""
    if quantization is None:
        if not (folder / ORBAX).exists():
            return folder, "the checkpoint itself"
        convert(folder, temporary, "bf16")
        return temporary, "the same weights in safetensors"
    specs = quantization.linears.values()
    plain = any(spec.scheme.weight_dtype == "float4_e2m1fn" for spec in specs)
    ordered = any(spec.act_order for spec in specs)
    if quantization.method == "compressed-tensors" and not plain and not ordered:
        return folder, "the checkpoint itself"
    try:
        if not plain:
            convert(folder, temporary, "compressed-tensors")
            return temporary, "converted to compressed-tensors, bit for bit"
    except ValueError as error:
        if _quantizes_as_it_runs(quantization):
            raise ValueError(f"{folder} cannot be compared with transformers: {error}") from error
    _dequantize(folder, temporary)
    return temporary, "dequantized to float32 here"


def _dequantize(folder: Path, output: Path) -> None:
    with open_checkpoint(folder) as source:
        # What its weights are rounded to depends on its config alone.
        source.config = source.config | {"dtype": "float32", "torch_dtype": "float32"}
        shapes = linear_shapes(LlamaConfig.from_hf(source.config))
        quantization = parse_quantization(source, shapes)
        assert quantization is not None
        export_checkpoint(
            output,
            source=source,
            linears=lambda path: read_linear(source, quantization, path, shapes[path]),
            schemes={path: spec.scheme for path, spec in quantization.linears.items()},
            to="bf16",
        )


def _quantizes_as_it_runs(quantization: Quantization | None) -> bool:
    if quantization is None:
        return False
    inputs = any(spec.scheme.activations for spec in quantization.linears.values())
    return inputs or quantization.kv_cache is not None


def _their_logits(
    python: str, folder: Path, ids: list[np.ndarray], temporary: Path
) -> tuple[np.ndarray, tuple[str, ...]]:
    with open_checkpoint(folder) as checkpoint:
        section: Mapping[str, Any] | None = checkpoint.config.get("quantization_config")
    groups = section["config_groups"].values() if section else ()
    packed_zeros = any(
        not group["weights"].get("symmetric", True) for group in groups if isinstance(group, dict)
    )
    inputs, outputs = temporary / "inputs.npz", temporary / "outputs.npz"
    given: dict[str, Any] = {f"ids_{i}": sequence for i, sequence in enumerate(ids)}
    given |= {"folder": str(folder.resolve()), "dequantize": packed_zeros}
    np.savez(inputs, **given, uses_library=section is not None)
    # Not this process's search path: an uninstalled qllama must not shadow the other's packages.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = _PROGRAM.read_text(encoding="utf-8")
    found = shutil.which(python)
    interpreter = os.path.abspath(found) if found else python  # it starts in another folder
    try:
        done = subprocess.run(
            [interpreter, "-c", program, str(inputs), str(outputs)],
            cwd=temporary,
            env=environment | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TIMEOUT,
        )
    except (subprocess.TimeoutExpired, OSError) as error:
        raise ValueError(f"{python} cannot be run: {error}") from error
    if done.returncode or not outputs.exists():
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise ValueError(f"transformers cannot run {folder.name} ({python}): {last}")
    with np.load(outputs) as results:
        logits = [results[f"logits_{i}"] for i in range(len(ids))]
        return np.concatenate(logits), tuple(results["versions"].tolist())


def _our_logits(
    folder: Path, llama: LlamaConfig, quantization: Quantization | None, ids: list[np.ndarray]
) -> list[np.ndarray]:
    with open_checkpoint(folder) as checkpoint:
        model = load_model(
            checkpoint, llama, quantization, dtype=jnp.float32, semantics="compressed-tensors"
        )
    graph, state = nnx.split(model)
    quantized = quantization is not None and quantization.kv_cache is not None
    longest = max(map(len, ids))
    cache = init_cache(llama, 1, longest, jnp.float8_e4m3fn if quantized else jnp.float32)
    logits = []
    for sequence in ids:
        padded = np.pad(sequence, (0, longest - len(sequence)))[None]
        logits.append(np.asarray(_logits(graph, state, padded, len(sequence), cache)))
    return [array[: len(sequence)] for array, sequence in zip(logits, ids, strict=True)]


@partial(jax.jit, static_argnums=0)
def _logits(
    graph: nnx.GraphDef[Llama],
    state: nnx.State,
    tokens: jax.Array,
    length: jax.Array,
    cache: KVCache,
) -> jax.Array:
    """float32 `[T, V]` of one sequence; what follows its end is written nowhere."""
    model = nnx.merge(graph, state)
    steps = jnp.arange(tokens.shape[1])
    positions = jnp.where(steps < length, steps, cache.capacity)[None]
    hidden, _ = model(tokens, positions, cache, lengths=jnp.asarray(length)[None])
    return model.logits(hidden[0])
