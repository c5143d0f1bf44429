"""The devices of a run as a mesh: one row a replica, one column a part of every weight."""

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

DATA, MODEL = AXES = ("data", "model")


def make_mesh(tensor_parallel_size: int = 1, data_parallel_size: int = 1) -> Mesh:
    """The mesh of the first devices, with axes ("data", "model").

    Raises:
        ValueError: there are fewer devices than that; or, in a run of several processes, the mesh
            would leave some of their devices out, or have several replicas.
    """
    wanted = tensor_parallel_size * data_parallel_size
    devices = jax.devices()
    if wanted > len(devices):
        sizes = f"tensor_parallel_size={tensor_parallel_size}"
        if data_parallel_size > 1:
            replicas = f"data_parallel_size={data_parallel_size}"
            sizes = replicas if tensor_parallel_size == 1 else f"{sizes} x {replicas}"
        kinds = sorted({device.device_kind for device in devices})
        raise ValueError(
            f"{sizes} needs {wanted} devices, but there are {len(devices)} ({', '.join(kinds)})"
        )
    processes = jax.process_count()
    if processes > 1 and data_parallel_size > 1:
        raise ValueError(
            f"data_parallel_size={data_parallel_size}: replicas belong to one process, and this "
            f"run has {processes}; start a run of its own for each replica"
        )
    if processes > 1 and wanted < len(devices):
        raise ValueError(
            f"tensor_parallel_size={tensor_parallel_size} leaves out some of the {len(devices)} "
            f"devices of {processes} processes; use tensor_parallel_size={len(devices)}, or hide "
            "devices with CUDA_VISIBLE_DEVICES"
        )
    grid = np.asarray(devices[:wanted]).reshape(data_parallel_size, tensor_parallel_size)
    return Mesh(grid, AXES)


def replicas(mesh: Mesh) -> list[Mesh]:
    """The rows of `mesh`, each a mesh of its own with one row."""
    return [Mesh(row[None], AXES) for row in mesh.devices]


def local_ranks(mesh: Mesh) -> list[int]:
    """The places along "model" whose devices are this process's own. One replica."""
    (row,) = mesh.devices
    return [i for i, device in enumerate(row) if device.process_index == jax.process_index()]


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device of `mesh`."""
    return NamedSharding(mesh, PartitionSpec())
