"""The three ways a weight leaf is used: linear, expert linear, embedding lookup.

The forward pass calls nothing else on weights, so a leaf kind that works here works everywhere.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
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


def linear(
    x: jax.Array, weight: Any, bias: jax.Array | None = None, dtype: Any = None
) -> jax.Array:
    """`x @ weight.T + bias`, accumulated in float32; devices that split K round before they add.

    Its gradient is rounded to the dtype of `x` before it is multiplied with anything, so that the
    products of training are as fast backward as forward.

    Args:
      x: activations, [..., K], in the compute dtype.
      weight: leaf standing for [N, K].
      bias: [N] or None.
      dtype: of the result; None is that of `x`.

    Returns:
      [..., N].
    """
    dtype = jnp.dtype(dtype or x.dtype)
    if bias is None:
        return _product(x, weight, _dot, dtype).astype(dtype)
    out = _product(x, weight, _dot, jnp.float32)
    return (out + bias.astype(jnp.float32).reshape((1,) * (out.ndim - 1) + (-1,))).astype(dtype)


def expert_linear(x: jax.Array, weights: Any, group_sizes: jax.Array) -> jax.Array:
    """Rows of `x` times the weight of the expert that each row belongs to.

    Args:
      x: [rows, K], sorted by expert.
      weights: leaf standing for [E, N, K].
      group_sizes: int32 [E], rows of each expert; sums to `rows`.

    Returns:
      [rows, N] in the dtype of `x`.
    """

    def dot(dtype: Any, rows: jax.Array, experts: jax.Array) -> jax.Array:
        return jax.lax.ragged_dot(
            rows, jnp.swapaxes(experts, 1, 2), group_sizes, preferred_element_type=dtype
        )

    return _product(x, weights, dot, x.dtype).astype(x.dtype)


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
    x: jax.Array, weight: Any, dot: Callable[[Any, jax.Array, jax.Array], Any], dtype: Any
) -> jax.Array:
    """Dispatch on the leaf kind; `dot(dtype, x, w)` contracts the last axes.

        z = hadamard(x · pre_scale, rotate),    Q(z) Ŵᵀ + (z downᵀ) upᵀ

    What is a single product comes in `dtype`, since compilers for GPUs write a result that is
    rounded by an operation of its own in float32 first. What is a sum comes in float32.

    Packed leaves go to their kernel, if the device has one, which may quantize the input as well.
    Other quantized leaves are dequantized and multiplied, which runs on every backend.
    """
    if isinstance(weight, Probe):
        return _product(x, weight.weight, dot, jnp.float32).astype(jnp.float32) + weight.delta
    if not isinstance(weight, QTensor | FakeTensor | DenseTensor | PackedTensor):
        return dot(dtype, x, weight.astype(x.dtype))
    if weight.pre_scale is not None:
        x = x * weight.pre_scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
    if weight.rotate:
        x = hadamard(x, weight.rotate)
    dtype = dtype if weight.low_rank is None else jnp.float32
    if isinstance(weight, PackedTensor):
        out = weight.product(x).astype(dtype)
    else:
        quantized = x if weight.input is None else weight.input(x)
        out = dot(dtype, quantized, weight.dequantize(x.dtype))
    if weight.low_rank is not None:
        inner = dot(x.dtype, x, weight.low_rank.down.astype(x.dtype))
        out = out + dot(jnp.float32, inner, weight.low_rank.up.astype(x.dtype))
    return out


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dot(dtype: Any, x: jax.Array, weight: jax.Array) -> jax.Array:
    """[..., K] · [N, K] -> [..., N], in `dtype`."""
    return _contracted(x, weight, ((x.ndim - 1,), (1,)), dtype)


def _forward(dtype: Any, x: jax.Array, weight: jax.Array) -> tuple[jax.Array, Any]:
    return _dot(dtype, x, weight), (x, weight)


def _backward(dtype: Any, kept: Any, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Products of two arrays of one dtype, where JAX's own rule would widen both to float32.

    What nobody asks for is no longer there once it is compiled.
    """
    x, weight = kept
    rows, gradient = tuple(range(gradient.ndim - 1)), gradient.astype(x.dtype)
    of_x = _contracted(gradient, weight, ((len(rows),), (0,)), x.dtype)
    return of_x, _contracted(gradient, x, (rows, rows), x.dtype)


_dot.defvjp(_forward, _backward)


def _contracted(x: jax.Array, y: jax.Array, axes: Any, dtype: Any) -> jax.Array:
    return jax.lax.dot_general(x, y, (axes, ((), ())), preferred_element_type=dtype)


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
