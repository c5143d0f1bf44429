"""A command that several processes run together: who joins, who talks, and how one leaves."""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import NoReturn


@contextlib.contextmanager
def together(args: argparse.Namespace) -> Iterator[None]:
    """Join the other processes that the arguments of `add_process_options` tell of, if any.

    Within the block, only process 0 writes: of the others nothing is seen but how they fail.
    """
    if not several(args):
        yield
        return
    from qllama.parallel.processes import is_first, join

    waits = {}
    if args.initialization_timeout is not None:
        waits["initialization_timeout"] = args.initialization_timeout
    join(args.coordinator, args.num_processes, args.process_id, **waits)
    with contextlib.ExitStack() as stack:
        results = stack.enter_context(os.fdopen(os.dup(1), "w", encoding="utf-8"))
        nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
        # Gloo writes on file descriptor 1, whatever Python's stdout is.
        os.dup2((sys.stderr if is_first() else nowhere).fileno(), 1)
        stack.enter_context(contextlib.redirect_stdout(results if is_first() else nowhere))
        if not is_first():
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def several(args: argparse.Namespace) -> bool:
    """Whether the command is one of several processes.

    Raises:
        ValueError: some of the three that belong together are missing.
    """
    if getattr(args, "distributed", False):
        return True
    names = ("coordinator", "num_processes", "process_id")
    given = [name for name in names if getattr(args, name, None) is not None]
    if given and len(given) < len(names):
        missing = [f"--{name.replace('_', '-')}" for name in names if name not in given]
        raise ValueError(
            f"{' and '.join(missing)} missing: a run of several processes needs all three of "
            "--coordinator, --num-processes and --process-id, or --distributed"
        )
    if not given and getattr(args, "initialization_timeout", None) is not None:
        raise ValueError("--initialization-timeout is for a run of several processes")
    return bool(given)


def joined() -> bool:
    """Whether this process is connected with others."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized()


def lost_process(error: RuntimeError) -> RuntimeError:
    """What an error of the runtime most likely means in a run of several processes."""
    return RuntimeError(
        f"this run of several processes cannot go on; most likely one of them has stopped ({error})"
    )


def leave(code: int) -> NoReturn:
    """End this process at once.

    At a normal exit JAX waits for the others, who may wait for us; that we are gone tells them.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
