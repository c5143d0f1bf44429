"""Layers that talk to the other devices. They run inside a `shard_map` over the axis "model".

All else of the model is what one device would run, with its own heads and its own slice of the MLP;
the residual stream is whole on every device.
"""

import contextlib

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from qllama_kernels import all_reduce as peer_memory
from qllama_kernels.rows import Codes

from qllama.model.dense import Dense, Input, QuantDense
from qllama.model.llama import Llama
from qllama.parallel.mesh import MODEL


def all_reduce(x: jax.Array, peers: jax.Array | None = None) -> jax.Array:
    """The sum of `x` over the devices of a replica, on each of them; small ones by the kernel that
    writes to `peers`, see `ShardedLlama.connect`."""
    return peer_memory.all_reduce(x, MODEL, peers=peers)


class RowParallel(nnx.Module):
    """A Linear whose input columns are spread over the devices: partial products, then their sum.

    `dense` holds this device's columns and no bias; `bias` `[N]` is added to the sum. An input
    that is quantized is so by each device for its own columns, as in vLLM, unless `dense` has an
    `axis_name`.
    """

    def __init__(self, dense: Dense | QuantDense, bias: jax.Array | None = None) -> None:
        self.dense = dense
        self.bias = None if bias is None else nnx.Param(bias)
        self.peers: nnx.Variable[jax.Array] | None = nnx.data(None)  # see `connect`

    @property
    def input_codes(self) -> Codes | None:
        """As `Dense.input_codes`."""
        return self.dense.input_codes

    def addends(self, x: Input) -> jax.Array:
        """The result, `[1, ..., N]`: what there is to add up is so before it travels."""
        return self(x)[None]

    def __call__(self, x: Input, out_dtype: jnp.dtype | type | None = None) -> jax.Array:
        peers = None if self.peers is None else self.peers[...]
        out = all_reduce(self.dense(x, out_dtype), peers)
        if self.bias is None:
            return out
        biased = out.astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return biased.astype(out.dtype)


class ShardedLlama(Llama):
    """A Llama of which this device holds a part; the vocabulary too is divided."""

    workspaces: nnx.Variable[jax.Array] | None = None  # what the addresses of `connect` are of

    def connect(self, mesh: Mesh) -> None:
        """Let the Linears that write to the residual stream sum through the memory of their peers,
        if the devices of `mesh`, which hold the model, can. The embedding's sum stays XLA's: with
        it a program's devices meet before they look for each other's data."""
        with contextlib.suppress(NotImplementedError):
            peers = peer_memory.connect(mesh)
            self.workspaces = nnx.Variable(peers.workspaces)
            addresses = nnx.Variable(peers.addresses)  # one argument of the programs, not one each
            for _, module in nnx.iter_modules(self):
                if isinstance(module, RowParallel):
                    module.peers = addresses

    def embed(self, tokens: jax.Array) -> jax.Array:
        table = self.embed_tokens[...]
        rows = tokens - jax.lax.axis_index(MODEL) * table.shape[0]
        here = (rows >= 0) & (rows < table.shape[0])
        found = table[jnp.where(here, rows, 0)]
        return all_reduce(jnp.where(here[..., None], found, 0))

    def logits(self, hidden: jax.Array) -> jax.Array:
        part = super().logits(hidden)
        whole = jax.lax.all_gather(part, MODEL, axis=part.ndim - 1, tiled=True)
        return whole[..., : self.config.vocab_size]
