"""Speculative decoding: cheap guesses, which the model checks several at a time, losing nothing.

generate(config, params, prompts, draft=NGram())
generate(config, params, prompts, draft=DraftModel(small.config, small.params, count=4))
"""

from jaxopt_models.speculative.draft import Drafter
from jaxopt_models.speculative.draft_model import DraftModel
from jaxopt_models.speculative.loop import begin, speculate
from jaxopt_models.speculative.ngram import NGram

__all__ = ["DraftModel", "Drafter", "NGram", "begin", "speculate"]
