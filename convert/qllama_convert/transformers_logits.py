"""A program for another interpreter: the logits that transformers computes for a checkpoint.

It is run as text (`python -c`) where torch, transformers and compressed-tensors are installed, and
imports nothing of qllama. Arguments: an .npz file with `folder`, `dequantize` and `ids_0`, `ids_1`,
...; and the .npz file to write, with `logits_0`, ..., and `versions`.
"""

import sys
from typing import Any


def main(inputs: str, outputs: str) -> None:
    import numpy as np
    import torch
    import transformers

    given = dict(np.load(inputs))
    options: dict[str, Any] = {"dtype": torch.float32}
    versions = [f"transformers {transformers.__version__}", f"torch {torch.__version__}"]
    if given["uses_library"]:
        import compressed_tensors

        versions.append(f"compressed-tensors {compressed_tensors.__version__}")
        if given["dequantize"]:
            from transformers import CompressedTensorsConfig

            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(str(given["folder"]), **options)
    results: dict[str, Any] = {"versions": np.array(versions)}
    with torch.no_grad():
        for name in sorted(name for name in given if name.startswith("ids_")):
            ids = torch.from_numpy(given[name]).long()[None]
            logits = model(ids).logits[0].float().numpy()
            results[name.replace("ids_", "logits_")] = logits
    np.savez(outputs, **results)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
