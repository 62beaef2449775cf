"""Scores against their formulas on whole activations, and what they are good for."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import CONFIGS, params_of, tokens

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models.transformer import forward_with_taps
from jaxopt_models.prune.choose import Target, choose, largest
from jaxopt_models.prune.importance import importance


@partial(jax.jit, static_argnums=(0,))
def _tapped(config, params, text):
    return forward_with_taps(config, params, text, ["*"])[1]


def _minitron(x, lengths):
    """By its formula, sequence by sequence."""
    means = [np.abs(row[:length]).mean(axis=0) for row, length in zip(x, lengths, strict=True)]
    return np.sqrt(np.square(means).sum(axis=0))


LENGTHS = (12, 7, 9)


@pytest.fixture(scope="module", params=["gemma3", "mixtral"])
def scored(request):
    """(config, scores, taps by name): text in two batches, two rows filled up with other tokens."""
    config, params, text = CONFIGS[request.param], params_of(request.param), tokens(3)
    valid = np.arange(12)[None] < np.asarray(LENGTHS)[:, None]
    batches, parts = (text[:2], text[2:]), (valid[:2], valid[2:])
    taps = {name: np.asarray(x) for name, x in _tapped(config, params, text).items()}
    return config, importance(config, params, batches, parts), taps


def test_scores_are_those_of_the_paper(scored):
    config, found, taps = scored
    second = "pre_feedforward" if config.sandwich_norm else "post_attention"
    hidden = 0
    for i in range(config.num_layers):
        for norm in ("input", second):
            hidden += _minitron(taps[f"layers/{i}/{norm}_layernorm/output"], LENGTHS)
        heads = _minitron(taps[f"layers/{i}/self_attn/o_proj/input"], LENGTHS).reshape(2, 2, 8)
        np.testing.assert_allclose(found.heads[i], np.linalg.norm(heads, axis=-1), rtol=1e-4)
        before, behind = taps[f"layers/{i}/input"], taps[f"layers/{i}/output"]
        cosine = np.sum(before * behind, -1) / (
            np.linalg.norm(before, axis=-1) * np.linalg.norm(behind, axis=-1)
        )
        kept = np.concatenate([row[:n] for row, n in zip(cosine, LENGTHS, strict=True)])
        assert float(found.layers[i]) == pytest.approx(1 - kept.mean(), rel=1e-4, abs=1e-6)
        if not config.moe_layers:
            neurons = _minitron(taps[f"layers/{i}/mlp/down_proj/input"], LENGTHS)
            np.testing.assert_allclose(found.neurons[i], neurons, rtol=1e-4)
    np.testing.assert_allclose(found.hidden, hidden, rtol=1e-4)


def test_experts_are_scored_on_the_tokens_that_are_sent_to_them(scored):
    config, found, taps = scored
    for i in config.moe_layers:
        prefix = f"layers/{i}/mlp/"
        weights = taps[f"{prefix}router/output"].reshape(-1)
        sizes, order = (taps[f"{prefix}experts/{name}"] for name in ("group_sizes", "order"))
        out, hidden = (taps[f"{prefix}experts/down_proj/{end}"] for end in ("output", "input"))
        score, count = np.zeros(4), np.zeros(4)
        means = np.zeros((4, 3, hidden.shape[-1]))
        for row, expert in enumerate(np.repeat(np.arange(4), sizes)):
            sequence, place = divmod(order[row] // 2, 12)
            if place < LENGTHS[sequence]:
                count[expert] += 1
                score[expert] += weights[order[row]] * np.linalg.norm(out[row])
                means[expert, sequence] += np.abs(hidden[row]) / LENGTHS[sequence]
        assert count.sum() == 2 * sum(LENGTHS)
        np.testing.assert_array_equal(found.expert_tokens[i], count)
        np.testing.assert_allclose(found.experts[i], score / np.maximum(count, 1), rtol=1e-4)
        neurons = np.sqrt(np.square(means).sum(axis=1))
        np.testing.assert_allclose(found.neurons[i], neurons, rtol=1e-4, atol=1e-6)
    assert config.moe_layers or found.experts == (None,) * 3


def test_what_stands_behind_a_text_counts_nowhere():
    config, params, text = CONFIGS["tied"], params_of("tied"), np.asarray(tokens(2))
    valid = np.ones((2, 12), bool)
    valid[:, 8:] = False
    changed = np.where(valid, text, 63 - text)
    first, second = (importance(config, params, [t], [valid]) for t in (text, changed))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), first, second)
    alone = importance(config, params, [text[:, :8]])
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), first, alone)


def test_scores_may_count_the_columns_that_read_a_channel():
    config, params = CONFIGS["mixtral"], params_of("mixtral")
    plain, weighted = (
        importance(config, params, [tokens()], weighted=weighted) for weighted in (False, True)
    )
    down = params["layers"][1]["mlp"]["experts"]["down_proj"]["weight"]
    expected = plain.neurons[1] * jnp.linalg.norm(down, axis=1)
    np.testing.assert_allclose(weighted.neurons[1], expected, rtol=1e-5)
    assert not np.allclose(weighted.heads[1], plain.heads[1])
    np.testing.assert_allclose(weighted.hidden, plain.hidden, rtol=1e-6)


def test_sites_may_count_equally():
    config, params = CONFIGS["tied"], params_of("tied")
    loud = tree.map_with_path(
        lambda path, x: x * 100 if path == "layers/1/input_layernorm/weight" else x, params
    )
    plain, equal = (
        importance(config, loud, [tokens()], equal_sites=equal).hidden for equal in (False, True)
    )
    quiet = importance(config, params, [tokens()], equal_sites=True).hidden
    assert not np.allclose(plain / plain.sum(), equal / equal.sum(), rtol=0.05)
    assert equal.sum() == pytest.approx(float(quiet.sum()), rel=0.1)


def test_the_most_important_are_kept():
    found = importance(CONFIGS["qwen3_moe"], params_of("qwen3_moe"), [tokens()])
    target = Target(
        hidden=18,
        layers=2,
        groups=1,
        heads=(1, 2, 1),
        neurons=30,
        experts=(2, 4, 3),
        expert_neurons=7,
        multiple=8,
    )
    masks = choose(found, target)
    assert masks.hidden.sum() == 24 and masks.layers.sum() == 2
    assert [float(mask.sum()) for mask in masks.heads] == [1, 2, 1]
    assert [mask.sum(axis=-1).tolist() for mask in masks.neurons] == [[8.0] * 4, 32.0, [8.0] * 4]
    assert [None if m is None else float(m.sum()) for m in masks.experts] == [2, None, 3]
    for mask, scores in zip(jax.tree.leaves(masks), _leaves(found), strict=True):
        if mask.ndim == 1 and 0 < mask.sum() < mask.size:
            assert float(scores[mask > 0].min()) >= float(scores[mask == 0].max())


def _leaves(found):
    return jax.tree.leaves(dataclasses.replace(found, expert_tokens=()))


def test_ties_go_to_the_first():
    np.testing.assert_array_equal(largest("x", jnp.asarray([1.0, 2, 2, 1]), 3), [1, 1, 1, 0])


def test_scores_of_nothing_and_impossible_targets_are_refused():
    config, params, text = CONFIGS["tied"], params_of("tied"), tokens()
    with pytest.raises(UserError, match="no batches"):
        importance(config, params, [])
    with pytest.raises(UserError, match="leaves a row of batch 0 without a token"):
        importance(config, params, [text], [np.zeros((2, 12))])
    with pytest.raises(UserError, match="one array for each batch, of its shape"):
        importance(config, params, [text], [np.ones((2, 5))])
    broken = tree.map_with_path(
        lambda p, x: x * jnp.nan if p == "layers/1/mlp/up_proj/weight" else x, params
    )
    with pytest.raises(UserError, match="activations of layer 1 are not finite"):
        importance(config, broken, [text])
    found = importance(config, params, [text])
    with pytest.raises(UserError, match="hidden: cannot keep 33 of 32"):
        choose(found, Target(hidden=33))
    with pytest.raises(UserError, match="neurons: 2 numbers for 3 layers"):
        choose(found, Target(neurons=(1, 2)))
