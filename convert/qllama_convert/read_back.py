"""Fingerprints of what a checkpoint holds, taken while it is written and when it is read back."""

import hashlib
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.quantization.qtensor import QTensor
from qllama_convert.checkpoint import Checkpoint, CheckpointWarning, open_checkpoint
from qllama_convert.files import first_few
from qllama_convert.kv_scales import read_kv_scales
from qllama_convert.linear import LinearWeights, read_linear
from qllama_convert.module_tensors import ModuleTensors
from qllama_convert.names import LM_HEAD, attention_paths, is_derived, linear_shapes, module_shapes
from qllama_convert.quantization_config import parse_quantization

_PIECE = 1 << 24  # bytes that one thread hashes at a time


def fingerprint(*arrays: np.ndarray | None) -> bytes:
    """A hash of dtypes, shapes and bits: of the hashes of pieces, which all cores share."""
    digest = hashlib.sha256()
    with ThreadPoolExecutor() as pool:
        for array in arrays:
            if array is None:
                digest.update(b"none")
                continue
            digest.update(f"{array.dtype} {array.shape}".encode())
            octets = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
            pieces = [octets[i : i + _PIECE] for i in range(0, octets.size, _PIECE)]
            for found in pool.map(hashlib.sha256, pieces):
                digest.update(found.digest())
    return digest.digest()


def fingerprint_linear(linear: LinearWeights) -> bytes:
    """A hash of a Linear: scheme, codes, zeros, `g_idx` and bias by their bits, scales by their
    values, because formats differ in the dtype they keep them in."""
    weight = linear.weight
    if not isinstance(weight, QTensor):
        return fingerprint(weight, linear.bias)
    scales = np.asarray(weight.scales, np.float32)
    arrays = (weight.codes, scales, weight.zeros, weight.g_idx)
    inputs = (weight.input_scale, weight.input_zero)
    bits = fingerprint(*map(_host, arrays), *map(_host, inputs), linear.bias)
    return bits + repr(weight.scheme).encode()


def read_fingerprints(folder: Path) -> dict[str, bytes]:
    """Module path -> fingerprint of everything a checkpoint holds; scales of a quantized cache are
    under the path of their attention.

    Raises:
        CheckpointError: as loading does.
    """
    with warnings.catch_warnings(), open_checkpoint(folder) as checkpoint:
        warnings.simplefilter("ignore", CheckpointWarning)  # the source has given them already
        return _read(checkpoint)


def _read(checkpoint: Checkpoint) -> dict[str, bytes]:
    llama = LlamaConfig.from_hf(checkpoint.config)
    linears = linear_shapes(llama)
    quantization = parse_quantization(checkpoint, linears)
    found: dict[str, bytes] = {}
    for path, shape in module_shapes(llama).items():
        tensors = ModuleTensors(checkpoint, path)
        if path == LM_HEAD and llama.tie_word_embeddings and not tensors.suffixes:
            continue
        if path in linears:
            linear = read_linear(checkpoint, quantization, path, linears[path])
            found[path] = fingerprint_linear(linear)
        else:
            found[path] = fingerprint(tensors.read_floats("weight", shape))
    for path in attention_paths(llama):
        k, v = read_kv_scales(checkpoint, quantization, path, llama.num_key_value_heads)
        if k is not None:
            found[path] = fingerprint(k, v)
    unread = [name for name in checkpoint.unread() if not is_derived(name)]
    if unread:
        raise CheckpointError(f"{len(unread)} tensors belong to nothing: {first_few(unread)}")
    return found


def _host(array: object) -> np.ndarray | None:
    return None if array is None else np.asarray(array)
