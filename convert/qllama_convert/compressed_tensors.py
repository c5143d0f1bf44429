"""The config of compressed-tensors: which scheme and format each Linear has.

Source: compressed-tensors `quantization/quant_config.py`, `utils/match.py`; the readers of the same
object in vLLM and transformers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from qllama.errors import CheckpointError
from qllama_convert.checkpoint import Checkpoint
from qllama_convert.formats import LinearSpec
from qllama_convert.module_tensors import FLOATS
from qllama_convert.patterns import Pattern, compile_pattern
from qllama_convert.quantization_scheme import PRESETS, file_format, parse_scheme
from qllama_convert.section import Section, shown

_KEYS = (
    "quant_method", "config_groups", "format", "quantization_status", "ignore", "kv_cache_scheme",
    "version", "global_compression_ratio", "sparsity_config", "transform_config",
    "moe_sparsity_config", "run_compressed",
)  # fmt: skip


@dataclass(frozen=True)
class _Group:
    """One entry of `config_groups`. `spec` None: its modules stay unquantized."""

    targets: tuple["_Target", ...]
    spec: LinearSpec | None


@dataclass(frozen=True)
class _Target:
    """A module path, "re:" and a regular expression, or a class of modules."""

    text: str
    pattern: Pattern | None = field(default=None, compare=False)

    def rank(self, path: str) -> int | None:
        """How it matches a Linear: 0 by its name, 1 by expression, 2 by class, None: not."""
        if self.pattern is not None:
            return 1 if self.pattern.match(path) else None
        if self.text == path:
            return 0
        return 2 if self.text.lower() == "linear" else None


def parse(
    config: Section, checkpoint: Checkpoint, linears: Mapping[str, tuple[int, int]]
) -> dict[str, LinearSpec]:
    """The quantized Linears among `linears` (path -> `(N, K)`).

    Raises:
        CheckpointError: the object is malformed or ambiguous, it asks for something that is not
            run, or the weights are not stored compressed.
    """
    for key in config:
        if key not in _KEYS:
            checkpoint.warn(f"{config.place(key)} is unknown and ignored")
    _refuse_sparsity(config)
    _refuse_online_transforms(config)
    file_format(config)
    groups = list(_parse_groups(config, checkpoint))
    ignored = [_target(text, config.place("ignore")) for text in config.strings("ignore")]
    specs: dict[str, LinearSpec] = {}
    for path in linears:
        if any(target.rank(path) is not None for target in ignored):
            continue
        spec = _choose(path, groups, config)
        if spec is not None:
            specs[path] = spec
    for target in (target for group in groups for target in group.targets):
        if all(target.rank(path) is None for path in linears):
            checkpoint.warn(f"{config.place()}: target {target.text!r} matches no module")
    _check_status(config, checkpoint, specs)
    return specs


def _choose(path: str, groups: list[_Group], config: Section) -> LinearSpec | None:
    """The spec of the group that matches `path` most specifically."""
    matches = [
        (rank, target.text, group.spec)
        for group in groups
        for target in group.targets
        if (rank := target.rank(path)) is not None
    ]
    if not matches:
        return None
    best = min(rank for rank, _, _ in matches)
    equal = [(text, spec) for rank, text, spec in matches if rank == best]
    if any(spec != equal[0][1] for _, spec in equal):
        names = ", ".join(repr(text) for text, _ in equal)
        raise config.error(
            "config_groups",
            f"gives {path} different schemes by the targets {names}; readers of this format "
            "would choose differently, so name the module in one group only",
        )
    return equal[0][1]


def _parse_groups(config: Section, checkpoint: Checkpoint) -> Iterator[_Group]:
    groups = config.section_or_empty("config_groups")
    for name in groups:
        if isinstance(groups.value(name), list):
            scheme, targets = _preset(groups, name), groups.strings(name)
        else:
            section = groups.section(name)
            if section is None:
                raise groups.wrong(name, "a scheme or a list of targets")
            if "targets" not in section:
                raise section.wrong("targets", "a list of targets")
            scheme, targets = section, section.strings("targets")
        if targets and all(text.endswith("Attention") for text in targets):
            checkpoint.warn(
                f"{groups.place(name)} quantizes attention itself, which is not run; only "
                "kv_cache_scheme is"
            )
            continue
        yield _Group(
            tuple(_target(text, scheme.place("targets")) for text in targets),
            parse_scheme(scheme, config),
        )


def _preset(groups: Section, name: str) -> Section:
    if name.upper() not in PRESETS:
        raise groups.error(
            name, f"is a list of targets, but no preset; presets are {', '.join(PRESETS)}"
        )
    return groups.child(name, PRESETS[name.upper()])


def _target(text: str, path: str) -> _Target:
    if text.startswith("re:"):
        return _Target(text, compile_pattern(text.removeprefix("re:"), path))
    return _Target(text)


def _refuse_sparsity(config: Section) -> None:
    sparsity = config.section("sparsity_config")
    if sparsity and sparsity.string("format") != "dense":
        raise config.error(
            "sparsity_config",
            f"format {shown(sparsity.value('format'))} is not supported; only dense weights are "
            "read",
        )
    if "moe_sparsity_config" in config:
        raise config.error("moe_sparsity_config", "is set, but is not supported")


def _refuse_online_transforms(config: Section) -> None:
    """Transforms of weights are folded into them already; all others would run with the model."""
    groups = config.section_or_empty("transform_config").section_or_empty("config_groups")
    for name in groups:
        group = groups.section_or_empty(name)
        steps = group.value("apply")
        if not isinstance(steps, list):
            raise group.wrong("apply", "a list")
        for i, step in enumerate(steps):
            place = group.child(f"apply[{i}]", step)
            location = place.string("location")
            if location not in ("weight_input", "weight_output"):
                raise place.error(
                    "location",
                    f"is {shown(location)}, a transform while the model runs, which is not "
                    "supported; weight_input and weight_output are",
                )


def _check_status(config: Section, checkpoint: Checkpoint, specs: Mapping[str, LinearSpec]) -> None:
    """Weights saved before compression are refused; compressed ones with an old status are not."""
    status, format_name = config.string("quantization_status"), config.string("format")
    if not specs or (status == "compressed" and format_name not in ("fakequant", "dense")):
        return
    for path in specs:
        weight = checkpoint.tensors.get(f"{path}.weight")
        if weight is not None and weight.dtype in FLOATS:
            raise CheckpointError(
                f"{config.place()}: quantization_status {shown(status)}, format "
                f"{shown(format_name)}, and {path}.weight is {weight.dtype}: this is not a "
                "compressed checkpoint; save it compressed, or list the module under ignore"
            )
    checkpoint.warn(
        f"{config.place()}: quantization_status is {shown(status)}, format {shown(format_name)}, "
        "but the weights are compressed; other readers may not load this checkpoint"
    )
