"""`qllama.quantize`: from a float checkpoint to a quantized one, a layer at a time."""

import dataclasses
import functools
import json
import platform
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from qllama_convert.checkpoint import Checkpoint, open_checkpoint
from qllama_convert.export import export_checkpoint
from qllama_convert.export_section import quantization_section
from qllama_convert.hub import resolve
from qllama_convert.kv_cache_scheme import KVCacheScheme
from qllama_convert.linear import LinearWeights
from qllama_convert.module_tensors import ModuleTensors
from qllama_convert.names import EMBED_TOKENS, LM_HEAD, embedding_shape, linear_shapes
from qllama_convert.quantization_config import parse_quantization
from qllama_convert.writer import check_output_folder

from qllama.config import LlamaConfig
from qllama.device import compute_dtype, set_up_devices
from qllama.errors import CheckpointError
from qllama.gptq.batches import make_batches
from qllama.gptq.calibration import CalibrationData, load_calibration, shortage
from qllama.gptq.decide import Quantizing, Replaying
from qllama.gptq.journal import Entry, Journal, open_journal
from qllama.gptq.live import Display, show
from qllama.gptq.plan import estimate_seconds, place, plan_sizes, tokens_per_batch
from qllama.gptq.recipe import (
    LinearRecipe,
    Recipe,
    make_recipe,
    needs_calibration,
    resolve_recipe,
)
from qllama.gptq.report import CalibrationReport, QuantizationReport, Seconds
from qllama.gptq.report_page import report_page
from qllama.gptq.source import Unit, check_tensors, fingerprint, read_ahead, units
from qllama.gptq.walk import Walk
from qllama.quantization.scheme import QuantScheme
from qllama.tokenizer import load_tokenizer

REPORT_FILE = "quantization_report.json"
PAGE_FILE = "quantization_report.html"


def quantize(
    model: str | Path,
    output_dir: str | Path,
    *,
    scheme: str = "W4A16",
    dataset: Any = None,
    num_calibration_samples: int = 512,
    max_seq_length: int = 2048,
    algorithm: str = "gptq",
    group_size: int | None = None,
    actorder: str | None = "static",
    observer: str = "hdiag",
    dampening_frac: float | None = None,
    smoothquant_strength: float | None = None,
    kv_cache_scheme: str | Mapping[str, Any] | None = None,
    ignore: str | Sequence[str] = (LM_HEAD,),
    recipe: str | Path | Mapping[str, Any] | None = None,
    format: str = "compressed-tensors",
    seed: int = 0,
    resume: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
) -> QuantizationReport:
    """Quantize a float checkpoint and write it as one that vLLM, transformers and qllama load.

    Interrupted at any moment, the same call goes on after the last finished layer; equal arguments
    on equal devices give equal bytes, but for the times in the report.

    Args:
        model: a checkpoint folder or a Hub id, not quantized yet.
        output_dir: the folder to write. It appears when it is complete and has been read back.
        scheme: a key of `PRESETS`: W4A16, W4A16_ASYM, W8A16, W8A8, FP8, FP8_DYNAMIC, FP8_BLOCK.
        dataset: calibration texts, see `load_calibration`. For schemes that need them.
        num_calibration_samples: sequences of it to use.
        max_seq_length: tokens of the longest sequence.
        algorithm: "gptq", or "rtn" for rounding to nearest. FP8 weights are always rounded.
        group_size: columns per scale of schemes with groups, in place of 128; -1: one per row.
        actorder: "static" or None, see `GPTQOptions`.
        observer: how scales are chosen: "hdiag", "mse" or "absmax", see `choose_scales`.
        dampening_frac: see `GPTQOptions`.
        smoothquant_strength: for int8 activations: how far their outliers are moved into the
            weights, 0 to 1; None: not at all.
        kv_cache_scheme: "fp8": calibrate scales of keys and values.
        ignore: Linears that stay as they are: paths, or "re:" and a regular expression.
        recipe: a YAML file, the name of one that comes with qllama, or what one would hold.
        format: "compressed-tensors", "gptq", "fp8" (AutoFP8), or "bf16" (dequantized).
        seed: of random calibration tokens.
        resume: go on with an interrupted run; False: discard what it did.
        overwrite: replace an existing output.
        dry_run: compute and write nothing; the report has sizes, and estimates as notes.

    Raises:
        CheckpointError: anything wrong with the model.
        ValueError: an argument out of range or that the model cannot have, calibration data that
            cannot be read, the journal of another run.
        OSError: writing failed; what is finished is kept, and the same call goes on.
    """
    made = make_recipe(
        recipe,
        scheme=scheme,
        dataset=dataset,
        num_calibration_samples=num_calibration_samples,
        max_seq_length=max_seq_length,
        algorithm=algorithm,
        group_size=group_size,
        actorder=actorder,
        observer=observer,
        dampening_frac=dampening_frac,
        smoothquant_strength=smoothquant_strength,
        kv_cache_scheme=kv_cache_scheme,
        ignore=ignore,
    )
    output = check_output_folder(output_dir, overwrite=overwrite)
    set_up_devices(0.9)
    with open_checkpoint(resolve(model)) as checkpoint:
        config = float_config(checkpoint)
        task = Task(
            model=str(model),
            checkpoint=checkpoint,
            config=config,
            recipe=made,
            linears=_linears(checkpoint, config, made),
            output=output,
            format=format,
            overwrite=overwrite,
        )
        _check_export(task)
        data = None
        if needs_calibration(made, task.linears):
            data = load_calibration(
                made.dataset,
                load_tokenizer(checkpoint.folder, config.vocab_size),
                config.vocab_size,
                num_calibration_samples=made.num_calibration_samples,
                max_seq_length=made.max_seq_length,
                seed=seed,
            )
        if dry_run:
            return _report(task, data, [], [_estimate(task, data)])
        return _run(task, data, resume=resume)


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

    @property
    def schemes(self) -> dict[str, QuantScheme]:
        return {path: linear.scheme for path, linear in self.linears.items()}


def float_config(checkpoint: Checkpoint) -> LlamaConfig:
    """The architecture of a model that is not quantized yet.

    Raises:
        CheckpointError: it is quantized, or its config.json is wrong.
    """
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


def _check_export(task: Task) -> None:
    """Refuse now what could not be written in the end."""
    kv_cache = None if task.recipe.kv_cache_scheme is None else KVCacheScheme()
    quantization_section(task.format, task.schemes, task.config, kv_cache=kv_cache)
    check_tensors(task.checkpoint, task.config)


# -- the run ---------------------------------------------------------------------------------------


def _run(task: Task, data: CalibrationData | None, *, resume: bool) -> QuantizationReport:
    everything = units(task.config, task.linears)
    with open_journal(task.output, _identity(task, data), resume=resume) as journal:
        with show(len(everything)) as display:
            if len(journal.entries) < len(everything):
                _quantize_units(task, data, everything, journal, display)
            display.phase("Writing and reading back")
            report = _export(task, data, journal)
        journal.discard()
    return report


def _quantize_units(
    task: Task,
    data: CalibrationData | None,
    everything: Sequence[Unit],
    journal: Journal,
    display: Display,
) -> None:
    """Quantize the units that the journal does not have, and write them into it."""
    walk = None if data is None else _start_walk(task, data)
    precision = "highest" if walk is not None and walk.dtype == jnp.float32 else "default"
    finished = len(journal.entries)
    display.phase(f"{finished} layers are done" if finished else "Reading weights")
    begin = time.perf_counter()
    # Without a walk there is nothing to take through the layers that are finished.
    wanted = everything if walk is not None else everything[finished:]
    with jax.default_matmul_precision(precision):
        for unit, weights in read_ahead(task.checkpoint, task.config, wanted, finished):
            io = time.perf_counter() - begin
            if unit.number < finished:
                assert walk is not None
                walk.layer(Replaying(unit, weights, journal.read(unit.number, task.linears)))
                begin = time.perf_counter()
                continue
            if unit.number == finished:
                display.begin(finished)
                if walk is not None:
                    walk.take_seconds()
            decisions = Quantizing(
                unit,
                weights,
                task.linears,
                smoothquant_strength=task.recipe.smoothquant_strength,
                kv_cache=task.recipe.kv_cache_scheme is not None and unit.layer is not None,
                on_linear=display.linear,
            )
            passed = _decide(decisions, unit, walk)
            seconds = passed + Seconds(solve=decisions.seconds, io=io)
            journal.append(decisions.unit, seconds)
            name = LM_HEAD if unit.layer is None else f"layer {unit.layer}"
            display.unit(name, decisions.unit.reports)
            begin = time.perf_counter()


def _decide(decisions: Quantizing, unit: Unit, walk: Walk | None) -> Seconds:
    """Have everything in a unit decided upon; the time of the passes that this took."""
    if walk is None:
        decisions.without_data()
        return Seconds()
    if unit.layer is None:
        walk.head(decisions, LM_HEAD)
    else:
        walk.layer(decisions)
    return walk.take_seconds()


def _start_walk(task: Task, data: CalibrationData) -> Walk:
    config = task.config
    dtype = compute_dtype("auto", config.dtype)
    batches = make_batches(data.sequences, tokens_per_batch())
    embed_tokens = ModuleTensors(task.checkpoint, EMBED_TOKENS).read_floats(
        "weight", embedding_shape(config)
    )
    tokens = sum(batch.tokens.size for batch in batches)
    placement = place(config, tokens, dtype)
    return Walk(config, batches, embed_tokens, dtype=dtype, placement=placement)


def _identity(task: Task, data: CalibrationData | None) -> dict[str, Any]:
    """What has to be the same for a run to go on with what another process finished."""
    return {
        "model": fingerprint(task.checkpoint),
        "calibration": None if data is None else data.digest(),
        "recipe": _plain(task.recipe),
        "versions": _versions(),
        "device": jax.devices()[0].device_kind,
        "tokens_per_batch": tokens_per_batch(),
    }


def _export(task: Task, data: CalibrationData | None, journal: Journal) -> QuantizationReport:
    everything = units(task.config, task.linears)
    numbers = {path: unit.number for unit in everything for path in unit.paths}
    read = functools.lru_cache(1)(lambda number: journal.read(number, task.linears))
    norms: dict[str, np.ndarray] = {}
    kv_scales = {}
    for unit in everything:
        quantized = read(unit.number)
        norms |= quantized.norms
        if quantized.kv_scales is not None:
            kv_scales[f"{unit.prefix}self_attn"] = quantized.kv_scales
    report = _report(task, data, journal.entries, [])
    export_checkpoint(
        task.output,
        source=task.checkpoint,
        linears=lambda path: LinearWeights(read(numbers[path]).linears[path], None),
        schemes=task.schemes,
        to=task.format,
        norms=norms,
        kv_scales=kv_scales,
        files={
            REPORT_FILE: report.to_json().encode(),
            PAGE_FILE: report_page(report).encode(),
        },
        damp_percent=task.recipe.default.options.dampening_frac,
        overwrite=task.overwrite,
    )
    return report


# -- the report ------------------------------------------------------------------------------------


def _report(
    task: Task, data: CalibrationData | None, entries: Sequence[Entry], notes: Sequence[str]
) -> QuantizationReport:
    statistics = jax.devices()[0].memory_stats() or {}
    schemes = [linear.scheme.describe() for linear in task.linears.values()]
    return QuantizationReport(
        model=task.model,
        output=str(task.output),
        scheme=", ".join(dict.fromkeys(schemes)),
        format=task.format,
        recipe=_plain(task.recipe),
        calibration=None if data is None else CalibrationReport(
            source=data.source,
            sequences=len(data.sequences),
            tokens=data.tokens,
            digest=data.digest(),
        ),
        versions=_versions(),
        device=jax.devices()[0].device_kind,
        seconds=sum((entry.seconds for entry in entries), Seconds()),
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_device_bytes=statistics.get("peak_bytes_in_use"),
        sizes=plan_sizes(task.checkpoint, task.linears, task.format),
        linears=tuple(report for entry in entries for report in entry.linears),
        notes=(*task.recipe.unused, *_shortage(task, data), *notes),
    )  # fmt: skip


def _shortage(task: Task, data: CalibrationData | None) -> list[str]:
    shapes = linear_shapes(task.config)
    solved = [shapes[path][1] for path, how in task.linears.items() if how.algorithm == "gptq"]
    sentence = shortage(data.tokens, max(solved)) if data is not None and solved else None
    return [] if sentence is None else [sentence]


def _estimate(task: Task, data: CalibrationData | None) -> str:
    if data is None:
        return "the scheme needs no calibration: the time is that of reading and writing"
    seconds = estimate_seconds(task.config, task.linears, [len(s) for s in data.sequences])
    return (
        f"about {seconds:.0f} s for {data.tokens} calibration tokens, if the run multiplies at "
        "half the speed that a large product of matrices was just measured to have"
    )


def _plain(recipe: Recipe) -> dict[str, Any]:
    """The options of a recipe as JSON values; the data themselves are not among them."""
    value = dataclasses.asdict(replace(recipe, dataset=None, unused=()))
    del value["dataset"], value["unused"]
    plain: dict[str, Any] = json.loads(json.dumps(value))
    return plain


def _versions() -> dict[str, str]:
    names = ("qllama", "jax", "jaxlib")
    return {name: _version(name) for name in names} | {"python": platform.python_version()}


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "unknown"
