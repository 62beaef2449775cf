"""Keys and values in fewer bits: what a recipe may ask for, what calibration remembers of them,
and the quantizer (`kv_quantizer.KVQuantizer`) that follows from both.

    measure = kv_measure(choice.rotate)                     of the taps of a batch
    statistics = kv_merge(statistics, measure(taps))        after each batch
    quantizer = kv_quantizer(config, choice, statistics)    of one layer
"""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import struct
from pydantic import StrictBool, model_validator

from jaxopt_models.errors import UserError
from jaxopt_models.formats import QuantSpec, resolve
from jaxopt_models.hadamard import hadamard, largest_block
from jaxopt_models.kv_quantizer import KVQuantizer, RowQuantizer, Search
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.settings import Strict

_GRANULARITIES = {
    "fp8": ("tensor", "head", "token"),
    "int8": ("token",),
    "nvfp4": ("tensor", "head"),
}


class KVChoice(Strict):
    """Format of cached keys and values with its options. A bare format is accepted.

    Attributes:
      format: "fp8", "int8" or "nvfp4" (blocks of 16 along the head).
      granularity: what shares a scale: the whole "tensor" or each "head" of it, static and
        calibrated (for NVFP4 the global scale, blocks having their own), or each "token" of each
        head, dynamic. None is the format's first: fp8 has all three, nvfp4 two, int8 "token".
      rotate: multiplies queries and keys by a Hadamard matrix, which spreads the channels of keys
        that stand out.
      bias: subtracts the calibrated mean of each channel of the "key", or of "both". Values rarely
        gain: those of tokens that only collect attention are near 0, off which a mean takes them.
      search: how NVFP4 chooses block scales; see `RowQuantizer.search`.
    """

    format: Literal["fp8", "int8", "nvfp4"]
    granularity: Literal["tensor", "head", "token"] | None = None
    rotate: StrictBool = False
    bias: Literal["none", "key", "both"] = "none"
    search: Search = "max"

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"format": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _goes_together(self) -> "KVChoice":
        allowed = _GRANULARITIES[self.format]
        if self.granularity not in (None, *allowed):
            raise ValueError(
                f"cached {self.format} has no granularity {self.granularity!r}; "
                f"choose {' or '.join(allowed)}"
            )
        if self.search != "max" and self.format != "nvfp4":
            raise ValueError(f"search {self.search!r} is of 'nvfp4' blocks; {self.format} has none")
        return self

    @property
    def scope(self) -> str:
        """The granularity, the format's first where none was given."""
        return self.granularity or _GRANULARITIES[self.format][0]

    @property
    def calibrated(self) -> bool:
        """Whether statistics are needed."""
        return self.scope != "token" or self.bias != "none"

    def spec(self) -> QuantSpec:
        """The decided format of rows [..., head_dim]; scales of a head each are the tensor's."""
        if self.format == "nvfp4":
            return resolve("nvfp4")
        return resolve(self.format, granularity="token" if self.scope == "token" else "tensor")


@struct.dataclass
class RowStatistics:
    """Channels of one layer's keys or values over calibration tokens.

    Attributes:
      count: float32 scalar, tokens seen.
      mean, low, high: float32 [G, d].
    """

    count: jax.Array
    mean: jax.Array
    low: jax.Array
    high: jax.Array


@struct.dataclass
class KVStatistics:
    """Of keys, after rotary embedding and rotation, and of values."""

    key: RowStatistics
    value: RowStatistics


def kv_statistics(key: jax.Array, value: jax.Array, rotate: bool) -> KVStatistics:
    """Statistics of one batch.

    Args:
      key, value: [B, T, G, d], the taps "self_attn/key" and "self_attn/value".
      rotate: whether keys are rotated before they are stored.
    """
    key = hadamard(key, key.shape[-1]) if rotate else key
    return KVStatistics(_row_statistics(key), _row_statistics(value))


@cache
def kv_measure(rotate: bool) -> Callable[[Mapping[str, jax.Array]], KVStatistics]:
    """`kv_statistics` as a function of a layer's taps; the same function at each call."""

    def measure(taps: Mapping[str, jax.Array]) -> KVStatistics:
        return kv_statistics(taps["self_attn/key"], taps["self_attn/value"], rotate)

    return measure


@jax.jit
def kv_merge(a: KVStatistics, b: KVStatistics) -> KVStatistics:
    """Statistics of both texts."""
    return KVStatistics(_merge(a.key, b.key), _merge(a.value, b.value))


def kv_quantizer(
    config: ModelConfig, choice: KVChoice, statistics: KVStatistics | None = None
) -> KVQuantizer:
    """The quantizer of one layer.

    Args:
      statistics: of that layer; may be None if the choice is not `calibrated`.

    Raises:
      UserError: for a rotation of heads that are no power of two wide, for missing statistics, and
        for keys or values that are not finite or always zero.
    """
    if choice.rotate and largest_block(config.head_dim) != config.head_dim:
        raise UserError(
            f"kv_cache cannot rotate heads of {config.head_dim} channels, which is no power of "
            "two; set rotate to false"
        )
    if choice.calibrated and statistics is None:
        raise UserError(
            f"kv_cache {choice.format} has static scales or a bias; give calibration text, "
            "or choose granularity 'token' without bias"
        )

    def rows(name: str, bias: bool) -> RowQuantizer:
        seen = getattr(statistics, name) if choice.calibrated else None
        return _row_quantizer(choice, seen, bias, name)

    key = rows("key", choice.bias != "none")
    return KVQuantizer(key, rows("value", choice.bias == "both"), rotate=choice.rotate)


def _row_quantizer(
    choice: KVChoice, seen: RowStatistics | None, biased: bool, name: str
) -> RowQuantizer:
    amax = bias = None
    if seen is not None:
        centre = seen.mean if biased else jnp.zeros_like(seen.mean)
        # Each head's; a scalar is that of the layer.
        amax = jnp.max(jnp.maximum(seen.high - centre, centre - seen.low), axis=-1)
        if not bool(jnp.all(jnp.isfinite(amax))) or not bool(jnp.any(amax > 0)):
            raise UserError(
                f"the {name}s of a layer are not finite, or zero, on all calibration text; "
                "use other text, or check the model"
            )
        amax = jnp.max(amax) if choice.scope == "tensor" else amax
        bias = centre if biased else None
    amax = None if choice.scope == "token" else amax
    return RowQuantizer(amax, bias, spec=choice.spec(), search=choice.search)


def _row_statistics(x: jax.Array) -> RowStatistics:
    x = x.astype(jnp.float32)
    return RowStatistics(
        jnp.float32(x.shape[0] * x.shape[1]),
        jnp.mean(x, axis=(0, 1)),
        jnp.min(x, axis=(0, 1)),
        jnp.max(x, axis=(0, 1)),
    )


def _merge(a: RowStatistics, b: RowStatistics) -> RowStatistics:
    count = a.count + b.count
    return RowStatistics(
        count,
        a.mean + (b.mean - a.mean) * (b.count / count),
        jnp.minimum(a.low, b.low),
        jnp.maximum(a.high, b.high),
    )
