"""Sums over devices: what the kernel is given and what it refuses. On GPUs: what it computes."""

import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from qllama_kernels import all_reduce

from qllama.parallel.mesh import make_mesh

SHARED = PartitionSpec("model")


def over(mesh: Mesh, body, *, peers: bool):
    """`body(x, peers)` on each device, which gets a row of `x` and gives a row."""
    specs = (SHARED, SHARED if peers else None)
    return jax.jit(
        jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=SHARED, check_vma=False)
    )


def rows(size: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=(size, *shape)), jnp.bfloat16)


@pytest.mark.parametrize("backend", ["auto", "xla"])
def test_without_addresses_it_is_a_psum(backend: str) -> None:
    x = rows(4, 2, 1024)
    body = functools.partial(all_reduce.all_reduce, axis_name="model", backend=backend)
    found = over(make_mesh(4), lambda x, peers: body(x, peers=peers), peers=False)(x, None)
    expected = np.asarray(x, np.float32).sum(axis=0)
    for row in np.asarray(found, np.float32):
        np.testing.assert_allclose(row, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("shape", "dtype", "reason"),
    [
        ((1, 8192), jnp.float32, "neither bfloat16"),
        ((1, 1000), jnp.bfloat16, "not a multiple of 1024"),
        ((0, 1024), jnp.bfloat16, "not a multiple of 1024"),
        ((65, 8192), jnp.bfloat16, "more than 1048576 bytes"),
    ],
)
def test_the_kernel_says_what_it_cannot_take(
    shape: tuple[int, ...], dtype: type, reason: str
) -> None:
    mesh = make_mesh(2)
    arguments = (
        jax.ShapeDtypeStruct((2, *shape), dtype),
        jax.ShapeDtypeStruct((2, 8), jnp.uint32),
    )

    def body(backend: str, x: jax.Array, peers: jax.Array) -> jax.Array:
        return all_reduce.all_reduce(x[0], "model", peers=peers, backend=backend)[None]

    with pytest.raises(NotImplementedError, match=reason):
        over(mesh, functools.partial(body, "pallas"), peers=True).trace(*arguments)
    lowered = over(mesh, functools.partial(body, "auto"), peers=True).trace(*arguments).lower()
    assert lowered.as_text().count("stablehlo.all_reduce") == 1


def test_unknown_names_and_unconnected_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="backend='triton' is unknown"):
        all_reduce.all_reduce(rows(1, 1024), "model", backend="triton")  # type: ignore[arg-type]
    with pytest.raises(NotImplementedError, match="not connected"):
        all_reduce.all_reduce(rows(1, 1024), "model", backend="pallas")
    with pytest.raises(NotImplementedError, match="for Hopper"):
        all_reduce.connect(make_mesh(2))
    with pytest.raises(NotImplementedError, match="3"):
        all_reduce.connect(make_mesh(3))


def test_memory_that_peers_do_not_see_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = mock.Mock(process_index=0, compute_capability="9.0")
    mesh = mock.Mock(devices=np.array([[gpu, gpu]]), shape={"data": 1, "model": 2})
    monkeypatch.setenv("XLA_PYTHON_CLIENT_ALLOCATOR", "cuda_async")
    with pytest.raises(NotImplementedError, match="allocator 'cuda_async'"):
        all_reduce.connect(mesh)


@pytest.mark.parametrize("size", all_reduce.SIZES)
def test_it_lowers_for_gpus(size: int) -> None:
    def body(x: jax.Array, peers: jax.Array) -> jax.Array:
        sums = functools.partial(all_reduce.all_reduce, axis_name="model", peers=peers)

        def step(x: jax.Array, _: None) -> tuple[jax.Array, None]:
            return sums(x, backend="pallas"), None

        return jax.lax.scan(step, sums(x), None, length=3)[0]

    arguments = (
        jax.ShapeDtypeStruct((size, 16, 8192), jnp.bfloat16),
        jax.ShapeDtypeStruct((size, 2 * (2 + size)), jnp.uint32),
    )
    traced = over(make_mesh(size), body, peers=True).trace(*arguments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("@mosaic_gpu_v2") == 1
    assert "uses_xla_collective_metadata = true" not in text
    assert "stablehlo.all_reduce" not in text


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("shape", [(1, 1024), (1, 8192), (7, 4096), (64, 8192)])
def test_sums_on_gpus(shape: tuple[int, int], dtype: type) -> None:
    size = next((n for n in reversed(all_reduce.SIZES) if n <= jax.device_count()), 0)
    if not size or np.prod(shape) * 2 > all_reduce.largest(size):
        pytest.skip("too few devices, or too large for so many")
    mesh = make_mesh(size)
    peers = all_reduce.connect(mesh)

    def body(x: jax.Array, addresses: jax.Array) -> jax.Array:
        meet = jax.lax.psum(jnp.zeros((), jnp.float32) + x.ravel()[0], "model")
        first = all_reduce.all_reduce(x, "model", peers=addresses, backend="pallas")

        def step(carry: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
            total = all_reduce.all_reduce(carry, "model", peers=addresses, backend="pallas")
            return (total / size).astype(dtype), total

        last, _ = jax.lax.scan(step, (first / size).astype(dtype), None, length=50)
        return jnp.stack([first, last]) + (0 * meet).astype(dtype)

    x = rows(size, *shape).astype(dtype)
    program = over(mesh, body, peers=True)
    for _ in range(3):
        found = np.asarray(program(x, peers.addresses), np.float32)
        found = found.reshape(size, 2, *shape)
        expected = np.asarray(x, np.float32).sum(axis=0)
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(found[0, 0], expected, rtol=eps, atol=1e-6)
        np.testing.assert_array_equal(found, found[:1].repeat(size, axis=0))
        # Equal on all devices, so their mean is the same again, up to a rounding each time.
        np.testing.assert_allclose(found[0, 1], expected / size, rtol=60 * eps, atol=1e-5)
