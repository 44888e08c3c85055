"""Intervals, McNemar's test and pass@k against scipy, published tables and plain counting."""

import itertools
import math

import pytest
from scipy import stats
from toys import answers

from evaluation.significance import (
    gained_and_lost,
    mcnemar_p,
    mean_interval,
    paired_difference,
    pass_at_k,
    wilson_interval,
)


def test_wilson_interval_matches_published_values():
    # Newcombe 1998, table I, method 3: 81/263, 15/148, 0/20, 1/29
    for (k, n), expected in {
        (81, 263): (0.2553, 0.3662), (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611), (1, 29): (0.0061, 0.1718),
    }.items():  # fmt: skip
        assert wilson_interval(k, n) == pytest.approx(expected, abs=6e-5)


def test_wilson_interval_is_scipy_s_and_contains_its_share():
    for n in (1, 2, 17, 512, 1319):
        for k in {0, 1, n // 3, n - 1, n}:
            low, high = wilson_interval(k, n)
            reference = stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
            assert (low, high) == pytest.approx((reference.low, reference.high), abs=1e-12)
            assert low <= k / n <= high


def test_mcnemar_p_is_the_exact_binomial_test_of_the_changed_answers():
    pairs = [*itertools.product(range(9), repeat=2), (109, 41), (64, 40), (700, 619), (0, 1319)]
    for gained, lost in pairs:
        p = stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0
        assert mcnemar_p(gained, lost) == pytest.approx(p, rel=1e-9), (gained, lost)


def test_gained_and_lost_count_the_changes():
    assert gained_and_lost([True, True, False, False], [True, False, True, True]) == (2, 1)


# Newcombe 1998 (paired data), table III, method 10: (both, only first, only second, neither)
TABLE_III = {
    (36, 12, 2, 0): (0.0569, 0.3404), (20, 12, 2, 16): (0.0562, 0.3292),
    (18, 12, 2, 18): (0.0562, 0.3290), (36, 14, 0, 0): (0.1528, 0.4167),
    (18, 14, 0, 18): (0.1441, 0.3963), (2, 97, 1, 0): (0.8721, 0.9854),
    (0, 29, 1, 0): (0.6666, 0.9882), (0, 30, 0, 0): (0.8395, 1.0),
    (54, 0, 0, 0): (-0.0664, 0.0664), (29, 0, 0, 25): (-0.0354, 0.0354),
}  # fmt: skip


@pytest.mark.parametrize(("counts", "expected"), TABLE_III.items())
def test_the_paired_interval_matches_published_values(counts, expected):
    first, second = answers(*counts)
    difference, low, high = paired_difference(second, first)
    assert difference == pytest.approx((counts[1] - counts[2]) / sum(counts))
    assert (low, high) == pytest.approx(expected, abs=6e-5)
    assert paired_difference(first, second) == pytest.approx((-difference, -high, -low))


def test_the_paired_interval_covers_the_truth_nineteen_times_in_twenty():
    """Exactly, by summing over every table that 16 questions can give."""
    n = 16
    for truth in [(0.4, 0.2, 0.1, 0.3), (0.1, 0.3, 0.3, 0.3), (0.6, 0.05, 0.15, 0.2)]:
        covered = 0.0
        for cut in itertools.combinations(range(n + 3), 3):
            counts = [b - a - 1 for a, b in zip((-1, *cut), (*cut, n + 3))]
            _, low, high = paired_difference(*answers(*counts))
            ways = math.factorial(n) / math.prod(math.factorial(count) for count in counts)
            chance = ways * math.prod(p**count for p, count in zip(truth, counts))
            covered += chance * (low <= truth[2] - truth[1] <= high)
        assert 0.94 < covered < 0.98


def test_pass_at_k_is_the_share_of_choices_with_a_right_sample():
    for n in (1, 4, 7):
        for right, k in itertools.product(range(n + 1), range(1, n + 1)):
            choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_pass_at_one_is_the_mean_and_pass_at_all_is_any():
    assert pass_at_k(1000, 250, 1) == pytest.approx(0.25)
    assert [pass_at_k(1000, right, 1000) for right in (0, 1)] == [0.0, 1.0]


def test_the_interval_of_a_mean_is_scipy_s_normal_interval():
    values = [0.0, 0.25, -0.5, 1.0, 0.75, 0.125]
    reference = stats.norm.interval(0.95, loc=sum(values) / 6, scale=stats.sem(values))
    assert mean_interval(values) == pytest.approx((sum(values) / 6, *reference))
    assert mean_interval([0.5]) == (0.5, -math.inf, math.inf)
