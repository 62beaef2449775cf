"""What guesses the next tokens, as the loop sees it."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
from flax import struct

from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sampling import Sampler
from jaxopt_models.speculative.tree import Guess


@struct.dataclass
class Target:
    """The model that decides, of which a drafter may use parts: its embedding, its output head."""

    config: ModelConfig = struct.field(pytree_node=False)
    params: Any


@struct.dataclass
class Prompted:
    """What is known before the first guess.

    Attributes:
      tokens: int32 [B, W], padded on the right.
      lengths: int32 [B], tokens of each prompt.
      features: [B, W, F], of these tokens; the last one's are seen again.
    """

    tokens: jax.Array
    lengths: jax.Array
    features: jax.Array


@struct.dataclass
class Seen:
    """What is known when a guess is due.

    Attributes:
      tokens: int32 [B, S]; what lies behind `length` is not defined.
      length: int32 [B], committed tokens, at least 2: the prompt and the first new one.
      features: [B, W, F], what the model thought of the tokens that it was run on last, those that
        were committed since the pass before: column j is position length - count - 1 + j.
      count: int32 [B], columns that are defined, 1 to W. The token of the last position is not
        among them: the model has not been run on it.
    """

    tokens: jax.Array
    length: jax.Array
    features: jax.Array
    count: jax.Array


class Drafter(Protocol):
    """Guesses tokens. A pytree, whose arrays are its parameters; its methods are pure.

    A guess is never an error, however bad: it only goes unused.
    """

    @property
    def count(self) -> int:
        """Tokens of a guess; static, at least 1."""
        ...

    @property
    def depth(self) -> int:
        """Tokens of a guess that may be right together; static. That of a chain is its count."""
        ...

    @property
    def layers(self) -> tuple[int, ...]:
        """Features that it looks at, see `cached.decode_step_with_features`; static."""
        ...

    def check(self, config: ModelConfig) -> None:
        """Raises UserError if it cannot guess for this model."""
        ...

    def begin(self, target: Target, prompts: Prompted, capacity: int) -> Any:
        """What it carries from pass to pass, any pytree.

        Args:
          target: the model that decides.
          prompts: that it begins with.
          capacity: places of a row, guesses aside, which may run over it.
        """
        ...

    def propose(
        self, target: Target, state: Any, seen: Seen, sampler: Sampler
    ) -> tuple[Guess, Any]:
        """(guess of the tokens at positions length, length + 1, …; state).

        Args:
          target: the model that decides.
          state: of the pass before, with what remains of guesses that went wrong.
          seen: see there.
          sampler: what to choose with. Its noise is that of the model, if the verification has it
            so, and a guess that shares it is right more often.
        """
        ...


def check_layers(layers: Sequence[int], config: ModelConfig) -> None:
    """Raises UserError unless the model has the layers that a head reads."""
    if not all(0 <= i < config.num_layers for i in layers):
        raise UserError(
            f"the draft head reads layers {list(layers)}, and the model has {config.num_layers}; "
            "it was made for another model"
        )
