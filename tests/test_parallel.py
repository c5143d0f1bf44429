"""Runs over several devices: what one device gives, in parts, with no more talk than needed."""

import functools
import re
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drafts import read_tensors
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qllama_convert.names import weight_shapes
from qllama_kernels import all_reduce
from test_golden import all_logits, assert_near, quantizes_activations, tolerances

from qllama import LLM, SamplingParams
from qllama.engine import programs
from qllama.engine.replicas import spread
from qllama.engine.request import Request
from qllama.model.dense import make_dense
from qllama.parallel.layers import RowParallel
from qllama.parallel.memory import plan_memory
from qllama.parallel.mesh import make_mesh
from qllama.parallel.placement import partition_specs, place
from qllama.parallel.sharding import Part, shard_weight
from qllama.quantization.activations import quantize_activations
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [{"prompt_token_ids": list(range(5, 5 + n))} for n in (5, 16, 9, 12)]  # of one chunk


def greedy(llm: LLM) -> list[list[int]]:
    return [output.outputs[0].token_ids for output in llm.generate(PROMPTS, GREEDY)]


@pytest.mark.parametrize(
    "kind",
    [
        "ct_w4a16_g128",
        "gptq_w4_g128_desc_act",
        "gptq_w4_g128_no_desc_act_asym",
        "ct_w8a16",
        "ct_w8a8_int8",
        "ct_fp8_static_kv_fp8",
        "ct_fp8_dynamic",
        "ct_fp8_block",
    ],
)
def test_two_devices_give_the_golden_logits(tiny_llama3, kind: str) -> None:
    folder = tiny_llama3(kind)
    golden = read_tensors(folder / "expected.safetensors")
    logits = {}
    for size in (1, 2):
        with LLM(
            folder,
            dtype="float32",
            tensor_parallel_size=size,
            activation_semantics="compressed-tensors",
        ) as llm:
            logits[size] = all_logits(llm, golden)
    expected = np.concatenate([golden[f"logits_{i}"] for i in range(3)])
    assert_near(logits[2], expected, tolerances(folder)["logits_fp32_compute"])
    if not quantizes_activations(folder):
        np.testing.assert_allclose(logits[2], logits[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("scheme", ["W4A16_ASYM", "gptq-desc-act", "W8A8", "FP8_DYNAMIC"])
def test_four_devices_give_what_one_gives(wide: Callable[[str], Path], scheme: str) -> None:
    folder = wide(scheme)
    ids = np.arange(40)
    one, four = (
        LLM(
            folder,
            dtype="float32",
            backend="xla",
            tensor_parallel_size=size,
            activation_semantics="compressed-tensors",
        )
        for size in (1, 4)
    )
    expected, found = one.logits(ids), four.logits(ids)
    if scheme in ("W8A8", "FP8_DYNAMIC"):  # a rounding that flips spreads
        assert_near(found, expected, {"max_abs": 0.5, "rel_rms": 0.007, "argmax_agreement": 0.95})
    else:
        assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()
    if scheme == "gptq-desc-act":
        assert greedy(four) == greedy(one)


def test_columns_in_activation_order_keep_whole_groups_where_they_can(tiny_llama3) -> None:
    with LLM(tiny_llama3("gptq_w4_g128_desc_act"), backend="xla", tensor_parallel_size=2) as llm:
        layer = llm.model.layers[0]
    down, o = (
        linear.dense.weight.get_value() for linear in (layer.mlp.down_proj, layer.self_attn.o_proj)
    )
    assert down.g_idx is None  # gate and up make their rows in its order
    assert down.scales.shape == (2 * 256, 2)  # two devices, 256 rows, 2 of 4 groups on each
    assert o.g_idx is not None  # heads stay together
    assert o.scales.shape == (2 * 256, 2)


@pytest.mark.parametrize("kind", ["bf16_original", "ct_w8a8_int8", "ct_fp8_static"])
def test_more_devices_than_key_value_heads(tiny_llama3, kind: str) -> None:
    folder = tiny_llama3(kind)
    golden = read_tensors(folder / "expected.safetensors")
    with LLM(
        folder,
        dtype="float32",
        tensor_parallel_size=4,
        activation_semantics="compressed-tensors",
    ) as llm:
        assert llm.config.num_key_value_heads == 2
        found = all_logits(llm, golden)
    expected = np.concatenate([golden[f"logits_{i}"] for i in range(3)])
    assert_near(found, expected, tolerances(folder)["logits_fp32_compute"])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            "ct_w4a16_g128",
            "K=256 makes 64 columns each, but it has groups of 128 columns; use 1 or 2",
        ),
        ("ct_fp8_block", "N=256 makes 64 rows each, but it has blocks of 128 rows; use 1 or 2"),
    ],
)
def test_a_checkpoint_that_does_not_split_is_refused(tiny_llama3, kind: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        LLM(tiny_llama3(kind), tensor_parallel_size=4)


@pytest.fixture(scope="module")
def alone(wide: Callable[[str], Path]) -> list[list[int]]:
    with LLM(wide("W4A16"), dtype="float32") as llm:
        return mixed(llm)


def mixed(llm: LLM) -> list[list[int]]:
    """Greedy and sampled rows in turn."""
    sampled = SamplingParams(temperature=1.0, max_tokens=12, ignore_eos=True)
    outputs = llm.generate(PROMPTS, [GREEDY, sampled] * 2)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("mesh", [(2, 2), (2, 4)])
def test_replicas_share_a_batch(
    wide: Callable[[str], Path], alone: list[list[int]], mesh: tuple[int, int]
) -> None:
    replicas, size = mesh
    with LLM(
        wide("W4A16"), dtype="float32", tensor_parallel_size=size, data_parallel_size=replicas
    ) as llm:
        assert dict(llm.mesh.shape) == {"data": replicas, "model": size}
        assert mixed(llm) == alone
        # Both had work: each filled its rows.
        rows = [engine.runner.cache.layers[0].keys.shape[0] for engine in llm._engines]
        assert rows == [2, 2]


def test_everything_a_request_may_ask_for(tiny_llama3) -> None:
    """The largest of the compiled variants, on two devices as on one."""
    params = SamplingParams(
        temperature=0.7,
        seed=5,
        max_tokens=10,
        logprobs=3,
        prompt_logprobs=2,
        repetition_penalty=1.2,
        presence_penalty=0.3,
        logit_bias={7: 2.0},
        bad_words=[" the"],
        stop=["zzz"],
    )
    found = []
    for size in (1, 2):
        with LLM(tiny_llama3("ct_w4a16_g128"), dtype="float32", tensor_parallel_size=size) as llm:
            (output,) = llm.generate("It is a truth", params)
            found.append(output)
    one, two = found
    assert two.outputs[0].token_ids == one.outputs[0].token_ids
    assert two.outputs[0].cumulative_logprob == pytest.approx(one.outputs[0].cumulative_logprob)
    for mine, theirs in zip(two.prompt_logprobs[1:], one.prompt_logprobs[1:], strict=True):
        assert [at.logprob for at in mine.values()] == pytest.approx(
            [at.logprob for at in theirs.values()], abs=1e-4
        )


def test_what_an_evaluation_reads(tiny_llama3) -> None:
    ids = np.arange(5, 40)
    with LLM(tiny_llama3("ct_w4a16_g128"), dtype="float32", tensor_parallel_size=2) as llm:
        logits, hidden, head = llm.logits(ids), llm.hidden_states(ids), llm.head()
    assert hidden.shape == (len(ids), 256)
    np.testing.assert_allclose(head(hidden), logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_floats(tiny_llama3, dtype: str) -> None:
    logits = []
    for size in (1, 2):
        with LLM(tiny_llama3("ct_w4a16_g128"), dtype=dtype, tensor_parallel_size=size) as llm:
            logits.append(llm.logits(np.arange(5, 40)))
    limits = {"max_abs": 0.25, "rel_rms": 0.01, "argmax_agreement": 0.95}
    assert_near(logits[1], logits[0], limits)


def test_requests_go_where_the_fewest_tokens_are() -> None:
    def request(tokens: int) -> Request:
        prompt = np.zeros(tokens, np.int32)
        return Request(prompt=prompt, params=GREEDY, seed=(0,), max_tokens=1)

    shares = spread([request(n) for n in (50, 10, 10, 10, 30, 5)], 2)
    assert [[len(r.prompt) for r in share] for share in shares] == [[50, 5], [10, 10, 10, 30]]


def test_an_error_of_one_replica_ends_the_run(wide: Callable[[str], Path]) -> None:
    with LLM(wide("W4A16"), dtype="float32", data_parallel_size=2) as llm:
        greedy(llm)

        def fail() -> None:
            raise RuntimeError("lost a device")

        llm._engines[1].runner.decode = fail
        with pytest.raises(RuntimeError, match="lost a device"):
            greedy(llm)


def test_a_decode_step_sums_twice_a_layer_and_gathers_once(tiny_llama3) -> None:
    with LLM(tiny_llama3("ct_w8a8_int8"), dtype="float32", tensor_parallel_size=2) as llm:
        greedy(llm)
        run = llm._engines[0].runner
        (key,) = [key for key in run.compiled if key[0] == "decode"]
        text = run.compiled[key].as_text()
        cache = ",".join(map(str, run.cache.layers[0].keys.addressable_shards[0].data.shape))
        layers = llm.config.num_hidden_layers
    collectives = re.findall(r" = \S+ (all-\w+|reduce-scatter|collective-\w+)\(", text)
    # The steps are a loop, so its body is there once; the one more sums the embedding's rows.
    assert collectives.count("all-reduce") == 2 * layers + 1
    assert collectives.count("all-gather") == 1
    assert len(collectives) == 2 * layers + 2
    assert " conditional(" not in text
    assert not [line for line in text.splitlines() if f"f32[{cache}]" in line and " copy(" in line]


@pytest.mark.parametrize("connected", [False, True])
@pytest.mark.parametrize(("kind", "rows"), [("ct_w4a16_g128", 4), ("ct_w8a8_int8", 5)])
def test_a_sharded_decode_step_lowers_for_gpus(
    tiny_llama3, monkeypatch: pytest.MonkeyPatch, kind: str, rows: int, connected: bool
) -> None:
    """Each device packed its own parts; the kernels run on them inside the `shard_map`."""

    def connect(mesh: Mesh) -> all_reduce.Peers:
        over = NamedSharding(mesh, PartitionSpec("model"))
        words = jnp.zeros((2, 8), jnp.uint32, device=over)
        return all_reduce.Peers(words, jnp.zeros((2, 16), jnp.uint8, device=over))

    if connected:
        monkeypatch.setattr(all_reduce, "connect", connect)
    with LLM(tiny_llama3(kind), dtype="bfloat16", backend="pallas", tensor_parallel_size=2) as llm:
        run = llm._engines[0].runner
        run.reset(8, programs.Features())
        run.reserve(128)
        step = functools.partial(programs.decode, steps=8, features=programs.Features())
        step.__name__ = "decode"
        arguments = (run.leaves, run.cache, run.slots, np.ones(8, bool))
        jitted = run._jit(run._with_leaves(step), arguments, (1, 2), None)
        text = jitted.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    # One for each shape; the parts of q|k|v and of down are both 256x256. Between them SwiGLU, the
    # codes of what o_proj reads, attention, and three norms: the first adds nothing, the last keeps
    # no sum. Where devices can write to each other, one more sums; XLA sums the embedding's rows.
    assert text.count("@mosaic_gpu_v2") == 3 + rows + 1 + connected
    sums = 1 if connected else 2 * llm.config.num_hidden_layers + 1
    assert text.count("stablehlo.all_reduce") == sums


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["ct_w4a16_g128", "ct_w8a8_int8"])
def test_two_gpus_give_what_one_does(tiny_llama3, kind: str) -> None:
    if jax.device_count() < 2:
        pytest.skip("one GPU")
    logits, tokens = [], []
    for size in (1, 2):
        with LLM(tiny_llama3(kind), dtype="bfloat16", tensor_parallel_size=size) as llm:
            # 32 tokens, or 4 rows, of 256 numbers each: enough for the kernel that sums.
            logits.append(llm.logits(np.arange(5, 37)))
            tokens.append([greedy(llm) for _ in range(3)])
            assert (size == 1) == (getattr(llm.model, "workspaces", None) is None)
    assert_near(logits[1], logits[0], {"max_abs": 0.25, "rel_rms": 0.02, "argmax_agreement": 0.9})
    assert all(run == runs[0] for runs in tokens for run in runs)


def test_each_device_holds_its_part_and_no_more(wide: Callable[[str], Path]) -> None:
    held = {}
    for size in (1, 4):
        with LLM(wide("W4A16"), backend="xla", tensor_parallel_size=size) as llm:
            held[size] = sum(
                shard.data.nbytes
                for leaf in jax.tree.leaves(llm.model)
                for shard in leaf.addressable_shards
                if shard.device == jax.devices()[0]
            )
            plan = plan_of(llm, size)
            # Norms and the padding of the vocabulary beside what is planned.
            assert plan <= held[size] < 1.02 * plan
    assert held[4] < 0.27 * held[1]


def plan_of(llm: LLM, size: int) -> int:
    assert llm.quantization is not None
    return plan_memory(
        llm.config,
        weight_shapes(llm.config),
        {path: spec.scheme for path, spec in llm.quantization.linears.items()},
        size=size,
        dtype=llm.dtype,
        cache_dtype=llm.kv_cache_dtype,
        dequantized=False,
    ).weights


@pytest.mark.parametrize("scheme", ["W8A8", "FP8_DYNAMIC"])
@pytest.mark.parametrize("backend", ["reference", "interpret"])
def test_partial_products_of_quantized_inputs(
    scheme: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each device rounds its own columns by their own largest, as vLLM's kernels do."""
    # At the end of a simulated kernel JAX demands that no other one is running in the process.
    simulator = "jax._src.pallas.mosaic_gpu.interpret.gpu_callbacks"
    monkeypatch.setattr(f"{simulator}._assert_no_barriers_allocated", lambda token: token)
    n, k, size = 64, 256, 2
    rng = np.random.default_rng(0)
    x = rng.normal(size=(8, k)).astype(np.float32) * np.geomspace(1, 30, k, dtype=np.float32)
    weight = jax.tree.map(
        np.asarray, quantize_rtn(rng.normal(size=(n, k)).astype(np.float32), PRESETS[scheme])
    )
    mesh = make_mesh(size)

    def of_device(rank: int) -> RowParallel:
        columns = slice(rank * k // size, (rank + 1) * k // size)
        mine = jax.tree.map(jnp.asarray, shard_weight(weight, Part(slice(0, n), columns)))
        return RowParallel(make_dense(mine, dtype=jnp.float32, backend=backend), bias)

    bias = jnp.arange(n, dtype=jnp.float32)
    (layer,) = place(range(mesh.size), of_device, [mesh])
    product = jax.shard_map(
        lambda layer, x: layer(x),
        mesh=mesh,
        in_specs=(partition_specs(layer), PartitionSpec(None, "model")),
        out_specs=PartitionSpec(),
        check_vma=False,
    )
    found = np.asarray(jax.jit(product)(layer, x))

    dequantized = np.asarray(weight.dequantize(), np.float64)
    expected = np.arange(n, dtype=np.float64)[None].repeat(8, axis=0)
    for half in (slice(0, k // 2), slice(k // 2, k)):
        codes, scale, _ = quantize_activations(x[:, half], weight.scheme.activations)
        rounded = np.asarray(codes, np.float64) * np.asarray(scale, np.float64)
        expected += rounded @ dequantized[:, half].T
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def test_too_little_memory_is_told_before_loading(
    wide: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qllama.llm.device_memory", lambda devices: 1_000_000)
    monkeypatch.setattr("qllama.llm.load_replicas", lambda *_, **__: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"take \d.* on each device .* 1.00 MB are free"):
        LLM(wide("W4A16"), tensor_parallel_size=2)
