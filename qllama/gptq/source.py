"""The float model that is quantized: what of it is read, when, and how it is known again."""

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.files import first_few
from qllama_convert.layers import read_model_linear
from qllama_convert.linear import LinearWeights
from qllama_convert.module_tensors import FLOATS, ModuleTensors
from qllama_convert.names import (
    LM_HEAD,
    has_bias,
    is_derived,
    layer_path,
    linear_shapes,
    module_shapes,
    norm_shapes,
)

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.threads import look_ahead

_SAMPLES = 64  # pieces of a weight file that are hashed
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Unit:
    """What is quantized, written down and resumed as one: a decoder layer, or the head."""

    number: int
    layer: int | None  # None: the head
    paths: tuple[str, ...]  # of the Linears

    @property
    def prefix(self) -> str:
        """Of the paths of its modules; names within it go on from there."""
        return "" if self.layer is None else f"{layer_path(self.layer)}."


@dataclass(frozen=True)
class UnitWeights:
    """The weights of one unit, in host memory, by path."""

    linears: Mapping[str, LinearWeights]
    norms: Mapping[str, np.ndarray]


def units(config: LlamaConfig, quantized: Collection[str]) -> list[Unit]:
    """All decoder layers; and the head, if it is one of the `quantized` Linears."""
    shapes = linear_shapes(config)
    found = []
    for layer in range(config.num_hidden_layers):
        prefix = f"{layer_path(layer)}."
        paths = tuple(path for path in shapes if path.startswith(prefix))
        found.append(Unit(layer, layer, paths))
    if LM_HEAD in quantized:
        found.append(Unit(len(found), None, (LM_HEAD,)))
    return found


def check_tensors(checkpoint: Checkpoint, config: LlamaConfig) -> None:
    """See from the headers alone that the float model is all there, and nothing else.

    Raises:
        CheckpointError: a tensor is missing, of another shape or dtype, or belongs to no module.
    """
    shapes = dict(module_shapes(config))
    if config.tie_word_embeddings and f"{LM_HEAD}.weight" not in checkpoint.tensors:
        del shapes[LM_HEAD]
    strange = set(checkpoint.tensors)
    for path, shape in shapes.items():
        suffixes = ["weight", "bias"] if has_bias(config, path) else ["weight"]
        for suffix in suffixes:
            name = f"{path}.{suffix}"
            strange.discard(name)
            if name not in checkpoint.tensors:
                raise CheckpointError(f"{checkpoint.folder}: tensor {name} is missing")
            info = checkpoint.tensors[name]
            expected = shape if suffix == "weight" else shape[:1]
            if info.shape != expected or info.dtype not in FLOATS:
                raise CheckpointError(
                    f"{checkpoint.folder / info.file}: tensor {name} is {info.dtype} "
                    f"{list(info.shape)}; expected one of {', '.join(FLOATS)} {list(expected)}"
                )
    strange = {name for name in strange if not is_derived(name)}
    if strange:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(strange)} tensors belong to no module of this Llama as its "
            f"config.json describes it: {first_few(strange)}"
        )


def read_unit(checkpoint: Checkpoint, config: LlamaConfig, unit: Unit) -> UnitWeights:
    """The weights of a unit, views on their files.

    Raises:
        CheckpointError: a tensor is missing, of the wrong dtype or shape.
    """
    norms = ["model.norm"]
    if unit.layer is not None:
        norms = [path for path in norm_shapes(config) if path.startswith(unit.prefix)]
    shape = (config.hidden_size,)
    return UnitWeights(
        linears={path: read_model_linear(checkpoint, config, None, path) for path in unit.paths},
        norms={
            path: ModuleTensors(checkpoint, path).read_floats("weight", shape) for path in norms
        },
    )


def read_ahead(
    checkpoint: Checkpoint, config: LlamaConfig, wanted: Sequence[Unit], finished: int
) -> Iterator[tuple[Unit, UnitWeights]]:
    """The units and their weights in turn, the next ones being read into memory meanwhile. Those of
    the first `finished` units, of which little is needed, stay where they are."""

    def read(unit: Unit) -> UnitWeights:
        weights = read_unit(checkpoint, config, unit)
        if unit.number < finished:
            return weights
        linears = {
            path: LinearWeights(np.array(linear.weight), linear.bias)
            for path, linear in weights.linears.items()
        }
        return UnitWeights(linears, weights.norms)

    return look_ahead((unit, read(unit)) for unit in wanted)


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256, in hex, of config.json, and of the names, sizes, headers and samples of the weight
    files: enough to tell two models apart, and read in a moment."""
    digest = hashlib.sha256((checkpoint.folder / "config.json").read_bytes())
    for name in sorted({info.file for info in checkpoint.tensors.values()}):
        _add_file(digest, checkpoint.folder / name)
    return digest.hexdigest()


def _add_file(digest: "hashlib._Hash", path: Path) -> None:
    size = path.stat().st_size
    digest.update(f"{path.name} {size}".encode())
    with open(path, "rb") as file:
        head = file.read(8)
        digest.update(head + file.read(int.from_bytes(head, "little")))
        for i in range(_SAMPLES):
            file.seek(size * i // _SAMPLES)
            digest.update(file.read(_SAMPLE_BYTES))
