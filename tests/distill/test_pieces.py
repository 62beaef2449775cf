"""Logits a piece at a time: what is found is that of all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from teachers import CONFIG, T, V

from jaxopt_models.distill import losses, pieces
from jaxopt_models.models.transformer import logits

HEAD = {"embed_tokens": {"weight": jax.random.normal(jax.random.key(0), (V, 16))}}
HIDDEN = jax.random.normal(jax.random.key(1), (3, T, 16))


@pytest.mark.parametrize("piece", [1, 5, T, None])
def test_the_most_likely_tokens(piece):
    found = pieces.most_likely(CONFIG, HEAD, HIDDEN, 4, 2.0, piece)
    expected = losses.top_k(logits(CONFIG, HEAD, HIDDEN), 4, 2.0)
    np.testing.assert_array_equal(found.indices, expected.indices)
    for a, b in zip(jax.tree.leaves(found)[1:], jax.tree.leaves(expected)[1:], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("piece", [1, 5, T])
def test_joined_is_what_was_cut(piece):
    for array in (HIDDEN, jnp.arange(3 * T).reshape(3, T)):
        np.testing.assert_array_equal(pieces.joined(pieces.cut(array, piece), T), array)


def test_pieces_have_room():
    assert pieces.piece_length(8, 512, 49152) * 8 * 49152 <= 2**28
    assert pieces.piece_length(8, 4, 64) == 4
    assert pieces.piece_length(2**20, 512, 2**18) == 1


def _largest(jaxpr) -> int:
    inner = (e for eqn in jaxpr.eqns for e in jaxprs_in_params(eqn.params))
    own = [v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars]
    return max([*own, *(_largest(one) for one in inner)])


def test_all_logits_never_exist():
    jaxpr = jax.make_jaxpr(lambda hidden: pieces.most_likely(CONFIG, HEAD, hidden, 4, piece=2))
    assert _largest(jaxpr(HIDDEN).jaxpr) < 3 * T * V / 2
