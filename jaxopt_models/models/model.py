"""What a loaded model is."""

from dataclasses import dataclass
from typing import Any

from jaxopt_models.models.config import ModelConfig


@dataclass(frozen=True)
class Model:
    """A pretrained language model: static architecture, parameter pytree, tokenizer.

    Attributes:
      config: the architecture; hashable, so it can be a static argument of `jax.jit`.
      params: nested dict of weight leaves (`models.transformer.abstract_params` gives the layout).
      tokenizer: a transformers tokenizer, or None for models that never saw text.
      source: where it came from (path or hub id), kept as provenance.
    """

    config: ModelConfig
    params: Any
    tokenizer: Any = None
    source: str = ""
