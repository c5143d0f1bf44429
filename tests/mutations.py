"""Ways to spoil a checkpoint, and what has to come of each.

A checkpoint is `Files`, its bytes by file name. A mutation draws what it does from Hypothesis,
changes the files in place and returns a verdict.
"""

import json
from collections.abc import Callable
from enum import Enum
from typing import Any

import ml_dtypes
import numpy as np
from drafts import DTYPES, decode_tensors, encode_tensors
from hypothesis import strategies as st

Files = dict[str, bytes]
Draw = Callable[[st.SearchStrategy[Any]], Any]
Path = tuple[str | int, ...]


class Verdict(Enum):
    """What `LLM` must make of a mutated checkpoint."""

    SAME = "the logits it had before"
    REFUSED = "a CheckpointError"
    EITHER = "finite logits, or a CheckpointError"


CONFIG, INDEX = "config.json", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)

# Keys of config.json that say nothing about the computation.
_IRRELEVANT = (
    "architectures", "initializer_range", "use_cache", "transformers_version", "pad_token_id",
    "_name_or_path", "something_new",
)  # fmt: skip
# Keys whose every other value contradicts the tensors.
_STRUCTURAL = (
    "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_key_value_heads", "head_dim",
)  # fmt: skip

_DEEP: Any = 0
for _ in range(400):
    _DEEP = [_DEEP]

JUNK: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 4, 5, 8, 16, 32, 64, 127, 128, 129, 256, 2**31 - 1, 2**31,
    2**63, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1.0, 4.0, 1e-5, 1e-30, 1e-300, 5e-324, 1e17,
    1e30, 1e300, float("nan"), float("inf"), -float("inf"), "", "0", "4", "128", "nan", "true",
    "Linear", "lm_head", "re:.*", "re:(", "re:^(.*.*.*)*$", "static", "dynamic", "float", "int",
    "group", "channel", "token", "tensor", "block", "tensor_group", "attn_head", "weight",
    "gptq", "gptq_v2", "awq", "fp8", "fbgemm_fp8", "compressed-tensors", "marlin", "gemm",
    "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
    "bfloat16", "float16", "float32", "llama", "llama3", "linear", "mistral", "W8A8", "W4A16",
    "\0", "\ud800", "é" * 3, "x" * 5000, [], [0], [1], [-1], [128, 128], [64, 128], [1, 1],
    [None], ["Linear"], ["lm_head"], ["re:.*_proj"], ["re:.*(down|o)_proj$"], [[]], [["q_proj"]],
    {}, {"": 0}, {"a": {"b": []}}, {"rope_type": "linear", "factor": 2.0},
    {"rope_type": "dynamic", "factor": 1e6}, {"rope_type": "llama3"}, _DEEP,
]  # fmt: skip
_junk = st.sampled_from(JUNK)
_numbers = st.one_of(
    st.integers(-2, 300), st.integers(), st.floats(), st.sampled_from([1e-9, 1e-38, 1e38])
)
# Each a fresh copy, since later edits may go into it.
_values = st.one_of(_junk, _numbers, st.text(max_size=8), st.lists(_junk, max_size=3)).map(
    lambda value: json.loads(json.dumps(value))
)


def change_config(draw: Draw, files: Files) -> Verdict:
    """One key of config.json, wherever it is."""
    config = json.loads(files[CONFIG])
    places = [path for path in _places(config) if path != ()]
    new = ("rope_scaling", "rope_parameters", "mlp_bias", "dtype", "something_new", "text_config")
    place = draw(st.sampled_from([*places, *((key,) for key in new)]))
    before = json.dumps(_at(config, place[:1]))
    changed = _edit(draw, config, place)
    files[CONFIG] = _dump(config)
    key = place[0]
    if key in _IRRELEVANT or (len(place) == 1 and json.dumps(_at(config, place)) == before):
        # A key that is renamed may say something under its new name.
        return Verdict.SAME if changed is None or changed in _IRRELEVANT else Verdict.EITHER
    if key in _STRUCTURAL:
        # Where they are absent they follow from others, to the same value or not.
        implied = key in ("num_key_value_heads", "head_dim") and config.get(key) is None
        return Verdict.EITHER if implied else Verdict.REFUSED
    return Verdict.EITHER


def change_quantization(draw: Draw, files: Files) -> Verdict:
    """One to three places of the quantization config, or of its sidecar."""
    name = draw(st.sampled_from([n for n in (CONFIG, "quantize_config.json") if n in files]))
    content = json.loads(files[name])
    section = content.get("quantization_config", content)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(section))
        place = draw(st.sampled_from(places[1:] or [("quant_method",)]))
        _edit(draw, section, place)
    files[name] = _dump(content)
    return Verdict.EITHER


def change_text(draw: Draw, files: Files) -> Verdict:
    """config.json as text: cut short, a key twice, not JSON, not UTF-8, nested without end."""
    text = files[CONFIG]
    how = draw(st.sampled_from(["cut", "twice", "bytes", "deep", "other", "comma"]))
    if how == "cut":
        text = text[: draw(st.integers(0, len(text) - 3))]
    elif how == "twice":
        key, value = draw(st.sampled_from(sorted(json.loads(text).items())))
        text = b"{" + _dump({key: value})[1:-1] + b"," + text[1:]
    elif how == "bytes":
        start = draw(st.integers(0, len(text) - 3))
        text = text[:start] + b"\xff\xfe" + text[start:]
    elif how == "deep":
        depth = draw(st.sampled_from([500, 3_000, 20_000, 200_000]))
        text = b'{"hidden_size": ' + b"[" * depth + b"]" * depth + b"," + text[1:]
    elif how == "other":
        text = draw(st.sampled_from([b"", b"[]", b"null", b"1", b'"config"', b"\0", b"{" * 9]))
    else:
        text = text.replace(b",", b",,", 1)
    files[CONFIG] = text
    return Verdict.REFUSED


def change_tensor(draw: Draw, files: Files) -> Verdict:
    """Drop, rename, copy, reshape, retype or overwrite one tensor; the file stays well-formed."""
    file = draw(st.sampled_from(weight_files(files)))
    tensors = decode_tensors(files[file])
    name = draw(st.sampled_from(sorted(tensors)))
    edits = (_drop, _rename, _add, _reshape, _resize, _retype, _cast, _overwrite, _overwrite)
    verdict = draw(st.sampled_from(edits))(draw, tensors, name)
    files[file] = encode_tensors(tensors)
    if INDEX in files and verdict is Verdict.SAME:
        return Verdict.EITHER  # the index may name what is gone
    return verdict


def change_bytes(draw: Draw, files: Files) -> Verdict:
    """A weight file as bytes: cut short, longer, or bits of its header flipped."""
    file = draw(st.sampled_from(weight_files(files)))
    data = bytearray(files[file])
    how = draw(st.sampled_from(["cut", "longer", "length", "flip", "flip", "digit"]))
    header = 8 + int.from_bytes(data[:8], "little")
    if how == "cut":
        del data[draw(st.one_of(st.integers(0, header), st.integers(0, len(data) - 1))) :]
    elif how == "longer":
        data += draw(st.binary(min_size=1, max_size=9))
    elif how == "length":
        length = draw(st.sampled_from([0, 1, header, 2**31, 2**63, 2**64 - 1]))
        data[:8] = length.to_bytes(8, "little")
    elif how == "flip":
        for _ in range(draw(st.integers(1, 4))):
            data[draw(st.integers(0, header - 1))] ^= 1 << draw(st.integers(0, 7))
    else:
        digits = [i for i in range(8, header) if chr(data[i]).isdecimal()]
        data[draw(st.sampled_from(digits))] = ord(draw(st.sampled_from("0123456789-.eE")))
    files[file] = bytes(data)
    return Verdict.EITHER if how in ("flip", "digit") else Verdict.REFUSED


def change_index(draw: Draw, files: Files) -> Verdict:
    """The index of shards: entries gone, renamed, in another file, or not names at all."""
    if INDEX not in files:
        return change_tensor(draw, files)
    index = json.loads(files[INDEX])
    weight_map = index["weight_map"]
    name = draw(st.sampled_from(sorted(weight_map)))
    how = draw(st.sampled_from(["gone", "renamed", "moved", "junk", "metadata", "all", "unlisted"]))
    verdict = Verdict.REFUSED
    if how == "gone":  # the shard is read all the same, with a warning
        del weight_map[name]
        verdict = Verdict.SAME if index["weight_map"].values() else Verdict.REFUSED
    elif how == "renamed":
        weight_map[name + draw(st.sampled_from(["s", ".", "\0"]))] = weight_map.pop(name)
    elif how == "moved":
        others = sorted(set(weight_map.values()) - {weight_map[name]})
        weight_map[name] = draw(
            st.sampled_from([*others, "model.safetensors", "../x.safetensors", CONFIG, "", "."])
        )
    elif how == "junk":
        value = draw(_values)
        weight_map[name] = value
    elif how == "metadata":
        index["metadata"] = draw(_values)
        verdict = Verdict.SAME
    elif how == "all":
        index["weight_map"] = draw(_values)
    else:
        shard = weight_map[name]
        index["weight_map"] = {n: f for n, f in weight_map.items() if f != shard}
    files[INDEX] = _dump(index)
    return verdict


def change_files(draw: Draw, files: Files) -> Verdict:
    """Lose a file, empty it, or put another's content there."""
    name = draw(st.sampled_from(sorted(files)))
    how = draw(st.sampled_from(["gone", "empty", "pointer", "swapped", "noise"]))
    needed = name == CONFIG or name.endswith(".safetensors")
    if how == "gone":
        del files[name]
    elif how == "empty":
        files[name] = b""
    elif how == "pointer":
        files[name] = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    elif how == "swapped":
        other = draw(st.sampled_from(sorted(files)))
        needed &= other != name
        files[name] = files[other]
    else:
        files[name] = draw(st.binary(max_size=40))
    return Verdict.REFUSED if needed else Verdict.EITHER


def change_tokenizer(draw: Draw, files: Files) -> Verdict:
    """One to three places of a file of the tokenizer, or of generation_config.json."""
    name = draw(st.sampled_from([n for n in TOKENIZER_FILES if n in files]))
    content = json.loads(files[name])
    for _ in range(draw(st.integers(1, 3))):
        new = [("auto_map",), ("chat_template",), ("padding",), ("truncation",), ("normalizer",)]
        place = draw(st.sampled_from([*_places(content)][1:] + new))
        _edit(draw, content, place)
    files[name] = _dump(content)
    return Verdict.EITHER


def weight_files(files: Files) -> list[str]:
    return sorted(name for name in files if name.endswith(".safetensors"))


# -- JSON --------------------------------------------------------------------------------------


def _places(value: Any, path: Path = ()) -> list[Path]:
    """The paths of all values in a JSON value, its own first."""
    items: list[tuple[str | int, Any]] = []
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list):
        items = list(enumerate(value))[:8]
    if len(path) > 8:
        return [path]
    return [path, *(place for key, below in items for place in _places(below, (*path, key)))]


def _at(value: Any, path: Path) -> Any:
    for key in path:
        value = value.get(key) if isinstance(value, dict) else value[key]
    return value


def _edit(draw: Draw, root: Any, path: Path) -> str | None:
    """Replace, drop or rename what is at `path`; returns the new name, if there is one."""
    owner, key = _at(root, path[:-1]), path[-1]
    if not isinstance(owner, dict | list):
        return None
    how = draw(st.sampled_from(["value", "value", "value", "drop", "rename"]))
    if how == "value" or (isinstance(owner, dict) and key not in owner):
        owner[key] = draw(_values)  # type: ignore[index]
    elif how == "drop" or isinstance(owner, list):
        del owner[key]  # type: ignore[arg-type]
    else:
        name = draw(st.sampled_from([f"{key}s", f"_{key}", str(key).upper(), "something_new"]))
        owner[name] = owner.pop(key)
        return name
    return None


def _dump(value: Any) -> bytes:
    return json.dumps(value).encode()


# -- tensors -----------------------------------------------------------------------------------

Tensors = dict[str, np.ndarray]

# What a checkpoint may lack: kept for other readers, implied by the config, or only a bound.
_OPTIONAL = ("weight_shape", "g_idx", "bias", "k_scale", "v_scale")


def _suffix(name: str) -> str:
    return name.rpartition(".")[2]


def _drop(draw: Draw, tensors: Tensors, name: str) -> Verdict:
    del tensors[name]
    return Verdict.EITHER if _suffix(name) in _OPTIONAL else Verdict.REFUSED


def _rename(draw: Draw, tensors: Tensors, name: str) -> Verdict:
    """To no name of the format, or to one that is taken elsewhere in it."""
    path, _, suffix = name.rpartition(".")
    names = [f"{name}s", f"x.{name}", path, name.upper(), f"{path}.scales", f"{path}.weight", ""]
    new = draw(st.sampled_from([n for n in names if n not in tensors]))
    tensors[new] = tensors.pop(name)
    return Verdict.EITHER if suffix in _OPTIONAL else Verdict.REFUSED


def _add(draw: Draw, tensors: Tensors, name: str) -> Verdict:
    """A tensor that belongs nowhere, or one that every loader drops."""
    path = name.rpartition(".")[0]
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    suffixes = ("extra", "qweight", "weight_scale", "weight_packed", "bias", "g_idx", "input_scale")
    new = draw(st.sampled_from([buffer, *(f"{path}.{suffix}" for suffix in suffixes)]))
    if new in tensors:
        return Verdict.SAME
    tensors[new] = tensors[name]
    if new == buffer:
        return Verdict.SAME
    return Verdict.REFUSED if new.endswith(".extra") else Verdict.EITHER


def _reshape(draw: Draw, tensors: Tensors, name: str) -> Verdict:
    """The same bytes as another shape; a row of scales may be a column, and a scalar a vector."""
    array = tensors[name]
    shapes = {
        array.shape[::-1], (array.size,), (1, *array.shape), (*array.shape, 1), array.shape[1:],
        (*array.shape[:1], -1), (2, -1), (-1, 2),
    } - {array.shape}  # fmt: skip
    possible = []
    for shape in sorted(shapes):
        try:
            possible.append(array.reshape(shape))
        except ValueError:
            continue
    reshaped = draw(st.sampled_from(range(len(possible))))
    tensors[name] = possible[reshaped]
    if tensors[name].shape == array.shape:
        return Verdict.SAME
    return Verdict.EITHER if "scale" in name else Verdict.REFUSED


def _resize(draw: Draw, tensors: Tensors, name: str) -> Verdict:
    """Rows or columns fewer or more."""
    array = tensors[name]
    if array.ndim == 0:
        tensors[name] = np.repeat(array.reshape(1), draw(st.sampled_from([0, 2, 3])))
        return Verdict.REFUSED
    axis = draw(st.integers(0, array.ndim - 1))
    less = draw(st.integers(0, array.shape[axis] - 1))
    more = draw(st.booleans())
    taken = np.take(array, range(less), axis)
    tensors[name] = np.concatenate([array, array], axis) if more else taken
    return Verdict.REFUSED


def _retype(draw: Draw, tensors: Tensors, name: str) -> Verdict:
    """The same bytes as another dtype of the same width."""
    array = tensors[name]
    dtypes = [np.dtype(d) for d in DTYPES.values()]
    others = [d for d in dtypes if d.itemsize == array.dtype.itemsize and d != array.dtype]
    tensors[name] = array.view(draw(st.sampled_from(others or [array.dtype])))
    return Verdict.EITHER


def _cast(draw: Draw, tensors: Tensors, name: str) -> Verdict:
    """The same numbers, as far as possible, in another dtype."""
    dtype = np.dtype(draw(st.sampled_from(sorted(DTYPES.values(), key=str))))
    array = tensors[name]
    if array.dtype.kind in "iu" or dtype.kind in "iu" or dtype.name == "float8_e8m0fnu":
        array = np.clip(array.astype(np.float32), 0, 100)
    tensors[name] = array.astype(dtype)
    return Verdict.EITHER


def _overwrite(draw: Draw, tensors: Tensors, name: str) -> Verdict:
    """Some or all elements: special numbers, or any bits."""
    array = tensors[name].copy()
    flat = array.reshape(-1)
    if not flat.size:
        return Verdict.EITHER
    span = draw(st.sampled_from([1, 2, flat.size]))
    start = draw(st.integers(0, flat.size - 1))
    if draw(st.booleans()):
        bits = draw(st.binary(min_size=array.itemsize, max_size=array.itemsize))
        value = np.frombuffer(bits, array.dtype)[0]
    elif array.dtype.kind in "iu":
        limits = np.iinfo(array.dtype)
        value = draw(st.sampled_from([0, 1, limits.max, limits.min]))
    else:
        limits = ml_dtypes.finfo(array.dtype)
        special = [0, -0.0, 1, limits.max, limits.min, limits.tiny, limits.smallest_subnormal]
        value = draw(st.sampled_from([*special, np.nan, -1]))
        value = np.asarray(value, np.float32).astype(array.dtype)
    flat[start : start + span] = value
    tensors[name] = array
    weights = array.dtype.name in ("bfloat16", "float16", "float32", "float8_e4m3fn")
    if weights and np.isnan(flat.astype(np.float32)).any():
        return Verdict.REFUSED
    return Verdict.EITHER


MUTATIONS = (
    change_config, change_config, change_quantization, change_text, change_tensor, change_tensor,
    change_bytes, change_index, change_files,
)  # fmt: skip
