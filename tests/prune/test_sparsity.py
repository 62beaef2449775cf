"""Zeros where the pattern says, and the better the method the nearer the output."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pruned_models import CONFIGS, params_of, tokens

from jaxopt_models import tree
from jaxopt_models.errors import UserError
from jaxopt_models.models.transformer import forward, forward_with_taps
from jaxopt_models.prune.patterns import Pattern, magnitude_mask, mask_of, wanda_mask
from jaxopt_models.prune.refit import refit
from jaxopt_models.prune.sparsegpt import sparsegpt
from jaxopt_models.prune.sparsity import Sparsity, sparsify

TWO_OF_FOUR, HALF = Pattern.parse("2:4"), Pattern.parse(0.5)
each_pattern = pytest.mark.parametrize("pattern", [TWO_OF_FOUR, HALF], ids=["2:4", "half"])


def _layer(rows=24, columns=40, correlation=1.0):
    """A matrix and the second moment of correlated inputs of unequal size."""
    rng = np.random.default_rng(0)
    mixing = np.eye(columns) + correlation * rng.standard_normal((columns, columns))
    mixing *= rng.lognormal(0, 0.5, columns)
    x = rng.standard_normal((400, columns)) @ mixing
    weight = rng.standard_normal((rows, columns))
    return jnp.asarray(weight, jnp.float32), jnp.asarray(x.T @ x / 400, jnp.float32)


def _error(weight, found, moment):
    """tr(Δ H Δᵀ) in float64."""
    lost = np.asarray(weight, np.float64) - np.asarray(found, np.float64)
    return float(np.sum(lost @ np.asarray(moment, np.float64) * lost))


def _by_the_paper(weight, moment, pattern, damping, block):
    """SparseGPT column by column with the inverse Hessian's upper factor, as published."""
    w, h = np.asarray(weight, np.float64).copy(), np.asarray(moment, np.float64)
    h = h + damping * np.mean(np.diag(h)) * np.eye(len(h))
    upper = np.linalg.cholesky(np.linalg.inv(h)).T
    keep = np.ones(w.shape, bool)
    for start in range(0, len(h), block):
        stop = min(start + block, len(h))
        score = w[:, start:stop] ** 2 / np.diag(upper)[start:stop] ** 2
        if not pattern.group:
            order = np.argsort(score, axis=None)[: round(pattern.sparsity * score.size)]
            inside = np.ones(score.shape, bool)
            inside.reshape(-1)[order] = False
            keep[:, start:stop] = inside
        for i in range(start, stop):
            if pattern.group and i % pattern.group == 0:
                at = slice(i, i + pattern.group)
                score = w[:, at] ** 2 / np.diag(upper)[at] ** 2
                ranks = np.argsort(np.argsort(score, axis=1), axis=1)
                keep[:, at] = ranks >= pattern.zeros
            new = np.where(keep[:, i], w[:, i], 0.0)
            error = (w[:, i] - new) / upper[i, i]
            w[:, i:] -= np.outer(error, upper[i, i:])
            w[:, i] = new
    return w, keep


@each_pattern
@pytest.mark.parametrize("block", [16, 128])
def test_sparsegpt_is_that_of_the_paper(pattern, block):
    weight, moment = _layer(correlation=0.1)  # such that float32 makes the choices of float64
    found, keep, used = sparsegpt(weight, moment, pattern, damping=0.01, block=block)
    expected, places = _by_the_paper(weight, moment, pattern, 0.01, block)
    assert used == pytest.approx(0.01)
    np.testing.assert_array_equal(keep, places)
    np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-3)


@each_pattern
def test_each_step_comes_nearer_to_the_output(pattern):
    weight, moment = _layer()
    magnitude, wanda = magnitude_mask(weight, pattern), wanda_mask(weight, moment, pattern)
    updated, places, _ = sparsegpt(weight, moment, pattern, damping=1e-4)
    errors = {
        "magnitude": _error(weight, jnp.where(magnitude, weight, 0.0), moment),
        "wanda": _error(weight, jnp.where(wanda, weight, 0.0), moment),
        "places of sparsegpt": _error(weight, jnp.where(places, weight, 0.0), moment),
        "sparsegpt": _error(weight, updated, moment),
        "exact on its places": _error(weight, refit(weight, moment, places, 1e-4), moment),
    }
    assert errors["wanda"] < errors["magnitude"]
    assert errors["sparsegpt"] < errors["places of sparsegpt"]
    assert errors["exact on its places"] < errors["sparsegpt"]
    assert errors["exact on its places"] < 0.7 * errors["wanda"]
    for mask in (magnitude, wanda, places):
        assert float(mask.mean()) == pytest.approx(0.5, abs=0.01)


@each_pattern
def test_an_exact_refit_cannot_be_improved(pattern):
    """Its error is orthogonal to every column that it may use; its zeros are where they were."""
    weight, moment = _layer()
    mask = wanda_mask(weight, moment, pattern)
    if not pattern.group:
        mask = magnitude_mask(weight, pattern)  # rows keep different numbers
        assert len(set(np.asarray(mask.sum(axis=1)).tolist())) > 1
    found = refit(weight, moment, mask, 1e-3)
    assert not bool(jnp.any(jnp.where(mask, 0.0, found)))
    damped = np.asarray(moment, np.float64)
    damped += 1e-3 * np.mean(np.diag(damped)) * np.eye(len(damped))
    slope = (np.asarray(weight, np.float64) - np.asarray(found, np.float64)) @ damped
    scale = np.abs(np.asarray(weight, np.float64) @ damped).max()
    assert np.abs(np.where(mask, slope, 0.0)).max() < 1e-4 * scale
    assert np.abs(np.where(mask, 0.0, slope)).max() > 1e-2 * scale


def test_places_of_zeros():
    scores = jnp.asarray([[5.0, 1, 2, 6, 0, 3, 4, 7], [1.0, 1, 1, 1, 9, 8, 7, 6]])
    groups = [[1, 0, 0, 1, 0, 0, 1, 1], [1, 1, 0, 0, 1, 1, 0, 0]]
    np.testing.assert_array_equal(mask_of(scores, TWO_OF_FOUR, "row"), groups)
    rows = [[1, 0, 0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
    np.testing.assert_array_equal(mask_of(scores, HALF, "row"), rows)
    whole = mask_of(scores, Pattern.parse("0.75"), "matrix")
    largest = [[0, 0, 0, 0, 0, 0, 0, 1], [0, 0, 0, 0, 1, 1, 1, 0]]  # of two sevens the first
    np.testing.assert_array_equal(whole, largest)


@pytest.mark.parametrize("text", ["4:2", "2:2", "0", 1.0, "half", "0:4"])
def test_patterns_that_are_none(text):
    with pytest.raises(UserError, match="give n:m with 0 < n < m"):
        Pattern.parse(text)


def test_columns_that_nothing_reads_are_the_first_to_go():
    weight, moment = _layer()
    dead = jnp.arange(40) % 4 == 1
    moment = jnp.where(dead[:, None] | dead[None, :], 0.0, moment)
    found, _, _ = sparsegpt(weight, moment, TWO_OF_FOUR)
    assert not bool(jnp.any(jnp.where(dead[None], found, 0.0)))


@pytest.fixture(scope="module")
def sparse():
    """Errors of final logits by method and update, and the last result."""
    config, params, text = (
        CONFIGS["tied"],
        params_of("tied"),
        [tokens(8, 32, seed) for seed in (1, 2)],
    )
    plans = [
        Sparsity(TWO_OF_FOUR, "magnitude", "none"),
        Sparsity(TWO_OF_FOUR, "wanda", "none"),
        Sparsity(TWO_OF_FOUR, "wanda", "exact"),
        Sparsity(TWO_OF_FOUR, "sparsegpt", "obs"),
    ]
    results = {(p.method, p.update): sparsify(config, params, p, text) for p in plans}
    return config, params, text, results


def test_a_model_has_zeros_in_every_matrix_and_stays_near(sparse):
    config, params, text, results = sparse
    original = forward(config, params, text[0])
    errors = {}
    for kind, (found, reports) in results.items():
        assert [r.path for r in reports] == list(tree.select(params, "layers/*_proj/weight"))
        for path, leaf in tree.leaves_with_paths(found):
            before = tree.select(params, path)[path]
            if path.endswith("_proj/weight"):
                zeros = (leaf.reshape(leaf.shape[0], -1, 4) == 0).sum(axis=-1)
                assert int(zeros.min()) == 2 == int(zeros.max()), path
            else:
                assert leaf is before
        assert {r.sparsity for r in reports} == {0.5}
        errors[kind] = float(jnp.mean((forward(config, found, text[0]) - original) ** 2))
    assert errors["wanda", "exact"] < errors["wanda", "none"] < errors["magnitude", "none"]
    assert errors["sparsegpt", "obs"] < errors["wanda", "none"]


def test_inputs_are_those_behind_sparse_layers(sparse):
    """The reported error of a later matrix is that on the text as earlier layers pass it on."""
    config, params, text, results = sparse
    found, reports = results["wanda", "exact"]
    path = "layers/2/self_attn/q_proj/weight"
    tap = path.removesuffix("weight") + "input"
    rows = [forward_with_taps(config, found, batch, [tap])[1][tap] for batch in text]
    x = jnp.concatenate([batch.reshape(-1, batch.shape[-1]) for batch in rows])
    old, new = (tree.select(side, path)[path] for side in (params, found))
    expected = jnp.linalg.norm(x @ (old - new).T) / jnp.linalg.norm(x @ old.T)
    reported = {r.path: r.output_error for r in reports}[path]
    assert reported == pytest.approx(float(expected), rel=1e-3)


def test_experts_and_choices_of_weights():
    config, params = CONFIGS["mixtral"], params_of("mixtral")
    chosen = ("layers/*/experts/*_proj/weight",)
    plan = Sparsity(TWO_OF_FOUR, weights=chosen)
    found, reports = sparsify(config, params, plan, [tokens(8, 32)])
    assert len(reports) == 9 and all(report.sparsity == 0.5 for report in reports)
    attention = found["layers"][0]["self_attn"]["q_proj"]["weight"]
    assert attention is params["layers"][0]["self_attn"]["q_proj"]["weight"]


def test_magnitudes_need_no_text_and_host_arrays_stay():
    params = jax.tree.map(np.asarray, params_of("tied"))
    found, reports = sparsify(CONFIGS["tied"], params, Sparsity(HALF, "magnitude", "none"))
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert {report.output_error for report in reports} == {None}


def test_what_cannot_be_done_is_refused():
    config, params = CONFIGS["mixtral"], params_of("mixtral")
    with pytest.raises(UserError, match="update 'obs' belongs to method 'sparsegpt'"):
        Sparsity(HALF, "wanda", "obs")
    with pytest.raises(UserError, match="method 'best' is unknown"):
        Sparsity(HALF, "best", "none")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="reads text; give batches"):
        sparsify(config, params, Sparsity(HALF))
    with pytest.raises(UserError, match="embed_tokens/weight is no matrix of a decoder layer"):
        sparsify(config, params, Sparsity(HALF, weights=("embed*",)), [tokens()])
    with pytest.raises(UserError, match="no whole groups of 5"):
        sparsify(config, params, Sparsity(Pattern.parse("2:5")), [tokens()])
    with pytest.raises(UserError, match="expert . of layers/0/mlp/experts/.*saw no token"):
        sparsify(config, params, Sparsity(HALF), [tokens(1, 1)])
