"""A run of several processes, on one host or many: all run the same program on the same arguments.

JAX connects them (`jax.distributed`) and its collectives carry the data; nothing else passes
between them. Process 0 talks to the user.
"""

import jax
import numpy as np

HEARTBEAT_TIMEOUT = 20
"""Seconds after which a process that no longer answers is given up, and the others with it."""


def join(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connect this process with the others of its run. Before JAX touches a device.

    Args:
        coordinator: "host:port" of process 0, which listens there.
        num_processes: of the run.
        process_id: of this one, from 0. What is None is found in the environment of SLURM or Open
            MPI, as `jax.distributed.initialize` does.

    Raises:
        ValueError: arguments out of range, or missing and not to be found.
        RuntimeError: the others do not answer.
    """
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator={coordinator!r} must be HOST:PORT, the address of process 0")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be at least 1")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise ValueError(f"process_id={process_id} must be from 0 to num_processes - 1")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    except ValueError as error:
        raise ValueError(
            f"this process cannot find the others ({error}); give coordinator, num_processes and "
            "process_id, or start it with srun or mpirun"
        ) from error


def is_first() -> bool:
    """Whether this process talks to the user: it is alone, or process 0."""
    return jax.process_index() == 0


def smallest(value: int) -> int:
    """The least `value` that any process has. Each must ask."""
    if jax.process_count() == 1:
        return value
    from jax.experimental import multihost_utils

    # Two words: without 64-bit integers JAX would cut one in half.
    words = np.array(divmod(value, 2**31), np.int32)
    gathered = np.asarray(multihost_utils.process_allgather(words)).astype(np.int64)
    return int((gathered[:, 0] * 2**31 + gathered[:, 1]).min())
