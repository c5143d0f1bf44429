"""`qllama inspect`: what is in a checkpoint, without loading it."""

import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from qllama.cli.options import add_model
from qllama.cli.tables import in_units, table

if TYPE_CHECKING:
    from qllama_convert.inspection import Inspection, ModuleSummary

SUMMARY = "tell what a checkpoint contains, without loading it"

_HEADER = ("module", "shape", "scheme", "format", "bits/weight", "on disk", "in memory")
_RIGHT = (1, 4, 5, 6)
_LAYERS = "model.layers."


def configure_parser(parser: argparse.ArgumentParser) -> None:
    add_model(parser)
    parser.add_argument(
        "--all", action="store_true", help="list every layer, also where all are alike"
    )
    parser.add_argument("--json", action="store_true", help="write one JSON object")


def run(args: argparse.Namespace) -> None:
    from qllama_convert.inspection import inspect

    from qllama import demo

    model = demo.model_path() if args.model is None else args.model
    found = inspect(model, revision=args.revision)
    print(json.dumps(as_json(found), indent=2) if args.json else report(found, every=args.all))


def as_json(found: "Inspection") -> dict[str, object]:
    """The fields of an inspection and its totals, as JSON has them."""
    totals = (
        "num_parameters",
        "bytes_on_disk",
        "bytes_in_memory",
        "bytes_as_float32",
        "kv_cache_bytes",
        "tied_head",
    )
    return dataclasses.asdict(found) | {name: getattr(found, name) for name in totals}


def report(found: "Inspection", *, every: bool = False) -> str:
    """The inspection as text; `every`: layers that are alike are not summed up as one."""
    lines = [*_head(found), ""]
    rows: list[Sequence[str]] = [_HEADER]
    for title, modules in _sections(found.modules, every):
        if title:
            rows.append([title])
        rows += [_row(module) for module in modules]
    if found.tied_head:
        rows.append(["lm_head is tied to the embedding"])
    lines += [*table(rows, _RIGHT), "", *_totals(found)]
    if found.anomalies:
        lines += ["", "worth knowing:", *(f"  - {anomaly}" for anomaly in found.anomalies)]
    return "\n".join(lines)


def _head(found: "Inspection") -> list[str]:
    config = found.config
    rope = config.rope_scaling
    schemes = dict.fromkeys(m.scheme for m in found.modules if m.format != "plain")
    return [
        found.folder,
        f"Llama, {_count(found.num_parameters)} parameters: {config.num_hidden_layers} layers, "
        f"hidden {config.hidden_size}, intermediate {config.intermediate_size}, "
        f"{config.num_attention_heads} heads of {config.head_dim}, "
        f"{config.num_key_value_heads} key-value heads, vocabulary {config.vocab_size}",
        f"up to {config.max_model_len} tokens, rope theta {config.rope_theta:g}"
        + (f", {rope.rope_type} scaling by {rope.factor:g}" if rope else ""),
        f"quantization: {found.quant_method}, {', '.join(schemes)}"
        if found.quant_method
        else f"quantization: none, {config.dtype}",
    ]


def _sections(
    modules: "Sequence[ModuleSummary]", every: bool
) -> "Iterator[tuple[str, list[ModuleSummary]]]":
    """Titled groups of table rows; layers in a row that are alike make one, unless `every`."""
    matrices = [module for module in modules if len(module.shape) == 2]
    by_layer = [
        (layer, list(members))
        for layer, members in groupby(matrices, lambda module: _place(module.path)[0])
    ]

    def kind(group: "tuple[int | None, list[ModuleSummary]]") -> object:
        layer, members = group
        if layer is None or every:
            return layer, members[0].path
        return [dataclasses.replace(m, path=_place(m.path)[1]) for m in members]

    for _, alike in groupby(by_layer, kind):
        (first, members), *others = alike
        if first is None:
            yield "", members
        elif others:
            yield f"layers {first}-{first + len(others)}, each", members
        else:
            yield f"layer {first}", members


def _place(path: str) -> tuple[int | None, str]:
    """The number of the layer a module is in, if any, and its path there."""
    if not path.startswith(_LAYERS):
        return None, path
    layer, _, rest = path.removeprefix(_LAYERS).partition(".")
    return int(layer), rest


def _row(module: "ModuleSummary") -> list[str]:
    layer, name = _place(module.path)
    return [
        name if layer is None else f"  {name}",
        " x ".join(map(str, module.shape)),
        module.scheme + (", act order" if module.act_order else ""),
        module.format,
        f"{module.bits_per_weight:.2f}",
        in_units(module.bytes_on_disk),
        in_units(module.bytes_in_memory),
    ]


def _totals(found: "Inspection") -> list[str]:
    linears = [m for m in found.modules if m.format != "plain"]
    weights = sum(math.prod(m.shape) for m in linears)
    lines = [
        f"on disk       {in_units(found.bytes_on_disk)}",
        f"in memory     {in_units(found.bytes_in_memory)} on a GPU; "
        f"{in_units(found.bytes_as_float32)} on a CPU, where weights are widened to float32",
        f"KV cache      {in_units(found.kv_cache_bytes)} a token on a GPU, "
        f"{found.kv_cache_scheme or found.config.dtype}",
    ]
    if weights:
        bits = sum(m.bits_per_weight * math.prod(m.shape) for m in linears) / weights
        share = weights / found.num_parameters
        lines.append(f"quantized     {share:.1%} of the weights, {bits:.2f} bits each")
    return lines


def _count(parameters: int) -> str:
    for limit, unit in ((1e9, "B"), (1e6, "M")):
        if parameters >= limit:
            return f"{parameters / limit:.3g}{unit}"
    return str(parameters)
