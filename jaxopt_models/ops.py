"""The three ways a weight leaf is used: linear, expert linear, embedding lookup.

The forward pass calls nothing else on weights, so a leaf kind that works here works everywhere.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor
from jaxopt_models.hadamard import hadamard
from jaxopt_models.numerics import Scales, from_grid
from jaxopt_models.packed import PackedTensor
from jaxopt_models.qtensor import DenseTensor, QTensor, unpack
from jaxopt_models.tree import WeightLeaf


@struct.dataclass
class Probe(WeightLeaf):
    """A weight with something added to its product: dL/d(delta) is the gradient of the product.

    Attributes:
      weight: leaf standing for [..., N, K].
      delta: float32 [..., N], of the product's shape.
    """

    weight: Any
    delta: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape


def linear(x: jax.Array, weight: Any, bias: jax.Array | None = None) -> jax.Array:
    """`x @ weight.T + bias`, accumulated in float32.

    Args:
      x: activations, [..., K], in the compute dtype.
      weight: leaf standing for [N, K].
      bias: [N] or None.

    Returns:
      [..., N] in the dtype of `x`.
    """
    out = _product(x, weight, _dot)
    if bias is not None:
        out = out + bias.astype(jnp.float32).reshape((1,) * (out.ndim - 1) + (-1,))
    return out.astype(x.dtype)


def expert_linear(x: jax.Array, weights: Any, group_sizes: jax.Array) -> jax.Array:
    """Rows of `x` times the weight of the expert that each row belongs to.

    Args:
      x: [rows, K], sorted by expert.
      weights: leaf standing for [E, N, K].
      group_sizes: int32 [E], rows of each expert; sums to `rows`.

    Returns:
      [rows, N] in the dtype of `x`.
    """

    def dot(rows: jax.Array, experts: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(
            rows, jnp.swapaxes(experts, 1, 2), group_sizes, preferred_element_type=jnp.float32
        )

    return _product(x, weights, dot).astype(x.dtype)


def embed(tokens: jax.Array, weight: Any, dtype: Any) -> jax.Array:
    """Rows of the table `weight` (standing for [V, D]) for token ids [...]: [..., D] in `dtype`."""
    if isinstance(weight, QTensor):
        return _quantized_rows(tokens, weight).astype(dtype)
    table = weight.dequantize() if isinstance(weight, FakeTensor) else weight
    return table[tokens].astype(dtype)


def effective_weight(weight: Any) -> jax.Array:
    """The matrix M of `linear(x, weight) = x Mᵀ`, how inputs are rounded left out.

        M = hadamard(Ŵ + up · down, rotate) · pre_scale

    Args:
      weight: array, `QTensor`, `FakeTensor` or `DenseTensor` standing for [..., N, K].

    Returns:
      float32 [..., N, K].
    """
    if not isinstance(weight, QTensor | FakeTensor | DenseTensor):
        return weight.astype(jnp.float32)
    matrix = weight.dequantize(jnp.float32)
    if weight.low_rank is not None:
        matrix = matrix + weight.low_rank.product()
    if weight.rotate:
        matrix = hadamard(matrix, weight.rotate)
    if weight.pre_scale is not None:
        columns = weight.pre_scale.astype(jnp.float32)
        matrix = matrix * columns.reshape((1,) * (matrix.ndim - 1) + (-1,))
    return matrix


def _product(
    x: jax.Array, weight: Any, dot: Callable[[jax.Array, jax.Array], jax.Array]
) -> jax.Array:
    """Dispatch on the leaf kind; `dot` contracts the last axes into float32.

        z = hadamard(x · pre_scale, rotate),    Q(z) Ŵᵀ + (z downᵀ) upᵀ

    Packed leaves go to their kernel, if the device has one, which may quantize the input as well.
    Other quantized leaves are dequantized and multiplied, which runs on every backend.
    """
    if isinstance(weight, Probe):
        return _product(x, weight.weight, dot) + weight.delta
    if not isinstance(weight, QTensor | FakeTensor | DenseTensor | PackedTensor):
        return dot(x, weight.astype(x.dtype))
    if weight.pre_scale is not None:
        x = x * weight.pre_scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    if weight.rotate:
        x = hadamard(x, weight.rotate)
    if isinstance(weight, PackedTensor):
        out = weight.product(x).astype(jnp.float32)
    else:
        quantized = x if weight.input is None else weight.input(x)
        out = dot(quantized, weight.dequantize(x.dtype))
    if weight.low_rank is not None:
        inner = dot(x, weight.low_rank.down.astype(x.dtype)).astype(x.dtype)
        out = out + dot(inner, weight.low_rank.up.astype(x.dtype))
    return out


def _dot(x: jax.Array, weight: jax.Array) -> jax.Array:
    """[..., K] · [N, K] -> float32 [..., N]."""
    contract = (((x.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x, weight, contract, preferred_element_type=jnp.float32)


def _quantized_rows(tokens: jax.Array, table: QTensor) -> jax.Array:
    """Dequantizes only the rows that are looked up, float32."""
    if table.pre_scale is not None or table.low_rank is not None or table.rotate:
        raise UserError(
            "an embedding table has no input that a pre_scale, a rotation or a low_rank correction "
            "could read; leave embed_tokens out of algorithms that make them"
        )
    spec = table.spec
    height = spec.tile(table.shape)[0]

    row, shared, zero = tokens // height, table.global_scale, table.zero_point
    scales = Scales(
        table.scale[row],
        None if shared is None else shared.reshape((1,) * (tokens.ndim + 1)),
        None if zero is None else zero[row],
    )
    # A looked-up row is a tile row of its own, whatever the height of the table's tiles.
    by_row = {"tensor": "channel", "block2d": "block"}.get(spec.granularity, spec.granularity)
    grid = spec.element.decode(unpack(table.codes[tokens], spec, table.shape[-1]))
    return from_grid(grid, scales, replace(spec, granularity=by_row))
