"""What is remembered of the inputs of Linears, and of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from qllama_kernels.codes import FP8_MAX

from qllama.gptq.hessian import Hessian, accumulate

# Such a share of tokens that are not finite means that something is broken.
MAX_BAD_SHARE = 1e-3


@dataclass(kw_only=True)
class InputObserver:
    """Looks at one input of K features, batch after batch, and never waits for the device.

    Batches on several devices are seen by one on each of them, see `spread`.
    """

    hessian: Hessian | None  # None: not wanted
    absmax: jax.Array | None  # float32 [K], the largest magnitude of each feature; None: not wanted
    bad: jax.Array | None = None  # int32 [], tokens that were not finite, left out of both
    tokens: int = 0  # padding included

    @classmethod
    def of(cls, k: int, *, hessian: bool, absmax: bool) -> "InputObserver | None":
        """For inputs of `k` features; None where nothing is wanted."""
        if not hessian and not absmax:
            return None
        return cls(
            hessian=Hessian.zeros(k) if hessian else None,
            absmax=jnp.zeros(k, jnp.float32) if absmax else None,
            bad=jnp.zeros((), jnp.int32),
        )

    def see(self, x: jax.Array, mask: jax.Array) -> None:
        """Add `x [B, T, K]`, whose tokens count where `mask [B, T]` is True."""
        self.tokens += mask.size
        if self.absmax is not None:
            self.absmax, self.bad = _widen(self.absmax, self.bad, x, mask)
        if self.hessian is not None:
            self.hessian = accumulate(self.hessian, x, mask)
            self.bad = self.hessian.dropped

    def spread(self, devices: Sequence[jax.Device]) -> dict[jax.Device, "InputObserver"]:
        """Observers of the batches on each device, the first being this one. It has seen nothing,
        and is to be given the others with `add` in the end."""
        parts = [self, *(replace(self) for _ in devices[1:])]
        for part, device in zip(parts, devices, strict=True):
            part.hessian, part.absmax, part.bad = jax.tree.map(
                partial(jnp.zeros_like, device=device), (part.hessian, part.absmax, part.bad)
            )
        return dict(zip(devices, parts, strict=True))

    def add(self, other: "InputObserver") -> None:
        """See all that `other`, which observes the same and may lie on another device, has seen."""
        self.tokens += other.tokens
        if self.absmax is not None:
            here = self.absmax.device
            self.absmax = jnp.maximum(self.absmax, jax.device_put(other.absmax, here))
            self.bad += jax.device_put(other.bad, here)
        if self.hessian is not None:
            theirs = jax.device_put(other.hessian, self.hessian.total.device)
            self.hessian = _together(self.hessian, theirs)
            self.bad = self.hessian.dropped

    def ready(self) -> None:
        """Wait for the device."""
        jax.block_until_ready((self.hessian, self.absmax, self.bad))


@jax.jit
def _widen(
    absmax: jax.Array, bad: jax.Array, x: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array]:
    size = jnp.abs(x.astype(jnp.float32))
    finite = jnp.isfinite(jnp.sum(size, axis=-1))
    size = jnp.where((mask & finite)[..., None], size, 0.0)
    return (
        jnp.maximum(absmax, jnp.max(size, axis=(0, 1))),
        bad + jnp.sum(mask & ~finite, dtype=jnp.int32),
    )


@partial(jax.jit, donate_argnums=0)
def _together(mine: Hessian, theirs: Hessian) -> Hessian:
    return jax.tree.map(jnp.add, mine, theirs)


def fp8_scale(absmax: np.ndarray | jax.Array | float) -> np.float32:
    """The scale that takes the largest magnitude to the largest float8_e4m3 number.

    1.0 for what was nothing but zeros, and never a subnormal number, which devices flush to zero.
    """
    largest = np.float32(np.max(np.asarray(absmax, np.float32)))
    scale = largest / np.float32(FP8_MAX)
    return np.maximum(scale, np.finfo(np.float32).tiny) if largest > 0 else np.float32(1.0)
