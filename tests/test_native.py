"""The native form: every kind of weight as it is, kept by orbax."""

import functools
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import small_checkpoints
from drafts import LINEAR, Draft, parse
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qllama_convert import orbax_arrays
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.export import export_checkpoint
from qllama_convert.formats import native
from qllama_convert.kv_scales import read_kv_scales
from qllama_convert.layers import part_of_linear, read_layers
from qllama_convert.linear import open_embedding, read_linear
from qllama_convert.names import EMBED_TOKENS, attention_paths, embedding_shape, linear_shapes
from qllama_convert.orbax_arrays import OrbaxArray, OrbaxArrays, write_orbax
from qllama_convert.quantization_config import parse_quantization
from qllama_convert.read_back import read_fingerprints

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.llm import LLM
from qllama.quantization.scheme import PRESETS, ActivationScheme, QuantScheme

IDS = np.arange(1, 33)


def to_native(out: Path, folder: Path) -> Path:
    with open_checkpoint(folder) as source:
        llama = LlamaConfig.from_hf(source.config)
        shapes = linear_shapes(llama)
        quantization = parse_quantization(source, shapes)
        specs = quantization.linears if quantization else {}
        cached = quantization is not None and quantization.kv_cache is not None
        heads = llama.num_key_value_heads
        return export_checkpoint(
            out,
            source=source,
            linears=lambda path: read_linear(source, quantization, path, shapes[path]),
            schemes={path: spec.scheme for path, spec in specs.items()},
            to="native",
            kv_scales={
                path: read_kv_scales(source, quantization, path, heads)
                for path in (attention_paths(llama) if cached else ())
            },
        )


def test_every_kind_is_kept_whole(tiny_llama3_dir: Path, tmp_path: Path) -> None:
    out = to_native(tmp_path / "out", tiny_llama3_dir)
    assert read_fingerprints(out) == read_fingerprints(tiny_llama3_dir)
    assert (out / "tokenizer.json").read_bytes() == (
        tiny_llama3_dir / "tokenizer.json"
    ).read_bytes()
    assert {path.suffix for path in out.iterdir()} <= {".json", ".jinja", ".orbax"}


@pytest.mark.parametrize("kind", ["gptq_w4_g128_desc_act", "ct_w8a8_int8"])
def test_it_runs_as_its_source(
    kind: str, tiny_llama3: Callable[[str], Path], tmp_path: Path
) -> None:
    out = to_native(tmp_path / "a folder, 100%", tiny_llama3(kind))
    with LLM(tiny_llama3(kind), dtype="float32") as llm:
        expected = llm.logits(IDS)
    with LLM(out, dtype="float32") as llm:
        assert np.array_equal(llm.logits(IDS), expected)
        assert llm.tokenizer is not None


@pytest.mark.parametrize("kind", ["tied", "mixed", "float8_kv", "awq"])
def test_small_models_too(kind: str, tmp_path: Path) -> None:
    folder = small_checkpoints.make(kind, tmp_path / "in")
    out = to_native(tmp_path / "out", folder)
    assert read_fingerprints(out) == read_fingerprints(folder)


def test_every_field_of_a_scheme_is_kept(tmp_path: Path) -> None:
    static = ActivationScheme(dtype="int8", strategy="tensor", dynamic=False, symmetric=False)
    bounded = ActivationScheme(dtype="float8_e4m3fn", strategy="token", upper_bound=1200.0)
    schemes = [*PRESETS.values(), replace(PRESETS["W8A8"], activations=static)]
    schemes += [replace(PRESETS["FP8_DYNAMIC"], activations=bounded)]
    schemes += [QuantScheme(weight_dtype="float4_e2m1fn", strategy="group", group_size=16)]
    given = {f"{LINEAR}{i}": scheme for i, scheme in enumerate(schemes)}
    config = json.loads(json.dumps({"quantization_config": native.section(given)}))
    draft = Draft(config, {f"{path}.codes": np.zeros(1, np.uint8) for path in given},
                  dict.fromkeys(given, (128, 128)))  # fmt: skip
    quantization = parse(draft, tmp_path)
    assert quantization is not None
    assert {path: spec.scheme for path, spec in quantization.linears.items()} == given


def test_orbax_restores_it_onto_any_sharding(
    tiny_llama3: Callable[[str], Path], tmp_path: Path
) -> None:
    import orbax.checkpoint as ocp

    out = to_native(tmp_path / "out", tiny_llama3("ct_w4a16_g128"))
    mesh = Mesh(np.array(jax.devices()[:2]), ("model",))
    split = NamedSharding(mesh, PartitionSpec("model"))
    name = "model.layers.1.mlp.up_proj.codes"
    with ocp.StandardCheckpointer() as checkpointer:
        path = (out / "model.orbax").resolve()
        kept = checkpointer.metadata(path).item_metadata.tree

        def target(array: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=split)

        restored = checkpointer.restore(path, jax.tree.map(target, dict(kept)))
    codes = restored["model"]["layers"]["1"]["mlp"]["up_proj"]["codes"]
    assert codes.sharding == split
    with open_checkpoint(out) as checkpoint:
        assert np.array_equal(codes, checkpoint.read(name))


# Onto several devices, each part read by itself.


@pytest.fixture(scope="module")
def in_chunks(
    wide: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """The native form of a wide checkpoint, in chunks as small for it as usual ones for a Llama."""
    folder = tmp_path_factory.mktemp("chunks")

    @functools.cache
    def native(scheme: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(orbax_arrays, "_CHUNK_BYTES", 1 << 12)
            return to_native(folder / scheme, wide(scheme))

    return native


@pytest.mark.parametrize(
    "scheme",
    [
        "W4A16_ASYM",
        "gptq-desc-act",
        pytest.param("bf16", marks=pytest.mark.slow),
        pytest.param("FP8_DYNAMIC", marks=pytest.mark.slow),
    ],
)
def test_any_mesh_gives_what_one_device_gives(
    scheme: str, in_chunks: Callable[[str], Path]
) -> None:
    folder = in_chunks(scheme)
    settings = {"dtype": "float32", "activation_semantics": "compressed-tensors"}
    with LLM(folder, **settings) as llm:
        expected = llm.logits(IDS)
    for replicas, size in ((1, 2), (1, 4), (2, 2)):
        with LLM(folder, tensor_parallel_size=size, data_parallel_size=replicas, **settings) as llm:
            assert dict(llm.mesh.shape) == {"data": replicas, "model": size}
            found = llm.logits(IDS)
        bound = 1e-5 if scheme != "FP8_DYNAMIC" else 1e-2  # a rounding that flips spreads
        assert np.abs(found - expected).max() < bound * np.abs(expected).max()


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "gptq-desc-act"])
@pytest.mark.parametrize("size", [2, 4])
def test_a_part_is_read_without_the_rest(
    scheme: str, size: int, in_chunks: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = in_chunks(scheme)
    asked: list[tuple[str, int]] = []
    read = OrbaxArray.__array__

    def counted(self: OrbaxArray, *args: Any, **kwargs: Any) -> np.ndarray:
        array = read(self, *args, **kwargs)
        asked.append((self.name, array.nbytes))
        return array

    monkeypatch.setattr(OrbaxArray, "__array__", counted)
    with open_checkpoint(folder) as checkpoint:
        llama = LlamaConfig.from_hf(checkpoint.config)
        quantization = parse_quantization(checkpoint, linear_shapes(llama))
        table = open_embedding(checkpoint, embedding_shape(llama))
        before = bytes_from_files()
        for linears in read_layers(checkpoint, llama, quantization, ranks=[1], size=size):
            assert len(linears) in (1, 3)
        table.read(part_of_linear(llama, EMBED_TOKENS, table, 1, size))
        from_files = bytes_from_files() - before
        whole = {name: info.nbytes for name, info in checkpoint.tensors.items()}
    read_of = Counter[str]()
    for name, nbytes in asked:
        read_of[name] += nbytes
    shared = (".g_idx",)  # says where the columns of any part are
    if scheme == "gptq-desc-act":
        shared += ("o_proj.scales",)  # whose columns cannot be sorted
    for name, nbytes in read_of.items():
        if not name.endswith(shared):
            # Of 998 rows of the vocabulary, pieces have 256 or 512; two 4-bit codes are in a byte,
            # and one of them may be a neighbour's where columns are sorted.
            twice = scheme == "gptq-desc-act" and name.endswith("down_proj.codes")
            assert nbytes <= 1.03 * (2 if twice else 1) * whole[name] / size, name
    assert {"model.embed_tokens.weight", f"{UP}.codes"} <= read_of.keys()
    if scheme == "W4A16_ASYM":  # elsewhere rows in another order are spread over all chunks
        assert from_files < 1.15 * sum(read_of.values())


def bytes_from_files() -> int:
    """That this process has read so far, from disks or their cache."""
    if not Path("/proc/self/io").exists():
        pytest.skip("the system does not tell what a process reads")
    counters = Path("/proc/self/io").read_text().split()
    return int(counters[counters.index("rchar:") + 1])


@pytest.mark.parametrize(
    "index",
    [
        np.s_[3:7],
        np.s_[2:40, 1:5],
        np.s_[30:64],
        np.s_[:, np.array([4, 0, 4])],
        (np.array([5, 1]), slice(2, 4)),
    ],
)
def test_parts_of_arrays(index: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orbax_arrays, "_CHUNK_BYTES", 64)
    whole = np.arange(20 * 8, dtype=np.int16).reshape(20, 8)
    write_orbax(tmp_path / "a", [("x", whole), ("y", whole[0, 0])])
    stored = OrbaxArrays(tmp_path / "a")
    np.testing.assert_array_equal(stored.read("x"), whole)
    np.testing.assert_array_equal(stored.read("y"), whole[0, 0])
    part = stored.view("x")[index]
    expected = whole[index]
    assert (part.shape, part.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_array_equal(part, expected)
    np.testing.assert_array_equal(part[1:2], expected[1:2])  # counted from the part's start


def test_a_bad_value_is_told_with_its_part(
    in_chunks: Callable[[str], Path], tmp_path: Path
) -> None:
    source = in_chunks("W4A16_ASYM")
    arrays = OrbaxArrays(source / "model.orbax")
    tensors = {name: arrays.read(name) for name in arrays.tensors}
    scales = tensors[f"{UP}.scales"].copy()
    scales[700, 1] = np.inf
    folder = tmp_path / "out"
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("model.orbax"))
    write_orbax(folder / "model.orbax", (tensors | {f"{UP}.scales": scales}).items())
    where = r"at \[188, 1\]: inf \(in the part of rows 512 to 1023 and columns 0 to 511, where"
    with pytest.raises(CheckpointError, match=where):
        LLM(folder, tensor_parallel_size=2)


# What is wrong with it.


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("native")
    return to_native(folder / "out", small_checkpoints.make("gptq", folder / "in"))


@pytest.mark.parametrize("damage", ["delete", "empty", "truncate", "flip"])
def test_damaged_files(damage: str, small: Path, tmp_path: Path) -> None:
    """Every file in turn: what is loaded is right, or refused."""
    expected = read_fingerprints(small)
    files = [p.relative_to(small) for p in (small / "model.orbax").rglob("*") if p.is_file()]
    refused = 0
    for number, file in enumerate(files):
        folder = tmp_path / str(number)
        shutil.copytree(small, folder)
        target = folder / file
        content = target.read_bytes()
        if damage == "delete":
            target.unlink()
        else:
            half = len(content) // 2
            flipped = content[:half] + bytes([content[half] ^ 0x10]) + content[half + 1 :]
            target.write_bytes({"empty": b"", "truncate": content[:half], "flip": flipped}[damage])
        try:
            found = read_fingerprints(folder)
        except CheckpointError:
            refused += 1
        else:
            # Orbax keeps no checksum of the arrays' own bits, as safetensors does not.
            assert found == expected or damage == "flip", file
    assert refused >= 2


def changed(folder: Path, out: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_bytes())
    change(config["quantization_config"])
    (out / "config.json").write_text(json.dumps(config))
    return out


UP = "model.layers.0.mlp.up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.update(version=2), "quantization_config.version is unknown"),
        (lambda q: q["config_groups"]["group_0"].pop("scheme"), "weight_dtype must be one of"),
        (lambda q: q["config_groups"]["group_0"]["targets"].append(UP), "up_proj is named twice"),
        (lambda q: q["config_groups"]["group_0"]["targets"].append("x"), "x is no Linear"),
        (lambda q: q["config_groups"]["group_0"]["targets"].remove(UP), "says this Linear is not"),
        (
            lambda q: q["config_groups"]["group_0"]["scheme"].update(weight_dtype="int8"),
            "codes has dtype U8, expected I8",
        ),
        (
            lambda q: q["config_groups"]["group_0"]["scheme"].update(group_size=64),
            r"scales has shape \[128, 1\], expected \[128, 2\]",
        ),
        (
            lambda q: q["config_groups"]["group_0"]["scheme"].update(strategy="channel"),
            "group_size belongs to strategy 'group'",
        ),
        (
            lambda q: q["config_groups"]["group_0"]["scheme"].update(symmetric=False),
            "zeros are missing",
        ),
        (
            lambda q: q["config_groups"]["group_0"]["scheme"].update(
                activations={"dtype": "int8", "strategy": "token", "group_size": 0}
            ),
            "group_size must be positive",
        ),
    ],
)
def test_configs_that_do_not_fit(
    change: Callable[[dict[str, Any]], None], message: str, small: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_fingerprints(changed(small, tmp_path / "out", change))


def test_two_sets_of_weights(small: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(small, folder)
    (folder / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"both model\.orbax and model\.safetensors"):
        LLM(folder)


def test_arrays_of_another_name_or_shape(small: Path, tmp_path: Path) -> None:
    arrays = OrbaxArrays(small / "model.orbax")
    tensors = {name: arrays.read(name) for name in arrays.tensors}
    codes = f"{UP}.codes"
    cases = [
        ({k: v for k, v in tensors.items() if k != codes}, "tensor codes is missing"),
        (
            tensors | {codes: tensors[codes][:, :5]},
            r"codes has shape \[256, 5\], expected \[256, 64",
        ),
        (tensors | {"model.extra": np.zeros(3)}, "1 tensors belong to nothing: model.extra"),
        (tensors | {f"{UP}.more": np.zeros(3)}, "unexpected tensors more"),
    ]
    for number, (given, message) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(small, folder, ignore=shutil.ignore_patterns("model.orbax"))
        write_orbax(folder / "model.orbax", given.items())
        with pytest.raises(CheckpointError, match=message):
            read_fingerprints(folder)


def test_a_disk_that_is_full(small: Path, tmp_path: Path) -> None:
    """A limit on file sizes stops orbax where a full disk would."""
    script = """
        import pathlib, resource, signal, sys
        sys.path[:0] = sys.argv[3:]
        import test_native
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        try:
            test_native.to_native(pathlib.Path(sys.argv[2]), pathlib.Path(sys.argv[1]))
        except OSError as error:
            print(error, end="")
    """
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(small), str(out), *sys.path],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert f"cannot write {out}: File too large; nothing there was changed" in done.stdout
    assert list(tmp_path.iterdir()) == []
