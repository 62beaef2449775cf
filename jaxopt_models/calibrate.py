"""Statistics of activations from one streaming pass, layer by layer.

Only the residual stream of the calibration text is kept, [tokens, D]; each layer is run once over
all batches before the next is looked at, and is compiled once for each kind of layer.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.data import token_arrays
from jaxopt_models.errors import UserError
from jaxopt_models.models.block import block
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import embed_tokens, final_norm, positions_of
from jaxopt_models.progress import Progress, silent


def input_amax(
    config: ModelConfig,
    params: Any,
    batches: Iterable[Any],
    weights: Iterable[str],
    progress: Progress = silent,
) -> dict[str, jax.Array]:
    """Largest magnitude that reaches each linear over all calibration tokens ("max" calibration).

    Args:
      params: the unquantized model.
      batches: int32 [B, T] token arrays.
      weights: paths of the weights whose inputs are wanted, such as
        "layers/3/self_attn/q_proj/weight" or "lm_head/weight".
      progress: wraps the loop over layers, as `tqdm` would.

    Returns:
      float32 scalars by weight path.

    Raises:
      UserError: without batches, for token ids outside the vocabulary, or for an input that is not
        finite or always zero.
    """
    wanted = frozenset(weights)
    tokens = token_arrays(config, batches)
    if not tokens:
        raise UserError("calibration needs text: no batches were given")
    streams = [embed_tokens(config, params, batch) for batch in tokens]
    found: dict[str, jax.Array] = {}
    layers = list(enumerate(zip(config.attention_kinds, params["layers"], strict=True)))
    for i, (kind, layer) in progress(layers, "calibrating"):
        prefix = f"layers/{i}/"
        names = frozenset(_tap(w.removeprefix(prefix)) for w in wanted if w.startswith(prefix))
        for b, x in enumerate(streams):
            streams[b], seen = _observe(config, layer, x, kind, names)
            for name, amax in seen.items():
                path = prefix + name.removesuffix("input") + "weight"
                found[path] = jnp.maximum(found.get(path, jnp.zeros_like(amax)), amax)
    if "lm_head/weight" in wanted:
        ends = [jnp.max(jnp.abs(final_norm(config, params, x))) for x in streams]
        found["lm_head/weight"] = jnp.max(jnp.stack(ends)).astype(jnp.float32)
    _check(wanted, found)
    return found


@partial(jax.jit, static_argnums=(0, 3, 4))
def _observe(
    config: ModelConfig, layer: Any, x: jax.Array, kind: Any, names: frozenset[str]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One layer forward, its wanted inputs reduced to their amax before they are stored."""
    x, _, taps = block(config, layer, x, positions_of(x), kind=kind, wanted=names)
    return x, {name: jnp.max(jnp.abs(t)).astype(jnp.float32) for name, t in taps.items()}


def _tap(weight: str) -> str:
    return weight.removesuffix("weight") + "input"


def _check(wanted: frozenset[str], found: dict[str, jax.Array]) -> None:
    missing = sorted(wanted - found.keys())
    if missing:
        raise UserError(f"no activation reaches {missing[0]}; it cannot be calibrated")
    bad = [path for path, amax in found.items() if not bool(jnp.isfinite(amax))]
    if bad:
        raise UserError(f"the input of {bad[0]} is not finite on the calibration text")
    idle = [path for path, amax in found.items() if float(amax) == 0]
    if idle:
        raise UserError(
            f"the input of {idle[0]} is zero on all calibration text; use more or other text"
        )
