"""How keys and values are stored in fewer bits: the leaf "layers/i/self_attn/kv_cache".

A row is the key, or the value, of one token and head. No scale spans rows, so a token's code
depends on nothing but the token. The law, bit for bit:
    quantizer(x) == restore(*store(x))
Its gradient is straight-through, so that models train under the cache they will be served with.
Keys come after rotary embedding; with `rotate` both queries and keys are multiplied by an
orthonormal Hadamard matrix, which leaves q·k as it is.

Reference: Ashkboos et al. 2024 (QuaRot), arXiv:2404.00456; Liu et al. 2024 (KIVI, on the channel
means of keys), arXiv:2402.02750.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models import numerics, packing, qtensor
from jaxopt_models.block_search import Search, find_block_scales, global_amax
from jaxopt_models.formats import QuantSpec
from jaxopt_models.hadamard import hadamard
from jaxopt_models.numerics import Scales


@struct.dataclass
class RowQuantizer:
    """Rows [B, G, N, d] to codes with scales and back: `x ≈ codes · scale + bias`.

    Attributes:
      amax: float32 [] or [G], calibrated magnitude of `x - bias`, from which static scales follow
        (and NVFP4's global scale); larger values saturate. None: scales come from each row.
      bias: float32 [G, d], subtracted before rounding and added back after; None is 0. (A bias of
        keys would cancel in the softmax, but not under a soft cap on scores.)
      spec: number format; granularity "tensor" (static), "channel" (a scale a row) or "block".
      search: how an NVFP4 block's scale is chosen; see `block_search`.
    """

    amax: jax.Array | None
    bias: jax.Array | None = None
    spec: QuantSpec = struct.field(pytree_node=False, kw_only=True)
    search: Search = struct.field(pytree_node=False, default="max", kw_only=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Rows as they would be read back, in the dtype of `x`; straight-through gradient."""
        grid, scales = self._round(jax.lax.stop_gradient(x))
        return _straight_through(x, self._real(grid, scales, x.dtype))

    def store(self, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
        """Codes [B, G, N, bytes] and the scales of each row [B, G, N, blocks], None if static.

        Numbers of 8-bit float types are kept as their bytes, which every backend moves as they are.
        """
        grid, scales = self._round(x)
        codes = packing.pack(self.spec.element.encode(grid), self.spec.element.bits)
        return _bytes(codes), None if self._static else _bytes(scales.scale)

    def restore(self, codes: jax.Array, scale: jax.Array | None, dtype: Any) -> jax.Array:
        """Inverse of `store` up to rounding: [B, G, N, d] in `dtype`."""
        spec, scales = self.spec, Scales(jnp.zeros(()))
        if self.amax is not None:
            overall = global_amax(self._overall(), spec, self.search)
            scales = numerics.scales_from_amax(overall, spec, overall)
        if scale is not None:
            scales = Scales(_from_bytes(scale, spec.scale_dtype), scales.global_scale)
        size = codes.shape[-1] * 8 // spec.element.bits
        unpacked = qtensor.unpack(_from_bytes(codes, spec.element.storage), spec, size)
        return self._real(spec.element.decode(unpacked), scales, dtype)

    def blank(self, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
        """Zeros of the shapes and dtypes that `store` gives for rows of a shape."""
        *rows, size = shape
        bits, storage = self.spec.element.bits, self.spec.element.storage
        codes = jnp.zeros((*rows, packing.packed_size(size, bits)), _byte_type(storage))
        if self._static:
            return codes, None
        blocks = -(-size // self.spec.tile(shape)[-1])
        return codes, jnp.zeros((*rows, blocks), _byte_type(self.spec.scale_dtype))

    @property
    def _static(self) -> bool:
        return self.spec.granularity == "tensor"

    def _overall(self) -> jax.Array:
        """The calibrated magnitude [1, 1 or G, 1, 1]."""
        assert self.amax is not None
        return self.amax.reshape(1, -1, 1, 1)

    def _centre(self) -> jax.Array | None:
        return None if self.bias is None else self.bias[None, :, None]

    def _round(self, x: jax.Array) -> tuple[jax.Array, Scales]:
        """Grid values and scales of `x - bias`."""
        x, centre = x.astype(jnp.float32), self._centre()
        x = x if centre is None else x - centre
        overall = None if self.amax is None else self._overall()
        scales = find_block_scales(x, self.spec, overall, self.search)
        return numerics.to_grid(x, scales, self.spec), scales

    def _real(self, grid: jax.Array, scales: Scales, dtype: Any) -> jax.Array:
        x, centre = numerics.from_grid(grid, scales, self.spec), self._centre()
        return (x if centre is None else x + centre).astype(dtype)


@struct.dataclass
class KVQuantizer:
    """Storage of one layer's keys and values. Not a weight: it counts for no bits per weight.

    Attributes:
      key, value: of keys (after rotary embedding and rotation) and of values.
      rotate: whether queries and keys are rotated; static. The head size is then a power of two.
    """

    key: RowQuantizer
    value: RowQuantizer
    rotate: bool = struct.field(pytree_node=False, default=False, kw_only=True)

    def rotated(self, x: jax.Array) -> jax.Array:
        """Queries or keys [..., d] in the space in which keys are stored."""
        return hadamard(x, x.shape[-1]) if self.rotate else x


def in_kv_cache(path: str) -> bool:
    """Whether a path of a parameter tree leads to an array of a layer's `kv_cache`.

    Those are calibrated: they are neither trained nor cast, as the plain arrays beside them are.
    """
    return "/self_attn/kv_cache/" in path


def with_kv_cache(params: Any, quantizers: Sequence[KVQuantizer | None]) -> Any:
    """Parameters whose layers store keys and values as given, one a layer; None leaves them be."""
    layers = zip(params["layers"], quantizers, strict=True)
    return params | {"layers": tuple(_with(layer, quantizer) for layer, quantizer in layers)}


def without_kv_cache(params: Any) -> Any:
    """The parameters with keys and values stored as they are."""
    return with_kv_cache(params, [None] * len(params["layers"]))


def _with(layer: dict[str, Any], quantizer: KVQuantizer | None) -> dict[str, Any]:
    attention = {name: part for name, part in layer["self_attn"].items() if name != "kv_cache"}
    return layer | {"self_attn": attention | ({"kv_cache": quantizer} if quantizer else {})}


@jax.custom_vjp
def _straight_through(x: jax.Array, rounded: jax.Array) -> jax.Array:
    """`rounded`, with the gradient of `x`."""
    return rounded


_straight_through.defvjp(
    lambda x, rounded: (rounded, None), lambda _, grad: (grad, jnp.zeros_like(grad))
)


def _byte_type(dtype: str) -> str:
    return "uint8" if dtype.startswith("float8") else dtype


def _bytes(array: jax.Array) -> jax.Array:
    """8-bit floats as bytes, others as they are."""
    byte_type = _byte_type(array.dtype.name)
    return array if array.dtype == byte_type else jax.lax.bitcast_convert_type(array, byte_type)


def _from_bytes(array: jax.Array, dtype: str) -> jax.Array:
    """Inverse of the above."""
    return array if array.dtype == dtype else jax.lax.bitcast_convert_type(array, jnp.dtype(dtype))
