"""Mixture-of-experts feed-forward with dropless routing."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jaxopt_models.ops import expert_linear, linear


def route(
    x: jax.Array,
    router: Any,
    experts_per_token: int,
    normalize: bool,
    bias: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Experts of each token: the largest of `softmax(x @ router.T + bias)` over all experts.

    Args:
      x: [tokens, D].
      router: leaf standing for [E, D].
      experts_per_token: k.
      normalize: whether the k weights are rescaled to sum to 1.
      bias: [E]; -inf takes an expert out. None is zero.

    Returns:
      (weights float32 [tokens, k], experts int32 [tokens, k]).
    """
    probabilities = jax.nn.softmax(linear(x, router, bias).astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, experts_per_token)
    if normalize:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts


def moe_feed_forward(
    x: jax.Array,
    mlp: Mapping[str, Any],
    activate: Callable[[jax.Array], jax.Array],
    *,
    experts_per_token: int,
    normalize: bool,
    save: Callable[[str, jax.Array], None],
) -> jax.Array:
    """`sum_k weight_k · down_k(activate(gate_k x) · up_k x)` over each token's experts.

    Tokens are sorted by expert and each expert multiplies a contiguous group of rows; none is
    dropped, whatever the imbalance. Reference: Gale et al. 2022, arXiv:2211.15841.

    Args:
      x: [B, T, D].
      mlp: {"router", "experts": {"gate_proj", "up_proj" [E, F, D], "down_proj" [E, D, F]}}.
      save: receives taps, among them "router/output" and, in sorted row order, the experts' inputs
        and "experts/down_proj/output". There "experts/group_sizes" are the int32 [E] rows of each
        expert, and "experts/order" says which of all k choices, token by token, each row is.

    Returns:
      [B, T, D] in the dtype of `x`.
    """
    batch, length, width = x.shape
    tokens = x.reshape(batch * length, width)
    save("router/input", x)
    router = mlp["router"]
    weights, chosen = route(
        tokens, router["weight"], experts_per_token, normalize, router.get("bias")
    )
    save("router/output", weights)

    assignment = chosen.reshape(-1)
    order = jnp.argsort(assignment, stable=True)
    owner = order // experts_per_token
    experts = mlp["experts"]
    count = experts["gate_proj"]["weight"].shape[0]
    group_sizes = jnp.bincount(assignment, length=count).astype(jnp.int32)
    save("experts/group_sizes", group_sizes)
    save("experts/order", order)

    rows = tokens[owner]
    save("experts/gate_proj/input", rows)
    save("experts/up_proj/input", rows)
    gate = expert_linear(rows, experts["gate_proj"]["weight"], group_sizes)
    up = expert_linear(rows, experts["up_proj"]["weight"], group_sizes)
    hidden = activate(gate) * up
    save("experts/down_proj/input", hidden)
    out = expert_linear(hidden, experts["down_proj"]["weight"], group_sizes)
    save("experts/down_proj/output", out)

    weighted = out.astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    # Undoing the sort and summing over k keeps the order of additions fixed for every token.
    summed = weighted[jnp.argsort(order)].reshape(-1, experts_per_token, width).sum(axis=1)
    return summed.astype(x.dtype).reshape(batch, length, width)
