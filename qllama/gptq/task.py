"""What is to be quantized and how, settled and checked before anything is computed."""

import dataclasses
import json
import platform
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from jax.sharding import Mesh
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.export_section import quantization_section
from qllama_convert.kv_cache_scheme import KVCacheScheme
from qllama_convert.names import LM_HEAD, linear_shapes
from qllama_convert.quantization_config import parse_quantization

from qllama.config import LlamaConfig
from qllama.errors import CheckpointError
from qllama.gptq.recipe import LinearRecipe, Recipe, resolve_recipe
from qllama.gptq.source import check_tensors
from qllama.parallel.mesh import make_mesh
from qllama.quantization.scheme import QuantScheme


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is to be done, settled and checked."""

    model: str  # as the user named it
    checkpoint: Checkpoint
    config: LlamaConfig
    recipe: Recipe
    linears: Mapping[str, LinearRecipe]  # those that are quantized, by path
    output: Path
    format: str
    overwrite: bool
    mesh: Mesh  # one row for each device of the run

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        return {path: linear.scheme for path, linear in self.linears.items()}


def settle(
    model: str,
    checkpoint: Checkpoint,
    recipe: Recipe,
    output: Path,
    format: str,
    *,
    overwrite: bool,
    data_parallel_size: int,
) -> Task:
    """The task, refused now if it could not be done in the end.

    Raises:
        CheckpointError: the model is quantized already, or something is wrong with it.
        ValueError: the recipe does not fit the model, or the format cannot hold the result; or
            there are fewer devices than asked for.
    """
    if not isinstance(data_parallel_size, int) or data_parallel_size < 1:
        raise ValueError(f"data_parallel_size={data_parallel_size!r} must be a positive integer")
    config = _float_config(checkpoint)
    task = Task(
        model=model,
        checkpoint=checkpoint,
        config=config,
        recipe=recipe,
        linears=_linears(checkpoint, config, recipe),
        output=output,
        format=format,
        overwrite=overwrite,
        mesh=make_mesh(data_parallel_size=data_parallel_size),
    )
    kv_cache = None if recipe.kv_cache_scheme is None else KVCacheScheme()
    quantization_section(format, task.schemes, config, kv_cache=kv_cache)
    check_tensors(checkpoint, config)
    return task


def _float_config(checkpoint: Checkpoint) -> LlamaConfig:
    config = LlamaConfig.from_hf(checkpoint.config)
    quantization = parse_quantization(checkpoint, linear_shapes(config))
    if quantization is not None:
        raise CheckpointError(
            f"{checkpoint.folder} is quantized already ({quantization.method}), and rounding what "
            "was rounded loses more than it saves: give the original, or dequantize this one first "
            f"with `qllama convert {checkpoint.folder} DIR --to bf16`"
        )
    return config


def _linears(
    checkpoint: Checkpoint, config: LlamaConfig, recipe: Recipe
) -> dict[str, LinearRecipe]:
    linears = resolve_recipe(recipe, linear_shapes(config))
    if not linears:
        raise ValueError("the recipe ignores every Linear: there is nothing to quantize")
    if LM_HEAD in linears and f"{LM_HEAD}.weight" not in checkpoint.tensors:
        raise ValueError(
            f"{LM_HEAD} is tied to the embedding, which stays as it is; put it into ignore"
        )
    return linears


def plain_recipe(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe as JSON values; the data themselves are not among them."""
    value = dataclasses.asdict(replace(recipe, dataset=None, unused=()))
    del value["dataset"], value["unused"]
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


def versions() -> dict[str, str]:
    """Of what the result depends on."""
    names = ("qllama", "jax", "jaxlib")
    return {name: _version(name) for name in names} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
