"""What a mixture's output loses without one of its experts, its tokens sent to others."""

from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.calibrate import Stream
from jaxopt_models.errors import UserError
from jaxopt_models.models.block import Recorder, activation
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.moe import moe_feed_forward
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.importance import valid_weights
from jaxopt_models.prune.masks import check_plain

_INPUT = "mlp/router/input"


def expert_damage(
    config: ModelConfig,
    params: Any,
    batches: Iterable[Any],
    valid: Sequence[Any] | None = None,
    progress: Progress = silent,
) -> tuple[jax.Array | None, ...]:
    """Relative squared error of each mixture when one expert is taken out:

        score_j = Σ_t ‖y_t - y_t^(-j)‖² / Σ_t ‖y_t‖²

    where y^(-j) is computed with the router's logit of expert j at -inf. In contrast to the norm of
    an expert's output, this sees whether others can stand in for it. It runs a layer's experts
    E + 1 times over the text.

    Args:
      config: the architecture.
      params: the model, in plain arrays; they may be host arrays.
      batches: int32 [B, T] token arrays.
      valid: as in `importance.importance`.
      progress: wraps the loop over layers, as `tqdm` would.

    Returns:
      float32 [E] for each layer, None for layers without experts.

    Raises:
      UserError: without batches, for what `masks.apply_masks` refuses, and for a layer whose tokens
        are sent to all of its experts already.
    """
    check_plain(params)
    stream = Stream(config, params, batches)
    weights = valid_weights(stream, valid)
    scores: list[jax.Array | None] = []
    layers = list(enumerate(zip(config.attention_kinds, params["layers"], strict=True)))
    for i, (kind, layer) in progress(layers, "taking experts out"):
        layer = jax.device_put(layer)
        if "experts" not in layer["mlp"]:
            scores.append(None)
            stream.advance(layer, kind)
            continue
        experts = layer["mlp"]["router"]["weight"].shape[0]
        if experts <= config.experts_per_token:
            raise UserError(
                f"layer {i} sends every token to all of its {experts} experts, so none can be "
                "taken out; lower experts_per_token first"
            )
        beside = [(mask, layer["mlp"]) for mask in weights]
        lost, whole = stream.reduce(
            layer, kind, frozenset({_INPUT}), _measure(config), beside=beside, advance=True
        )
        scores.append(lost / jnp.maximum(whole, 1e-30))
    return tuple(scores)


@cache
def _measure(config: ModelConfig) -> Callable[..., Any]:
    """(Σ ‖y - y^(-j)‖² [E], Σ ‖y‖²) of one batch; one function a config, as `reduce` wants it."""

    def measure(taps: dict[str, jax.Array], beside: Any) -> tuple[jax.Array, jax.Array]:
        valid, mlp = beside
        count = mlp["router"]["weight"].shape[0]
        bias = mlp["router"].get("bias", jnp.zeros(count, jnp.float32)).astype(jnp.float32)

        def output(bias: jax.Array) -> jax.Array:
            y = moe_feed_forward(
                taps[_INPUT],
                {**mlp, "router": {**mlp["router"], "bias": bias}},
                activation(config),
                experts_per_token=config.experts_per_token,
                normalize=config.normalize_router,
                save=Recorder(frozenset()),
            )
            return y.astype(jnp.float32) * valid[:, :, None]

        whole = output(bias)

        def lost(j: jax.Array) -> jax.Array:
            without = output(jnp.where(jnp.arange(count) == j, -jnp.inf, bias))
            return jnp.sum((whole - without) ** 2)

        return jax.lax.map(lost, jnp.arange(count)), jnp.sum(whole**2)

    return measure
