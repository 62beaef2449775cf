"""As many guesses as pay: none while they rarely come true, more while they mostly do.

A pass may guess one of a few numbers k of tokens, each of which is a program of its own inside the
loop. The one is taken that promises the most tokens for its time, over the rows b that go on:

    k = argmax_k  Σ_b (1 + α_b + … + α_b^k) / cost_k
    α_b = (w α_0 + Σ_t λ^(T-t) right_t) / (w + Σ_t λ^(T-t) tried_t)      t = 1..T, passes with k > 0
    tried_t = min(right_t + 1, k_t)

α_b is the share of a row's guesses that came true lately, of those behind right ones; cost_k the
time of a pass with k guesses, drafting included, in passes without. A batch has one k, because on a
device a pass costs what its most guesses cost: a row that looked at fewer would save nothing, and
whatever of its guesses comes true is free. Rows that are done do not count, so that the last ones
get what suits them. After 32 passes without guesses there is one with the fewest, which shows
whether they come true again.

References: Leviathan et al. 2022, arXiv:2211.17192 (the expected number of tokens); Liu et al.
2024, arXiv:2406.14066 (the number of guesses by a moving average and the cost of a batch).
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.draft import Drafter, Prompted, Seen, Target
from jaxopt_models.speculative.tree import Guess

_ALPHA, _WEIGHT = 0.7, 1.0  # of a new row: α_0, and w, of how many guesses
_MEMORY = 1 - 1 / 32  # λ
_PATIENCE = 32  # passes without guesses before one with them
# Of a pass, for each guess. EAGLE-3 on an 8B model gave 3.86 tokens a pass and was 2.37 times as
# fast at 7 guesses (SGLang, MT-bench, batch 1): 3.86 / 2.37 = 1 + 7 · 0.09.
_COST = 0.09


@struct.dataclass
class Rates:
    """What an adaptive drafter carries.

    Attributes:
      draft: what the drafter itself carries.
      right, tried: float32 [B], faded sums of guesses that came true, and of those that could.
      level: int32, number of the level of the next pass.
      silent: int32, passes without guesses since the last that had some.
      used: int32 [L], passes at each level.
    """

    draft: Any
    right: jax.Array
    tried: jax.Array
    level: jax.Array
    silent: jax.Array
    used: jax.Array


@struct.dataclass
class Adaptive:
    """A drafter that guesses as many tokens as pay.

    Verified coupled, the tokens are the same as with any number.

    Attributes:
      drafter: what guesses, a chain of any `count`.
      levels: numbers of guesses that a pass may have, rising; 0 is none, which still costs what the
        drafter needs to keep up with the text. Each is compiled.
      costs: time of a pass at each level, in passes without guesses, as `bench speculative`
        measures it ("pass_cost"); None is 1 + 0.09 k.
    """

    drafter: Any
    levels: tuple[int, ...] = struct.field(pytree_node=False, default=(0, 1, 3, 7))
    costs: tuple[float, ...] | None = struct.field(pytree_node=False, default=None)

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip(self.levels[:-1], self.levels[1:], strict=True))
        if not self.levels or not rising or self.levels[0] < 0 or self.levels[-1] < 1:
            raise UserError(
                f"levels {list(self.levels)} are not rising numbers of guesses; say some such as "
                "0, 1, 3, 7"
            )
        costs = self.costs
        positive = all(0 < cost < float("inf") for cost in costs or ())
        if costs is not None and (len(costs) != len(self.levels) or not positive):
            raise UserError(
                f"costs {list(costs)} are not {len(self.levels)} positive numbers, one for each of "
                f"the levels {list(self.levels)}"
            )

    @property
    def count(self) -> int:
        return self.levels[-1]

    @property
    def depth(self) -> int:
        return self.count

    @property
    def layers(self) -> tuple[int, ...]:
        return self.drafter.layers

    def check(self, config: ModelConfig) -> None:
        """Raises UserError if the drafter does not go with the model, or guesses no chain."""
        if self.drafter.depth != self.drafter.count:
            raise UserError("levels are of a chain, and this drafter guesses trees; choose one")
        self.at(self.count).check(config)

    def begin(self, target: Target, prompts: Prompted, capacity: int) -> Rates:
        """What the drafter carries, and that nothing is known of its guesses."""
        own = self.at(self.count).begin(target, prompts, capacity)
        batch, used = len(prompts.lengths), jnp.zeros(len(self.levels), jnp.int32)
        right, tried = jnp.zeros(batch, jnp.float32), jnp.zeros(batch, jnp.float32)
        level = self.best(right, tried, jnp.ones(batch, bool))
        return Rates(own, right, tried, level, jnp.zeros((), jnp.int32), used)

    def propose(
        self, target: Target, state: Rates, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, Rates]:
        """See `Drafter`: as many guesses as ever. The loop asks `at` a level."""
        guess, own = self.at(self.count).propose(target, state.draft, seen, sampler)
        return guess, replace(state, draft=own)

    def at(self, level: int) -> Drafter:
        """What guesses so many tokens."""
        drafter = replace(self.drafter, count=max(level, 1))
        return drafter if level else _Quiet(drafter)

    def best(self, right: jax.Array, tried: jax.Array, active: jax.Array) -> jax.Array:
        """Number of the level that promises most, int32.

        Args:
          right, tried: float32 [B], see `Rates`.
          active: bool [B], rows that go on.
        """
        alpha = (_WEIGHT * _ALPHA + right) / (_WEIGHT + tried)
        powers = alpha[:, None] ** jnp.arange(self.count + 1, dtype=jnp.float32)[None]
        tokens = jnp.cumsum(powers, axis=1)[:, jnp.asarray(self.levels)]
        promised = jnp.sum(jnp.where(active[:, None], tokens, 0.0), axis=0)
        costs = self.costs or tuple(1 + _COST * k for k in self.levels)
        return jnp.argmax(promised / jnp.asarray(costs, jnp.float32)).astype(jnp.int32)

    def seen(self, before: Rates, draft: Any, came_true: jax.Array, active: jax.Array) -> Rates:
        """The rates behind a pass.

        Args:
          before: of it.
          draft: what the drafter carries now.
          came_true: int32 [B], guesses of each row.
          active: bool [B], rows that go on.
        """
        guesses = jnp.asarray(self.levels, jnp.int32)[before.level]
        could = jnp.minimum(came_true + 1, guesses)
        memory = jnp.where(guesses > 0, _MEMORY, 1.0)
        right = memory * before.right + came_true.astype(jnp.float32)
        tried = memory * before.tried + could.astype(jnp.float32)
        silent = jnp.where(guesses > 0, 0, before.silent + 1)
        level = self.best(right, tried, active)
        if self.levels[0] == 0:
            level = jnp.where(silent >= _PATIENCE, jnp.maximum(level, 1), level)
        used = before.used.at[before.level].add(1)
        return Rates(draft, right, tried, level, silent, used)


def run_adapted[State: Any](
    adaptive: Adaptive,
    one_pass: Callable[[Drafter, State], State],
    state: State,
    passes: jax.Array | int,
) -> State:
    """`decoding.run_passes`, each pass at the level that promises most.

    Inside of one loop there is one for each level, which goes on while its level is the best. So
    the host asks once a pass where to go on, and caches are updated in place, which branches of a
    `lax.switch` would copy.

    Args:
      one_pass: of the loop, with a drafter; its state's `draft` is what that one carries.
    """

    def unfinished(carry: tuple[State, jax.Array]) -> jax.Array:
        state, left = carry
        return jnp.any(~state.decode.done) & (left > 0)

    def one(number: int, carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, left = carry
        drafter = adaptive.at(adaptive.levels[number])
        after = one_pass(drafter, replace(state, draft=state.draft.draft))
        rates = adaptive.seen(state.draft, after.draft, after.count - 1, ~after.decode.done)
        return replace(after, draft=rates), left - 1

    def rounds(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        for number in range(len(adaptive.levels)):

            def goes_on(carry: tuple[State, jax.Array], number: int = number) -> jax.Array:
                return unfinished(carry) & (carry[0].draft.level == number)

            carry = jax.lax.while_loop(goes_on, partial(one, number), carry)
        return carry

    return jax.lax.while_loop(unfinished, rounds, (state, jnp.asarray(passes, jnp.int32)))[0]


@struct.dataclass
class _Quiet:
    """Guesses nothing, and keeps up with the text, so that guessing can begin again."""

    drafter: Any
    count: int = struct.field(pytree_node=False, default=0)
    depth: int = struct.field(pytree_node=False, default=0)

    @property
    def layers(self) -> tuple[int, ...]:
        return self.drafter.layers

    def check(self, config: ModelConfig) -> None:
        self.drafter.check(config)

    def begin(self, target: Target, prompts: Prompted, capacity: int) -> Any:
        return self.drafter.begin(target, prompts, capacity)

    def propose(
        self, target: Target, state: Any, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, Any]:
        guess, state = self.drafter.propose(target, state, seen, sampler)
        none = None if guess.logits is None else guess.logits[:, :0]
        return Guess(guess.tokens[:, :0], logits=none), state
