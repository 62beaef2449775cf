"""What matters of a model, from one streaming pass: activations of every part, larger is better.

For activations a[b, t, i] of a sequence b at its tokens t, what stands behind a text excepted,

    score[i] = sqrt( Σ_b ( mean_t |a[b, t, i]| )² )

    neurons    of the input of down_proj; an expert's, over the tokens that are sent to it
    heads      of the input of o_proj, then the L2 norm over the channels of a head
    hidden     of the output of the two norms that read the residual stream, Σ over all layers
    experts    mean over the tokens sent to it of ‖p f(x)‖₂, its output times its router weight
    layers     1 - mean cos(h, h'), residual streams before and behind the layer

References: Muralidharan et al. 2024, arXiv:2407.14679 (neurons, heads, hidden); Men et al. 2024,
arXiv:2403.03853 (layers); Lasby et al. 2025, arXiv:2510.13999 (experts).
"""

from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jaxopt_models import tree
from jaxopt_models.calibrate import Stream
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.progress import Progress, silent
from jaxopt_models.prune.masks import check_plain, head_shape, keep_all

_Taps = dict[str, jax.Array]
_INPUT = "input_layernorm/output"
_HEADS, _NEURONS = "self_attn/o_proj/input", "mlp/down_proj/input"
_EXPERTS = tuple(
    f"mlp/{name}"
    for name in (
        "experts/down_proj/input",
        "experts/down_proj/output",
        "experts/group_sizes",
        "experts/order",
        "router/output",
    )
)


@struct.dataclass
class Importance:
    """Scores of all that can be removed, in the fields and shapes of `masks.Masks`; float32.

    Attributes:
      hidden: [D].
      layers: [L].
      heads: [G, S] of each layer.
      neurons: [F] of each layer, or [E, F].
      experts: [E] of each layer, or None.
      expert_tokens: likewise, how many tokens were sent to each.
    """

    hidden: jax.Array
    layers: jax.Array
    heads: tuple[jax.Array, ...]
    neurons: tuple[jax.Array, ...]
    experts: tuple[jax.Array | None, ...]
    expert_tokens: tuple[jax.Array | None, ...]


def importance(
    config: ModelConfig,
    params: Any,
    batches: Iterable[Any],
    valid: Sequence[Any] | None = None,
    progress: Progress = silent,
    *,
    equal_sites: bool = False,
    weighted: bool = False,
) -> Importance:
    """Scores of all parts of a model, from one pass over text, layer by layer.

    Args:
      config: the architecture.
      params: the model, in plain arrays; they may be host arrays.
      batches: int32 [B, T] token arrays.
      valid: [B, T] of each batch, nonzero at tokens of a text; what is behind it in its row counts
        nowhere. None counts all.
      progress: wraps the loop over layers, as `tqdm` would.
      equal_sites: gives each norm the same total in the score of hidden channels, where otherwise
        norms of large gain decide.
      weighted: multiplies the score of each channel in front of o_proj and down_proj by the norm of
        the column that reads it, as Wanda does for single weights (arXiv:2306.11695).

    Raises:
      UserError: without batches, for a row without a token, for what `masks.apply_masks` refuses,
        and for activations that are not finite.
    """
    check_plain(params)
    stream = Stream(config, params, batches)
    weights = valid_weights(stream, valid)
    found = []
    layers = list(enumerate(zip(config.attention_kinds, params["layers"], strict=True)))
    for i, (kind, layer) in progress(layers, "scoring"):
        layer = jax.device_put(layer)
        taps = _taps(config, layer)
        sums = stream.reduce(layer, kind, taps, _measure, beside=weights, advance=True)
        found.append(_scores(config, layer, sums, weighted))
        _check_finite(i, found[-1])
    return Importance(
        hidden=sum_of_sites([site for scores in found for site in scores["sites"]], equal_sites),
        layers=jnp.stack([scores["influence"] for scores in found]),
        heads=tuple(scores["heads"] for scores in found),
        neurons=tuple(scores["neurons"] for scores in found),
        experts=tuple(scores.get("experts") for scores in found),
        expert_tokens=tuple(scores.get("expert_tokens") for scores in found),
    )


def like(config: ModelConfig, params: Any) -> Importance:
    """Abstract scores of a model's parts."""
    masks = jax.eval_shape(lambda: keep_all(config, params))
    scores = {part.name: getattr(masks, part.name) for part in fields(masks)}
    return Importance(**scores, expert_tokens=masks.experts)


def valid_weights(stream: Stream, valid: Sequence[Any] | None) -> list[np.ndarray]:
    """float32 [B, T] of each batch: 1 at tokens that count, 0 elsewhere.

    Raises:
      UserError: for other shapes than those of the batches, and for a row where nothing counts.
    """
    shapes = [x.shape[:2] for x in stream.values]
    if valid is None:
        return [np.ones(shape, np.float32) for shape in shapes]
    given = [np.asarray(mask) for mask in valid]
    if [mask.shape for mask in given] != shapes:
        raise UserError(
            f"`valid` has shapes {[mask.shape for mask in given]} and the batches {shapes}; give "
            "one array for each batch, of its shape"
        )
    for i, mask in enumerate(given):
        if not (mask != 0).any(axis=1).all():
            raise UserError(f"`valid` leaves a row of batch {i} without a token; drop that row")
    return [(mask != 0).astype(np.float32) for mask in given]


def sum_of_sites(sites: Sequence[jax.Array], equal: bool) -> jax.Array:
    """Σ over sites of scores [D], each over its L2 norm first if they are to count equally."""
    if equal:
        sites = [site / jnp.maximum(jnp.linalg.norm(site), 1e-30) for site in sites]
    return jnp.sum(jnp.stack(sites), axis=0)


def _taps(config: ModelConfig, layer: Any) -> frozenset[str]:
    second = "pre_feedforward" if config.sandwich_norm else "post_attention"
    inner = _EXPERTS if "experts" in layer["mlp"] else (_NEURONS,)
    return frozenset({"input", "output", _INPUT, f"{second}_layernorm/output", _HEADS, *inner})


def _measure(taps: _Taps, valid: jax.Array) -> dict[str, Any]:
    """Sums over the sequences of a batch; `valid` is float32 [B, T]."""
    norms = sorted(name for name in taps if name.endswith("layernorm/output"))
    before, behind = taps["input"].astype(jnp.float32), taps["output"].astype(jnp.float32)
    lengths = jnp.linalg.norm(before, axis=-1) * jnp.linalg.norm(behind, axis=-1)
    cosine = jnp.sum(before * behind, axis=-1) / jnp.maximum(lengths, 1e-30)
    sums = {
        "sites": tuple(_of_sequences(taps[name], valid) for name in norms),
        "cosine": jnp.sum(cosine * valid),
        "tokens": jnp.sum(valid),
        "heads": _of_sequences(taps[_HEADS], valid),
    }
    if _NEURONS in taps:
        return sums | {"neurons": _of_sequences(taps[_NEURONS], valid)}
    return sums | _of_experts(taps, valid)


def _of_sequences(x: jax.Array, valid: jax.Array) -> jax.Array:
    """Σ_b (mean_t |x[b, t, i]|)² of [B, T, n], float32 [n]."""
    total = jnp.sum(jnp.abs(x.astype(jnp.float32)) * valid[:, :, None], axis=1)
    return jnp.sum((total / jnp.sum(valid, axis=1)[:, None]) ** 2, axis=0)


def _of_experts(taps: _Taps, valid: jax.Array) -> dict[str, jax.Array]:
    """The same of each expert's rows, which are sorted by expert; [E, F] and [E]."""
    hidden, out, sizes, order, weights = (taps[name] for name in _EXPERTS)
    experts, (batch, length) = sizes.shape[0], valid.shape
    owner = order // weights.shape[-1]  # the token that a row belongs to
    expert = jnp.repeat(jnp.arange(experts), sizes, total_repeat_length=order.shape[0])
    counts = valid.reshape(-1)[owner]

    place = expert * batch + owner // length
    magnitude = jnp.abs(hidden.astype(jnp.float32)) * counts[:, None]
    total = jax.ops.segment_sum(magnitude, place, experts * batch)
    means = total.reshape(experts, batch, -1) / jnp.sum(valid, axis=1)[None, :, None]

    output = jnp.linalg.norm(out.astype(jnp.float32), axis=-1) * weights.reshape(-1)[order]
    return {
        "neurons": jnp.sum(means**2, axis=1),
        "experts": jax.ops.segment_sum(output * counts, expert, experts),
        "expert_tokens": jax.ops.segment_sum(counts, expert, experts),
    }


def _scores(
    config: ModelConfig, layer: Any, sums: dict[str, Any], weighted: bool
) -> dict[str, Any]:
    """Scores of one layer, of the sums over all text."""
    attention, mlp = layer["self_attn"], layer["mlp"]
    shape = (*head_shape(config, attention), config.head_dim)
    if weighted:
        down = mlp.get("experts", mlp)["down_proj"]["weight"]
        readers = {"heads": attention["o_proj"]["weight"], "neurons": down}
        sums = sums | {name: sums[name] * _energy(weight) for name, weight in readers.items()}
    scores: dict[str, Any] = {
        "sites": [jnp.sqrt(site) for site in sums["sites"]],
        "influence": 1 - sums["cosine"] / sums["tokens"],
        "heads": jnp.sqrt(jnp.sum(sums["heads"].reshape(shape), axis=-1)),
        "neurons": jnp.sqrt(sums["neurons"]),
    }
    if "experts" in sums:
        tokens = sums["expert_tokens"]
        scores["experts"] = sums["experts"] / jnp.maximum(tokens, 1.0)
        scores["expert_tokens"] = tokens
    return scores


def _energy(weight: jax.Array) -> jax.Array:
    """Σ_n w_nk² of each column, [.., N, K] -> [.., K]."""
    return jnp.sum(weight.astype(jnp.float32) ** 2, axis=-2)


def _check_finite(index: int, scores: Any) -> None:
    for path, array in tree.arrays_with_paths(scores):
        if not bool(jnp.all(jnp.isfinite(array))):
            raise UserError(
                f"activations of layer {index} are not finite ({path}); look for NaN in the "
                "weights of the model"
            )
