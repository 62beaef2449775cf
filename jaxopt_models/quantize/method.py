"""What a recipe may ask for one matrix: formats, and the algorithms for scales and codes."""

from typing import Any, Literal

import jax
from pydantic import Field, StrictBool, StrictInt, model_validator

from jaxopt_models.block_search import Search, has_search
from jaxopt_models.formats import QuantSpec, resolve
from jaxopt_models.qtensor import InputQuantizer
from jaxopt_models.quantize.calibrators import InputMethod
from jaxopt_models.quantize.scales import ScaleMethod, check_method
from jaxopt_models.settings import Strict


class FormatChoice(Strict):
    """A number format with its options; see `formats.QuantSpec`. A bare name is accepted."""

    format: str
    granularity: Literal["tensor", "channel", "token", "block", "block2d"] | None = None
    block_size: StrictInt | None = None
    scale_dtype: str | None = None
    symmetric: StrictBool = True
    mx_rule: Literal["ceil", "floor"] = "ceil"

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"format": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _resolves(self) -> "FormatChoice":
        self.spec()
        return self

    def spec(self) -> QuantSpec:
        """The decided format."""
        return resolve(**{name: getattr(self, name) for name in FormatChoice.model_fields})


class ActivationChoice(FormatChoice):
    """Format of a linear's input.

    Granularity "tensor" (fp8, int8) has a static scale from calibration, "token" and "block" take
    theirs from each token. NVFP4's global scale is static, block scales are always dynamic. A
    dynamic scale for the whole tensor does not exist: a token would depend on its batch.

    `calibrator` says how a static magnitude is read off the calibration text; see
    `calibrators.input_amax`. `search` is how block scales are chosen at run time; see
    `block_search`.
    """

    calibrator: InputMethod = "max"
    percentile: float = Field(default=99.99, gt=50, le=100)
    search: Search = "max"

    @model_validator(mode="after")
    def _is_causal(self) -> "ActivationChoice":
        spec = self.spec()
        if spec.granularity == "block2d" or not spec.symmetric:
            raise ValueError("activations have no 'block2d' granularity and no zero point")
        if self.calibrator != "max" and not self.calibrated:
            raise ValueError(f"calibrator {self.calibrator!r} needs a static scale; there is none")
        if not has_search(spec, self.search):
            raise ValueError(f"format {self.format!r} has no block scales to search")
        return self

    def quantizer(self, amax: jax.Array | None) -> InputQuantizer:
        """The input quantizer with a calibrated magnitude, or None for dynamic scales."""
        return InputQuantizer(amax, self.spec(), self.search)

    @property
    def calibrated(self) -> bool:
        """Whether a static amax is needed."""
        spec = self.spec()
        return spec.granularity == "tensor" or spec.two_level


class _Named(Strict):
    """Options of an algorithm; its bare name is accepted."""

    method: str

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"method": value} if isinstance(value, str) else value


class Smoothing(_Named):
    """Moves range from activations to weights; see `smooth`.

    `alpha` is SmoothQuant's exponent, or "search" for the best of a grid.
    """

    method: Literal["awq", "smoothquant"]
    alpha: float | Literal["search"] = 1.0


class Rounding(_Named):
    """How values go to the grid.

    GPTQ: `damping` (of the mean diagonal), `block`, `act_order`. AutoRound: `steps`, `batch`
    (windows), `learning_rate` (None is 1/steps), `seed`.
    """

    method: Literal["nearest", "gptq", "autoround"]
    damping: float = Field(default=0.01, gt=0)
    block: StrictInt = Field(default=128, gt=0)
    act_order: StrictBool = False
    steps: StrictInt = Field(default=200, ge=0)
    batch: StrictInt = Field(default=8, gt=0)
    learning_rate: float | None = None
    seed: StrictInt = 0


class Method(Strict):
    """All that is done to one matrix and its input."""

    weight: FormatChoice | None
    activation: ActivationChoice | None = None
    smooth: Smoothing | None = None
    rotate: StrictInt = Field(default=0, ge=0)
    low_rank: StrictInt = Field(default=0, ge=0)
    scales: ScaleMethod = "max"
    rounding: Rounding = Rounding(method="nearest")

    @model_validator(mode="after")
    def _has_weight(self) -> "Method":
        if self.weight is None and (self.activation or self.algorithm != "rtn"):
            raise ValueError("activation formats and algorithms need a weight format beside them")
        if self.weight is not None:
            check_method(self.weight.spec(), self.scales)
        return self

    @property
    def algorithm(self) -> str:
        """Short name for reports: the parts that are not the default, joined by "+"."""
        parts = [
            self.smooth.method if self.smooth else "",
            f"hadamard{self.rotate}" if self.rotate else "",
            f"svd{self.low_rank}" if self.low_rank else "",
            self.scales if self.scales != "max" else "",
            self.rounding.method if self.rounding.method != "nearest" else "",
        ]
        return "+".join(part for part in parts if part) or "rtn"

    @property
    def needs_second_moment(self) -> bool:
        """Whether an algorithm reads E[x xᵀ]."""
        return (
            self.rounding.method == "gptq"
            or self.scales in ("hessian", "clip")
            or self.smooth is not None
        )

    @property
    def needs_histogram(self) -> bool:
        """Whether the input's static magnitude is read off its histogram."""
        return self.activation is not None and self.activation.calibrator != "max"

    @property
    def needs_text(self) -> bool:
        """Whether calibration is needed at all."""
        static = self.activation is not None and self.activation.calibrated
        return static or self.needs_second_moment or self.rounding.method == "autoround"
