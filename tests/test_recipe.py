"""Recipes: what each Linear gets, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
from qllama_convert.names import linear_shapes

from qllama.config import LlamaConfig
from qllama.gptq.linear import GPTQOptions
from qllama.gptq.recipe import LinearRecipe, make_recipe, needs_calibration, resolve_recipe
from qllama.gptq.recipe_file import recipe_names
from qllama.quantization.scheme import PRESETS, QuantScheme


def shapes(hidden: int = 256, intermediate: int = 512) -> dict[str, tuple[int, int]]:
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2}
    sizes = {"hidden_size": hidden, "intermediate_size": intermediate, "vocab_size": 768}
    return linear_shapes(
        LlamaConfig.from_hf(
            {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | heads | sizes
        )
    )


SHAPES = shapes()


def resolved(recipe: Any = None, **arguments: Any) -> dict[str, LinearRecipe]:
    return resolve_recipe(make_recipe(recipe, **arguments), SHAPES)


def test_defaults() -> None:
    linears = resolved()
    assert linears.keys() == SHAPES.keys() - {"lm_head"}
    w4a16 = LinearRecipe(scheme=PRESETS["W4A16"], algorithm="gptq", options=GPTQOptions())
    assert set(map(repr, linears.values())) == {repr(w4a16)}


def test_arguments() -> None:
    recipe = make_recipe(
        scheme="w4a16_asym",
        group_size=64,
        actorder="weight",
        observer="mse",
        dampening_frac=0,
        ignore="lm_head",
    )
    assert recipe.default == LinearRecipe(
        scheme=QuantScheme(weight_dtype="int4", strategy="group", group_size=64, symmetric=False),
        algorithm="gptq",
        options=GPTQOptions(actorder="static", observer="mse", dampening_frac=0.0),
    )
    assert recipe.ignore == ("lm_head",)
    per_row = make_recipe(scheme="W8A16", group_size=-1, actorder=None).default
    assert per_row.scheme == QuantScheme(weight_dtype="int8", strategy="channel")
    assert per_row.options.actorder is None


def test_float8_weights_are_solved_where_there_is_data() -> None:
    def algorithm(**arguments: Any) -> str:
        return make_recipe(**arguments).default.algorithm

    assert algorithm(scheme="FP8") == "gptq"  # which needs data for its activations
    for scheme in ("FP8_DYNAMIC", "FP8_BLOCK"):
        assert algorithm(scheme=scheme) == "rtn"
        assert algorithm(scheme=scheme, dataset="a.txt") == "gptq"
        assert algorithm(scheme=scheme, dataset="a.txt", algorithm="rtn") == "rtn"


@pytest.mark.parametrize(
    ("arguments", "needed"),
    [
        ({}, True),
        ({"algorithm": "rtn"}, False),
        ({"scheme": "W8A8", "algorithm": "rtn"}, False),
        ({"scheme": "W8A8", "algorithm": "rtn", "smoothquant_strength": 0.8}, True),
        ({"scheme": "FP8"}, True),
        ({"scheme": "FP8_DYNAMIC"}, False),
        ({"scheme": "FP8_DYNAMIC", "smoothquant_strength": 0.8}, False),
        ({"scheme": "FP8_DYNAMIC", "kv_cache_scheme": "fp8"}, True),
        ({"scheme": "FP8_BLOCK"}, False),
        ({"scheme": "FP8_BLOCK", "dataset": "a.txt"}, True),
    ],
)
def test_what_needs_calibration(arguments: dict[str, Any], needed: bool) -> None:
    recipe = make_recipe(**arguments)
    assert needs_calibration(recipe, resolve_recipe(recipe, SHAPES)) == needed


# -- recipes in files ------------------------------------------------------------------------------

FILE = r"""
scheme: W4A16
group_size: 32
actorder: null
dampening_frac: 0.05
ignore: [lm_head, 're:model\.layers\.1\.mlp']
kv_cache_scheme: {num_bits: 8, type: float, strategy: tensor, dynamic: false, symmetric: true}
num_calibration_samples: 7
rules:
  - targets: model.layers.0.mlp.down_proj
    scheme: W8A8
    actorder: static
  - targets: ['re:.*\.(down|o)_proj$']
    group_size: 64
    refit: true
"""


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(FILE)
    recipe = make_recipe(path, max_seq_length=99)
    linears = resolve_recipe(recipe, SHAPES)
    options = GPTQOptions(actorder=None, dampening_frac=0.05)
    int4 = QuantScheme(weight_dtype="int4", strategy="group", group_size=32)
    base = LinearRecipe(scheme=int4, algorithm="gptq", options=options)
    wider = QuantScheme(weight_dtype="int4", strategy="group", group_size=64)
    outputs = LinearRecipe(
        scheme=wider,
        algorithm="gptq",
        options=GPTQOptions(actorder=None, dampening_frac=0.05, refit=True),
    )
    attention = {
        f"model.layers.{i}.self_attn.{x}_proj": outputs if x == "o" else base
        for i in range(2)
        for x in "qkvo"
    }
    # The first rule that matches says it all: the second one's refit is not for this down_proj.
    down = LinearRecipe(
        scheme=PRESETS["W8A8"], algorithm="gptq", options=GPTQOptions(dampening_frac=0.05)
    )
    mlp = {f"model.layers.0.mlp.{x}_proj": base for x in ("gate", "up")}
    assert linears == attention | mlp | {"model.layers.0.mlp.down_proj": down}
    assert recipe.kv_cache_scheme == "fp8"
    assert (recipe.num_calibration_samples, recipe.max_seq_length) == (7, 99)


def test_arguments_take_the_place_of_what_a_file_says_for_the_whole_model() -> None:
    written = {"observer": "mse", "rules": [{"targets": ["lm_head"], "observer": "absmax"}]}
    recipe = make_recipe(written, observer="hdiag", scheme="W8A8", ignore=())
    assert recipe.default.options.observer == "mse"  # hdiag is the default, so was not asked for
    assert recipe.default.scheme == PRESETS["W8A8"]
    assert resolve_recipe(recipe, SHAPES)["lm_head"].options.observer == "absmax"


def test_recipes_of_the_model_cards() -> None:
    """Figures of the cards: RedHatAI/Meta-Llama-3.1-8B-Instruct-quantized.w4a16,
    RedHatAI/Meta-Llama-3-8B-Instruct-FP8, RedHatAI/Llama-3.3-70B-Instruct-quantized.w8a8."""
    found = {}
    for name in recipe_names():
        recipe = make_recipe(name)
        linear = recipe.default
        assert recipe.unused == ()
        assert recipe.ignore == ("lm_head",)
        frac = linear.options.dampening_frac if linear.algorithm == "gptq" else None
        data = recipe.num_calibration_samples, recipe.max_seq_length
        found[name] = linear.scheme.describe(), linear.algorithm, frac, *data
    assert found == {
        "llama-3-8b-instruct-fp8": ("FP8", "rtn", None, 512, 2048),
        "llama-3.1-8b-instruct-w4a16": ("W4A16", "gptq", 0.1, 768, 4064),
        "llama-3.3-70b-instruct-w8a8": ("W8A8", "gptq", 0.01, 1024, 8192),
    }
    assert make_recipe("llama-3.3-70b-instruct-w8a8").dataset == "random-tokens"
    assert make_recipe("llama-3-8b-instruct-fp8", dataset="my.txt").dataset == "my.txt"


def test_int8_activations_are_smoothed_where_gptq_sees_them() -> None:
    found = {
        "default": make_recipe(scheme="W8A8"),
        "off": make_recipe(scheme="W8A8", smoothquant_strength=0),
        "wished": make_recipe(scheme="W8A8", smoothquant_strength=0.5),
        "rounded": make_recipe(scheme="W8A8", algorithm="rtn"),
        "16 bit": make_recipe(scheme="W4A16"),
        "a card's": make_recipe("llama-3.3-70b-instruct-w8a8"),
    }
    assert {name: recipe.smoothquant_strength for name, recipe in found.items()} == {
        "default": 0.8,
        "off": None,
        "wished": 0.5,
        "rounded": None,
        "16 bit": None,
        "a card's": None,
    }
    assert not any(recipe.unused for recipe in found.values())


# -- what has no effect ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({}, []),
        ({"dampening_frac": 0.1, "observer": "mse", "dataset": "a.txt"}, []),
        (
            {
                "scheme": "FP8_DYNAMIC",
                "dampening_frac": 0.1,
                "observer": "mse",
                "max_seq_length": 9,
            },
            ["observer", "dampening_frac", "max_seq_length"],
        ),
        (
            {"scheme": "FP8_DYNAMIC", "algorithm": "rtn", "dataset": "a.txt"},
            ["dataset"],
        ),
        ({"scheme": "FP8", "dataset": "a.txt", "group_size": 64}, ["group_size"]),
        ({"scheme": "W8A8", "group_size": 64, "smoothquant_strength": 0.5}, ["group_size"]),
        ({"smoothquant_strength": 0.5}, ["smoothquant_strength"]),
        ({"algorithm": "rtn", "actorder": None}, ["actorder"]),
        ({"algorithm": "rtn", "num_calibration_samples": 9}, ["num_calibration_samples"]),
        ({"algorithm": "rtn", "max_seq_length": 9, "kv_cache_scheme": "fp8"}, []),
    ],
)
def test_unused_arguments_are_told(arguments: dict[str, Any], names: list[str]) -> None:
    sentences = make_recipe(**arguments).unused
    assert [sentence.partition("=")[0] for sentence in sentences] == names
    assert all(" is not used: " in sentence for sentence in sentences)


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ({"schem": "W4A16"}, "recipe: 'schem' is unknown; did you mean scheme?"),
        ({"GPTQModifier": {}}, "recipe: 'GPTQModifier' is unknown; known are scheme,"),
        ({"scheme": "W4A8"}, "scheme must be one of W4A16, W4A16_ASYM"),
        ({"scheme": None}, "recipe: scheme must be one of"),
        ({"group_size": "128"}, "group_size must be a number of columns, or -1"),
        ({"group_size": True}, "group_size must be a number of columns, or -1"),
        ({"group_size": 0}, "group_size must be a number of columns, or -1"),
        ({"actorder": "group"}, "actorder must be static or none, found 'group'; orders that need"),
        ({"observer": "minmax"}, "observer must be one of absmax, mse, hdiag, found 'minmax'"),
        ({"observer": []}, "observer must be one of absmax, mse, hdiag, found []"),
        ({"algorithm": "awq"}, "algorithm must be one of gptq, rtn"),
        ({"dampening_frac": "1e-2"}, "must be a number within [0, 1], found '1e-2'; write 0.01"),
        ({"dampening_frac": 1.5}, "dampening_frac must be a number within [0, 1], found 1.5"),
        ({"dampening_frac": float("nan")}, "must be a number within [0, 1], found nan"),
        ({"refit": "yes"}, "refit must be true or false"),
        ({"kv_cache_scheme": {"num_bits": 4}}, "kv_cache_scheme must be fp8"),
        ({"kv_cache_scheme": "int8"}, "kv_cache_scheme must be fp8"),
        ({"num_calibration_samples": 0}, "num_calibration_samples must be a positive integer"),
        ({"ignore": 3}, "ignore must be a list of module paths"),
        ({"rules": {}}, "rules must be a list of rules"),
        ({"rules": [{"scheme": "W8A8"}]}, "rules[0] must have targets"),
        ({"rules": ["lm_head"]}, "rules[0] must have targets"),
        ({"rules": [{"targets": "x", "ignore": True}]}, "rules[0].'ignore' is unknown"),
        ({"rules": [{"targets": "x", "scheme": "W9"}]}, "rules[0].scheme must be one of"),
        ("nosuch.yaml", "recipe 'nosuch.yaml' is neither a file nor the name of a recipe; there"),
        ("llama-3.1-8b-instruct", "did you mean llama-3.1-8b-instruct-w4a16?"),
    ],
)
def test_bad_settings(recipe: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_recipe(recipe)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"scheme: [W4A16", "is no YAML that can be read"),
        (b"\xff\xfe\x00", "is no YAML that can be read"),
        (b"[" * 100_000, "is no YAML that can be read"),
        (b"- scheme", "must hold settings like 'scheme: W4A16', found ['scheme']"),
        (b"", "must hold settings like 'scheme: W4A16', found None"),
        (b"scheme: !!python/name:os.system", "is no YAML that can be read"),
        (b"scheme: W8A8\nscheme: FP8", "is no YAML that can be read (scheme stands there twice"),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        make_recipe(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "arguments", "message"),
    [
        (
            (576, 1536),
            {},
            "model.layers.0.self_attn.q_proj has K=576 input features, which group_size=128 does "
            "not divide; 64, 32, 16 divide those of all like it, and -1",
        ),
        (
            (512, 96 * 11),
            {},
            "model.layers.0.mlp.down_proj has K=1056 input features, which group_size=128 does not "
            "divide; 32, 16 divide those of all like it",
        ),
        (
            (256, 1400),
            {"scheme": "FP8_BLOCK"},
            "model.layers.0.mlp.down_proj has K=1400 input features, which blocks of 128 columns",
        ),
    ],
)
def test_sizes_that_do_not_divide(
    sizes: tuple[int, int], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        resolve_recipe(make_recipe(**arguments), shapes(*sizes))


def test_rows_may_be_ragged_in_blocks() -> None:
    ragged = SHAPES | {"model.layers.0.self_attn.k_proj": (100, 256)}
    assert resolve_recipe(make_recipe(scheme="FP8_BLOCK"), ragged)


@pytest.mark.parametrize(
    "recipe",
    [
        {"ignore": ["re:.*v_proj"]},
        {"rules": [{"targets": ["re:.*q_proj"], "scheme": "W8A16"}]},
        {"rules": [{"targets": ["model.layers.1.mlp.up_proj"], "observer": "mse"}]},
    ],
)
def test_linears_that_are_merged_must_be_alike(recipe: Any) -> None:
    with pytest.raises(ValueError, match=r"would be quantized differently .* merge them into one"):
        resolved(recipe)


def test_targets_must_match_something() -> None:
    with pytest.raises(ValueError, match=r"^ignore: 're:mlp' matches no Linear; give a module"):
        resolved(ignore=["re:mlp"])
    with pytest.raises(ValueError, match=r"^rules\[1\]: 'model.layers.9' matches no Linear"):
        resolved({"rules": [{"targets": "lm_head"}, {"targets": "model.layers.9"}]})
    assert resolved(ignore=["lm_head", "model.embed_tokens"]) == resolved()
    with pytest.raises(ValueError, match=r"is no regular expression"):
        resolved(ignore=["re:("])
