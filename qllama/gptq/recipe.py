r"""The recipe: which Linear is quantized how.

    scheme: W4A16
    group_size: 64
    dampening_frac: 0.05
    ignore: [lm_head]
    rules:
      - targets: ['re:.*\\.down_proj$']
        scheme: W8A16
      - targets: [model.layers.0.mlp.gate_proj, model.layers.0.mlp.up_proj]
        observer: mse

The keys of a recipe are arguments of `qllama.quantize`, and `rules`. The first rule that has a
target for a Linear says what is different there. A target is a module path, or after `re:` a
regular expression that matches its beginning, as in compressed-tensors.
"""

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any, Literal

from qllama_convert.names import EMBED_TOKENS, GATE_UP, LM_HEAD, QKV
from qllama_convert.patterns import compile_pattern

from qllama.gptq.linear import GPTQOptions
from qllama.gptq.recipe_file import SETTINGS, Settings, check_settings, read_recipe
from qllama.quantization.scheme import PRESETS, QuantScheme

Algorithm = Literal["gptq", "rtn"]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearRecipe:
    """How one Linear is quantized."""

    scheme: QuantScheme
    algorithm: Algorithm  # "rtn": rounded to nearest, with scales that reach every weight
    options: GPTQOptions  # of algorithm "gptq"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """Linears that are treated otherwise than the rest."""

    targets: tuple[str, ...]
    linear: LinearRecipe


SMOOTHQUANT_STRENGTH = 0.8
"""For W8A8 by GPTQ. On SmolLM2 it leaves 0.4 of the divergence that there is without."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """How a model is quantized. `make_recipe` makes one, `resolve_recipe` applies it."""

    default: LinearRecipe
    rules: tuple[Rule, ...] = ()
    ignore: tuple[str, ...] = (LM_HEAD,)  # targets that stay as they are, before any rule
    smoothquant_strength: float | None = None
    kv_cache_scheme: Literal["fp8"] | None = None
    dataset: Any = None  # what `load_calibration` takes
    num_calibration_samples: int = 512
    max_seq_length: int = 2048
    unused: tuple[str, ...] = ()  # sentences about settings that have no effect


def make_recipe(
    recipe: str | Path | Mapping[str, Any] | None = None,
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
) -> Recipe:
    """The recipe that the arguments of `qllama.quantize` ask for.

    An argument that differs from its default takes the place of what a recipe says for the whole
    model; rules keep what they say themselves.

    Args:
        recipe: a YAML file, the name of a recipe that comes with qllama (`recipe_names`), or what
            a file would hold; None: the other arguments say it all.
        scheme: a key of `PRESETS`.
        dataset: see `load_calibration`.
        num_calibration_samples: see there.
        max_seq_length: see there.
        algorithm: "gptq", or "rtn" for rounding to nearest. FP8 weights whose inputs need no
            calibration are rounded where there is no `dataset`.
        group_size: columns per scale of schemes with groups, in place of the scheme's; -1: one
            scale per row.
        actorder: "static" or None, see `GPTQOptions`.
        observer: see there.
        dampening_frac: see there.
        smoothquant_strength: how far outliers of int8 activations are moved into the weights, 0 to
            1, 0 being not at all; None: `SMOOTHQUANT_STRENGTH` where GPTQ looks at them anyway.
        kv_cache_scheme: "fp8", to calibrate scales of keys and values; None: none.
        ignore: targets that stay as they are.

    Raises:
        ValueError: an unknown key, scheme or name, or a value out of range.
        OSError: the file cannot be read.
    """
    arguments = {
        "scheme": scheme,
        "num_calibration_samples": num_calibration_samples,
        "max_seq_length": max_seq_length,
        "algorithm": algorithm,
        "group_size": group_size,
        "actorder": actorder,
        "observer": observer,
        "dampening_frac": dampening_frac,
        "smoothquant_strength": smoothquant_strength,
        "kv_cache_scheme": kv_cache_scheme,
        "ignore": ignore,
    }
    settings = check_settings(arguments, SETTINGS, "")
    place = ""
    if recipe is not None:
        given = {name: value for name, value in settings.items() if value != _DEFAULTS[name]}
        own, place = read_recipe(recipe)
        settings = settings | own | given
    if dataset is not None:
        settings["dataset"] = dataset
    return _build(settings, place)


_DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(make_recipe).parameters.items()
} | {"dampening_reference": "mean", "refit": False}


def resolve_recipe(
    recipe: Recipe, shapes: Mapping[str, tuple[int, int]]
) -> dict[str, LinearRecipe]:
    """How each Linear is quantized; those that stay as they are, are not in it.

    Args:
        recipe: from `make_recipe`.
        shapes: module path -> (out_features, in_features) of every Linear, as `linear_shapes` has
            it.

    Raises:
        ValueError: a group or block size does not divide the features of a Linear, a target
            matches none, or Linears that readers merge would differ.
    """
    # These stay as they are in any case, or are no Linears.
    harmless = [text for text in recipe.ignore if text in (LM_HEAD, EMBED_TOKENS)]
    ignored = set(_matches([t for t in recipe.ignore if t not in harmless], shapes, "ignore"))
    ignored |= set(harmless)
    resolved = {path: recipe.default for path in shapes if path not in ignored}
    for i, rule in reversed([*enumerate(recipe.rules)]):  # so that the first one stays
        for path in _matches(rule.targets, shapes, f"rules[{i}]"):
            if path not in ignored:
                resolved[path] = rule.linear
    _check_sizes(resolved, shapes)
    _check_fused(resolved, shapes)
    return resolved


def needs_calibration(recipe: Recipe, linears: Mapping[str, LinearRecipe]) -> bool:
    """Whether anything has to be measured on data; else the weights say it all."""
    return _needs_data([*linears.values()], recipe.smoothquant_strength, recipe.kv_cache_scheme)


# -- from settings to a recipe ---------------------------------------------------------------------


def _build(settings: Settings, place: str) -> Recipe:
    default = _linear(settings, place)
    rules = tuple(
        Rule(targets=rule["targets"], linear=_linear(settings | rule, f"{place}rules[{i}]: "))
        for i, rule in enumerate(settings.get("rules", ()))
    )
    linears = [default, *(rule.linear for rule in rules)]
    strength = settings["smoothquant_strength"]
    if strength is None and any(
        x.algorithm == "gptq" and _has_int8_activations(x) for x in linears
    ):
        strength = SMOOTHQUANT_STRENGTH
    settings = settings | {"smoothquant_strength": strength or None}
    return Recipe(
        default=default,
        rules=rules,
        ignore=settings["ignore"],
        smoothquant_strength=settings["smoothquant_strength"],
        kv_cache_scheme=settings["kv_cache_scheme"],
        dataset=settings.get("dataset"),
        num_calibration_samples=settings["num_calibration_samples"],
        max_seq_length=settings["max_seq_length"],
        unused=tuple(_unused(settings, linears)),
    )


_OPTIONS = ("actorder", "observer", "dampening_frac", "dampening_reference", "refit")


def _linear(settings: Settings, place: str) -> LinearRecipe:
    scheme = PRESETS[settings["scheme"]]
    size = settings["group_size"]
    if scheme.strategy == "group" and size is not None:
        strategy: Literal["channel", "group"] = "channel" if size == -1 else "group"
        scheme = replace(scheme, strategy=strategy, group_size=None if size == -1 else size)
    try:
        options = GPTQOptions(**{name: settings[name] for name in _OPTIONS if name in settings})
    except ValueError as error:
        raise ValueError(f"{place}{error}") from error
    rounded = _needs_no_data(scheme) and settings.get("dataset") is None
    return LinearRecipe(
        scheme=scheme, algorithm="rtn" if rounded else settings["algorithm"], options=options
    )


def _needs_no_data(scheme: QuantScheme) -> bool:
    """Whether one expects a checkpoint of this scheme to be made without calibration."""
    activations = scheme.activations
    dynamic = activations is None or activations.dynamic
    return scheme.weight_dtype == "float8_e4m3fn" and dynamic


def _unused(settings: Settings, linears: Sequence[LinearRecipe]) -> Iterator[str]:
    """A sentence for each setting that differs from its default and has no effect."""
    schemes = ", ".join(dict.fromkeys(linear.scheme.describe() for linear in linears))
    why: dict[str, str] = {}
    if not any(PRESETS[name].strategy == "group" for name in _scheme_names(settings)):
        why["group_size"] = f"{schemes} has no groups"
    if not any(linear.algorithm == "gptq" for linear in linears):
        why |= dict.fromkeys(_OPTIONS, f"{schemes} is rounded to nearest here")
    if not any(map(_has_int8_activations, linears)):
        why["smoothquant_strength"] = f"it is for int8 activations, and {schemes} has none"
    if not _needs_data(linears, settings["smoothquant_strength"], settings["kv_cache_scheme"]):
        data = ("dataset", "num_calibration_samples", "max_seq_length")
        why |= dict.fromkeys(data, f"{schemes} needs no calibration here")
    for name, reason in why.items():
        if name in settings and settings[name] != _DEFAULTS[name]:
            yield f"{name}={shown(settings[name])} is not used: {reason}"


def _scheme_names(settings: Settings) -> list[str]:
    return [settings["scheme"], *(r["scheme"] for r in settings.get("rules", ()) if "scheme" in r)]


def _needs_data(
    linears: Sequence[LinearRecipe], smoothquant_strength: float | None, kv_cache: str | None
) -> bool:
    smooth = smoothquant_strength is not None and any(map(_has_int8_activations, linears))
    measured = any(linear.algorithm == "gptq" or _is_static(linear) for linear in linears)
    return measured or smooth or kv_cache is not None


def _has_int8_activations(linear: LinearRecipe) -> bool:
    activations = linear.scheme.activations
    return activations is not None and activations.dtype == "int8"


def _is_static(linear: LinearRecipe) -> bool:
    activations = linear.scheme.activations
    return activations is not None and not activations.dynamic


# -- from a recipe to every Linear -----------------------------------------------------------------


def _matches(targets: Sequence[str], shapes: Mapping[str, Any], place: str) -> list[str]:
    """The paths that a target matches; each target must match one."""
    found = []
    for target in targets:
        if target.startswith("re:"):
            pattern = compile_pattern(target.removeprefix("re:"), place)
            paths = [path for path in shapes if pattern.match(path)]
        else:
            paths = [path for path in shapes if path == target]
        if not paths:
            some = next(iter(shapes), "")
            raise ValueError(
                f"{place}: {target!r} matches no Linear; give a module path such as {some}, or "
                "'re:' and a regular expression that matches such paths from their beginning"
            )
        found += paths
    return found


def _check_sizes(
    linears: Mapping[str, LinearRecipe], shapes: Mapping[str, tuple[int, int]]
) -> None:
    for path, linear in linears.items():
        k = shapes[path][1]
        scheme = linear.scheme
        if scheme.strategy == "block":
            columns = scheme.scale_block(shapes[path])[1]
            if k % columns:
                raise ValueError(
                    f"{path} has K={k} input features, which blocks of {columns} columns do not "
                    f"divide; quantize it to FP8_DYNAMIC, or ignore it"
                )
        elif scheme.strategy == "group" and k % (scheme.group_size or 1):
            together = math.gcd(*(shapes[p][1] for p, other in linears.items() if other == linear))
            sizes = [str(size) for size in (256, 128, 64, 32, 16) if together % size == 0]
            fit = (
                f"{', '.join(sizes)} divide those of all like it" if sizes else "no usual one does"
            )
            raise ValueError(
                f"{path} has K={k} input features, which group_size={scheme.group_size} does not "
                f"divide; {fit}, and -1 gives one scale per row"
            )


def _check_fused(
    linears: Mapping[str, LinearRecipe], shapes: Mapping[str, tuple[int, int]]
) -> None:
    """vLLM merges these Linears, and refuses a checkpoint where they differ."""
    for path in shapes:
        for first, *others in (QKV, GATE_UP):
            if not path.endswith(f".{first}"):
                continue
            for other in (path.removesuffix(first) + sibling for sibling in others):
                if linears.get(path) != linears.get(other):
                    raise ValueError(
                        f"{path} and {other} would be quantized differently "
                        f"({_shown(linears.get(path))}; {_shown(linears.get(other))}), but readers "
                        "merge them into one; name both in the same rule or in ignore"
                    )


def _shown(linear: LinearRecipe | None) -> str:
    return "not at all" if linear is None else f"{linear.scheme.describe()} by {linear.algorithm}"
