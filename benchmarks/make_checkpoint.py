"""Makes checkpoints to measure with: random ones of real shapes, or an existing model rounded.

    python benchmarks/make_checkpoint.py --shape llama-3.1-8b --scheme W4A16 --out DIR
    python benchmarks/make_checkpoint.py --from MODEL --scheme W8A8 --out DIR

Random codes are random bytes, never quantized floats, so that a checkpoint is made about as fast
as the disk takes it. Its weights have the spread of real ones and no meaning; what loads it, loads
what a user would load.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from qllama_convert.checkpoint import Checkpoint, open_checkpoint
from qllama_convert.export import export_checkpoint
from qllama_convert.export_config import (
    compressed_tensors_config,
    compressed_tensors_format,
    fp8_config,
    gptq_config,
)
from qllama_convert.files import read_json
from qllama_convert.linear import LinearWeights, read_linear, write_linear
from qllama_convert.names import (
    EMBED_TOKENS,
    LM_HEAD,
    embedding_shape,
    linear_shapes,
    norm_shapes,
)
from qllama_convert.quantization_config import parse_quantization
from qllama_convert.writer import check_output_folder, write_checkpoint

from qllama import demo
from qllama.config import LlamaConfig
from qllama.quantization.qtensor import QTensor
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS, QuantScheme

_LLAMA = {
    "attention_bias": False,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 128256,
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": _LLAMA
    | {
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 8,
    },
    "llama-3.3-70b": _LLAMA
    | {
        "head_dim": 128,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_attention_heads": 64,
        "num_hidden_layers": 80,
        "num_key_value_heads": 8,
    },
    "llama-3.2-1b": _LLAMA
    | {
        "head_dim": 64,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_hidden_layers": 16,
        "num_key_value_heads": 8,
        "rope_scaling": {**_LLAMA["rope_scaling"], "factor": 32.0},  # type: ignore[dict-item]
        "tie_word_embeddings": True,
    },
}
"""What the `config.json` of the published models says."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What the Linears are quantized to, and whose files they are written as."""

    scheme: QuantScheme
    method: Literal["compressed-tensors", "gptq", "fp8"] = "compressed-tensors"
    desc_act: bool = False  # GPTQ's activation order: columns belong to groups by g_idx

    @property
    def format(self) -> str:
        """The name of the layout, as `qllama_convert.linear` knows it."""
        if self.method == "compressed-tensors":
            return compressed_tensors_format(self.scheme)
        return self.method


RECIPES: dict[str, Recipe | None] = {
    "bf16": None,
    **{name: Recipe(scheme=scheme) for name, scheme in PRESETS.items()},
    "gptq": Recipe(scheme=PRESETS["W4A16"], method="gptq"),
    "gptq-desc-act": Recipe(scheme=PRESETS["W4A16"], method="gptq", desc_act=True),
    "gptq-asym": Recipe(scheme=PRESETS["W4A16_ASYM"], method="gptq"),
    "autofp8": Recipe(scheme=PRESETS["FP8"], method="fp8"),
    "fp8-block": Recipe(scheme=PRESETS["FP8_BLOCK"], method="fp8"),
}
"""By the name given to --scheme: presets of compressed-tensors, and dialects of others."""

STD = 0.02
"""Standard deviation of random weights, that of Llama's initialisation."""

INPUT_SCALE = 2.0**-5
"""Static scale of the inputs of random FP8 weights: they may reach ±14, and do not calibrate it."""

# bfloat16 words from random ones: any sign, any fraction, any last bit of the exponent, whose other
# bits make magnitudes of 2^-7 to 2^-5. Their root mean square is 0.0189.
_BF16_FREE, _BF16_SET = 0x80FF, 0x3C00
# float8_e4m3fn bytes: without the first bit of the exponent there is no NaN and nothing beyond ±2.
_FP8_FREE = 0xBF


def random_checkpoint(
    out: str | Path,
    *,
    shape: str | Mapping[str, Any] = "llama-3.1-8b",
    scheme: str = "W4A16",
    layers: int | None = None,
    vocab: int | None = None,
    group_size: int | None = None,
    tokenizer: str | Path | None = None,
    seed: int = 0,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write a checkpoint with random weights; equal arguments give equal bytes.

    Args:
        out: its folder.
        shape: a name in `SHAPES`, or the keys of a `config.json` that differ from Llama 3.1's.
        scheme: a name in `RECIPES`. Every Linear but `lm_head` is quantized.
        layers: decoder layers, where not those of the shape.
        vocab: tokens, where not those of the shape.
        group_size: columns per scale, for schemes with groups.
        tokenizer: folder whose tokenizer and special tokens the checkpoint gets; None: the demo
            model's, if the vocabulary is as large.
        seed: of the weights.
        max_shard_bytes: see `write_checkpoint`.
        overwrite: replace an existing checkpoint.

    Returns:
        The folder, as an absolute path.

    Raises:
        ValueError: an unknown name, or sizes that do not go together.
        OSError: as writing does.
    """
    out = check_output_folder(out, overwrite=overwrite)
    recipe = _recipe(scheme, group_size)
    if isinstance(shape, str) and shape not in SHAPES:
        raise ValueError(f"shape {shape!r} is unknown; use one of {', '.join(SHAPES)}")
    config = dict(SHAPES[shape] if isinstance(shape, str) else _LLAMA | dict(shape))
    config |= {"num_hidden_layers": layers} if layers is not None else {}
    config |= {"vocab_size": vocab} if vocab is not None else {}
    files: dict[str, bytes | Path] = {}
    if tokenizer is None and config["vocab_size"] >= _vocab_size(demo.model_path()):
        tokenizer = demo.model_path()
    if tokenizer is not None:
        if config["vocab_size"] < _vocab_size(Path(tokenizer)):
            raise ValueError(
                f"vocab={config['vocab_size']} has no room for the {_vocab_size(Path(tokenizer))} "
                f"tokens of {tokenizer}"
            )
        files |= _files(Path(tokenizer), _TOKENIZER_FILES)
        config |= _special_tokens(Path(tokenizer))
    llama = LlamaConfig.from_hf(config)
    if recipe is not None:
        _check_sizes(recipe, llama)
    rng = np.random.Generator(np.random.SFC64(seed))
    return write_checkpoint(
        out,
        config=config | _quantization_section(recipe, llama),
        tensors=_random_tensors(llama, recipe, rng),
        files=files | _sidecar(recipe),
        max_shard_bytes=max_shard_bytes,
        overwrite=overwrite,
    )


def rounded_checkpoint(
    out: str | Path,
    *,
    source: str | Path,
    scheme: str = "W4A16",
    group_size: int | None = None,
    max_shard_bytes: int = 5_000_000_000,
    overwrite: bool = False,
) -> Path:
    """Write an unquantized model with its Linears, but `lm_head`, rounded to nearest.

    Args:
        out: folder to write.
        source: folder of the model; its tokenizer and generation config come along.
        scheme: a name in `RECIPES` that needs no calibration.
        group_size: columns per scale, for schemes with groups.
        max_shard_bytes: see `write_checkpoint`.
        overwrite: replace an existing checkpoint.

    Returns:
        The folder, as an absolute path.

    Raises:
        ValueError: an unknown name, or a scheme that rounding alone does not make.
        CheckpointError: the source is quantized already, or something is wrong with it.
        OSError: as writing does.
    """
    out = check_output_folder(out, overwrite=overwrite)
    recipe = _recipe(scheme, group_size)
    if recipe is None:
        raise ValueError("scheme bf16 rounds nothing; copy the folder")
    activations = recipe.scheme.activations
    if recipe.desc_act or (activations is not None and not activations.dynamic):
        raise ValueError(
            f"scheme {scheme} needs calibration, which rounding does without; take one with "
            "dynamic activations, or quantize the model with GPTQ"
        )
    with open_checkpoint(source) as checkpoint:
        llama = LlamaConfig.from_hf(checkpoint.config)
        _check_sizes(recipe, llama)
        quantization = parse_quantization(checkpoint, linear_shapes(llama))
        if quantization is not None:
            raise ValueError(f"{source} is quantized already ({quantization.method})")
        return export_checkpoint(
            out,
            source=checkpoint,
            linears=lambda path: _rounded(checkpoint, path, recipe.scheme),
            schemes={path: recipe.scheme for path, _ in _quantized(llama)},
            to=recipe.method,
            max_shard_bytes=max_shard_bytes,
            overwrite=overwrite,
        )


# -- files and configs --------------------------------------------------------------------------

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def _recipe(scheme: str, group_size: int | None) -> Recipe | None:
    if scheme not in RECIPES:
        raise ValueError(f"scheme {scheme!r} is unknown; use one of {', '.join(RECIPES)}")
    recipe = RECIPES[scheme]
    if group_size is None:
        return recipe
    if recipe is None or recipe.scheme.strategy != "group":
        raise ValueError(f"scheme {scheme} has no groups; leave group_size out")
    return replace(recipe, scheme=replace(recipe.scheme, group_size=group_size))


def _check_sizes(recipe: Recipe, llama: LlamaConfig) -> None:
    for path, shape in _quantized(llama):
        columns = recipe.scheme.scale_block(shape)[1]
        if shape[1] % columns:
            raise ValueError(
                f"{path} has K={shape[1]}, no multiple of the {columns} columns that share a "
                "scale; pass a group_size that divides it, or another scheme"
            )


def _quantized(llama: LlamaConfig) -> Iterator[tuple[str, tuple[int, int]]]:
    return ((path, shape) for path, shape in linear_shapes(llama).items() if path != LM_HEAD)


def _quantization_section(recipe: Recipe | None, llama: LlamaConfig) -> dict[str, Any]:
    if recipe is None:
        return {}
    if recipe.method == "gptq":
        section = gptq_config(recipe.scheme, desc_act=recipe.desc_act)
    elif recipe.method == "fp8":
        section = fp8_config(recipe.scheme, [LM_HEAD])
    else:
        schemes = {path: recipe.scheme for path, _ in _quantized(llama)}
        section = compressed_tensors_config(schemes, [LM_HEAD])
    return {"quantization_config": section}


def _sidecar(recipe: Recipe | None) -> dict[str, bytes | Path]:
    """GPTQ's config once more, where older readers look for it."""
    if recipe is None or recipe.method != "gptq":
        return {}
    import json

    config = gptq_config(recipe.scheme, desc_act=recipe.desc_act)
    return {"quantize_config.json": json.dumps(config, indent=2).encode() + b"\n"}


def _files(folder: Path, names: tuple[str, ...]) -> dict[str, bytes | Path]:
    return {name: folder / name for name in names if (folder / name).is_file()}


def _vocab_size(folder: Path) -> int:
    """Of the model that the tokenizer belongs to."""
    return LlamaConfig.from_hf(read_json(folder / "config.json")).vocab_size


def _special_tokens(folder: Path) -> dict[str, Any]:
    config = read_json(folder / "config.json")
    return {key: config[key] for key in _SPECIAL_TOKENS if key in config}


_SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


# -- tensors ------------------------------------------------------------------------------------


def _random_tensors(
    llama: LlamaConfig, recipe: Recipe | None, rng: np.random.Generator
) -> Iterator[tuple[str, np.ndarray]]:
    yield f"{EMBED_TOKENS}.weight", _random_bfloat16(rng, embedding_shape(llama))
    for path, (size,) in norm_shapes(llama).items():
        yield f"{path}.weight", np.ones(size, ml_dtypes.bfloat16)
    for path, shape in linear_shapes(llama).items():
        if path == LM_HEAD and llama.tie_word_embeddings:
            continue
        if recipe is None or path == LM_HEAD:
            yield f"{path}.weight", _random_bfloat16(rng, shape)
        else:
            weight = _random_weight(rng, shape, recipe)
            yield from write_linear(path, LinearWeights(weight, None), recipe.format).items()


def _random_bfloat16(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    words = _random_bytes(rng, (*shape[:-1], 2 * shape[-1])).view(np.uint16)
    words &= _BF16_FREE
    words |= _BF16_SET
    return words.view(ml_dtypes.bfloat16)


def _random_weight(rng: np.random.Generator, shape: tuple[int, int], recipe: Recipe) -> QTensor:
    """Any codes, as likely as each other, with scales around those that give weights of `STD`."""
    (n, k), scheme = shape, recipe.scheme
    codes = _random_bytes(rng, (n, k * scheme.bits // 8))
    if scheme.weight_dtype == "float8_e4m3fn":
        codes &= _FP8_FREE
        codes = codes.view(ml_dtypes.float8_e4m3fn)
        spread = np.arange(0x40, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
        std = float(np.sqrt(np.mean(spread**2)))
    else:
        codes = codes.view(np.int8) if scheme.bits == 8 else codes
        std = float(np.std(np.arange(2**scheme.bits)))
    grid = scheme.scale_shape(shape)
    scales = STD / std * rng.uniform(0.75, 1.25, grid)
    dtype = np.float16 if recipe.method == "gptq" else ml_dtypes.bfloat16
    activations = scheme.activations
    static = activations is not None and not activations.dynamic
    return QTensor(
        codes=codes,
        scales=scales.astype(dtype),
        zeros=None if scheme.symmetric else rng.integers(-2, 3, grid, np.int16),
        g_idx=_random_groups(rng, k, scheme) if recipe.desc_act else None,
        input_scale=np.array(INPUT_SCALE, np.float32) if static else None,
        scheme=scheme,
        shape=shape,
    )


def _random_groups(rng: np.random.Generator, k: int, scheme: QuantScheme) -> np.ndarray:
    assert scheme.group_size is not None
    return rng.permutation(np.arange(k) // scheme.group_size).astype(np.int32)


def _random_bytes(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    words = rng.integers(0, 2**64, -(-size // 8), np.uint64)  # six times as fast as rng.bytes
    return words.view(np.uint8)[:size].reshape(shape)


def _rounded(checkpoint: Checkpoint, path: str, scheme: QuantScheme) -> LinearWeights:
    shapes = linear_shapes(LlamaConfig.from_hf(checkpoint.config))
    weight = read_linear(checkpoint, None, path, shapes[path]).weight
    return LinearWeights(quantize_rtn(weight, scheme), None)


# -- command line -------------------------------------------------------------------------------

_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    parser.add_argument("--scheme", default="W4A16", choices=list(RECIPES))
    parser.add_argument("--group-size", type=int, metavar="COLUMNS")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--from", dest="source", metavar="DIR", help="round this model's weights")
    random = parser.add_argument_group("random weights")
    random.add_argument("--shape", default="llama-3.1-8b", choices=[*SHAPES, "custom"])
    random.add_argument("--layers", type=int)
    random.add_argument("--vocab", type=int)
    random.add_argument("--tokenizer", metavar="DIR", help="default: the demo model's, if it fits")
    random.add_argument("--seed", type=int, default=0)
    custom = parser.add_argument_group("--shape custom, which needs --layers and --vocab too")
    for key in _SIZES:
        custom.add_argument(f"--{key.replace('_', '-')}", type=int)
    custom.add_argument("--tie-word-embeddings", action="store_true")
    options = parser.parse_args(arguments)

    sizes = {key: getattr(options, key) for key in _SIZES}
    shape: str | dict[str, Any] = options.shape
    if options.shape == "custom":
        missing = [key for key in _SIZES if sizes[key] is None]
        missing += [key for key in ("layers", "vocab") if getattr(options, key) is None]
        if missing:
            parser.error(f"--shape custom needs --{', --'.join(missing).replace('_', '-')}")
        shape = {**sizes, "tie_word_embeddings": options.tie_word_embeddings}
    elif any(size is not None for size in sizes.values()) or options.tie_word_embeddings:
        parser.error("sizes are for --shape custom")
    try:
        if options.source is not None:
            out = rounded_checkpoint(
                options.out,
                source=options.source,
                scheme=options.scheme,
                group_size=options.group_size,
                overwrite=options.overwrite,
            )
        else:
            out = random_checkpoint(
                options.out,
                shape=shape,
                scheme=options.scheme,
                layers=options.layers,
                vocab=options.vocab,
                group_size=options.group_size,
                tokenizer=options.tokenizer,
                seed=options.seed,
                overwrite=options.overwrite,
            )
    except (ValueError, OSError) as error:
        print(f"make_checkpoint: {error}", file=sys.stderr)
        return 2
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    print(f"{out}: {size / 1e9:.2f} GB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
