"""What a run leaves: the checkpoint, its model card, and the report."""

import dataclasses
import functools
import os
import resource
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from qllama_convert.export import export_checkpoint
from qllama_convert.linear import LinearWeights
from qllama_convert.model_card import has_chat_template, license_of, model_card
from qllama_convert.names import linear_shapes

from qllama.gptq.calibration import CalibrationData, shortage
from qllama.gptq.journal import Entry, Journal
from qllama.gptq.plan import plan_sizes
from qllama.gptq.report import (
    PAGE_FILE,
    REPORT_FILE,
    CalibrationReport,
    QuantizationReport,
    Seconds,
)
from qllama.gptq.report_page import report_page
from qllama.gptq.source import units
from qllama.gptq.task import Task, plain_recipe, versions


def write_output(task: Task, data: CalibrationData | None, journal: Journal) -> QuantizationReport:
    """Export what the journal has, all of it being finished; the report is beside it."""
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
    report = make_report(task, data, journal.entries)
    export_checkpoint(
        task.output,
        source=task.checkpoint,
        linears=lambda path: LinearWeights(read(numbers[path]).linears[path], None),
        schemes=task.schemes,
        to=task.format,
        norms=norms,
        kv_scales=kv_scales,
        files=_files(task, report),
        damp_percent=task.recipe.default.options.dampening_frac,
        overwrite=task.overwrite,
    )
    return report


def _files(task: Task, report: QuantizationReport) -> dict[str, bytes]:
    """What goes beside the weights. Only the reports say how long things took."""
    used = report.calibration
    card = model_card(
        name=task.output.name,
        to=task.format,
        scheme=report.scheme,
        base_model=None if os.path.lexists(task.model) else task.model,
        license_name=license_of(task.checkpoint.folder),
        recipe=_settings(task),
        calibration=None
        if used is None
        else f"{used.tokens} tokens in {used.sequences} sequences of {Path(used.source).name}",
        notes=task.recipe.unused,
        chat=has_chat_template(task.checkpoint.folder),
    )
    return {
        REPORT_FILE: report.to_json().encode(),
        PAGE_FILE: report_page(report).encode(),
        "README.md": card.encode(),
    }


def _settings(task: Task) -> dict[str, object]:
    """The recipe for a model card, in the words of `qllama.quantize`."""
    recipe, linear = task.recipe, task.recipe.default
    settings: dict[str, object] = {"algorithm": linear.algorithm}
    if linear.algorithm == "gptq":
        settings |= dataclasses.asdict(linear.options)
    settings |= {
        "smoothquant_strength": recipe.smoothquant_strength,
        "kv_cache_scheme": recipe.kv_cache_scheme,
        "rules": len(recipe.rules) or None,
        "ignore": ", ".join(recipe.ignore),
    }
    return {name: value for name, value in settings.items() if value not in (None, False)}


def make_report(
    task: Task,
    data: CalibrationData | None,
    entries: Sequence[Entry],
    notes: Sequence[str] = (),
) -> QuantizationReport:
    """The report of a run that has finished these units."""
    devices = list(task.mesh.devices.flat)
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    schemes = [linear.scheme.describe() for linear in task.linears.values()]
    return QuantizationReport(
        model=task.model,
        output=str(task.output),
        scheme=", ".join(dict.fromkeys(schemes)),
        format=task.format,
        recipe=plain_recipe(task.recipe),
        calibration=None if data is None else CalibrationReport(
            source=data.source,
            sequences=len(data.sequences),
            tokens=data.tokens,
            digest=data.digest(),
        ),
        versions=versions(),
        device=f"{len(devices)} x " * (len(devices) > 1) + devices[0].device_kind,
        seconds=sum((entry.seconds for entry in entries), Seconds()),
        peak_host_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        peak_device_bytes=max((peak for peak in peaks if peak is not None), default=None),
        sizes=plan_sizes(task.checkpoint, task.linears, task.format),
        linears=tuple(report for entry in entries for report in entry.linears),
        notes=(*task.recipe.unused, *_shortage(task, data), *notes),
    )  # fmt: skip


def _shortage(task: Task, data: CalibrationData | None) -> list[str]:
    shapes = linear_shapes(task.config)
    solved = [shapes[path][1] for path, how in task.linears.items() if how.algorithm == "gptq"]
    sentence = shortage(data.tokens, max(solved)) if data is not None and solved else None
    return [] if sentence is None else [sentence]
