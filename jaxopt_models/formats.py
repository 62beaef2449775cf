"""Number formats: an element, the tile of values that share one scale, and that scale's number
type."""

from dataclasses import dataclass
from typing import Literal

from jaxopt_models.elements import E2M1, E2M3, E3M2, E4M3, E5M2, INT4, INT8, NF4, Element
from jaxopt_models.errors import UserError

Granularity = Literal["tensor", "channel", "block", "block2d"]


@dataclass(frozen=True)
class Format:
    """An element with the way its scales are shared by default.

    E4M3 scales lie under one float32 number a tensor ("two levels"); `power_of_two`
    scales are E8M0; otherwise a scale is one number of `scale_dtype`.
    """

    element: Element
    granularity: Granularity
    block_size: int = 0
    scale_dtype: str = "float32"
    choices: tuple[Granularity, ...] = ("block",)

    @property
    def power_of_two(self) -> bool:
        return self.scale_dtype == "float8_e8m0fnu"


_ANY: tuple[Granularity, ...] = ("tensor", "channel", "block", "block2d")


def _mx(element: Element) -> Format:
    """OCP Microscaling: blocks of 32 under an E8M0 scale (arXiv:2310.10537)."""
    return Format(element, "block", 32, "float8_e8m0fnu")


FORMATS: dict[str, Format] = {
    "fp8": Format(E4M3, "tensor", 128, choices=_ANY),
    "int8": Format(INT8, "tensor", 128, choices=_ANY),
    "int4": Format(INT4, "block", 128, choices=_ANY),
    "nvfp4": Format(E2M1, "block", 16, "float8_e4m3fn"),
    "mxfp4": _mx(E2M1),
    "mxfp6_e3m2": _mx(E3M2),
    "mxfp6_e2m3": _mx(E2M3),
    "mxfp8_e4m3": _mx(E4M3),
    "mxfp8_e5m2": _mx(E5M2),
    "mxint8": _mx(INT8),
    "nf4": Format(NF4, "block", 64),
}
# What people call the variant that the reference implementation takes for the family.
ALIASES = {"mxfp4_e2m1": "mxfp4", "mxfp6": "mxfp6_e3m2", "mxfp8": "mxfp8_e4m3"}


@dataclass(frozen=True)
class QuantSpec:
    """One fully decided way to quantize an array; static and hashable. Made by `resolve`.

    Attributes:
      format: a key of `FORMATS`.
      granularity: what shares a scale: the whole array, each row of the last axis ("channel", the
        same as per token for activations), `block_size` neighbours on the last axis, or square
        tiles of the last two axes ("block2d").
      block_size: side of a block; 0 where the granularity has none.
      scale_dtype: how a scale is stored; its rounding is part of the format.
      symmetric: False adds an integer zero point (int4 only).
      mx_rule: exponent of an E8M0 scale: "ceil", the smallest that does not saturate, or "floor",
        the OCP text's `floor(log2(amax)) - floor(log2(largest))`.
    """

    format: str
    granularity: Granularity
    block_size: int
    scale_dtype: str
    symmetric: bool = True
    mx_rule: Literal["ceil", "floor"] = "ceil"

    @property
    def element(self) -> Element:
        return FORMATS[self.format].element

    @property
    def two_level(self) -> bool:
        return self.scale_dtype == "float8_e4m3fn"

    @property
    def power_of_two(self) -> bool:
        return self.scale_dtype == "float8_e8m0fnu"

    def tile(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Extent of the values under one scale, an entry for each axis of an array of `shape`."""
        lead = (1,) * (len(shape) - 1)
        if self.granularity == "tensor":
            return shape
        if self.granularity == "channel":
            return (*lead, shape[-1])
        if self.granularity == "block":
            return (*lead, self.block_size)
        return (*lead[1:], self.block_size, self.block_size)


def resolve(
    format: str,
    *,
    granularity: str | None = None,
    block_size: int | None = None,
    scale_dtype: str | None = None,
    symmetric: bool = True,
    mx_rule: Literal["ceil", "floor"] = "ceil",
) -> QuantSpec:
    """Fills in a format's defaults and checks that the choices go together.

    Raises:
      UserError: for an unknown format or a combination that the format does not have.
    """
    format = ALIASES.get(format, format)
    if format not in FORMATS:
        raise UserError(f"format {format!r} is unknown; known are {', '.join(FORMATS)}")
    default = FORMATS[format]
    # A caller who gives a block size and nothing else means blocks.
    implied = "block" if block_size and default.granularity == "tensor" else default.granularity
    chosen = {"token": "channel", None: implied}.get(granularity, granularity)
    if chosen not in default.choices:
        raise UserError(
            f"format {format!r} has no granularity {granularity!r}; "
            f"choose one of {', '.join(default.choices)}"
        )
    blocked = chosen in ("block", "block2d")
    if block_size is not None and (not blocked or block_size < 1):
        raise UserError(
            f"block_size {block_size} does not go with granularity {chosen!r}; "
            "leave it out, or choose 'block' or 'block2d' and a positive size"
        )
    if default.power_of_two and block_size not in (None, 32):
        raise UserError(f"format {format!r} is defined with blocks of 32, not {block_size}")
    if not symmetric and format != "int4":
        raise UserError(f"format {format!r} has no zero point; symmetric=False needs 'int4'")
    if mx_rule not in ("ceil", "floor"):
        raise UserError(f"mx_rule {mx_rule!r} is unknown; choose 'ceil' or 'floor'")
    if mx_rule == "floor" and not default.power_of_two:
        raise UserError(f"format {format!r} has no power-of-two scale; leave mx_rule at 'ceil'")
    return QuantSpec(
        format,
        chosen,
        (block_size or default.block_size) if blocked else 0,
        _scale_dtype(format, default, scale_dtype),
        symmetric,
        mx_rule,
    )


def _scale_dtype(format: str, default: Format, asked: str | None) -> str:
    choices = {"float32": ("float32", "bfloat16", "float16")}.get(
        default.scale_dtype, (default.scale_dtype,)
    )
    if format == "nf4":
        choices += ("float8_e4m3fn",)  # double quantization
    if asked is not None and asked not in choices:
        raise UserError(
            f"format {format!r} has no scale_dtype {asked!r}; choose one of {', '.join(choices)}"
        )
    return asked or default.scale_dtype
