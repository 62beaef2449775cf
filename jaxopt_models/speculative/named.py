"""Drafters by the names that commands take."""

from jaxopt_models.checkpoint.load import load
from jaxopt_models.inference import for_device
from jaxopt_models.speculative.draft_model import DraftModel
from jaxopt_models.speculative.ngram import NGram


def load_drafter(name: str, dtype: str | None = None) -> NGram | DraftModel:
    """What guesses, with as many tokens of a guess as its kind has by default.

    Args:
      name: "ngram", or a model as `load` takes it.
      dtype: of the model's activations; None is the checkpoint's.

    Raises:
      UserError: for a model that cannot be found or read.
    """
    if name == "ngram":
        return NGram()
    loaded = load(name, dtype=dtype)
    return DraftModel(loaded.config, for_device(loaded.config, loaded.params))
