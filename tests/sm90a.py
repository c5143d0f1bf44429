"""Compiles kernels for sm_90a without a GPU and prints what ptxas spilled.

Products by the configs of the table, and by those that the rules give to FP8 in blocks and to many
tokens; then what lies between the products, of the models of those shapes.

A program of its own, because JAX must see the CUDA plugin. Needs jax-cuda13-plugin,
jax-cuda13-pjrt, nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-runtime and nvidia-nvjitlink.
"""

import itertools
import json
import os
import re
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

# What XLA's own description of an H100 says of its limits.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  device_address_bits: 64 name: "NVIDIA H100 80GB HBM3" driver_version: "13.0.0"
  runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def main() -> None:
    import nvidia

    toolkit = next(folder for path in nvidia.__path__ if (folder := Path(path) / "cu13").is_dir())
    dump = Path(tempfile.mkdtemp())
    os.environ.update(
        JAX_PLATFORMS="",
        JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1",
        MOSAIC_GPU_DUMP_PTXAS="1",
        MOSAIC_GPU_DUMP_TO=str(dump),
        PATH=f"{toolkit / 'bin'}:{os.environ['PATH']}",
        XLA_FLAGS=f"--xla_gpu_cuda_data_dir={toolkit}",
    )
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec
    from qllama_kernels import rows, tuning
    from qllama_kernels.attention import decode_attention
    from test_kernels_tuning import DEVICES, SHAPES, TABLE, operands, product

    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    sharding = NamedSharding(topologies.make_mesh(topology, (1,), ("x",)), PartitionSpec())

    def compile_and_print(name: dict[str, Any], function: Any, *arguments: Any) -> None:
        arguments = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), arguments
        )
        for file in dump.iterdir():
            file.unlink()
        jax.jit(function).lower(*arguments).compile()
        reports = [file.read_text() for file in dump.glob("*.ptxas")]
        spills = [int(n) for text in reports for n in re.findall(r"(\d+) bytes spill", text)]
        print(json.dumps({**name, "spilled": spills}), flush=True)

    done = set()
    blocks = [
        (DEVICES[0], "fp8_block", *shape, m) for shape in SHAPES[::3] for m in tuning.M_BUCKETS
    ]
    schemes = ("w4a16", "w8a8", "fp8", "fp8_block")
    many = [(DEVICES[0], s, 28672, 4096, m) for s in schemes for m in (300, 2048)]
    for key in sorted(TABLE) + blocks + many:
        device, scheme, n, k, m = key
        group = 128 if scheme in ("w4a16", "fp8_block") else None
        problem = tuning.Problem(scheme=scheme, m=m, n=n, k=k, group_size=group)
        config = tuning.choose(problem, device)
        if (scheme, config) in done:
            continue
        done.add((scheme, config))
        name = {"product": key, "config": str(config)}
        compile_and_print(name, product(problem, config), *operands(problem))

    for scheme, group in itertools.product(("w4a16", "w8a16"), (None, 32, 128)):
        m = tuning.DENSE_M
        problem = tuning.Problem(scheme=scheme, m=m, n=4096, k=14336, group_size=group)
        name = {"dequantized": scheme, "group": group}
        compile_and_print(name, product(problem, None), *operands(problem))

    attend = partial(decode_attention, backend="pallas")
    for dtype, cached, d, capacity, group in itertools.product(
        ("bfloat16", "float16"), (None, "float8_e4m3fn"), (64, 128), (256, 4096), (1, 3, 4, 8)
    ):
        angles = jax.ShapeDtypeStruct((16, d // 2), jnp.float32)
        cache = jax.ShapeDtypeStruct((16, 8, capacity, d), cached or dtype)
        compile_and_print(
            {"decode_attention": d, "dtype": dtype, "cache": cached, "capacity": capacity,
             "group": group},
            attend,
            jax.ShapeDtypeStruct((16, (8 * group + 16) * d), dtype),
            angles,
            angles,
            jax.ShapeDtypeStruct((16,), jnp.int32),
            cache,
            cache,
        )  # fmt: skip

    shape = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    sums = partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    for codes in (None, rows.Codes("int8"), rows.Codes("float8_e4m3fn")):
        coded = codes and codes.dtype
        for d, s in itertools.product((2048, 3072, 4096, 5120, 8192), (0, 1, 2, 8)):
            compile_and_print(
                {"residual_norm": d, "addends": s, "codes": coded},
                partial(rows.residual_norm, eps=1e-5, codes=codes, backend="pallas"),
                shape((16, d)),
                sums((s, 16, d)) if s else None,
                shape((d,)),
            )
        for d, s in itertools.product((3584, 8192, 14336, 28672), (1, 2, 4)):
            compile_and_print(
                {"swiglu": d, "addends": s, "codes": coded},
                partial(rows.swiglu, dtype=jnp.bfloat16, codes=codes, backend="pallas"),
                sums((s, 16, 2 * d)),
            )
        if codes is not None:
            for d in (2048, 4096, 8192):
                run = partial(rows.quantize, codes=codes, backend="pallas")
                compile_and_print({"quantize": d, "codes": coded}, run, shape((16, d)))


if __name__ == "__main__":
    sys.exit(main())
