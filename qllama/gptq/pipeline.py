"""`qllama.quantize`: from a float checkpoint to a quantized one, a layer at a time."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from qllama_convert.checkpoint import open_checkpoint
from qllama_convert.hub import resolve
from qllama_convert.module_tensors import ModuleTensors
from qllama_convert.names import EMBED_TOKENS, LM_HEAD, embedding_shape
from qllama_convert.writer import check_output_folder

from qllama.device import compute_dtype, set_up_devices
from qllama.gptq.batches import make_batches
from qllama.gptq.calibration import CalibrationData, load_calibration
from qllama.gptq.decide import Quantizing, Replaying
from qllama.gptq.journal import Journal, open_journal
from qllama.gptq.live import Display, show
from qllama.gptq.output import make_report, write_output
from qllama.gptq.plan import estimate_seconds, place, tokens_per_batch
from qllama.gptq.recipe import make_recipe, needs_calibration
from qllama.gptq.report import QuantizationReport, Seconds
from qllama.gptq.source import Unit, fingerprint, read_ahead, units
from qllama.gptq.task import Task, plain_recipe, settle, versions
from qllama.gptq.walk import Walk
from qllama.threads import one_behind
from qllama.tokenizer import load_tokenizer


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
    data_parallel_size: int = 1,
    seed: int = 0,
    resume: bool = True,
    overwrite: bool = False,
    dry_run: bool = False,
) -> QuantizationReport:
    """Quantize a float checkpoint and write it as one that vLLM, transformers and qllama load.

    Interrupted at any moment, the same call goes on after the last finished layer; equal arguments
    on equal devices, and as many, give equal bytes, but for the times in the report.

    Args:
        model: a checkpoint folder or a Hub id, not quantized yet.
        output_dir: the folder to write. It appears when it is complete and has been read back.
        scheme: a key of `PRESETS`: W4A16, W4A16_ASYM, W8A16, W8A8, FP8, FP8_DYNAMIC, FP8_BLOCK.
        dataset: calibration texts, see `load_calibration`. For schemes that need them.
        num_calibration_samples: sequences of it to use.
        max_seq_length: tokens of the longest sequence.
        algorithm: "gptq", or "rtn" for rounding to nearest. FP8_DYNAMIC and FP8_BLOCK weights are
            rounded where there is no `dataset`.
        group_size: columns per scale of schemes with groups, in place of 128; -1: one per row.
        actorder: "static" or None, see `GPTQOptions`.
        observer: how scales are chosen: "hdiag", "mse" or "absmax", see `choose_scales`.
        dampening_frac: see `GPTQOptions`.
        smoothquant_strength: for int8 activations: how far their outliers are moved into the
            weights, 0 to 1, 0 being not at all; None: 0.8 with GPTQ, else 0.
        kv_cache_scheme: "fp8": calibrate scales of keys and values.
        ignore: Linears that stay as they are: paths, or "re:" and a regular expression.
        recipe: a YAML file, the name of one that comes with qllama, or what one would hold.
        format: "compressed-tensors", "gptq", "fp8" (AutoFP8), or "bf16" (dequantized).
        data_parallel_size: devices that share the calibration sequences, and the rows of every
            weight when it is solved. The result depends on it by rounding alone.
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
        task = settle(
            str(model),
            checkpoint,
            made,
            output,
            format,
            overwrite=overwrite,
            data_parallel_size=data_parallel_size,
        )
        data = None
        if needs_calibration(made, task.linears):
            vocab_size = task.config.vocab_size
            data = load_calibration(
                made.dataset,
                load_tokenizer(checkpoint.folder, vocab_size),
                vocab_size,
                num_calibration_samples=made.num_calibration_samples,
                max_seq_length=made.max_seq_length,
                seed=seed,
            )
        if dry_run:
            return make_report(task, data, [], [_estimate(task, data)])
        return _run(task, data, resume=resume)


def _run(task: Task, data: CalibrationData | None, *, resume: bool) -> QuantizationReport:
    everything = units(task.config, task.linears)
    with open_journal(task.output, _identity(task, data), resume=resume) as journal:
        with show(len(everything)) as display:
            if len(journal.entries) < len(everything):
                _quantize_units(task, data, everything, journal, display)
            display.phase("Writing and reading back")
            report = write_output(task, data, journal)
        journal.discard()
    return report


def _quantize_units(
    task: Task,
    data: CalibrationData | None,
    everything: Sequence[Unit],
    journal: Journal,
    display: Display,
) -> None:
    """Quantize the units that the journal does not have, and write them into it: each while the
    next one is quantized."""
    walk = None if data is None else _start_walk(task, data)
    precision = "highest" if walk is not None and walk.dtype == jnp.float32 else "default"
    finished = len(journal.entries)
    display.phase(f"{finished} layers are done" if finished else "Reading weights")
    begin = time.perf_counter()
    # Without a walk there is nothing to take through the layers that are finished.
    wanted = everything if walk is not None else everything[finished:]
    with jax.default_matmul_precision(precision), one_behind() as behind:
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
                mesh=task.mesh,
                smoothquant_strength=task.recipe.smoothquant_strength,
                kv_cache=task.recipe.kv_cache_scheme is not None and unit.layer is not None,
                on_linear=display.linear,
            )
            passed = _decide(decisions, unit, walk)
            seconds = passed + decisions.seconds + Seconds(io=io)
            name = LM_HEAD if unit.layer is None else f"layer {unit.layer}"
            display.unit(name, decisions.unit.reports)
            begin = time.perf_counter()
            behind(journal.append, decisions.unit, seconds)


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
    devices = list(task.mesh.devices.flat)
    batches = make_batches(data.sequences, tokens_per_batch(), devices)
    embed_tokens = ModuleTensors(task.checkpoint, EMBED_TOKENS).read_floats(
        "weight", embedding_shape(config)
    )
    placement = place(config, batches, dtype)
    return Walk(config, batches, embed_tokens, dtype=dtype, placement=placement)


def _identity(task: Task, data: CalibrationData | None) -> dict[str, Any]:
    """What has to be the same for a run to go on with what another process finished."""
    return {
        "model": fingerprint(task.checkpoint),
        "calibration": None if data is None else data.digest(),
        "recipe": plain_recipe(task.recipe),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "data_parallel_size": task.mesh.size,
        "tokens_per_batch": tokens_per_batch(),
    }


def _estimate(task: Task, data: CalibrationData | None) -> str:
    if data is None:
        return "the scheme needs no calibration: the time is that of reading and writing"
    lengths = [len(sequence) for sequence in data.sequences]
    seconds = estimate_seconds(task.config, task.linears, lengths, task.mesh.size)
    return (
        f"about {seconds:.0f} s for {data.tokens} calibration tokens, if the run multiplies at "
        "half the speed that a large product of matrices was just measured to have"
    )
