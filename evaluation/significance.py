"""How sure a figure is: intervals, an exact paired test, pass@k. Pure Python, no model, no file."""

import math
from statistics import NormalDist, fmean, stdev

Z = NormalDist().inv_cdf(0.975)  # 1.96: every interval here is a 95 % interval
NOISE = 0.05  # a p-value below it counts as more than noise


def wilson_interval(successes, trials):
    """The Wilson score interval of a proportion (Wilson 1927), as (low, high)."""
    share = successes / trials
    centre = share + Z * Z / (2 * trials)
    margin = Z * math.sqrt(share * (1 - share) / trials + Z * Z / (4 * trials * trials))
    scale = 1 + Z * Z / trials
    low, high = (centre - margin) / scale, (centre + margin) / scale
    return max(0.0, min(low, share)), min(1.0, max(high, share))  # rounding aside, as they are


def mean_interval(values):
    """(mean, low, high) of numbers of any kind, from the normal approximation."""
    mean = fmean(values)
    margin = Z * stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return mean, mean - margin, mean + margin


def with_interval(name, value, low, high):
    """A figure and the bounds of its interval under the names that they have in a summary."""
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def pass_at_k(samples, correct, k):
    """The chance that one of k samples is right, from `correct` right ones among `samples` >= k.

    Unbiased: 1 - C(samples - correct, k) / C(samples, k) (Chen et al. 2021, arXiv 2107.03374,
    eq. 1).
    """
    return 1 - math.comb(samples - correct, k) / math.comb(samples, k)


def gained_and_lost(before, after):
    """How many of the same questions turned right and how many wrong. before, after: bools."""
    gained = sum(y and not x for x, y in zip(before, after))
    lost = sum(x and not y for x, y in zip(before, after))
    return gained, lost


def mcnemar_p(gained, lost):
    """The exact two-sided McNemar test: is a question as likely to be gained as to be lost?

    Questions that both answered alike say nothing; of the others, half should be gains: twice the
    smaller tail of Binomial(gained + lost, 1/2), at most 1 (McNemar 1947, in its exact form).
    """
    changed = gained + lost
    tail = sum(math.comb(changed, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**changed)


def paired_difference(before, after):
    """(difference, low, high) of two shares of the same questions, after - before. Bools.

    Newcombe 1998, Statistics in Medicine 17, 2635-2650, method 10: the Wilson intervals of both
    shares, joined under the correlation phi of the pairs. It has a width even where no answer
    changed, which an interval from the standard error has not.
    """
    n = len(before)
    gained, lost = gained_and_lost(before, after)
    both = sum(x and y for x, y in zip(before, after))
    neither = n - both - gained - lost
    right_before, right_after = both + lost, both + gained
    margins = right_before * (n - right_before) * right_after * (n - right_after)
    association = both * neither - gained * lost
    if association > 0:
        association = max(0.0, association - n / 2)  # the method's correction for continuity
    phi = association / math.sqrt(margins) if margins else 0.0
    p, q = right_after / n, right_before / n
    (p_low, p_high), (q_low, q_high) = (wilson_interval(k, n) for k in (right_after, right_before))

    def reach(a, b):
        return math.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b))

    return p - q, p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)
