"""Medusa: heads that each say a token some places ahead, all at once, from the model's last state.

    h_k = h + silu(W_k h + b_k)  (once for each block),    logits_k = U_k h_k,    k = 1..K

h is what the model's own output head reads at token t, which says token t + 1; head k says token
t + 1 + k. None of them knows what the others say. Reference: Cai et al. 2024, arXiv:2401.10774.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.transformer import logits
from jaxopt_models.ops import linear
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.draft import Prompted, Seen, Target
from jaxopt_models.speculative.eagle3_params import head_rows
from jaxopt_models.speculative.tree import Guess


@struct.dataclass
class Medusa:
    """A drafter that is such heads.

    Attributes:
      config: of the model.
      params: {heads: ({blocks: ({linear: {weight [D, D], bias [D]}}, …), lm_head: {weight [V, D]}},
        …)}, a head for each token ahead. Leaves may be of any kind.
      count: tokens of a guess, those of the first heads; None is all.
    """

    config: ModelConfig = struct.field(pytree_node=False)
    params: Any
    count: int = struct.field(pytree_node=False)

    def __post_init__(self) -> None:
        # Not where a pytree is taken apart and its leaves are placeholders.
        heads = self.params.get("heads") if isinstance(self.params, dict) else None
        if isinstance(heads, tuple) and not 1 <= self.count <= len(heads):
            raise UserError(
                f"count is {self.count}, and there are {len(heads)} Medusa heads, which say as "
                "many tokens; choose 1 or more, and no more than that"
            )

    @property
    def depth(self) -> int:
        return self.count

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.config.num_layers,)

    @property
    def vocabulary(self) -> None:
        """See `growth.Grower`."""

    @property
    def reach(self) -> int:
        """See `growth.Grower`."""
        return len(self.params["heads"])

    def check(self, config: ModelConfig) -> None:
        """Raises UserError unless the heads read and say what the model has."""
        rows, width = self.params["heads"][0]["lm_head"]["weight"].shape
        needed = config.vocab_size, config.hidden_size
        if (rows, width) != needed or config.num_layers != self.config.num_layers:
            raise UserError(
                f"the Medusa heads are of a model of {self.config.num_layers} layers with output "
                f"head {[rows, width]}, and this one has {config.num_layers} and {list(needed)}; "
                "they were made for another model"
            )

    def begin(self, target: Target, prompts: Prompted, capacity: int) -> None:
        """They carry nothing."""

    def propose(
        self, target: Target, state: None, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, None]:
        """See `Drafter`."""
        hidden = _last(seen)
        said = jnp.concatenate([self.logits(hidden, k) for k in range(self.count)], axis=1)
        places = seen.length[:, None] + jnp.arange(self.count, dtype=jnp.int32)[None]
        return Guess(sampler(said, places), logits=said), None

    def grower(self, target: Target, state: None, seen: Seen, sampler: Sampler) -> tuple[Any, None]:
        """See `growth.Grower`: what a level says is the same behind all of its nodes."""
        hidden = _last(seen)

        def continued(level: int, token: jax.Array | None, above: jax.Array | None) -> jax.Array:
            said = sampler.scores(self.logits(hidden, level), (seen.length + level)[:, None])
            count = 1 if token is None else token.shape[1]
            return jnp.repeat(jax.nn.log_softmax(said, axis=-1), count, axis=1)

        return continued, None

    def states(self, hidden: jax.Array, number: int) -> jax.Array:
        """What the output of head `number`, from 0 on, reads: [B, T, D] of [B, T, D]."""
        x = hidden.astype(self.config.dtype)
        for block in self.params["heads"][number]["blocks"]:
            own = block["linear"]
            x = x + jax.nn.silu(linear(x, own["weight"], own.get("bias")))
        return x

    def logits(self, hidden: jax.Array, number: int) -> jax.Array:
        """Of head `number`, from 0 on: float32 [B, T, V]."""
        head = {"lm_head": self.params["heads"][number]["lm_head"]}
        return logits(self.config, head, self.states(hidden, number))


def init_medusa(target: Target, count: int, blocks: int = 1) -> Medusa:
    """Heads to be trained, each of which says what the model's own does.

    Args:
      target: the model.
      count: how many.
      blocks: of each.
    """
    config = target.config
    width = config.hidden_size
    rows = head_rows(target, jnp.arange(config.vocab_size), jnp.float32)

    def block() -> dict[str, Any]:
        zeros = jnp.zeros((width, width), jnp.float32), jnp.zeros(width, jnp.float32)
        return {"linear": dict(zip(("weight", "bias"), zeros, strict=True))}

    heads = tuple(
        {"blocks": tuple(block() for _ in range(blocks)), "lm_head": {"weight": rows}}
        for _ in range(count)
    )
    return Medusa(config, {"heads": heads}, count)


def _last(seen: Seen) -> jax.Array:
    """Features of the last token that the model was run on, [B, 1, D]."""
    return jnp.take_along_axis(seen.features, (seen.count - 1)[:, None, None], axis=1)
