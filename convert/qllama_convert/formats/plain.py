"""plain: an unquantized Linear, `weight` `[N, K]` in BF16, F16 or F32, as stored."""

from typing import Any

import numpy as np

from qllama_convert.module_tensors import FLOATS, ModuleTensors

_QUANTIZED_SUFFIXES = ("qweight", "qzeros", "scales", "weight_packed", "weight_scale_inv", "codes")


def view(tensors: ModuleTensors, shape: tuple[int, int]) -> Any:
    """The weight `[N, K]` as stored, not read yet; `ModuleTensors.check_floats` is for its values.

    Raises:
        CheckpointError: also when the module carries a quantized weight after all.
    """
    packed = [suffix for suffix in _QUANTIZED_SUFFIXES if suffix in tensors]
    if not packed and "weight" in tensors and tensors.info("weight").dtype not in FLOATS:
        packed = [f"weight of dtype {tensors.info('weight').dtype}"]
    if packed:
        raise tensors.error(
            f"the config says this Linear is not quantized, but it has {', '.join(packed)}; "
            "correct the config's list of ignored modules"
        )
    return tensors.view("weight", dtypes=FLOATS, shape=shape)


def write(weight: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of an unquantized Linear."""
    return {"weight": weight}
