"""What guesses the next tokens, as the loop sees it."""

from typing import Any, Protocol

import jax

from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sampling import Sampler


class Drafter(Protocol):
    """Guesses a chain of tokens. A pytree, whose arrays are its parameters; its methods are pure.

    A guess is never an error, however bad: it only goes unused.
    """

    @property
    def count(self) -> int:
        """Tokens of a guess; static, at least 1."""
        ...

    def check(self, config: ModelConfig) -> None:
        """Raises UserError if it cannot guess for this model."""
        ...

    def begin(self, prompts: jax.Array, lengths: jax.Array, capacity: int) -> Any:
        """What it carries from pass to pass, any pytree.

        Args:
          prompts: int32 [B, W], padded on the right.
          lengths: int32 [B], tokens of each prompt.
          capacity: places of a row, guesses aside, which may run over it.
        """
        ...

    def propose(
        self, state: Any, tokens: jax.Array, length: jax.Array, sampler: Sampler
    ) -> tuple[jax.Array, Any]:
        """(int32 [B, count], guesses of the tokens at positions length, length + 1, …; state).

        Args:
          state: of the pass before, with what remains of guesses that went wrong.
          tokens: int32 [B, capacity]; what lies behind `length` is not defined.
          length: int32 [B], committed tokens, at least 2: the prompt and the first new one.
          sampler: what the model will choose with, whose noise a guess may share.
        """
        ...
