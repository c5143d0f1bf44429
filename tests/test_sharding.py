"""What each device holds: a part of a weight is that part of the whole, or the split is refused."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from qllama_convert.names import LM_HEAD, linear_shapes, norm_shapes, weight_shapes

from qllama.config import LlamaConfig
from qllama.parallel.mesh import make_mesh, replicas
from qllama.parallel.sharding import (
    Part,
    check_split,
    group_order,
    kv_heads,
    local_config,
    part_of,
    rows_move,
    shard_bias,
    shard_kv_scales,
    shard_weight,
    split_kind,
)
from qllama.quantization.qtensor import QTensor
from qllama.quantization.rtn import quantize_rtn
from qllama.quantization.scheme import PRESETS

CONFIG = LlamaConfig(
    vocab_size=1000,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=1,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    max_position_embeddings=128,
)
LLAMA_8B = replace(
    CONFIG,
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


def quantized(scheme: str, shape: tuple[int, int], *, act_order: bool = False) -> QTensor:
    static = scheme == "FP8"
    weight = quantize_rtn(
        random(*shape), PRESETS[scheme], input_scale=np.float32(0.02) if static else None
    )
    weight = jax.tree.map(np.asarray, weight)
    if act_order:
        groups = np.random.default_rng(0).permutation(shape[1]) // weight.group_size[1]
        weight = replace(weight, g_idx=groups.astype(np.int32))
    return weight


def test_every_module_has_a_rule() -> None:
    for path in [*weight_shapes(CONFIG), *norm_shapes(CONFIG)]:
        assert split_kind(path)
    with pytest.raises(ValueError, match="no rule"):
        split_kind("model.layers.0.block_sparse_moe.gate")


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("path", [path for path in linear_shapes(CONFIG) if path != LM_HEAD])
def test_parts_cover_a_weight_once(path: str, size: int) -> None:
    shape = linear_shapes(CONFIG)[path]
    count = np.zeros(shape, int)
    parts = [part_of(CONFIG, path, shape, rank, size) for rank in range(size)]
    for part in parts:
        count[part.rows, part.columns] += 1
    holders = size // CONFIG.num_key_value_heads if split_kind(path) == "kv_heads" else 1
    assert (count == max(holders, 1)).all()
    local = linear_shapes(local_config(CONFIG, size))[path]
    assert all(random(*shape)[part.rows, part.columns].shape == local for part in parts)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_query_heads_lie_with_their_key_value_head(size: int) -> None:
    queries = CONFIG.num_attention_heads // size
    per_head = CONFIG.num_attention_heads // CONFIG.num_key_value_heads
    for rank in range(size):
        held = kv_heads(CONFIG, rank, size)
        wanted = {head // per_head for head in range(rank * queries, (rank + 1) * queries)}
        assert wanted == set(range(held.start, held.stop))


@pytest.mark.parametrize("scheme", [*PRESETS, "act_order"])
@pytest.mark.parametrize("kind", ["rows", "columns"])
def test_a_part_dequantizes_to_that_part_of_the_whole(scheme: str, kind: str) -> None:
    act_order = scheme == "act_order"
    whole = quantized("W4A16" if act_order else scheme, (256, 512), act_order=act_order)
    expected = np.asarray(whole.dequantize())
    for rank in range(2):
        half = slice(128 * rank, 128 * rank + 128)
        part = Part(half, slice(0, 512)) if kind == "rows" else Part(slice(0, 256), half)
        mine = shard_weight(whole, part)
        np.testing.assert_array_equal(mine.dequantize(), expected[part.rows, part.columns])
        mine.validate()


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A16"])
def test_columns_sorted_by_their_groups(scheme: str) -> None:
    weight = quantized(scheme, (64, 512), act_order=True)
    order = group_order(weight)
    assert order is not None
    expected = np.asarray(weight.dequantize())[:, order]
    for columns in (slice(0, 512), slice(128, 384)):
        part = shard_weight(weight, Part(slice(0, 64), columns, column_order=order))
        part.validate()
        assert group_order(part) is None
        np.testing.assert_array_equal(part.dequantize(), expected[:, columns])
    uneven = np.minimum(weight.g_idx, 2)
    assert group_order(replace(weight, g_idx=uneven)) is None


@pytest.mark.parametrize("scheme", PRESETS)
def test_rows_in_another_order(scheme: str) -> None:
    weight = quantized(scheme, (256, 256))
    order = np.random.default_rng(0).permutation(256)
    assert rows_move(weight) == (scheme != "FP8_BLOCK")
    if not rows_move(weight):
        return
    expected = np.asarray(weight.dequantize())[order]
    bias = random(256)
    for rows in (slice(0, 256), slice(64, 128)):
        part = Part(rows, slice(0, 256), row_order=order)
        mine = shard_weight(weight, part)
        mine.validate()
        np.testing.assert_array_equal(mine.dequantize(), expected[rows])
        np.testing.assert_array_equal(shard_bias(bias, part), bias[order][rows])


@pytest.mark.parametrize("scheme", ["W4A16", "W4A16_ASYM", "W8A8", "FP8_BLOCK"])
def test_pieces_of_a_vocabulary_are_even_and_padded_with_zeros(scheme: str) -> None:
    whole = quantized(scheme, (1000, 256))
    rows = whole.group_size[0]
    parts = [part_of(CONFIG, LM_HEAD, (1000, 256), rank, 4, rows) for rank in range(4)]
    pieces = [shard_weight(whole, part) for part in parts]
    assert {piece.shape for piece in pieces} == {(256, 256)}
    assert {piece.scales.shape for piece in pieces} == {pieces[0].scales.shape}
    together = np.concatenate([np.asarray(piece.dequantize()) for piece in pieces])
    np.testing.assert_array_equal(together[:1000], whole.dequantize())
    assert not together[1000:].any()


def test_a_vocabulary_smaller_than_its_pieces() -> None:
    table = random(70, 8)
    parts = [part_of(CONFIG, "model.embed_tokens", (70, 8), rank, 4) for rank in range(4)]
    pieces = [shard_weight(table, part) for part in parts]
    assert [piece.shape for piece in pieces] == [(64, 8)] * 4
    np.testing.assert_array_equal(np.concatenate(pieces)[:70], table)


def test_bias_and_cache_scales_follow_the_rows() -> None:
    bias = random(512)
    part = part_of(CONFIG, "model.layers.0.self_attn.q_proj", (512, 512), 1, 4)
    np.testing.assert_array_equal(shard_bias(bias, part), bias[128:256])
    scales = random(4, 1)
    np.testing.assert_array_equal(shard_kv_scales(CONFIG, scales, 3, 8), scales[1:2])
    np.testing.assert_array_equal(shard_kv_scales(CONFIG, scales, 1, 2), scales[2:4])
    one = random(1, 1)
    assert shard_kv_scales(CONFIG, one, 1, 2) is one
    assert shard_kv_scales(CONFIG, None, 1, 2) is None


@pytest.mark.parametrize(
    ("config", "scheme", "size", "message"),
    [
        (
            LLAMA_8B,
            None,
            3,
            "num_key_value_heads=8 cannot be split over 3 devices; use 1, 2, 4 or 8",
        ),
        (replace(CONFIG, num_attention_heads=12), None, 8, "num_attention_heads=12 cannot .* 1, 2"),
        (replace(CONFIG, intermediate_size=1030), None, 4, "intermediate_size=1030 cannot .* 1 or"),
        (CONFIG, "W4A16", 8, r"o_proj cannot .* K=512 makes 64 columns each, .* groups of 128"),
        (CONFIG, "FP8_BLOCK", 4, r"k_proj cannot .* N=256 makes 64 rows each, .* blocks of 128"),
    ],
)
def test_what_cannot_be_split(
    config: LlamaConfig, scheme: str | None, size: int, message: str
) -> None:
    shapes = linear_shapes(config)
    schemes = {path: PRESETS[scheme] for path in shapes if path != LM_HEAD} if scheme else {}
    with pytest.raises(ValueError, match=message):
        check_split(config, shapes, schemes, size)


@pytest.mark.parametrize("scheme", PRESETS)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_8b_shape_splits_in_every_scheme_but_for_blocks(scheme: str, size: int) -> None:
    shapes = linear_shapes(LLAMA_8B)
    check_split(LLAMA_8B, shapes, dict.fromkeys(shapes, PRESETS[scheme]), size)


def test_meshes() -> None:
    mesh = make_mesh(4, 2)
    assert dict(mesh.shape) == {"data": 2, "model": 4}
    first, second = replicas(mesh)
    assert {*first.devices.flat} | {*second.devices.flat} == set(jax.devices()[:8])
    assert not {*first.devices.flat} & {*second.devices.flat}
    with pytest.raises(ValueError, match=r"tensor_parallel_size=16 needs 16 devices, but .* are 8"):
        make_mesh(16)
    with pytest.raises(ValueError, match="=4 x data_parallel_size=3 needs 12 devices"):
        make_mesh(4, 3)
