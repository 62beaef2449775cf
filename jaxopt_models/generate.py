"""Generation: prompts in, tokens out, in one loop on the device, with or without a draft."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np

from jaxopt_models.decoding import decode_loop, new_tokens, prompt_room, start
from jaxopt_models.errors import UserError
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.sampling import make_sampler
from jaxopt_models.speculative.draft import Drafter
from jaxopt_models.speculative.loop import begin, speculate
from jaxopt_models.speculative.ngram import NGram


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
) -> Generation:
    """Continues prompts.

    With a `draft` tokens are guessed first, and the model is run once for several of them
    (speculative decoding). The tokens are the same, at any temperature; see `speculative.loop`.

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

    Returns:
      `Generation`.

    Raises:
      UserError: for an empty batch or prompt, ids outside the vocabulary, a sampling value out of
        range, or a draft that is unknown or does not go with the model.
    """
    _check_prompts(config, prompts, max_new_tokens)
    drafter = _drafter(draft, config)
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    sampler = make_sampler(len(prompts), key=key, request_ids=request_ids, **options)
    stops = tuple(config.eos_token_ids if eos_token_ids is None else eos_token_ids)
    state = start(config, params, prompts, max_new_tokens, sampler, stops, max_prompt_tokens)
    passes = None
    if drafter is None:
        state = decode_loop(config, params, state, sampler, stops)
    else:
        first = begin(state, drafter, prompt_room(prompts, max_prompt_tokens))
        found = speculate(config, params, first, drafter, sampler, stops)
        state, passes = found.decode, np.asarray(found.passes)
    new = new_tokens(state, prompts)
    if passes is None:
        return Generation(new)
    lengths = [
        (len(row) - 1) / n if n else 1.0 for row, n in zip(new, passes.tolist(), strict=True)
    ]
    return Generation(new, lengths)


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
