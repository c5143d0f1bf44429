"""From what each device holds to arrays over all of them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from qllama.parallel.mesh import MODEL, local_ranks


def place[P, T](parts: Iterable[P], build: Callable[[P], T], meshes: Sequence[Mesh]) -> list[T]:
    """For each replica what `build` makes of its devices' parts, as one tree of arrays over them.

    The global arrays are those of the devices stacked along their first axis, however a weight was
    split and packed: inside a `shard_map` every device finds again just what was built for it.
    Scalars must be the same everywhere.

    Args:
        parts: what the devices of this process hold, on the host, in the order of `local_ranks`.
            The next is asked for when the devices have the one before it.
        build: called with a part once for each replica, the device that holds it the default; the
            results differ in the values of their arrays alone.
        meshes: of the replicas, alike, one row each.
    """
    built: list[list[T]] = [[] for _ in meshes]
    for rank, part in zip(local_ranks(meshes[0]), parts, strict=True):
        for mesh, mine in zip(meshes, built, strict=True):
            device = mesh.devices[0, rank]
            with jax.default_device(device):
                mine.append(jax.device_put(build(part), device))
        if meshes[0].size > 1:
            # Transfers are asynchronous and keep their sources: the host would hold many parts.
            jax.block_until_ready([mine[-1] for mine in built])
    if meshes[0].size == 1:
        return [mine[0] for mine in built]
    return [
        jax.tree.map(lambda *arrays, mesh=mesh: _stack(arrays, mesh), *mine)
        for mesh, mine in zip(meshes, built, strict=True)
    ]


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
