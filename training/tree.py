"""A group's completions as a tree: what is equal is computed once.

The completions of a group begin alike, and late in a run many are copies of each other. A token's
hidden state depends on the prompt and the tokens before it alone, so it is enough to compute it
once for each distinct prefix, in sampling and in training alike:

    prompt ─┬─ I ─── think ─┬─ 4 ─── .       completion 0: I think 4 .
            │               └─ 5 ─── .       completion 1: I think 5 .
            └─ Four ─── .                    completion 2: Four .
                                             completion 3: I think 4 .

14 tokens, 8 prefixes. Questions that ask the same are one tree. Every prefix has a number, a
completion is the row of those it goes through, and whatever is computed per prefix comes back to
the completions by these numbers: equal numbers take the same value, and give their gradients to it.
"""

import numpy as np


def prefix_numbers(ids, lengths, question):
    """The number of the prefix that ends at each token: (R, C), -1 behind a completion's end.

    ids: (R, C), lengths: R numbers of tokens, question: R numbers; all on the host. Two places have
    the same number where question, token and all tokens before it are the same. Numbers go up from
    0 without a gap.
    """
    ids, lengths = np.asarray(ids, dtype=np.int64), np.asarray(lengths)
    numbers = np.full(ids.shape, -1, dtype=np.int64)
    before, count = np.array(question, dtype=np.int64), 0  # what a row's next token continues
    base = int(ids.max(initial=0)) + 1
    for c in range(ids.shape[1]):
        rows = np.flatnonzero(lengths > c)
        distinct, number = np.unique(before[rows] * base + ids[rows, c], return_inverse=True)
        if len(distinct) == len(rows):  # from here on every completion is alone
            rest = np.arange(c, ids.shape[1]) < lengths[:, None]
            numbers[:, c:][rest] = count + np.arange(rest.sum())
            break
        numbers[rows, c] = before[rows] = count + number
        count += len(distinct)
    return numbers


def first_equal(items):
    """For each of these items, the place of the first that equals it, as an array on the host."""
    places = {}
    return np.array([places.setdefault(item, place) for place, item in enumerate(items)])


def alone(lengths, width):
    """The numbers where nothing is shared, whatever the tokens: (R, C)."""
    real = np.arange(width) < np.asarray(lengths)[:, None]
    numbers = np.full(real.shape, -1, dtype=np.int64)
    numbers[real] = np.arange(real.sum())
    return numbers


def first_of_each(numbers):
    """Of a row of numbers (N,): where each distinct one stands first (U,), in the order of these
    places, and which of these each number is (N,)."""
    _, first, inverse = np.unique(numbers, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return first[order], rank[inverse]
