"""Speculative decoding: cheap guesses, which the model checks several at a time, losing nothing.

generate(config, params, prompts, draft=NGram())
generate(config, params, prompts, draft=DraftModel(small.config, small.params, count=4))
"""

from jaxopt_models.speculative.adaptive import Adaptive
from jaxopt_models.speculative.draft import Drafter, Seen, Target
from jaxopt_models.speculative.draft_model import DraftModel
from jaxopt_models.speculative.eagle3 import Eagle3
from jaxopt_models.speculative.eagle3_params import init_eagle3
from jaxopt_models.speculative.growth import TreeDrafter
from jaxopt_models.speculative.loop import begin, speculate
from jaxopt_models.speculative.medusa import Medusa, init_medusa
from jaxopt_models.speculative.ngram import NGram
from jaxopt_models.speculative.tree import Guess

__all__ = [
    "Adaptive",
    "DraftModel",
    "Drafter",
    "Eagle3",
    "Guess",
    "Medusa",
    "NGram",
    "Seen",
    "Target",
    "TreeDrafter",
    "begin",
    "init_eagle3",
    "init_medusa",
    "speculate",
]
