"""What does it cost to quantize one part of a model, the rest left as it is?

A trial is a few leaves that replace the originals, by path. Its score estimates the divergence
KL(original || model with the trial), in nats for each predicted token:

    gradient   ½ / P · Σ (dL/dY · (Ŷ - Y))²     Y, Ŷ: product of a linear, original and of the trial
    kl         1 / P · Σ KL                     measured

with L the summed next-token cross-entropy of the original model and P the number of predicted
positions. "gradient" is the second order of the divergence with the empirical Fisher matrix's
diagonal for its Hessian, and takes one backward pass for all trials. It does not see tokens change
experts, which is a jump, so it is too low for what comes before a router. "kl" runs the layers from
the trial's first on for each of them. On the device are the activations of one layer and a residual
stream at a time; "gradient" keeps the streams into all layers on the host.

Reference: Dong et al. 2019, arXiv:1911.03852.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models import tree
from jaxopt_models.data import token_arrays
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import position_sums
from jaxopt_models.models.block import block
from jaxopt_models.models.config import AttentionKind, ModelConfig
from jaxopt_models.models.transformer import (
    embed_tokens,
    final_norm,
    logits,
    output_head,
    positions_of,
)
from jaxopt_models.ops import Probe, expert_linear, linear
from jaxopt_models.progress import Progress, silent

Method = Literal["gradient", "kl"]
Trial = Mapping[str, Any]

# Positions whose logits exist at one time, as in evaluation.
_POSITIONS = 256


def sensitivities(
    config: ModelConfig,
    params: Any,
    trials: Sequence[Trial],
    batches: Iterable[Any],
    method: Method = "gradient",
    progress: Progress = silent,
) -> list[float]:
    """The score of each trial.

    Args:
      params: the original model.
      trials: leaves by path ("layers/3/mlp/down_proj/weight"), all in decoder layers. "gradient"
        takes matrices only; "kl" also what a layer may hold beside, such as "layers/3/self_attn/
        kv_cache".
      batches: int32 [B, T] token arrays, T at least 2.
      method: "gradient" or "kl".
      progress: wraps the loop over layers, as `tqdm` would.

    Returns:
      Nats a predicted token, in the order of the trials.

    Raises:
      UserError: for an unknown method, without batches, or for a score that is not finite.
    """
    methods: dict[str, Callable[..., np.ndarray]] = {"gradient": _gradient, "kl": _divergence}
    if method not in methods:
        raise UserError(f"sensitivity {method!r} is unknown; choose one of {', '.join(methods)}")
    tokens = token_arrays(config, batches, shortest=2)
    if not tokens:
        raise UserError("there is nothing to score on: no batches were given")
    positions = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in tokens)
    sums = methods[method](config, params, [_by_layer(t) for t in trials], tokens, progress)
    for trial, total in zip(trials, sums, strict=True):
        if not np.isfinite(total):
            raise UserError(
                f"the score of {next(iter(trial))} is not finite; look for NaN in the model's "
                "weights or the candidate's scales"
            )
    return [float(total) / positions for total in sums]


# A trial's leaves by layer, and there by path relative to the layer.
_Layers = dict[int, dict[str, Any]]


def _by_layer(trial: Trial) -> _Layers:
    found: _Layers = {}
    for path, leaf in trial.items():
        _, layer, inside = path.split("/", 2)
        found.setdefault(int(layer), {})[inside] = leaf
    return found


def _gradient(
    config: ModelConfig,
    params: Any,
    trials: list[_Layers],
    tokens: list[jax.Array],
    progress: Progress,
) -> np.ndarray:
    """Forward keeping each layer's input on the host, then backward layer by layer."""
    inputs: list[list[np.ndarray]] = []
    streams = [embed_tokens(config, params, batch) for batch in tokens]
    layers = list(zip(config.attention_kinds, params["layers"], strict=True))
    for kind, layer in progress(layers, "running the original"):
        inputs.append([np.asarray(x) for x in streams])
        streams = _advanced(config, kind, jax.device_put(layer), streams)
    ends = {"norm": params["norm"], **output_head(params)}
    cotangents = [
        _loss_gradient(config, ends, x, batch) for x, batch in zip(streams, tokens, strict=True)
    ]
    sums = np.zeros(len(trials), np.float64)
    for i in progress(list(reversed(range(len(layers)))), "scoring"):
        kind, layer = layers[i][0], jax.device_put(layers[i][1])
        places = [place for place, trial in enumerate(trials) if i in trial]
        variants = tuple(trials[place][i] for place in places)
        for b, x in enumerate(inputs.pop()):
            cotangents[b], scores = _layer_scores(config, kind, layer, variants, x, cotangents[b])
            sums[places] += np.asarray(scores, np.float64)
    return sums


def _advanced(
    config: ModelConfig, kind: AttentionKind, layer: Any, streams: Iterable[jax.Array]
) -> list[jax.Array]:
    """Residual streams after one layer."""
    return [block(config, layer, x, positions_of(x), kind=kind)[0] for x in streams]


@partial(jax.jit, static_argnums=0)
def _loss_gradient(config: ModelConfig, ends: Any, x: jax.Array, tokens: jax.Array) -> jax.Array:
    """Gradient of the summed cross-entropy by the last layer's output, [B, T, D] like `x`."""
    hidden, norm_vjp = jax.vjp(lambda x: final_norm(config, ends, x), x)
    count = tokens.shape[0] * (tokens.shape[1] - 1)
    size = min(_POSITIONS, count)
    padding = -count % size

    def chunks(x: jax.Array) -> jax.Array:
        flat = x.reshape(count, *x.shape[2:])
        flat = jnp.pad(flat, [(0, padding)] + [(0, 0)] * (flat.ndim - 1))
        return flat.reshape(-1, size, *flat.shape[1:])

    def loss(states: jax.Array, targets: jax.Array) -> jax.Array:
        log_p = jax.nn.log_softmax(logits(config, ends, states))
        return -jnp.sum(jnp.take_along_axis(log_p, targets[:, None], axis=1))

    # The padding's gradients are cut off, so what its loss is does not matter.
    each = jax.lax.map(
        lambda chunk: jax.grad(loss)(*chunk), (chunks(hidden[:, :-1]), chunks(tokens[:, 1:]))
    )
    inner = each.reshape(-1, x.shape[-1])[:count].reshape(x.shape[0], -1, x.shape[-1])
    # The last position predicts nothing.
    return norm_vjp(jnp.pad(inner, ((0, 0), (0, 1), (0, 0))))[0]


@partial(jax.jit, static_argnums=(0, 1))
def _layer_scores(
    config: ModelConfig,
    kind: AttentionKind,
    layer: Any,
    trials: tuple[dict[str, Any], ...],
    x: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """One layer backward: (gradient by its input, summed score of each trial [len(trials)])."""
    original = dict(tree.leaves_with_paths(layer))
    names = sorted({path for trial in trials for path in trial})
    weights = {path: original[path] for path in names}
    sizes = "mlp/experts/group_sizes"
    wanted = frozenset([_tap(path) for path in names] + [sizes])

    def run(x: jax.Array, deltas: dict[str, jax.Array]):
        probes = {path: Probe(weights[path], delta) for path, delta in deltas.items()}
        probed = tree.replace(layer, probes)
        out, _, taps = block(config, probed, x, positions_of(x), kind=kind, wanted=wanted)
        return out, taps

    def zeros(weight: jax.Array) -> jax.Array:
        routed = (x.shape[0] * x.shape[1] * config.experts_per_token,)
        rows = routed if weight.ndim == 3 else x.shape[:2]
        return jnp.zeros((*rows, weight.shape[-2]), jnp.float32)

    deltas = {path: zeros(weight) for path, weight in weights.items()}
    _, vjp, taps = jax.vjp(run, x, deltas, has_aux=True)
    below, gradients = vjp(cotangent)

    def score(path: str, leaf: Any) -> jax.Array:
        read, weight = taps[_tap(path)].astype(jnp.float32), weights[path]
        error = _product(read, leaf, taps.get(sizes)) - _product(read, weight, taps.get(sizes))
        return 0.5 * jnp.sum(jnp.square(gradients[path] * error))

    scores = [sum(score(path, leaf) for path, leaf in trial.items()) for trial in trials]
    return below, jnp.stack(scores) if scores else jnp.zeros(0)


def _product(x: jax.Array, weight: Any, group_sizes: jax.Array | None) -> jax.Array:
    if weight.ndim == 2:
        return linear(x, weight)
    assert group_sizes is not None
    return expert_linear(x, weight, group_sizes)


def _tap(path: str) -> str:
    return path.removesuffix("weight") + "input"


def _divergence(
    config: ModelConfig,
    params: Any,
    trials: list[_Layers],
    tokens: list[jax.Array],
    progress: Progress,
) -> np.ndarray:
    """Each trial from its first layer on; the stream before it is the original's."""
    layers = list(zip(config.attention_kinds, params["layers"], strict=True))
    head = output_head(params)

    def finished(streams: list[jax.Array], start: int, trial: _Layers) -> list[jax.Array]:
        for i, (kind, layer) in enumerate(layers[start:], start):
            streams = _advanced(config, kind, _with_leaves(layer, trial.get(i, {})), streams)
        return [final_norm(config, params, x) for x in streams]

    streams = [embed_tokens(config, params, batch) for batch in tokens]
    expected = [np.asarray(hidden) for hidden in finished(streams, 0, {})]
    sums = np.zeros(len(trials), np.float64)
    for i in progress(list(range(len(layers))), "scoring"):
        for place, trial in enumerate(trials):
            if min(trial) != i:
                continue
            hidden = finished(streams, i, trial)
            for ours, theirs, batch in zip(hidden, expected, tokens, strict=True):
                figures = position_sums(config, config, (head, ours), (head, theirs), batch)
                sums[place] += float(figures[1])
        kind, layer = layers[i]
        streams = _advanced(config, kind, layer, streams)
    return sums


def _with_leaves(layer: Mapping[str, Any], leaves: Mapping[str, Any]) -> Mapping[str, Any]:
    """Nested dicts with leaves set by path, whether or not they were there."""
    changed = dict(layer)
    for path, leaf in leaves.items():
        name, slash, rest = path.partition("/")
        changed[name] = _with_leaves(changed[name], {rest: leaf}) if slash else leaf
    return changed
