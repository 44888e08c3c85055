"""Reading what a model calculates: numbers, + - * / and brackets, in exact fractions.

What a model wrote is data and never code: it is read here, token by token.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from operator import add, mul, sub, truediv

CALCULATE = {"+": add, "-": sub, "*": mul, "/": truediv}
LONGEST, DEEPEST, DIGITS = 200, 20, 6  # characters, brackets in brackets, digits of a number
TOKEN = re.compile(r"[0-9]+|\\[a-z]+|\S")
BRACKETS = {"(": ")", "[": "]", "{": "}"}
# Other signs for the same; \left and \right only say how large a bracket is.
SIGNS = {
    **dict.fromkeys([*"×·⋅∙∗✕✖＊x", r"\times", r"\cdot"], "*"),
    **dict.fromkeys([*"÷∕⁄／", r"\div"], "/"),
    **dict.fromkeys("−–﹣－", "-"),
    **dict.fromkeys("＋﹢", "+"),
    **{"（": "(", "）": ")", r"\dfrac": r"\frac", r"\tfrac": r"\frac"},
}
IGNORED = (r"\left", r"\right")


@dataclass(frozen=True)
class Expression:
    """What an expression is worth, and the numbers in it from left to right."""

    value: Fraction
    numbers: tuple


def parsed(text):
    r"""The Expression that a text of numbers, + - * / and brackets is, by the usual precedence; one
    over another may be \frac{ }{ }.

    None for anything else, a sign before a number and a division by zero included.
    """
    if text is None or len(text) > LONGEST:
        return None
    tokens = [SIGNS.get(token, token) for token in TOKEN.findall(text) if token not in IGNORED]
    tokens.append(None)  # the end
    numbers, at = [], 0

    def take():
        nonlocal at
        at += 1
        return tokens[at - 1]

    def chain(operations, operand, depth):
        """operand (operation operand)*, from left to right."""
        value = operand(depth)
        while tokens[at] in operations:
            value = CALCULATE[take()](value, operand(depth))
        return value

    def total(depth):
        return chain(("+", "-"), product, depth)

    def product(depth):
        return chain(("*", "/"), atom, depth)

    def atom(depth):
        token = take()
        if token in BRACKETS and depth < DEEPEST:
            value = total(depth + 1)
            if take() == BRACKETS[token]:
                return value
        elif token == r"\frac" and tokens[at] == "{":
            return atom(depth) / atom(depth)
        elif token and token[0] in "0123456789" and len(token) <= DIGITS:
            numbers.append(int(token))
            return Fraction(numbers[-1])
        raise ValueError(token)

    try:
        value = total(0)
    except (ValueError, ZeroDivisionError):
        return None
    return Expression(value, tuple(numbers)) if tokens[at] is None else None
