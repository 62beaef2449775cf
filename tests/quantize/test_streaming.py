"""A model that is larger than the memory it is quantized in: only one layer at a time is there."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import abstract_params
from jaxopt_models.progress import Description
from jaxopt_models.qtensor import QTensor
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe

BUDGET = 1.5 * 2**30  # bytes of live arrays
# 0.5 billion parameters: 2 GiB of float32.
LARGE = ModelConfig.from_hf(
    {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 18,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "tie_word_embeddings": True,
    }
)
RECIPE = Recipe.model_validate(
    {"rules": [{"match": "*_proj/weight", "weight": "nvfp4", "activation": "nvfp4"}]}
)


def host_model(config: ModelConfig) -> Model:
    """Random float32 weights on the host; arrays of one shape share their memory."""
    rng, known = np.random.default_rng(0), {}

    def leaf(path: str, like: jax.ShapeDtypeStruct) -> np.ndarray:
        if "norm" in path:
            return np.ones(like.shape, np.float32)
        if like.shape not in known:
            known[like.shape] = rng.standard_normal(like.shape, np.float32) / np.sqrt(
                np.float32(like.shape[-1])
            )
        return known[like.shape]

    return Model(config, tree.map_with_path(leaf, abstract_params(config)))


class LiveBytes:
    """Bytes of all JAX arrays that were made since, at the worst moment that was looked at."""

    def __init__(self) -> None:
        self.before = {id(array): array for array in jax.live_arrays()}
        self.peak = 0

    def look(self) -> None:
        new = [a for a in jax.live_arrays() if id(a) not in self.before and not a.is_deleted()]
        self.peak = max(self.peak, sum(array.nbytes for array in new))

    @contextmanager
    def watched(self, seconds: float) -> Iterator[None]:
        """Looks at regular intervals, from another thread."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(seconds):
                self.look()

        thread = threading.Thread(target=watch)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


@pytest.mark.slow
def test_half_a_billion_parameters_in_a_budget_that_does_not_hold_them():
    model, live = host_model(LARGE), LiveBytes()
    leaves = jax.tree.leaves(model.params)
    assert sum(leaf.size for leaf in leaves) > 0.5e9
    assert sum(leaf.nbytes for leaf in leaves) > 1.2 * BUDGET
    tokens = np.random.default_rng(1).integers(0, LARGE.vocab_size, (1, 64))
    layers = []

    def progress(items: Any, description: Description) -> Iterator[Any]:
        for item in items:
            live.look()
            layers.append(item)
            yield item

    with live.watched(seconds=0.02):
        params, report = quantize(model, RECIPE, [tokens], progress)
    one_layer = sum(leaf.nbytes for leaf in jax.tree.leaves(model.params["layers"][0]))
    assert layers == list(range(LARGE.num_layers))
    assert one_layer < live.peak < BUDGET
    assert {type(leaf) for leaf in jax.tree.leaves(params)} == {np.ndarray}
    quantized = [leaf for _, leaf in tree.leaves_with_paths(params) if isinstance(leaf, QTensor)]
    assert len(quantized) == len(report.tensors) == 7 * LARGE.num_layers
