"""The kernels inside the model: packed at load, simulated on a CPU, lowered whole for a GPU."""

from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from qllama import LLM, SamplingParams
from qllama.engine import programs
from qllama.engine.runner import Runner
from qllama.model.dense import QuantDense
from qllama.model.kv_cache import init_cache


def quant_denses(llm: LLM) -> list[QuantDense]:
    return [m for _, m in nnx.iter_modules(llm.model) if isinstance(m, QuantDense)]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ct_w4a16_g128", "ct_w8a8_int8", "gptq_w4_g128_desc_act"])
def test_simulated_kernels_give_the_references_logits(tiny_llama3, kind: str) -> None:
    folder: Path = tiny_llama3(kind)
    ids = load_file(folder / "expected.safetensors")["input_ids_0"].reshape(-1)
    logits = {}
    for backend in ("interpret", "reference"):
        llm = LLM(folder, dtype="bfloat16", backend=backend, max_model_len=64)
        logits[backend] = llm.logits(ids)
    error = np.abs(logits["interpret"] - logits["reference"]).max()
    # int8 sums are exact; bfloat16 products round differently, by half of what bfloat16 does here.
    assert error <= (1e-5 if kind == "ct_w8a8_int8" else 0.12)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ct_w4a16_g128", "ct_w8a8_int8"])
def test_simulated_kernels_give_the_references_tokens(tiny_llama3, kind: str) -> None:
    params, found = SamplingParams(max_tokens=3, temperature=0), {}
    for backend in ("interpret", "reference"):
        llm = LLM(tiny_llama3(kind), dtype="bfloat16", backend=backend, max_model_len=32)
        [output] = llm.generate({"prompt_token_ids": [1, 5, 9, 30]}, params)
        found[backend] = output.outputs[0].token_ids
    assert found["interpret"] == found["reference"]


@pytest.mark.parametrize(
    ("kind", "layout", "kernels"),
    [
        ("ct_w4a16_g128", "wgmma4", 10),
        ("gptq_w4_g128_desc_act", "wgmma4", 10),
        ("ct_w8a8_int8", "natural", 11),
    ],
)
def test_a_decode_step_lowers_for_a_gpu_with_each_kernel_once(
    tiny_llama3, kind: str, layout: str, kernels: int
) -> None:
    llm = LLM(tiny_llama3(kind), dtype="bfloat16", backend="pallas", max_model_len=64)
    layers = quant_denses(llm)
    assert len(layers) == 4 * llm.config.num_hidden_layers
    assert {layer.weight.get_value().layout for layer in layers} == {layout}
    graphdef, state = nnx.split(llm.model)
    cache = init_cache(llm.config, 8, 128, llm.kv_cache_dtype)
    slots = Runner(llm.model, cache_dtype=llm.kv_cache_dtype, steps=1)
    slots.reset(8, programs.Features())

    def decode(state: nnx.State, cache: object, slots: object, alive: jax.Array) -> object:
        model = nnx.merge(graphdef, state)
        return programs.decode(model, cache, slots, alive, steps=8, features=programs.Features())

    traced = jax.jit(decode).trace(state, cache, slots.slots, np.ones(8, bool))
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    # Several layers, eight steps: each kernel stands in the program once. Norms are up to four
    # (the first, those after o_proj and down_proj, the last, which leaves the stream alone), and
    # attention is one.
    assert text.count("@mosaic_gpu_v2") == kernels


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("ct_nvfp4a16", "groups of 32, 64, 128"), ("ct_mxfp4a16", "no kernel for float4_e2m1fn")],
)
def test_a_weight_without_a_kernel_is_refused(tiny_llama3, kind: str, reason: str) -> None:
    with pytest.raises(NotImplementedError, match=reason):
        LLM(tiny_llama3(kind), dtype="bfloat16", backend="pallas")
