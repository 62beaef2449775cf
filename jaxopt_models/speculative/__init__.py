"""Speculative decoding: cheap guesses, which the model checks several at a time, losing nothing.

generate(config, params, prompts, draft=NGram())
generate(config, params, prompts, draft=DraftModel(small.config, small.params, count=4))
generate(config, params, prompts, draft=Adaptive(NGram(), levels=(0, 1, 3, 7)))
"""

from jaxopt_models.speculative.adaptive import Adaptive
from jaxopt_models.speculative.dflash import DFlash
from jaxopt_models.speculative.dflash_params import init_dflash
from jaxopt_models.speculative.draft import Drafter, Prompted, Seen, Target
from jaxopt_models.speculative.draft_model import DraftModel
from jaxopt_models.speculative.eagle3 import Eagle3
from jaxopt_models.speculative.eagle3_params import init_eagle3
from jaxopt_models.speculative.growth import TreeDrafter
from jaxopt_models.speculative.loop import begin, speculate
from jaxopt_models.speculative.medusa import Medusa, init_medusa
from jaxopt_models.speculative.mtp import Mtp, init_mtp
from jaxopt_models.speculative.ngram import NGram
from jaxopt_models.speculative.tree import Guess
from jaxopt_models.speculative.verify import Coupled, Rejection, Verification

__all__ = [
    "Adaptive",
    "Coupled",
    "DFlash",
    "DraftModel",
    "Drafter",
    "Eagle3",
    "Guess",
    "Medusa",
    "Mtp",
    "NGram",
    "Prompted",
    "Rejection",
    "Seen",
    "Target",
    "TreeDrafter",
    "Verification",
    "begin",
    "init_dflash",
    "init_eagle3",
    "init_medusa",
    "init_mtp",
    "speculate",
]
