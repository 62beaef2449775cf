"""Which guesses are kept, by what the model says behind each: two ways to decide.

`Coupled`, which is what generation does unless told otherwise, takes what the model would take
there anyway, with the noise of the request and the position; a guess that is the same is right. The
tokens are those of plain generation, whatever guesses.

`Rejection` lets a drafter draw guesses d_i from its own distribution q_i, and keeps each with a
probability; p_i is what the model draws from at that place, u_i uniform in [0, 1):

    keep d_i while u_i q_i(d_i) < p_i(d_i)            i = 1..n
    then draw from max(p_{n+1} - q_{n+1}, 0) / Σ      where all were kept, from p_{N+1}

The tokens are distributed as those of plain generation, and are not the same. A guess is kept with
the probability Σ min(p, q) = 1 - d, d being the total variation between the distributions; coupled
noise gives (1 - d) / (1 + d) at least. References: Leviathan et al. 2022, arXiv:2211.17192; Chen et
al. 2023, arXiv:2302.01318; Daliri et al. 2024, arXiv:2408.07978.
"""

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jaxopt_models.errors import UserError
from jaxopt_models.sampling import Sampler, position_noise, position_uniform
from jaxopt_models.speculative.draft import Drafter
from jaxopt_models.speculative.tree import Guess, Topology, follow

# What the keys of guesses and of decisions are derived by; no request has these numbers.
_GUESSES, _DECISIONS = np.uint32(2**32 - 1), np.uint32(2**32 - 2)


class Verdict(NamedTuple):
    """What is kept.

    Attributes:
      tokens: int32 [B, D + 1], of which the first right + 1 are to be committed.
      path: int32 [B, D + 1], nodes that the tokens stand behind: of the root, and of each guess
        that was kept; anything behind these.
      right: int32 [B], guesses that were kept.
    """

    tokens: jax.Array
    path: jax.Array
    right: jax.Array


class Verification(Protocol):
    """Decides. Static: it compares by its fields."""

    def check(self, drafter: Drafter) -> None:
        """Raises UserError if it cannot judge what this drafter guesses."""
        ...

    def drawing(self, sampler: Sampler) -> Sampler:
        """What drafters choose with, of what the model chooses with."""
        ...

    def __call__(
        self,
        guess: Guess,
        tree: Topology,
        logits: jax.Array,
        places: jax.Array,
        sampler: Sampler,
        deepest: int,
    ) -> Verdict:
        """Judges a guess.

        Args:
          guess: of N tokens.
          tree: of nodes 0..N.
          logits: float32 [B, N + 1, V], of the model behind each node.
          places: int32 [B, N + 1], positions of the nodes' tokens.
          sampler: what the model chooses with.
          deepest: of the tree; static.
        """
        ...


@dataclass(frozen=True)
class Coupled:
    """A guess is right if it is what the model takes, see the module."""

    def check(self, drafter: Drafter) -> None:
        """It judges every guess."""

    def drawing(self, sampler: Sampler) -> Sampler:
        """The same noise, so that both take the same more often."""
        return sampler

    def __call__(
        self,
        guess: Guess,
        tree: Topology,
        logits: jax.Array,
        places: jax.Array,
        sampler: Sampler,
        deepest: int,
    ) -> Verdict:
        """See `Verification`, and `tree.follow`."""
        chosen = sampler(logits, places + 1)
        path, right = follow(guess.tokens, tree, chosen, deepest)
        return Verdict(jnp.take_along_axis(chosen, path, axis=1), path, right)


@dataclass(frozen=True)
class Rejection:
    """A guess is kept with the probability min(1, p / q), see the module.

    p and q are what is drawn from: after temperature, top-k and top-p. A guess without logits was
    chosen, not drawn: q is 1. Noise belongs to the request and the position here, too: guesses have
    theirs, decisions theirs, and what is drawn at last the model's. None is used again once it has
    decided anything, since the next pass begins behind it.
    """

    def check(self, drafter: Drafter) -> None:
        """Raises UserError for trees."""
        if drafter.depth != drafter.count:
            raise UserError(
                "rejection is of a chain of guesses, and this drafter guesses trees; verify them "
                "coupled, or give a chain"
            )

    def drawing(self, sampler: Sampler) -> Sampler:
        """Noise of the guesses' own."""
        return replace(sampler, key=jax.random.fold_in(sampler.key, _GUESSES))

    def __call__(
        self,
        guess: Guess,
        tree: Topology,
        logits: jax.Array,
        places: jax.Array,
        sampler: Sampler,
        deepest: int,
    ) -> Verdict:
        """See `Verification`. Without a row that samples it is the same as coupled."""
        if not sampler.stochastic:
            return COUPLED(guess, tree, logits, places, sampler, deepest)
        p, tokens = sampler.probabilities(logits), guess.tokens
        if guess.logits is None:
            q = jax.nn.one_hot(tokens, p.shape[-1], dtype=p.dtype)
        else:
            q = sampler.probabilities(guess.logits)
        key = jax.random.fold_in(sampler.key, _DECISIONS)
        uniform = position_uniform(key, sampler.request, places[:, 1:])
        right = kept(p[:, :-1], q, tokens, uniform)
        last = right[:, None]
        own, its = (
            jnp.take_along_axis(x, last[:, :, None], axis=1)
            for x in (p, jnp.pad(q, ((0, 0), (0, 1), (0, 0))))
        )
        place = jnp.take_along_axis(places, last, axis=1) + 1
        noise = position_noise(sampler.key, sampler.request, place, p.shape[-1])
        drawn = jnp.argmax(jnp.log(remainder(own, its)) + noise, axis=-1).astype(jnp.int32)
        path = jnp.broadcast_to(jnp.arange(deepest + 1, dtype=jnp.int32), places.shape)
        tokens = jnp.where(path == last, drawn, jnp.pad(tokens, ((0, 0), (0, 1))))
        return Verdict(tokens, path, right)


COUPLED = Coupled()
VerificationName = Literal["coupled", "rejection"]


def verification_of(name: VerificationName) -> Verification:
    """By its name.

    Raises:
      UserError: for another one.
    """
    known: dict[str, Verification] = {"coupled": COUPLED, "rejection": Rejection()}
    if name not in known:
        raise UserError(f"verification {name!r} is unknown; choose {' or '.join(known)}")
    return known[name]


def kept(p: jax.Array, q: jax.Array, tokens: jax.Array, uniform: jax.Array) -> jax.Array:
    """How many guesses are kept before the first that is not: u_i q_i(d_i) < p_i(d_i).

    Args:
      p, q: float32 [B, N, V].
      tokens: int32 [B, N], drawn from q.
      uniform: float32 [B, N], in [0, 1).

    Returns:
      int32 [B].
    """
    own, its = (jnp.take_along_axis(x, tokens[:, :, None], axis=2)[:, :, 0] for x in (p, q))
    return jnp.sum(jnp.cumprod((uniform * its < own).astype(jnp.int32), axis=1), axis=1)


def remainder(p: jax.Array, q: jax.Array) -> jax.Array:
    """max(p - q, 0) / Σ, what is drawn from behind a guess that was not kept; p itself where
    rounding leaves nothing.

    Args:
      p, q: float32 [..., V].
    """
    rest = jnp.maximum(p - q, 0.0)
    total = jnp.sum(rest, axis=-1, keepdims=True)
    return jnp.where(total > 0, rest / jnp.where(total > 0, total, 1.0), p)
