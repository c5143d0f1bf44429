"""plain: an unquantized Linear, `weight` `[N, K]` in BF16, F16 or F32, as stored."""

import numpy as np

from qllama_convert.module_tensors import FLOATS, ModuleTensors

_QUANTIZED_SUFFIXES = ("qweight", "qzeros", "scales", "weight_packed", "weight_scale_inv", "codes")


def read(tensors: ModuleTensors, shape: tuple[int, int]) -> np.ndarray:
    """The weight `[N, K]` as stored, without infinity or NaN.

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
    return tensors.read_floats("weight", shape)


def write(weight: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of an unquantized Linear."""
    return {"weight": weight}
