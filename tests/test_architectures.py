"""Every variant of the architecture, freshly randomised, against transformers on the CPU.

One process of the oracle makes all checkpoints and says what transformers computes with them.
"""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest

from qllama.config import LlamaConfig
from qllama.engine.sampling_params import SamplingParams
from qllama.llm import LLM

pytestmark = pytest.mark.oracle

BASE = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
}
# Wavelengths of 16 dimensions at base 10000: 6, 20, 63, 199 ... tokens. The trained context of 64
# puts the first below, the next two between, and the rest above where llama3 stretches.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GENERATED = 12
# Tokens of the two texts. Of the variants trained for 48 positions, one text is longer from the
# start, and the other becomes so while it is generated.
LENGTHS = {"short": 40, "long": 60}
TRAINED = 48


@dataclass(frozen=True)
class Variant:
    """How an architecture differs from `BASE`, and its rotary settings in both spellings."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None

    @property
    def old_config(self) -> dict[str, Any]:
        """In the spelling of transformers 4."""
        return (
            BASE | self.changes | {"rope_theta": self.rope_theta, "rope_scaling": self.rope_scaling}
        )


def stretched(name: str, scaling: dict[str, Any], positions: int) -> Variant:
    return Variant(name, {"max_position_embeddings": positions}, rope_scaling=scaling)


VARIANTS = [
    Variant("plain"),
    Variant("tied_head", {"tie_word_embeddings": True}),
    Variant("attention_bias", {"attention_bias": True}),
    Variant("mlp_bias", {"mlp_bias": True}),
    Variant(
        "biases_and_tied_head",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    Variant("rope_theta", rope_theta=500000.0),
    stretched("rope_linear", {"rope_type": "linear", "factor": 2.5}, TRAINED),
    stretched("rope_linear_type", {"type": "linear", "factor": 2.0}, TRAINED),
    stretched("rope_dynamic", {"rope_type": "dynamic", "factor": 2.0}, TRAINED),
    stretched("rope_llama3", LLAMA3, 256),
    Variant("head_dim_larger", {"head_dim": 24}),
    Variant("head_dim_smaller", {"head_dim": 8, "attention_bias": True}),
    Variant("heads_not_shared", {"num_key_value_heads": 4}),
    Variant("four_heads_share", {"num_attention_heads": 8, "num_key_value_heads": 2}),
    Variant("all_heads_share", {"num_key_value_heads": 1}),
    Variant("odd_sizes", {"vocab_size": 171, "hidden_size": 96, "intermediate_size": 160}),
    Variant("rms_norm_eps", {"rms_norm_eps": 0.03}),
]


@dataclass(frozen=True)
class Oracle:
    folder: Path
    arrays: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def transformers(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    folder = tmp_path_factory.mktemp("architectures")
    arrays = oracle.run(
        """
        import json, os
        from transformers import LlamaConfig, LlamaForCausalLM

        def forget(model):
            # The rotary module of "dynamic" keeps the base that the longest text so far needed.
            model.model.rotary_emb = type(model.model.rotary_emb)(model.config)

        for seed, (name, config) in enumerate(json.loads(str(variants)).items()):
            torch.manual_seed(seed)
            config = LlamaConfig(**config, bos_token_id=None, eos_token_id=None)  # never ends
            model = LlamaForCausalLM(config).eval()
            with torch.no_grad():
                for path, weight in model.named_parameters():
                    if path.endswith("norm.weight"):
                        weight.uniform_(0.5, 1.5)
                    elif path.endswith("bias"):
                        weight.normal_(std=0.5)
                    else:
                        weight.normal_(std=1.5 * weight.shape[1] ** -0.5)
            model.save_pretrained(os.path.join(str(folder), name))
            with torch.inference_mode():
                for text, ids in ("short", short), ("long", long):
                    ids = torch.from_numpy(ids % config.vocab_size)[None]
                    forget(model)
                    out[f"{name}.{text}.logits"] = model(ids, use_cache=False).logits[0].numpy()
                    forget(model)
                    result = model.generate(
                        ids, attention_mask=torch.ones_like(ids), do_sample=False,
                        max_new_tokens=int(generated), pad_token_id=0,
                        return_dict_in_generate=True, output_logits=True,
                    )
                    out[f"{name}.{text}.tokens"] = result.sequences[0, ids.shape[1]:].numpy()
                    best = torch.cat(result.logits).topk(2).values
                    out[f"{name}.{text}.margins"] = (best[:, 0] - best[:, 1]).numpy()
        """,
        folder=np.array(str(folder)),
        variants=np.array(json.dumps({v.name: v.old_config for v in VARIANTS})),
        short=token_ids("short"),
        long=token_ids("long"),
        generated=np.array(GENERATED),
    )
    return Oracle(folder, arrays)


def token_ids(text: str, vocab_size: int = 1 << 20) -> np.ndarray:
    """One of the two texts, in a vocabulary."""
    length = LENGTHS[text]
    return np.random.default_rng(length).integers(0, 1 << 20, length) % vocab_size


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant.name)
def variant(request: pytest.FixtureRequest) -> Variant:
    return request.param


@pytest.fixture(scope="module")
def llm(variant: Variant, transformers: Oracle) -> Iterator[LLM]:
    with LLM(transformers.folder / variant.name, dtype="float32") as loaded:
        yield loaded


@pytest.mark.parametrize("text", LENGTHS)
def test_logits_equal_those_of_transformers(
    variant: Variant, transformers: Oracle, llm: LLM, text: str
) -> None:
    expected = transformers.arrays[f"{variant.name}.{text}.logits"]
    found = llm.logits(token_ids(text, llm.config.vocab_size))
    assert found.shape == expected.shape
    assert expected.std() > 0.5  # else small errors would mean nothing
    error = found - expected
    assert np.abs(error).max() < 1e-4
    assert np.sqrt((error**2).mean() / (expected**2).mean()) < 1e-5


def test_greedy_tokens_equal_those_of_transformers(
    variant: Variant, transformers: Oracle, llm: LLM
) -> None:
    prompts = [{"prompt_token_ids": token_ids(text, llm.config.vocab_size)} for text in LENGTHS]
    outputs = llm.generate(prompts, SamplingParams(temperature=0.0, max_tokens=GENERATED))
    for text, output in zip(LENGTHS, outputs, strict=True):
        found = list(output.outputs[0].token_ids)
        expected = transformers.arrays[f"{variant.name}.{text}.tokens"].tolist()
        margins = transformers.arrays[f"{variant.name}.{text}.margins"]
        settled = next((i for i, margin in enumerate(margins) if margin < 1e-4), GENERATED)
        assert len(found) == len(expected) == GENERATED
        assert settled > 0
        assert found[:settled] == expected[:settled]


def test_both_spellings_of_the_config_are_read_alike(
    variant: Variant, transformers: Oracle
) -> None:
    saved = json.loads((transformers.folder / variant.name / "config.json").read_text())
    assert "rope_parameters" in saved
    assert "rope_scaling" not in saved
    new = LlamaConfig.from_hf(saved)
    old = LlamaConfig.from_hf(variant.old_config | {"model_type": "llama"})
    assert dataclasses.replace(old, dtype=new.dtype) == new
