"""The settings of a recipe: where they are read, and what each may be."""

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from importlib import resources
from pathlib import Path
from reprlib import repr as shown
from typing import Any

from qllama.quantization.scheme import PRESETS

Settings = dict[str, Any]


def recipe_names() -> list[str]:
    """The recipes that come with qllama, by the names that `make_recipe` takes."""
    return sorted(Path(file.name).stem for file in _packaged().iterdir())


def read_recipe(recipe: str | Path | Mapping[str, Any]) -> tuple[Settings, str]:
    """The settings of a recipe, checked, and what to put before messages about it.

    Raises:
        ValueError: neither a file nor the name of a recipe, no YAML, or a setting that does not
            exist or is out of range.
        OSError: the file cannot be read.
    """
    if isinstance(recipe, Mapping):
        return check_settings(recipe, SETTINGS, "recipe: "), "recipe: "
    name = str(recipe)
    if name in recipe_names():
        content = _packaged().joinpath(f"{name}.yaml").read_bytes()
    elif Path(recipe).is_file():
        content = Path(recipe).read_bytes()
    else:
        near = difflib.get_close_matches(name, recipe_names(), 1)
        names = f"did you mean {near[0]}?" if near else f"there are {', '.join(recipe_names())}"
        raise ValueError(f"recipe {name!r} is neither a file nor the name of a recipe; {names}")
    return check_settings(_parse(content, name), SETTINGS, f"{name}: "), f"{name}: "


def check_settings(
    values: Mapping[str, Any], known: Mapping[str, Callable[[Any], Any]], place: str
) -> Settings:
    """`values`, each in the form that `known` gives it; refuses a key that is not there.

    Raises:
        ValueError: naming `place` and the key.
    """
    settings = {}
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, 1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
            raise ValueError(f"{place}{shown(key)} is unknown; {hint}")
        try:
            settings[key] = known[key](value)
        except ValueError as error:
            raise ValueError(f"{place}{key}{error}") from error
    return settings


def _packaged() -> Any:
    return resources.files("qllama.gptq").joinpath("recipes")


def _parse(content: bytes, name: str) -> Mapping[str, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            mapping = super().construct_mapping(node, deep)
            keys = [self.construct_object(key, deep) for key, _ in node.value]
            for key in mapping:
                if keys.count(key) > 1:
                    raise ValueError(f"{key} stands there twice")
            return mapping

    try:
        values = yaml.load(content, Loader)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{name}: is no YAML that can be read ({reason})") from error
    if not isinstance(values, Mapping):
        raise ValueError(f"{name}: must hold settings like 'scheme: W4A16', found {shown(values)}")
    return values


# -- what each setting may be ----------------------------------------------------------------------


def _scheme(value: Any) -> str:
    if not isinstance(value, str) or value.upper() not in PRESETS:
        near = difflib.get_close_matches(str(value).upper(), PRESETS, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise _wrong(value, f"one of {', '.join(PRESETS)}", hint)
    return value.upper()


def _one_of(*choices: str) -> Callable[[Any], str]:
    def check(value: Any) -> str:
        if value not in choices:
            raise _wrong(value, f"one of {', '.join(choices)}")
        return value

    return check


def _actorder(value: Any) -> str | None:
    if value in (None, "none", "None"):
        return None
    if value in ("static", "weight"):  # compressed-tensors knows both names
        return "static"
    raise _wrong(value, "static or none", "; orders that need a g_idx are read, but not made")


def _group_size(value: Any) -> int | None:
    if value is None or value == -1:
        return value
    return _positive(value, "a number of columns, or -1 for one scale per row")


def _positive(value: Any, expected: str = "a positive integer") -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise _wrong(value, expected)
    return value


def _fraction(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, str):  # what YAML makes of 1e-2
        hint = f"; write {float(value):g}" if _is_number(value) else ""
        raise _wrong(value, "a number within [0, 1]", hint)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise _wrong(value, "a number within [0, 1]")
    return float(value)


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise _wrong(value, "true or false")
    return value


def _kv_cache_scheme(value: Any) -> str | None:
    """Also the form that llm-compressor's recipes and compressed-tensors configs have."""
    fp8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    optional = {"dynamic": False, "symmetric": True}
    if isinstance(value, Mapping) and fp8.items() <= value.items() <= (fp8 | optional).items():
        return "fp8"
    if value not in (None, "fp8"):
        raise _wrong(value, "fp8 (8-bit floats, one scale a layer) or none")
    return value


def _strings(value: Any) -> tuple[str, ...]:
    values = (value,) if isinstance(value, str) else value
    if not isinstance(values, Iterable) or not all(isinstance(text, str) for text in values):
        raise _wrong(value, "a list of module paths or 're:' expressions")
    return tuple(values)


def _rules(value: Any) -> tuple[Settings, ...]:
    if not isinstance(value, list | tuple):
        raise _wrong(value, "a list of rules")
    rules = []
    for i, rule in enumerate(value):
        if not isinstance(rule, Mapping) or "targets" not in rule:
            raise ValueError(f"[{i}] must have targets and what is different, found {shown(rule)}")
        rules.append(check_settings(rule, RULE_SETTINGS, f"[{i}]."))
    return tuple(rules)


def _anything(value: Any) -> Any:
    return value


def _wrong(value: Any, expected: str, hint: str = "") -> ValueError:
    return ValueError(f" must be {expected}, found {shown(value)}{hint}")


LINEAR_SETTINGS: dict[str, Callable[[Any], Any]] = {
    "scheme": _scheme,
    "group_size": _group_size,
    "algorithm": _one_of("gptq", "rtn"),
    "observer": _one_of("absmax", "mse", "hdiag"),
    "actorder": _actorder,
    "dampening_frac": _fraction,
    "dampening_reference": _one_of("mean", "clipmean"),
    "refit": _boolean,
}
"""What may differ from Linear to Linear, each with the function that checks it."""

RULE_SETTINGS = {"targets": _strings} | LINEAR_SETTINGS

SETTINGS: dict[str, Callable[[Any], Any]] = LINEAR_SETTINGS | {
    "smoothquant_strength": _fraction,
    "kv_cache_scheme": _kv_cache_scheme,
    "ignore": _strings,
    "dataset": _anything,
    "num_calibration_samples": _positive,
    "max_seq_length": _positive,
    "rules": _rules,
}
"""All settings of a recipe."""
