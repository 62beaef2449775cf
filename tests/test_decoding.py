"""What is committed of a block of tokens, beside a loop over rows and tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxopt_models.decoding import DecodeState, commit


@pytest.mark.parametrize("stops", [(), (3,), (1, 3)])
def test_rows_take_their_count_up_to_a_limit_and_a_first_stop(stops):
    rng = np.random.default_rng(len(stops))
    rows, block, capacity = 200, 5, 12
    tokens = rng.integers(4, 9, (rows, capacity))
    length = rng.integers(1, capacity, rows)
    limit = np.minimum(length + rng.integers(1, 7, rows), capacity)
    done = rng.random(rows) < 0.2
    chosen, count = rng.integers(0, 4, (rows, block)), rng.integers(1, block + 1, rows)
    arrays = (jnp.asarray(x, jnp.int32) for x in (tokens, length, limit))
    state = DecodeState(*arrays, done=jnp.asarray(done), cache=())
    found = commit(state, jnp.asarray(chosen, jnp.int32), jnp.asarray(count, jnp.int32), stops)
    seen = set()
    for row in range(rows):
        expected, ended = tokens[row, : length[row]].tolist(), bool(done[row])
        for token in chosen[row, : count[row]].tolist():
            if not ended:
                expected.append(token)
                ended = token in stops or len(expected) == limit[row]
        end = len(expected)
        assert found.length[row] == end and bool(found.done[row]) == ended
        assert found.tokens[row, :end].tolist() == expected
        assert found.tokens[row, end:].tolist() == tokens[row, end:].tolist()  # untouched
        seen.add((bool(done[row]), ended, end - length[row] < count[row]))
    assert len(seen) == 4  # done before; else ended or not of the whole count, or ended within it


def test_one_token_for_all():
    state = DecodeState(
        tokens=jnp.zeros((2, 4), jnp.int32),
        length=jnp.asarray([1, 2], jnp.int32),
        limit=jnp.asarray([2, 4], jnp.int32),
        done=jnp.zeros(2, bool),
        cache=(),
    )
    found = commit(state, jnp.asarray([[5], [6]], jnp.int32), 1, ())
    assert found.tokens.tolist() == [[0, 5, 0, 0], [0, 0, 6, 0]]
    assert (found.length.tolist(), found.done.tolist()) == ([2, 3], [True, False])
