# Inside a kernel nearly everything is a ref or traced, for which Pallas has no static types.
# mypy: ignore-errors
"""Sums of small arrays over the GPUs of one machine, in one kernel and one trip over NVLink.

Every device keeps a workspace whose address all others know (`connect`). A kernel writes its array
into a slot in the workspace of each peer, waits for theirs in its own, adds them up in float32 in
the order of the devices, so that all get the same bits, and rounds once.

No message says that data has arrived: each 8 bytes written are 4 of the array and the number of
the call, and are read until that number is there. A device counts its own calls in its workspace.
Two slots in turn are enough: who reads a peer's call n knows that peer to be done with call n - 1,
and so may overwrite what it read there.

Nothing here is known to XLA: an array of addresses is the kernel's only other operand. So there is
no barrier before the kernel, nothing to set to zero, and nothing that CUDA graphs, loops or the
cache of compiled programs could get wrong. What must hold:

- All devices make the same calls with one workspace, in the same order: those of one program, each
  of which needs the result of the one before.
- A program has an XLA collective somewhere. XLA then lets the devices meet when all of them have
  loaded their kernels, before any starts; loading may block while a peer waits for this device.
"""

import ctypes
import os
from dataclasses import dataclass
from typing import Literal

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic.gpu import utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

from qllama_kernels import mosaic

Backend = Literal["auto", "pallas", "xla"]

THREADS = 128
TILE = 8 * THREADS  # elements of a CTA: 16 bytes a thread
HALF = 16 * THREADS  # bytes that carry half a tile, numbers included
HEADER = 1024  # bytes before the slots: two counters
SIZES = (2, 4, 8)
# How often to look for data before the program is given up as hung: a minute at least.
PATIENCE = 1 << 28


@dataclass(frozen=True)
class Peers:
    """The workspaces of the devices along one mesh axis, alive as long as this is."""

    addresses: jax.Array  # uint32 [devices, 2 * (2 + devices)], over the axis; see `connect`
    workspaces: jax.Array  # uint8 [devices, bytes], likewise


def largest(devices: int) -> int:
    """Bytes of the largest array that `all_reduce` takes; beyond, NCCL's bandwidth wins."""
    return (2 << 20) // devices


def connect(mesh: Mesh) -> Peers:
    """Give each device of `mesh`, which has one axis of more than one device, a workspace.

    `addresses`, pairs of words, low first, say to each device: its rank, the address of its own
    workspace, those of all. Use them in one program at a time.

    Raises:
        NotImplementedError: these devices cannot write into each other's memory.
    """
    devices = list(mesh.devices.flat)
    size = len(devices)
    axes = [name for name, length in mesh.shape.items() if length > 1]
    if size not in SIZES or len(axes) != 1:
        raise NotImplementedError(f"sums over a mesh {dict(mesh.shape)}")
    if any(device.process_index != jax.process_index() for device in devices):
        raise NotImplementedError("sums over the devices of several processes")
    if any(getattr(device, "compute_capability", None) != "9.0" for device in devices):
        raise NotImplementedError(f"sums over {devices[0].device_kind}: they are for Hopper")
    allocator = os.environ.get("XLA_PYTHON_CLIENT_ALLOCATOR", "default").lower()
    if allocator not in ("default", "bfc", "platform"):
        # The driver maps memory of other kinds into a peer's addresses only pool by pool.
        raise NotImplementedError(f"sums in memory from the allocator {allocator!r}")
    _let_write([device.local_hardware_id for device in devices])
    sharding = NamedSharding(mesh, PartitionSpec(axes[0]))
    length = HEADER + 2 * size * 2 * largest(size)
    workspaces = jnp.zeros((size, length), jnp.uint8, device=sharding).block_until_ready()
    there = {shard.device: shard.data for shard in workspaces.addressable_shards}
    every = [there[device].unsafe_buffer_pointer() for device in devices]
    words = np.array([[rank, every[rank], *every] for rank in range(size)], np.uint64)
    return Peers(jax.device_put(words.view(np.uint32), sharding), workspaces)


def _let_write(ordinals: list[int]) -> None:
    """Have the driver map each GPU's memory into the others' address spaces; JAX has already, where
    the hardware lets it."""
    cuda = ctypes.CDLL("libcuda.so.1")
    already = 704
    contexts = []

    def check(status: int, what: str) -> None:
        if status:
            raise NotImplementedError(f"GPUs that cannot write to each other: {what}: {status}")

    try:
        for ordinal in ordinals:
            context = ctypes.c_void_p()
            status = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), ordinal)
            check(status, "cuDevicePrimaryCtxRetain")
            contexts.append(context)
        for ordinal, context in zip(ordinals, contexts, strict=True):
            for other, peer in zip(ordinals, contexts, strict=True):
                if ordinal == other:
                    continue
                can = ctypes.c_int()
                status = cuda.cuDeviceCanAccessPeer(ctypes.byref(can), ordinal, other)
                check(status or not can.value, f"cuDeviceCanAccessPeer({ordinal}, {other})")
                check(cuda.cuCtxPushCurrent_v2(context), "cuCtxPushCurrent")
                status = cuda.cuCtxEnablePeerAccess(peer, 0)
                cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p()))
                check(0 if status == already else status, "cuCtxEnablePeerAccess")
    finally:
        for ordinal, _ in zip(ordinals, contexts, strict=False):
            cuda.cuDevicePrimaryCtxRelease_v2(ordinal)


def all_reduce(
    x: jax.Array,
    axis_name: str,
    *,
    peers: jax.Array | None = None,
    backend: Backend = "auto",
) -> jax.Array:
    """The sum of `x` over a mesh axis, on each of its devices: `lax.psum`, for small arrays faster.

    Args:
        x: any shape. The kernel takes bfloat16 and float16, multiples of 1024 elements, up to
            `largest` bytes.
        axis_name: of the `shard_map` this is inside of.
        peers: `Peers.addresses`, as the `shard_map` hands them out: `[1, ...]`; None: psum.
        backend: "pallas" for the kernel, "xla" for psum, "auto" for the kernel if it can.

    Raises:
        NotImplementedError: backend="pallas", and the kernel cannot take this.
    """
    if backend not in ("auto", "pallas", "xla"):
        raise ValueError(f"backend={backend!r} is unknown; use one of auto, pallas, xla")
    reason = _refusal(x, peers)
    if backend == "pallas" and reason is not None:
        raise NotImplementedError(f"all_reduce of {x.dtype} {list(x.shape)}: {reason}")
    if backend == "xla" or reason is not None:
        return lax.psum(x, axis_name)
    return _one_shot(x.reshape(-1), peers[0]).reshape(x.shape)


def _refusal(x: jax.Array, peers: jax.Array | None) -> str | None:
    if peers is None:
        return "the devices are not connected"
    if x.dtype not in (jnp.bfloat16, jnp.float16):
        return "neither bfloat16 nor float16"
    if x.size == 0 or x.size % TILE:
        return f"not a multiple of {TILE} elements"
    limit = largest(peers.shape[1] // 2 - 2)
    if x.size * x.dtype.itemsize > limit:
        return f"more than {limit} bytes"
    return None


# A jit of its own, so that sums of one shape are traced and lowered once.
@jax.jit
def _one_shot(x: jax.Array, addresses: jax.Array) -> jax.Array:
    """The kernel. A CTA takes a tile; it waits for the CTAs of the same tile on the peers only, and
    writes before it waits, so it does not matter how many CTAs run at a time."""
    size = addresses.shape[0] // 2 - 2
    tiles = x.size // TILE
    per_slot = 2 * largest(size)

    def one_shot_allreduce(x_ref, addresses_ref, out_ref):
        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),) * 3)
        def exchange(_, x_gmem, addresses_gmem, out_gmem):
            i32, i64 = (ir.IntegerType.get_signless(bits) for bits in (32, 64))
            pointer = llvm.PointerType.get()
            c = utils.c

            def at(base, offset):
                return llvm.inttoptr(pointer, arith.addi(base, offset))

            def address(ref):
                return llvm.ptrtoint(i64, utils.memref_ptr(ref))

            def wide(value):
                return arith.extui(i64, value)

            def times(value, factor):
                return arith.muli(value, c(factor, value.type))

            def known(index):
                """Word pair `index` of the addresses."""
                offset = times(index, 8) if isinstance(index, ir.Value) else c(8 * index, i64)
                return llvm.load(i64, at(address(addresses_gmem), offset))

            thread, tile = utils.thread_idx(), utils.block_idx()
            tile = tile if tile.type == i32 else arith.index_cast(i32, tile)
            rank, mine = known(0), known(1)
            place = arith.addi(times(wide(tile), HALF), times(wide(thread), 16))
            quad = ir.VectorType.get((4,), i32)
            own = llvm.load(quad, at(address(x_gmem), place), alignment=16)

            counter = llvm.inttoptr(pointer, mine)
            calls = utils.inline_ptx(
                "ld.relaxed.gpu.global.u32 $0, [$1];",
                counter,
                result_types=i32,
                has_side_effects=True,
            )
            calls = arith.addi(calls, c(1, i32))
            # Zero is what an unused slot holds; two keeps the slots in turn.
            wrapped = arith.cmpi(arith.CmpIPredicate.eq, calls, c(0, i32))
            calls = arith.select(wrapped, c(2, i32), calls)
            slot = wide(arith.andi(calls, c(1, i32)))

            def slot_of(sender):
                """Where `sender`'s part for this thread begins in any workspace."""
                index = arith.addi(times(slot, size), sender)
                inside = arith.addi(times(wide(tile), 2 * HALF), times(wide(thread), 16))
                return arith.addi(arith.addi(times(index, per_slot), inside), c(HEADER, i64))

            words = [
                vector.extract(own, dynamic_position=[], static_position=[i]) for i in range(4)
            ]
            for step in range(1, size):
                peer = arith.remui(arith.addi(rank, c(step, i64)), c(size, i64))
                target = known(arith.addi(peer, c(2, i64)))
                utils.inline_ptx(
                    f"""{{
                        .reg .b64 a, b, c, d;
                        mov.b64 a, {{$1, $5}};
                        mov.b64 b, {{$2, $5}};
                        mov.b64 c, {{$3, $5}};
                        mov.b64 d, {{$4, $5}};
                        st.relaxed.sys.global.v2.b64 [$0], {{a, b}};
                        st.relaxed.sys.global.v2.b64 [$0+{HALF}], {{c, d}};
                    }}""",
                    at(target, slot_of(rank)),
                    *words,
                    calls,
                    has_side_effects=True,
                )

            # All threads have read the counter. The last CTA to say so advances it.
            utils.warpgroup_barrier()
            first = arith.cmpi(arith.CmpIPredicate.eq, thread, c(0, i32))
            with ir.InsertionPoint(scf.IfOp(first).then_block):
                utils.inline_ptx(
                    """{
                        .reg .pred last;
                        .reg .b32 before;
                        atom.acq_rel.gpu.global.add.u32 before, [$0+4], 1;
                        setp.eq.u32 last, before, $2;
                        @last st.relaxed.gpu.global.u32 [$0+4], 0;
                        @last st.relaxed.gpu.global.u32 [$0], $1;
                    }""",
                    counter,
                    calls,
                    c(tiles - 1, i32),
                    has_side_effects=True,
                )
                scf.yield_([])

            def receive(sender):
                """The words of `sender`, once all carry the number of this call."""
                struct = llvm.StructType.get_literal([i32] * 4)
                source = at(mine, slot_of(sender))
                found = llvm.inline_asm(
                    struct,
                    [source, calls],
                    f"""{{
                        .reg .pred again, hung;
                        .reg .b64 a, b, c, d;
                        .reg .b32 e, f, g, h, tries;
                        mov.b32 tries, 0;
                        LOOK:
                        ld.relaxed.sys.global.v2.b64 {{a, b}}, [$4];
                        ld.relaxed.sys.global.v2.b64 {{c, d}}, [$4+{HALF}];
                        mov.b64 {{$0, e}}, a;
                        mov.b64 {{$1, f}}, b;
                        mov.b64 {{$2, g}}, c;
                        mov.b64 {{$3, h}}, d;
                        xor.b32 e, e, $5;
                        xor.b32 f, f, $5;
                        xor.b32 g, g, $5;
                        xor.b32 h, h, $5;
                        or.b32 e, e, f;
                        or.b32 g, g, h;
                        or.b32 e, e, g;
                        setp.ne.b32 again, e, 0;
                        add.u32 tries, tries, 1;
                        setp.gt.u32 hung, tries, {PATIENCE};
                        @hung trap;
                        @again bra LOOK;
                    }}""",
                    "=&r,=&r,=&r,=&r,l,r",
                    has_side_effects=True,
                )
                return [llvm.extractvalue(i32, found, [i]) for i in range(4)]

            narrow = utils.dtype_to_ir_type(x.dtype)
            parts = ir.VectorType.get((8,), narrow)
            floats = ir.VectorType.get((8,), ir.F32Type.get())
            total = None
            for sender in range(size):
                itself = arith.cmpi(arith.CmpIPredicate.eq, rank, c(sender, i64))
                branch = scf.IfOp(itself, [i32] * 4, has_else=True)
                with ir.InsertionPoint(branch.then_block):
                    scf.yield_(words)
                with ir.InsertionPoint(branch.else_block):
                    scf.yield_(receive(c(sender, i64)))
                part = vector.bitcast(parts, vector.from_elements(quad, list(branch.results)))
                part = arith.extf(floats, part)
                total = part if total is None else arith.addf(total, part)
            result = vector.bitcast(quad, arith.truncf(parts, total))
            llvm.store(result, at(address(out_gmem), place), alignment=16)

        exchange(x_ref, addresses_ref, out_ref)

    return plgpu.kernel(
        one_shot_allreduce,
        out_type=jax.ShapeDtypeStruct(x.shape, x.dtype),
        grid=(tiles,),
        grid_names=("tile",),
        compiler_params=mosaic.COMPILER_PARAMS,
    )(x, addresses)
