"""The solver against enumeration of every choice."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxopt_models.knapsack import Priced, choose, smallest

GROUPS = st.lists(
    st.lists(st.builds(Priced, st.floats(0, 1e3), st.integers(0, 10**9)), min_size=1, max_size=4),
    min_size=1,
    max_size=5,
)


def totals(groups, picks) -> tuple[float, int]:
    picked = [options[i] for options, i in zip(groups, picks, strict=True)]
    return sum(option.score for option in picked), sum(option.cost for option in picked)


def best_of_all(groups, capacity: int) -> float:
    choices = itertools.product(*(range(len(options)) for options in groups))
    found = (totals(groups, choice) for choice in choices)
    return min(score for score, cost in found if cost <= capacity)


@given(GROUPS, st.floats(0, 1))
def test_no_affordable_choice_is_better(groups, share):
    low = smallest(groups)
    most = sum(max(option.cost for option in options) for options in groups)
    capacity = low + int(share * (most - low))
    score, cost = totals(groups, choose(groups, capacity))
    assert cost <= capacity
    assert score == pytest.approx(best_of_all(groups, capacity), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_scores_of_all_magnitudes_and_costs_as_of_matrices(spread):
    """Scores fall with bits, as they do for weights, over up to ten orders of magnitude."""
    rng = np.random.default_rng(int(spread * 10))
    for _ in range(20):
        scores = -np.sort(-np.exp(rng.normal(0, spread, (6, 3))), axis=1)
        sizes = rng.integers(1, 50, (6, 1)) * 576 * 64
        costs = (
            sizes * np.asarray([4, 8, 16])
            + np.asarray([sizes // 16 * 8, 32 + 0 * sizes, 0 * sizes])[:, :, 0].T
        )
        groups = [
            [Priced(float(s), int(c)) for s, c in zip(*pair, strict=True)]
            for pair in zip(scores, costs, strict=True)
        ]
        capacity = int(rng.integers(smallest(groups), int(costs.max(axis=1).sum())))
        score, cost = totals(groups, choose(groups, capacity))
        assert cost <= capacity
        assert score == pytest.approx(best_of_all(groups, capacity), rel=1e-12)


def test_hundreds_of_groups_are_no_trouble():
    rng = np.random.default_rng(0)
    bits, sizes = np.asarray([4.5, 6.25, 8, 16]), np.tile([331776, 110592, 884736, 442368], 60)
    groups = []
    for size in sizes:
        scores = 2.0 ** (-2 * bits) * np.exp(rng.normal(0, 2) + rng.normal(0, 0.2, 4))
        groups.append([Priced(float(s), int(b * size)) for s, b in zip(scores, bits, strict=True)])
    last = np.inf
    for capacity in (int(b * sizes.sum()) for b in (4.6, 5.2, 7.7, 12.1)):
        score, cost = totals(groups, choose(groups, capacity))
        assert 0.999 * capacity < cost <= capacity
        assert score < last
        last = score


def test_ties_go_to_the_cheaper_and_then_to_the_first():
    groups = [
        [Priced(1.0, 5), Priced(1.0, 3), Priced(1.0, 3), Priced(2.0, 1)],
        [Priced(0.0, 7), Priced(0.0, 7)],
    ]
    assert choose(groups, 100) == [1, 0]
    assert choose(groups, 9) == [3, 0]


def test_what_is_dearer_and_worse_is_never_chosen():
    groups = [[Priced(1.0, 10), Priced(2.0, 20), Priced(0.5, 30)]] * 3
    for capacity in range(30, 120):
        assert 1 not in choose(groups, capacity)


def test_a_budget_spent_to_the_last_bit():
    groups = [[Priced(1.0, 10**12 + 1), Priced(0.0, 2 * 10**12 + 3)]] * 4
    exactly = 2 * (10**12 + 1) + 2 * (2 * 10**12 + 3)
    assert sum(choose(groups, exactly)) == 2
    assert sum(choose(groups, exactly - 1)) == 1


def test_equal_inputs_give_equal_choices():
    rng = np.random.default_rng(1)
    groups = [[Priced(float(s), 3 * i) for i, s in enumerate(rng.random(4))] for _ in range(30)]
    groups += groups[:10]
    assert choose(groups, 150) == choose(groups, 150)


def test_less_than_the_smallest_is_refused():
    groups = [[Priced(1.0, 4), Priced(0.0, 9)]] * 2
    assert choose(groups, 8) == [0, 0]
    with pytest.raises(ValueError, match="below the smallest possible 8"):
        choose(groups, 7)


def test_no_choice_with_so_few_rare_options_is_better():
    rng = np.random.default_rng(2)
    for _ in range(60):
        groups = [
            [Priced(float(rng.integers(5)), int(rng.integers(9)), i == 1) for i in range(3)]
            for _ in range(4)
        ]
        rare, room = int(rng.integers(4)), int(rng.integers(6))
        capacity = smallest(groups, rare) + room
        picks = choose(groups, capacity, rare)
        score, cost = totals(groups, picks)
        assert cost <= capacity and picks.count(1) <= rare
        each = itertools.product(range(3), repeat=4)
        sums = (totals(groups, one) for one in each if one.count(1) <= rare)
        assert score == min(total for total, cost in sums if cost <= capacity)
        with pytest.raises(ValueError, match="below the smallest possible"):
            choose(groups, smallest(groups, rare) - 1, rare)
