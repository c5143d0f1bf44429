"""Checkpoints to edit: a folder read into plain dicts and arrays, changed, and written again.

Reads and writes safetensors by itself, so that it can also write what no library would.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.linear import LinearWeights, read_linear
from qllama_convert.names import linear_shapes
from qllama_convert.quantization_config import Quantization, parse_quantization

from qllama.config import LlamaConfig
from qllama.quantization.qtensor import QTensor

Q_PROJ = "model.layers.0.self_attn.q_proj"
LINEAR = "lm_head"
DTYPES = {
    "U8": np.uint8,
    "I8": np.int8,
    "I32": np.int32,
    "I64": np.int64,
    "F16": np.float16,
    "F32": np.float32,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "F8_E8M0": ml_dtypes.float8_e8m0fnu,
}
_CODES = {np.dtype(dtype): code for code, dtype in DTYPES.items()}


@dataclass
class Draft:
    """A checkpoint as dicts and arrays."""

    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, int]]  # of the Linears that it has
    files: dict[str, dict[str, Any]] = field(default_factory=dict)  # other JSON files

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    def group(self, name: str = "group_0") -> dict[str, Any]:
        """One scheme of a compressed-tensors config."""
        return self.quantization["config_groups"][name]

    def save(self, folder: Path) -> Path:
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        for name, content in self.files.items():
            (folder / name).write_text(json.dumps(content))
        write_tensors(folder / "model.safetensors", self.tensors)
        return folder


def draft(folder: Path) -> Draft:
    """The first layer of a checkpoint, its head, and its config."""
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 1}
    tensors = read_tensors(folder / "model.safetensors")
    tensors = {
        name: array
        for name, array in tensors.items()
        if not name.startswith("model.layers.") or name.startswith("model.layers.0.")
    }
    shapes = linear_shapes(LlamaConfig.from_hf(config))
    sidecar = folder / "quantize_config.json"
    files = {sidecar.name: json.loads(sidecar.read_text())} if sidecar.exists() else {}
    return Draft(config, tensors, shapes, files)


def single(
    shape: tuple[int, int], config: dict[str, Any] | None, tensors: Mapping[str, np.ndarray]
) -> Draft:
    """A checkpoint of one Linear, `LINEAR`, with these tensors."""
    named = {f"{LINEAR}.{suffix}": array for suffix, array in tensors.items()}
    return Draft({"quantization_config": config}, named, {LINEAR: shape})


def parse(made: Draft, folder: Path) -> Quantization | None:
    with open_checkpoint(made.save(folder)) as checkpoint:
        return parse_quantization(checkpoint, made.shapes)


def load(made: Draft, folder: Path, path: str) -> LinearWeights:
    """Write the draft, open it, parse its config and read one Linear."""
    with open_checkpoint(made.save(folder)) as checkpoint:
        quantization = parse_quantization(checkpoint, made.shapes)
        return read_linear(checkpoint, quantization, path, made.shapes[path])


def load_quantized(made: Draft, folder: Path, path: str = LINEAR) -> QTensor:
    weight = load(made, folder, path).weight
    assert isinstance(weight, QTensor)
    return weight


def dequantized(made: Draft, folder: Path, path: str = LINEAR) -> np.ndarray:
    return np.asarray(load_quantized(made, folder, path).dequantize())


def compressed(
    weights: dict[str, Any], inputs: dict[str, Any] | None = None, **others: Any
) -> dict[str, Any]:
    """A compressed-tensors config with one group for every Linear."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
    } | others


def words(*values: int) -> np.ndarray:
    """int32 words from their unsigned values."""
    return np.array(values, np.uint32).view(np.int32)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    path.write_bytes(encode_tensors(tensors))


def encode_tensors(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A safetensors file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, array in tensors.items():
        start, data = len(data), data + array.tobytes()
        header[name] = {
            "dtype": _CODES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, len(data)],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    return decode_tensors(path.read_bytes())


def decode_tensors(content: bytes) -> dict[str, np.ndarray]:
    """What a safetensors file holds."""
    data = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:data])
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        start, stop = entry["data_offsets"]
        flat = np.frombuffer(content[data + start : data + stop], DTYPES[entry["dtype"]])
        tensors[name] = flat.reshape(entry["shape"])
    return tensors
