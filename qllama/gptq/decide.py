"""The two ways through a layer: quantizing it, and going the way of one that is quantized."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from qllama_convert.linear import LinearWeights

from qllama.gptq.linear import quantize_gptq
from qllama.gptq.nearest import quantize_nearest
from qllama.gptq.observers import MAX_BAD_SHARE, InputObserver, fp8_scale
from qllama.gptq.recipe import LinearRecipe
from qllama.gptq.report import LinearReport, ScaleHistogram, Seconds
from qllama.gptq.smoothquant import (
    fold_into_norm,
    smooth_hessian,
    smooth_weight,
    smoothing_factors,
)
from qllama.gptq.source import Unit, UnitWeights
from qllama.gptq.walk import Observe
from qllama.parallel.mesh import DATA, replicated
from qllama.quantization.qtensor import QTensor
from qllama.quantization.scheme import QuantScheme


@dataclass
class QuantizedUnit:
    """What became of one unit; arrays on the host, all by path."""

    linears: dict[str, QTensor] = field(default_factory=dict)
    norms: dict[str, np.ndarray] = field(default_factory=dict)  # those that changed
    kv_scales: tuple[np.ndarray, np.ndarray] | None = None  # of keys and values, each [1, 1]
    reports: list[LinearReport] = field(default_factory=list)


class Replaying:
    """Decides as it was decided before: `unit` is complete."""

    def __init__(self, place: Unit, weights: UnitWeights, unit: QuantizedUnit) -> None:
        self.place, self.weights, self.unit = place, weights, unit

    def linears(
        self, names: Sequence[str], observe: Observe, norm: str | None = None
    ) -> list[LinearWeights]:
        observe(None)
        return [self.linear(self.place.prefix + name) for name in names]

    def linear(self, path: str) -> LinearWeights:
        linear = self.weights.linears[path]
        quantized = self.unit.linears.get(path)
        return linear if quantized is None else LinearWeights(quantized, linear.bias)

    def norm(self, name: str) -> np.ndarray:
        path = self.place.prefix + name
        return self.unit.norms.get(path, self.weights.norms[path])

    def kv_scales(
        self, observe: Callable[[], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        return self.unit.kv_scales


class Quantizing(Replaying):
    """Decides by what it is shown, and fills `unit`."""

    def __init__(
        self,
        place: Unit,
        weights: UnitWeights,
        recipes: Mapping[str, LinearRecipe],
        *,
        mesh: Mesh,
        smoothquant_strength: float | None = None,
        kv_cache: bool = False,
        on_linear: Callable[[LinearReport], None] = lambda report: None,
    ) -> None:
        super().__init__(place, weights, QuantizedUnit())
        self.recipes = recipes
        self.mesh = mesh  # the devices to solve on
        self.smoothquant_strength = smoothquant_strength
        self.kv_cache = kv_cache
        self.on_linear = on_linear
        self.seconds = Seconds()  # of solving

    def linears(
        self, names: Sequence[str], observe: Observe, norm: str | None = None
    ) -> list[LinearWeights]:
        paths = [self.place.prefix + name for name in names]
        recipes = [self.recipes[path] for path in paths if path in self.recipes]
        if not recipes:
            observe(None)
            return [self.linear(path) for path in paths]
        recipe = recipes[0]  # the same for all that are merged
        weights = [np.asarray(self.weights.linears[path].weight) for path in paths]
        activations = recipe.scheme.activations
        smooth = None
        if norm and activations and activations.dtype == "int8":
            smooth = self.smoothquant_strength
        static = activations is not None and not activations.dynamic
        observer = InputObserver.of(
            weights[0].shape[1],
            hessian=recipe.algorithm == "gptq",
            absmax=static or smooth is not None,
        )
        observe(observer)
        if observer is not None:
            _check_finite(paths, observer)

        begin = time.perf_counter()
        if smooth is not None:
            assert norm is not None
            assert observer is not None
            weights = self._smooth(norm, weights, observer, smooth)
        input_scale = None
        if static:
            assert observer is not None
            assert observer.absmax is not None
            input_scale = fp8_scale(observer.absmax)
        factor = self._quantize(paths, weights, recipe, observer, input_scale, begin)
        self.seconds += Seconds(factor=factor, solve=time.perf_counter() - begin - factor)
        return [self.linear(path) for path in paths]

    def without_data(self) -> None:
        """Decide on all Linears, none of which needs to be shown its input."""
        for path in self.place.paths:
            self.linears([path.removeprefix(self.place.prefix)], lambda observer: None)

    def kv_scales(
        self, observe: Callable[[], tuple[np.ndarray, np.ndarray]]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        if self.kv_cache:
            keys, values = observe()
            self.unit.kv_scales = (
                np.full((1, 1), fp8_scale(keys)),
                np.full((1, 1), fp8_scale(values)),
            )
        return self.unit.kv_scales

    def _smooth(
        self, norm: str, weights: list[np.ndarray], observer: InputObserver, strength: float
    ) -> list[np.ndarray]:
        path = self.place.prefix + norm
        absmax = np.asarray(observer.absmax)
        factors = smoothing_factors(absmax, weights, strength)
        self.unit.norms[path], factors = fold_into_norm(self.weights.norms[path], factors)
        if observer.hessian is not None:
            observer.hessian = smooth_hessian(observer.hessian, factors)
        return [smooth_weight(weight, factors) for weight in weights]

    def _quantize(
        self,
        paths: Sequence[str],
        weights: Sequence[np.ndarray],
        recipe: LinearRecipe,
        observer: InputObserver | None,
        input_scale: np.float32 | None,
        begin: float,
    ) -> float:
        """Fills `unit`; returns the seconds for the factor."""
        spread = _over_rows(weights, recipe.scheme, self.mesh)
        try:
            if recipe.algorithm == "gptq":
                assert observer is not None
                assert observer.hessian is not None
                hessian = observer.hessian
                if spread is not weights:
                    hessian = jax.device_put(hessian, replicated(self.mesh))
                results = quantize_gptq(
                    spread, hessian, recipe.scheme, recipe.options, input_scale=input_scale
                )
            else:
                results = quantize_nearest(spread, recipe.scheme, input_scale=input_scale)
        except ValueError as error:
            raise ValueError(f"{', '.join(paths)}: {error}") from error
        seconds = time.perf_counter() - begin
        rows = sum(weight.shape[0] for weight in weights)
        for path, result in zip(paths, results, strict=True):
            weight = jax.device_get(result.weight)
            self.unit.linears[path] = weight
            report = LinearReport(
                path=path,
                layer=self.place.layer,
                scheme=recipe.scheme.describe(),
                algorithm=recipe.algorithm,
                figures=result.report,
                input_scale=None if input_scale is None else float(input_scale),
                seconds=seconds * result.report.shape[0] / rows,
                scales=ScaleHistogram.of(weight.scales),
            )
            self.unit.reports.append(report)
            self.on_linear(report)
        return results[0].factor_seconds


def _over_rows(
    weights: Sequence[np.ndarray], scheme: QuantScheme, mesh: Mesh
) -> Sequence[np.ndarray] | Sequence[jax.Array]:
    """Equal parts of the rows of each weight on every device; as they are, for one device, where
    rows share a scale, or where the devices do not divide them."""
    own_scales = scheme.strategy in ("channel", "group")
    if mesh.size == 1 or not own_scales or any(w.shape[0] % mesh.size for w in weights):
        return weights
    return [jax.device_put(w, NamedSharding(mesh, PartitionSpec(DATA))) for w in weights]


def _check_finite(paths: Sequence[str], observer: InputObserver) -> None:
    """Stop where a stream is broken: rounding all later layers to nearest would hide it."""
    bad = 0 if observer.bad is None else int(observer.bad)
    if bad > MAX_BAD_SHARE * observer.tokens:
        raise ValueError(
            f"{', '.join(paths)}: {bad} of {observer.tokens} calibration tokens make inputs that "
            "are NaN or infinite; the checkpoint is damaged, or an earlier layer overflows its "
            "dtype"
        )
