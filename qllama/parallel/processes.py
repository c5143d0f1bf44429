"""A run of several processes, on one host or many: all run the same program on the same arguments.

JAX connects them (`jax.distributed`) and its collectives carry the data; nothing else passes
between them. Process 0 talks to the user.
"""

import socket
import threading
from concurrent.futures import Future

import jax
import numpy as np

HEARTBEAT_TIMEOUT = 20
"""Seconds after which a process that no longer answers is given up, and the others with it."""


INITIALIZATION_TIMEOUT = 300
"""Seconds that the processes of a run wait for each other at its start."""

_NEVER = 10**8  # seconds
_ANSWER = 5  # seconds that an address has to answer


def join(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    initialization_timeout: float = INITIALIZATION_TIMEOUT,
) -> None:
    """Connect this process with the others of its run. Before JAX touches a device.

    Args:
        coordinator: "host:port" of process 0, which listens there.
        num_processes: of the run.
        process_id: of this one, from 0. What is None is found in the environment of SLURM or Open
            MPI, as `jax.distributed.initialize` does.
        initialization_timeout: seconds to wait until all processes are there.

    Raises:
        ValueError: arguments out of range, or missing and not to be found.
        TimeoutError: not all of them came in time. This process should end then: JAX goes on
            waiting for them.
        RuntimeError: JAX cannot connect, or has been used already.
    """
    if coordinator is not None and not coordinator.rpartition(":")[2].isdecimal():
        raise ValueError(f"coordinator={coordinator!r} must be HOST:PORT, the address of process 0")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be at least 1")
    if process_id is not None and not 0 <= process_id < (num_processes or process_id + 1):
        raise ValueError(f"process_id={process_id} must be from 0 to num_processes - 1")
    if initialization_timeout <= 0:
        raise ValueError(f"initialization_timeout={initialization_timeout} must be above 0")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    connected: Future[None] = Future()

    def connect() -> None:
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                # At its own timeout JAX aborts the process, in C++, with a stack trace.
                initialization_timeout=_NEVER,
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
            )
        except BaseException as error:
            connected.set_exception(error)
        else:
            connected.set_result(None)

    # In a thread, so that this one can give up, and answer to Ctrl-C.
    threading.Thread(target=connect, daemon=True).start()
    try:
        connected.result(initialization_timeout)
    except TimeoutError:
        waited = f"after {initialization_timeout:g} s not all processes of this run are there"
        raise TimeoutError(
            f"{waited}: {_missing(coordinator, num_processes, process_id)}"
        ) from None
    except ValueError as error:
        raise ValueError(
            f"this process cannot find the others ({error}); give coordinator, num_processes and "
            "process_id, or start it with srun or mpirun"
        ) from error


def _missing(coordinator: str | None, count: int | None, process_id: int | None) -> str:
    """Who is not there, as far as this process can tell, and what to look at."""
    number = "all" if count is None else f"all {count}"
    started = f"see whether {number} were started, each with its own id and the same coordinator"
    if coordinator is None:
        return f"{started}; the environment of SLURM or Open MPI names it"
    host, _, port = coordinator.rpartition(":")
    if process_id != 0:
        try:
            socket.create_connection((host.strip("[]"), int(port)), _ANSWER).close()
        except OSError as error:
            reason = error.strerror or str(error)
            return (
                f"nobody answers at the coordinator {coordinator} ({reason}); start process 0 of "
                f"{count} there, and see whether the address is right and no firewall is between"
            )
        return f"process 0 answers at {coordinator}, but others of the {count} do not; {started}"
    return (
        f"this is process 0 of {count}, and some of the others have not come to {coordinator}; "
        f"{started}, and can reach that address through firewalls"
    )


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
