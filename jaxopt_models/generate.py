"""Generation: prompts in, tokens out, at once or as they come, with or without a draft."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, Unpack

import jax
import numpy as np

from jaxopt_models.decoding import (
    ENDLESS,
    DecodeState,
    decode_loop,
    new_tokens,
    start,
)
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative.draft import Drafter
from jaxopt_models.speculative.loop import SpeculativeState, begin, speculate
from jaxopt_models.speculative.ngram import NGram
from jaxopt_models.speculative.verify import VerificationName, verification_of


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    Attributes:
      tokens: new ids of each row, an end-of-sequence id included.
      acceptance_length: of each row, tokens that a pass of the model gave on average, the first
        token aside, which the prompt gives; 1 is what plain generation gives, and what a row of one
        token has. None without a draft.
    """

    tokens: list[list[int]]
    acceptance_length: list[float] | None = None


def generate(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 64,
    temperature: float | list[float] = 0.0,
    top_p: float | list[float] = 1.0,
    top_k: int | list[int] = 0,
    key: jax.Array | None = None,
    request_ids: list[int] | None = None,
    eos_token_ids: Sequence[int] | None = None,
    max_prompt_tokens: int = 1,
    draft: Drafter | Literal["ngram"] | None = None,
    verification: VerificationName = "coupled",
) -> Generation:
    """Continues prompts.

    With a `draft` tokens are guessed first, and the model is run once for several of them
    (speculative decoding). The tokens are the same, at any temperature; see `speculative.loop`.
    With verification by rejection, sampled tokens are others, of the same distribution.

    Args:
      config, params: the model; leaves may be of any kind.
      prompts: token ids of each row, of any lengths.
      max_new_tokens: where a row stops unless an end-of-sequence id comes first.
      temperature: 0 is greedy; a number or one for each row.
      top_p, top_k: see `sampling.keep_most_likely`; likewise.
      key: random key of sampled rows; None is `jax.random.key(0)`.
      request_ids: identity of each row, which its noise is keyed by; 0, 1, … by default. A request
        gets the same tokens in every batch.
      eos_token_ids: ids that end a row; the model's own by default.
      max_prompt_tokens: prompts that buffers have room for at least. Batches of the same room share
        one compilation, however long their prompts are.
      draft: what guesses, such as `speculative.NGram` or `speculative.DraftModel`; "ngram" is
        `NGram()`. None generates one token after the other.
      verification: which guesses are kept, see `speculative.verify`.

    Returns:
      `Generation`.

    Raises:
      UserError: for an empty batch or prompt, ids outside the vocabulary, a sampling value out of
        range, or a draft that is unknown or does not go with the model or the verification.
    """
    rows = _Rows(
        config,
        params,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        key=key,
        request_ids=request_ids,
        eos_token_ids=eos_token_ids,
        max_prompt_tokens=max_prompt_tokens,
        draft=draft,
        verification=verification,
    )
    rows.go_on(ENDLESS)
    new, passes = rows.new_tokens(), rows.passes()
    if passes is None:
        return Generation(new)
    lengths = [(len(row) - 1) / n if n else 1.0 for row, n in zip(new, passes, strict=True)]
    return Generation(new, lengths)


class Options(TypedDict, total=False):
    """What `generate` may be told, besides the model and the prompts."""

    max_new_tokens: int
    temperature: float | list[float]
    top_p: float | list[float]
    top_k: int | list[int]
    key: jax.Array | None
    request_ids: list[int] | None
    eos_token_ids: Sequence[int] | None
    max_prompt_tokens: int
    draft: Drafter | Literal["ngram"] | None
    verification: VerificationName


def stream(
    config: ModelConfig,
    params: Any,
    prompts: Sequence[Sequence[int]],
    *,
    passes: int = 16,
    **options: Unpack[Options],
) -> Iterator[list[list[int]]]:
    """Continues prompts, and gives the tokens as they come: `generate`'s, in pieces.

    The host waits for the device once for so many passes of the model, not for each token.

    Args:
      config, params, prompts, options: as of `generate`.
      passes: of the model, between two pieces; the first is of the prompts' pass alone.

    Yields:
      The new ids of each row since the last time, none of a row that is done.

    Raises:
      UserError: as `generate`, when the first piece is asked for; for no passes.
    """
    if passes < 1:
        raise UserError(f"passes must be at least 1; it is {passes}")
    given: dict[str, Any] = (generate.__kwdefaults__ or {}) | options
    rows = _Rows(config, params, prompts, **given)
    while True:
        yield rows.new_tokens()
        if rows.done():
            return
        rows.go_on(passes)


class _Rows:
    """A batch that is being continued, with or without a draft."""

    def __init__(
        self,
        config: ModelConfig,
        params: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        key: jax.Array | None,
        request_ids: list[int] | None,
        eos_token_ids: Sequence[int] | None,
        max_prompt_tokens: int,
        draft: Drafter | Literal["ngram"] | None,
        verification: VerificationName,
        **sampling: Any,
    ) -> None:
        """Runs the prompts, which gives the first token of each."""
        _check_prompts(config, prompts, max_new_tokens)
        self._config, self._params, self._drafter = config, params, _drafter(draft, config)
        self._verification = verification_of(verification)
        if self._drafter is not None:
            self._verification.check(self._drafter)
        self._sampler = make_sampler(len(prompts), key=key, request_ids=request_ids, **sampling)
        self._stops = tuple(config.eos_token_ids if eos_token_ids is None else eos_token_ids)
        self._told = [len(prompt) for prompt in prompts]
        given = config, params, prompts, max_new_tokens, self._sampler, self._stops
        self._state: DecodeState | SpeculativeState
        if self._drafter is None:
            self._state, _ = start(*given, max_prompt_tokens)
        else:
            self._state = begin(*given, self._drafter, max_prompt_tokens)

    @property
    def _decode(self) -> DecodeState:
        return self._state.decode if isinstance(self._state, SpeculativeState) else self._state

    def go_on(self, passes: int) -> None:
        """For so many passes, or until every row is done."""
        model, rule, most = (self._config, self._params), (self._sampler, self._stops), passes
        if isinstance(self._state, SpeculativeState):
            assert self._drafter is not None
            given = self._state, self._drafter, *rule, most, self._verification
            self._state = speculate(*model, *given)
        else:
            self._state = decode_loop(*model, self._state, *rule, most)

    def done(self) -> bool:
        return bool(np.all(self._decode.done))

    def new_tokens(self) -> list[list[int]]:
        """Of each row, those since this was asked last."""
        new = new_tokens(self._decode, self._told)
        self._told = [told + len(row) for told, row in zip(self._told, new, strict=True)]
        return new

    def passes(self) -> list[int] | None:
        """Of the model for each row until now, the prompts' aside; None without a draft."""
        if isinstance(self._state, DecodeState):
            return None
        return np.asarray(self._state.passes).tolist()


def _drafter(draft: Drafter | str | None, config: ModelConfig) -> Drafter | None:
    if isinstance(draft, str):
        if draft != "ngram":
            raise UserError(f"draft {draft!r} is unknown; choose 'ngram', or give a drafter")
        return NGram()
    if draft is not None:
        draft.check(config)
    return draft


def _check_prompts(
    config: ModelConfig, prompts: Sequence[Sequence[int]], max_new_tokens: int
) -> None:
    if not prompts:
        raise UserError("there is nothing to generate from: no prompts were given")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1; it is {max_new_tokens}")
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(
                f"prompt {i} has no tokens; begin it with the beginning-of-sequence id "
                f"{config.bos_token_id}"
            )
        if not all(0 <= token < config.vocab_size for token in prompt):
            raise UserError(
                f"prompt {i} holds ids outside the vocabulary of {config.vocab_size}; "
                "tokenize it with the model's own tokenizer"
            )
