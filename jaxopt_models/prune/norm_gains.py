"""Gains of norms for a narrower residual stream, for nothing: one factor a norm.

The channels that are kept are the large ones, so the root mean square over them is larger than over
all, and what a norm puts out becomes smaller than the weights behind it were trained on. With

    r(x) = rms(x over kept channels) / rms(x)

the output of a norm is a = x_k / rms_k where it was b = r(x) a. The factor c that minimises
Σ ‖c a - b‖² over a text is the mean of r(x), since every ‖a‖² is the number of channels.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import cache, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models import tree
from jaxopt_models.calibrate import Stream
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.importance import valid_weights
from jaxopt_models.prune.masks import check_plain, scaled_norm


def norm_gains(
    config: ModelConfig,
    params: Any,
    batches: Iterable[Any],
    hidden: jax.Array,
    valid: Sequence[Any] | None = None,
    progress: Progress = silent,
) -> dict[str, jax.Array]:
    """The factor of each norm's gain, measured in the original model.

    Args:
      config: the architecture.
      params: the original model, in plain arrays; they may be host arrays.
      batches: int32 [B, T] token arrays.
      hidden: [D], 1 for channels that will be kept; `masks.Masks.hidden`.
      valid: as in `importance.importance`.
      progress: wraps the loop over layers, as `tqdm` would.

    Returns:
      float32 scalars by path of the norm ("layers/3/input_layernorm/weight", "norm/weight"), for
      `rescale_norms`.

    Raises:
      UserError: without batches, for a mask of another width or that keeps nothing, and for what
        `masks.apply_masks` refuses.
    """
    check_plain(params)
    stream = Stream(config, params, batches)
    width = stream.values[0].shape[-1]
    if hidden.shape != (width,) or not bool(jnp.any(hidden > 0)):
        raise UserError(
            f"the mask of hidden channels has shape {hidden.shape} and keeps "
            f"{int(jnp.sum(hidden > 0))}; give one of [{width}] that keeps some"
        )
    beside = [(weights, hidden) for weights in valid_weights(stream, valid)]
    found: dict[str, jax.Array] = {}
    layers = list(enumerate(zip(config.attention_kinds, params["layers"], strict=True)))
    for i, (kind, layer) in progress(layers, "measuring norms"):
        layer = jax.device_put(layer)
        taps = frozenset(f"{name}/unnormed" for name in layer if name.endswith("layernorm"))
        measure = _measure(config)
        sums, tokens = stream.reduce(layer, kind, taps, measure, beside=beside, advance=True)
        for tap, total in sums.items():
            found[f"layers/{i}/{tap.removesuffix('unnormed')}weight"] = total / tokens
    ends = (
        _measure(config)({"x": jnp.asarray(x)}, part)
        for x, part in zip(stream.values, beside, strict=True)
    )
    sums, tokens = reduce(partial(jax.tree.map, jnp.add), ends)
    return found | {"norm/weight": sums["x"] / tokens}


def rescale_norms(config: ModelConfig, params: Any, gains: Mapping[str, Any]) -> Any:
    """The parameters with the output of each norm multiplied by its factor, before or after a cut.

    The gain keeps its dtype.

    Raises:
      UserError: for a path that is not in the tree, as those of removed layers are not.
    """
    norms = tree.select(params, list(gains))

    def scaled(path: str) -> jax.Array:
        gain = scaled_norm(config, {"weight": norms[path]}, gains[path])["weight"]
        return gain.astype(norms[path].dtype)

    return tree.replace(params, {path: scaled(path) for path in gains})


@cache
def _measure(config: ModelConfig) -> Any:
    """(Σ r(x) of each tap, number of tokens) of one batch; one function a config."""

    def measure(taps: dict[str, jax.Array], beside: Any) -> Any:
        valid, hidden = beside
        kept = jnp.sum(hidden)

        def ratios(x: jax.Array) -> jax.Array:
            squares = x.astype(jnp.float32) ** 2
            some = jnp.sum(squares * hidden[None, None], axis=-1) / kept + config.rms_norm_eps
            every = jnp.mean(squares, axis=-1) + config.rms_norm_eps
            return jnp.sum(jnp.sqrt(some / every) * valid)

        return {tap: ratios(x) for tap, x in taps.items()}, jnp.sum(valid)

    return measure
