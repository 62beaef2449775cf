"""Quantized parameters made trainable, and trained ones quantized for good."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.fake_tensor import FakeTensor, LearnedAmax, learned_amax
from jaxopt_models.hadamard import hadamard
from jaxopt_models.kv_quantizer import in_kv_cache
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.repeated import repeated
from jaxopt_models.numerics import Scales, overall_amax
from jaxopt_models.qtensor import DenseTensor, Gradient, QTensor

ScaleMode = Literal["dynamic", "static", "learned", "learned_untied"]
# Of a weight and what it was quantized to: the relative distance, which is below a half for the
# coarsest formats, and how much larger the one is than the other, in the median row and column.
_FURTHEST, _MOST_SCALED = 0.7, 0.05


def fake_quantized(
    params: Any,
    quantized: Any,
    scales: ScaleMode = "dynamic",
    gradient: Gradient = "identity",
) -> Any:
    """Parameters to train: `quantized` with float32 weights behind its quantized leaves.

    Training begins where post-training quantization ended: its input steps and quantizers are kept,
    its scales too unless they are dynamic, and what it did to other tensors.

    Args:
      params: what was quantized, float leaves. None begins with what the codes stand for, as
        algorithms need that move factors from one tensor to the next.
      quantized: of the same model, by `quantize`.
      scales: "dynamic" takes them from the weight at every step (under NVFP4's calibrated second
        level), "static" keeps them, "learned" trains them, "learned_untied" trains those that
        weights are divided by apart from those that results are multiplied with.
      gradient: straight through, or "clip", masked to what the grid can represent.

    Returns:
      The tree of `quantized`, a `FakeTensor` for each `QTensor`; other leaves as they are there,
      and what quantizes cached keys and values, which rounds them in training, too.

    Raises:
      UserError: if nothing is quantized, if a weight is not what its quantized leaf was made of, or
        if scales of the format cannot be learnt.
    """
    if scales not in get_args(ScaleMode):
        raise UserError(f"scales {scales!r} are unknown; choose {', '.join(get_args(ScaleMode))}")
    originals = {} if params is None else dict(tree.leaves_with_paths(params))

    def leaf(path: str, q: Any) -> Any:
        if not isinstance(q, QTensor):
            return q
        if params is None:
            return _fake(path, q.dequantize(jnp.float32), q, scales, gradient)
        if path not in originals:
            raise UserError(f"the parameters have no tensor {path!r}, which is quantized")
        return _fake(path, _master(path, originals[path], q), q, scales, gradient)

    fakes = tree.map_with_path(leaf, quantized)
    leaves = tree.leaves_with_paths(fakes)
    if not any(isinstance(one, FakeTensor) or in_kv_cache(path) for path, one in leaves):
        raise UserError("no tensor is quantized, so there is nothing to train for")
    return fakes


def cast(params: Any, dtype: Any) -> Any:
    """Parameters with plain arrays in a dtype; other leaves, and those of a cache, as they are."""

    def leaf(path: str, one: Any) -> Any:
        return one if tree.is_leaf(one) or in_kv_cache(path) else one.astype(dtype)

    return tree.map_with_path(leaf, params)


def computed(params: Any, dtype: Any) -> Any:
    """Parameters as the forward pass reads them, worked out once for all that reads them.

    Matrices are in the dtype of computation, those of a `FakeTensor` rounded; the forward pass is
    the same bit for bit. Tables of embeddings stay, since their rows' gradients are to be added in
    float32.

    Args:
      params: parameter tree.
      dtype: of computation.
    """

    def leaf(path: str, one: Any) -> Any:
        if path.startswith("embed_tokens/"):
            return one
        if isinstance(one, FakeTensor):
            steps = one.pre_scale, one.low_rank, one.input
            return DenseTensor(one.dequantize(dtype), *steps, rotate=one.rotate)
        matrix = not tree.is_leaf(one) and path.endswith("/weight") and one.ndim >= 2
        return one.astype(dtype) if matrix else one

    return tree.map_with_path(leaf, params)


def looped(
    prepare: Callable[[Any], Any], config: ModelConfig, scan_layers: bool
) -> Callable[[Any], Any]:
    """`prepare`, and layers that are alike in a loop, if they are to be; see `repeated`."""
    if not scan_layers:
        return prepare
    return partial(repeated, kinds=config.attention_kinds, prepare=prepare)


def fold(params: Any) -> Any:
    """Each `FakeTensor` as the `QTensor` that it acts like: the same forward pass, bit for bit."""

    def leaf(path: str, one: Any) -> Any:
        return jax.jit(FakeTensor.fold)(one) if isinstance(one, FakeTensor) else one

    return tree.map_with_path(leaf, params)


def _master(path: str, weight: Any, q: QTensor) -> jax.Array:
    if tree.is_leaf(weight) or weight.shape != q.shape:
        raise UserError(
            f"{path!r} is {type(weight).__name__}{list(weight.shape)}; needed is the float array "
            f"{list(q.shape)} that was quantized"
        )
    master, apart, scaled = _in_its_space(weight, q)
    if not (float(apart) < _FURTHEST and float(scaled) < _MOST_SCALED):
        raise UserError(
            f"{path!r} is not what was quantized: they are {float(apart):.0%} apart, rows or "
            f"columns scaled by {float(scaled):.0%}; give the parameters that were rounded, or "
            "None to begin with the quantized values"
        )
    return master


def _fake(path: str, master: jax.Array, q: QTensor, mode: ScaleMode, gradient: Gradient) -> Any:
    scales: Scales | LearnedAmax | None = q.scales
    if mode == "dynamic":
        scales = None
    elif mode != "static":
        try:
            scales = learned_amax(q.scales, q.spec, untied=mode == "learned_untied")
        except UserError as error:
            raise UserError(f"{path!r}: {error}") from error
    return FakeTensor(
        master,
        scales,
        overall_amax(q.scales, q.spec) if scales is None else None,
        q.pre_scale,
        q.low_rank,
        q.input,
        spec=q.spec,
        gradient=gradient,
        dtype=q.dtype,
        rotate=q.rotate,
    )


@jax.jit
def _in_its_space(weight: jax.Array, q: QTensor) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(the float32 weight that `q` rounds, how far they are apart, by how much one is scaled)."""
    master = weight.astype(jnp.float32)
    if q.pre_scale is not None:
        scale = q.pre_scale.astype(jnp.float32)
        master = master / scale.reshape((1,) * (master.ndim - 1) + (-1,))
    if q.rotate:
        master = hadamard(master, q.rotate)
    if q.low_rank is not None:
        master = master - q.low_rank.product()
    rounded = q.dequantize(jnp.float32)

    def share(part: jax.Array, whole: jax.Array) -> jax.Array:
        return part / jnp.where(whole > 0.0, whole, 1.0)

    def scaled(axis: int) -> jax.Array:
        """Of the weight along an axis, as least squares see it."""
        squares = jnp.sum(rounded * rounded, axis)
        ratio = share(jnp.sum(master * rounded, axis), squares)
        return jnp.median(jnp.where(squares > 0.0, jnp.abs(ratio - 1.0), 0.0))

    apart = share(jnp.sum((master - rounded) ** 2), jnp.sum(master**2))
    return master, jnp.sqrt(apart), jnp.maximum(scaled(-1), scaled(-2))
