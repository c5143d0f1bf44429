"""The float model that is quantized: what of it is read, when, and how it is known again."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.linear import LinearWeights
from qllama_convert.loader import read_model_linear
from qllama_convert.module_tensors import ModuleTensors
from qllama_convert.names import LM_HEAD, layer_path, linear_shapes, norm_shapes

from qllama.config import LlamaConfig

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


def units(config: LlamaConfig, quantized: Sequence[str]) -> list[Unit]:
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


def read_unit(checkpoint: Checkpoint, config: LlamaConfig, unit: Unit) -> UnitWeights:
    """Read the weights of a unit into memory.

    Raises:
        CheckpointError: a tensor is missing, of the wrong dtype or shape.
    """
    norms = ["model.norm"]
    if unit.layer is not None:
        norms = [path for path in norm_shapes(config) if path.startswith(unit.prefix)]
    linears = {path: read_model_linear(checkpoint, config, None, path) for path in unit.paths}
    return UnitWeights(
        # Copies: a view would be read from the disk only when it is needed.
        linears={
            path: LinearWeights(
                np.array(linear.weight), None if linear.bias is None else np.array(linear.bias)
            )
            for path, linear in linears.items()
        },
        norms={path: np.array(read_norm(checkpoint, config, path)) for path in norms},
    )


def read_norm(checkpoint: Checkpoint, config: LlamaConfig, path: str) -> np.ndarray:
    """The weight `[D]` of a norm, a view on its file."""
    return ModuleTensors(checkpoint, path).read_floats("weight", (config.hidden_size,))


def read_ahead(
    checkpoint: Checkpoint, config: LlamaConfig, wanted: Sequence[Unit]
) -> Iterator[UnitWeights]:
    """The weights of each unit in turn, the next one being read meanwhile."""
    with ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as pool:
        coming = None
        for i in range(len(wanted)):
            current = coming or pool.submit(read_unit, checkpoint, config, wanted[i])
            coming = None
            weights = current.result()
            if i + 1 < len(wanted):
                coming = pool.submit(read_unit, checkpoint, config, wanted[i + 1])
            del current
            yield weights


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
