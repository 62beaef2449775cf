"""Evaluation: each figure against the same figure from whole logits, in float64 and without jax."""

import dataclasses
import functools
import math
from importlib import import_module
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.evaluate import Metrics, evaluate, reference
from jaxopt_models.models.config import ModelConfig
from jaxopt_models.models.model import Model
from jaxopt_models.models.transformer import forward, init
from jaxopt_models.qtensor import quantize_array
from jaxopt_models.quantize.ptq import quantize
from jaxopt_models.quantize.recipe import Recipe

CHUNK = import_module("jaxopt_models.evaluate")._POSITIONS

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
UNTIED = ModelConfig.from_hf({"model_type": "llama"} | _SIZES)
TIED = ModelConfig.from_hf({"model_type": "llama", "tie_word_embeddings": True} | _SIZES)
# A cap so low that it bends most logits, on a tied head.
CAPPED = ModelConfig.from_hf(
    {
        "model_type": "gemma3_text",
        "sliding_window": 8,
        "final_logit_softcapping": 0.5,
        "head_dim": 16,
    }
    | _SIZES
)
MODELS = {"untied": UNTIED, "tied": TIED, "capped": CAPPED}


@functools.cache
def params(config: ModelConfig, seed: int = 0) -> Any:
    model = init(config, jax.random.key(seed))
    if not config.tie_word_embeddings:
        return model
    # As small as embeddings begin, a tied head would predict much the same of every token.
    return tree.replace(model, {"embed_tokens/weight": 20 * model["embed_tokens"]["weight"]})


@functools.cache
def student(config: ModelConfig) -> Any:
    """The model with a share of another one mixed in: near enough to agree now and then."""
    return jax.tree.map(lambda a, b: a + 0.3 * b, params(config), params(config, 1))


def text(rows: int, length: int, seed: int = 0) -> jax.Array:
    ids = np.random.default_rng(seed).integers(0, _SIZES["vocab_size"], (rows, length))
    return jnp.asarray(ids, jnp.int32)


# Two whole chunks and a bit; a single position; a batch that is smaller than a chunk.
RAGGED = (text(9, 2 * CHUNK // 8, seed=1), text(1, 2, seed=2), text(3, 12, seed=3))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def directly(config: ModelConfig, model: Any, batches: Any, original: Any) -> dict[str, float]:
    """Perplexity, KL and agreement by their definitions."""
    nll, kl, same = [], [], []
    for batch in batches:
        ids = np.asarray(batch)
        log_q, log_p = (
            log_softmax(np.asarray(forward(config, m, batch), np.float64)[:, :-1])
            for m in (model, original)
        )
        nll.append(-np.take_along_axis(log_q, ids[:, 1:, None], axis=-1).ravel())
        kl.append((np.exp(log_p) * (log_p - log_q)).sum(-1).ravel())
        same.append((log_p.argmax(-1) == log_q.argmax(-1)).ravel())
    nll, kl, same = (np.concatenate(values) for values in (nll, kl, same))
    return {
        "perplexity": math.exp(nll.mean()),
        "nll": nll.mean(),
        "kl": kl.mean(),
        "top1_agreement": same.mean(),
        "positions": nll.size,
    }


def test_the_ragged_text_covers_the_cases():
    counts = [batch.shape[0] * (batch.shape[1] - 1) for batch in RAGGED]
    assert counts[0] > 2 * CHUNK and counts[0] % CHUNK
    assert counts[1] == 1 and counts[2] < CHUNK


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_every_figure_is_the_mean_over_all_predicted_positions(config):
    metrics = evaluate(config, student(config), RAGGED, reference=params(config)).as_dict()
    expected = directly(config, student(config), RAGGED, params(config))
    assert 0.02 < expected["top1_agreement"] < 0.98 and expected["kl"] > 1e-4
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-5), name


def test_a_batch_of_whole_chunks_counts_them_all():
    batches = [text(CHUNK // 16, 33, seed=5)]  # exactly two
    metrics = evaluate(UNTIED, params(UNTIED), batches)
    expected = directly(UNTIED, params(UNTIED), batches, params(UNTIED))
    assert metrics.positions == expected["positions"] == 2 * CHUNK
    assert metrics.nll == pytest.approx(expected["nll"], rel=1e-5)


def test_the_cut_into_batches_does_not_matter():
    rows = text(6, 12, seed=6)
    whole = evaluate(UNTIED, student(UNTIED), [rows], params(UNTIED))
    cut = evaluate(UNTIED, student(UNTIED), iter([rows[:5], rows[5:]]), params(UNTIED))
    assert dataclasses.asdict(cut) == pytest.approx(dataclasses.asdict(whole), rel=1e-5)


@pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
def test_a_model_is_at_no_distance_from_itself(config):
    metrics = evaluate(config, params(config), RAGGED, reference=params(config))
    assert metrics.kl == 0
    assert metrics.top1_agreement == 1


def test_the_soft_cap_is_applied():
    uncapped = dataclasses.replace(CAPPED, final_softcap=None)
    with_cap, without = (evaluate(c, params(CAPPED), RAGGED[2:]) for c in (CAPPED, uncapped))
    assert with_cap.nll < without.nll - 0.1
    # Logits within ±c: no token can be further from uniform than 2c nats.
    assert abs(with_cap.nll - math.log(64)) <= 2 * 0.5


def test_divergence_has_a_direction():
    forth = evaluate(UNTIED, student(UNTIED), RAGGED[2:], reference=params(UNTIED))
    back = evaluate(UNTIED, params(UNTIED), RAGGED[2:], reference=student(UNTIED))
    assert forth.kl != back.kl and forth.top1_agreement == back.top1_agreement


def test_without_a_reference_nothing_is_compared():
    alone = evaluate(UNTIED, student(UNTIED), RAGGED[2:])
    compared = evaluate(UNTIED, student(UNTIED), RAGGED[2:], reference=params(UNTIED))
    assert (alone.kl, alone.top1_agreement) == (None, None)
    assert alone == dataclasses.replace(compared, kl=None, top1_agreement=None)


def test_uniform_predictions_have_the_perplexity_of_the_vocabulary():
    flat = tree.replace(params(UNTIED), {"lm_head/weight": jnp.zeros((64, 32))})
    metrics = evaluate(UNTIED, flat, RAGGED[2:])
    assert metrics.perplexity == pytest.approx(64, rel=1e-5)


# A reference that was run before


def test_a_reference_that_was_run_before_gives_the_same_figures():
    known = reference(UNTIED, params(UNTIED), iter(RAGGED))
    assert evaluate(UNTIED, student(UNTIED), RAGGED, reference=known) == evaluate(
        UNTIED, student(UNTIED), RAGGED, reference=params(UNTIED)
    )
    assert evaluate(UNTIED, params(UNTIED), RAGGED, reference=known).kl == 0


def test_a_reference_may_have_another_architecture():
    small = dataclasses.replace(UNTIED, num_layers=1, attention_kinds=("full",))
    pruned = params(UNTIED) | {"layers": params(UNTIED)["layers"][:1]}
    known = reference(UNTIED, params(UNTIED), RAGGED[2:])
    metrics = evaluate(small, pruned, RAGGED[2:], reference=known)
    whole, cut = (
        log_softmax(np.asarray(forward(config, model, RAGGED[2]), np.float64)[:, :-1])
        for config, model in ((UNTIED, params(UNTIED)), (small, pruned))
    )
    expected = (np.exp(whole) * (whole - cut)).sum(-1).mean()
    assert metrics.kl == pytest.approx(expected, rel=2e-5)


@pytest.mark.parametrize(
    "others", [RAGGED[1:2], RAGGED[1:], RAGGED[::-1][:1] * 2, (RAGGED[2].at[0, 0].add(1) % 64,)]
)
def test_a_reference_belongs_to_its_batches(others):
    known = reference(UNTIED, params(UNTIED), RAGGED[2:])
    with pytest.raises(UserError, match=r"other batches; run reference\(\) on these"):
        evaluate(UNTIED, params(UNTIED), others, reference=known)


def test_a_reference_must_share_the_vocabulary():
    larger = dataclasses.replace(UNTIED, vocab_size=80)
    known = reference(larger, params(larger), RAGGED[2:])
    with pytest.raises(UserError, match="80 tokens in its vocabulary, the model 64"):
        evaluate(UNTIED, params(UNTIED), RAGGED[2:], reference=known)


# Sizes


def sizes(config: ModelConfig, model: Any) -> Metrics:
    return evaluate(config, model, RAGGED[1:2])


@pytest.mark.parametrize("dtype, bits", [(jnp.float32, 32), (jnp.bfloat16, 16)])
def test_plain_weights_take_the_bits_of_their_dtype(dtype, bits):
    model = init(UNTIED, jax.random.key(0), dtype)
    metrics = sizes(UNTIED, model)
    assert metrics.bits_per_weight == bits
    assert metrics.bytes == sum(leaf.nbytes for leaf in jax.tree.leaves(model))


def test_bits_are_counted_from_what_a_format_stores():
    """NVFP4: 4 bits a weight, 8 for each started block of 16 in a row, 32 a matrix."""
    recipe = Recipe.load("nvfp4_weight_only")
    qparams, _ = quantize(Model(UNTIED, params(UNTIED)), recipe)
    plain = dict(tree.leaves_with_paths(params(UNTIED)))
    matrices = [leaf for path, leaf in plain.items() if tree.is_decoder_matrix(path, leaf)]
    stored = sum(4 * n * k + 8 * n * -(-k // 16) + 32 for n, k in (m.shape for m in matrices))
    weights = sum(m.size for m in matrices)
    assert {m.shape[1] % 16 for m in matrices} == {0, 8}
    metrics = sizes(UNTIED, qparams)
    assert metrics.bits_per_weight == pytest.approx(stored / weights, rel=1e-12)
    rest = 4 * (sum(leaf.size for leaf in plain.values()) - weights)
    assert metrics.bytes == stored // 8 + rest


def test_a_quantized_output_head_counts_in_bytes_but_not_in_bits_per_weight():
    head = quantize_array(params(UNTIED)["lm_head"]["weight"], "int8", granularity="channel")
    before = sizes(UNTIED, params(UNTIED))
    after = sizes(UNTIED, tree.replace(params(UNTIED), {"lm_head/weight": head}))
    assert after.bits_per_weight == before.bits_per_weight == 32
    assert before.bytes - after.bytes == 3 * 64 * 32 - 4 * 64  # one byte a weight, a scale a row


def test_metrics_are_json_values():
    fields = evaluate(UNTIED, params(UNTIED), RAGGED[2:], reference=params(UNTIED)).as_dict()
    assert {name: type(value) for name, value in fields.items()} == {
        "perplexity": float,
        "nll": float,
        "kl": float,
        "top1_agreement": float,
        "bits_per_weight": float,
        "bytes": int,
        "positions": int,
    }


def test_progress_wraps_the_batches():
    seen = []

    def progress(items, description):
        for item in items:
            yield item
            seen.append(description)

    known = reference(UNTIED, params(UNTIED), RAGGED[1:], progress)
    evaluate(UNTIED, params(UNTIED), RAGGED[1:], known, progress)
    assert seen == ["running the reference"] * 2 + ["evaluating"] * 2


# What it refuses


@pytest.mark.parametrize("run", [evaluate, reference])
@pytest.mark.parametrize(
    "batches, problem",
    [
        ([], "no batches were given"),
        ([np.array([[1, 64]])], "outside the vocabulary of 64"),
        ([np.array([[-1, 3]])], "outside the vocabulary of 64"),
        ([np.array([1, 2, 3])], "L >= 2"),
        ([np.array([[1], [2]])], "L >= 2"),
        ([np.zeros((0, 4), np.int32)], "B >= 1"),
        ([np.array([[0.5, 1.5]])], "integer token ids"),
    ],
)
def test_batches_must_be_windows_of_ids(run, batches, problem):
    with pytest.raises(UserError, match=problem):
        run(UNTIED, params(UNTIED), batches)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_must_be_finite(value):
    weight = params(UNTIED)["norm"]["weight"].at[3].set(value)
    broken = tree.replace(params(UNTIED), {"norm/weight": weight})
    with pytest.raises(UserError, match="the model's logits are not finite"):
        evaluate(UNTIED, broken, RAGGED[2:])
    with pytest.raises(UserError, match="the model's logits are not finite"):
        evaluate(UNTIED, broken, RAGGED[2:], reference=params(UNTIED))
    with pytest.raises(UserError, match="the reference's logits are not finite"):
        evaluate(UNTIED, params(UNTIED), RAGGED[2:], reference=broken)
