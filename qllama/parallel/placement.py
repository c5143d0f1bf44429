"""From what each device holds to arrays over all of them."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qllama.parallel.mesh import MODEL, local_ranks


def place[T](build: Callable[[int], T], mesh: Mesh) -> T:
    """What `build` makes for each device of a replica, as one tree of arrays over them all.

    The global arrays are those of the devices stacked along their first axis, however a weight was
    split and packed: inside a `shard_map` every device finds again just what was built for it.
    Scalars must be the same everywhere.

    Args:
        build: called with the rank of each of this process's devices, that device the default; the
            results differ in the values of their arrays alone.
        mesh: of one replica.
    """
    (row,) = mesh.devices
    parts = []
    for rank in local_ranks(mesh):
        with jax.default_device(row[rank]):
            parts.append(jax.device_put(build(rank), row[rank]))
    if mesh.size == 1:
        return parts[0]
    return jax.tree.map(lambda *arrays: _stack(arrays, mesh), *parts)


def _stack(arrays: Sequence[jax.Array], mesh: Mesh) -> jax.Array:
    shape = arrays[0].shape
    whole = (mesh.size * shape[0], *shape[1:]) if shape else shape
    sharding = NamedSharding(mesh, PartitionSpec(MODEL) if shape else PartitionSpec())
    return jax.make_array_from_single_device_arrays(whole, sharding, list(arrays))


def cache_sharding(mesh: Mesh) -> NamedSharding:
    """Of a key-value cache `[B, K, S, H]`: each device has the heads that it computes."""
    return NamedSharding(mesh, PartitionSpec(None, MODEL))


def partition_specs(tree: Any) -> Any:
    """How each array of `tree` lies over the mesh, for `shard_map`; host arrays are replicated."""

    def spec(leaf: Any) -> PartitionSpec:
        sharding = getattr(leaf, "sharding", None)
        return sharding.spec if isinstance(sharding, NamedSharding) else PartitionSpec()

    return jax.tree.map(spec, tree)
