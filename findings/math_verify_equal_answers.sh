#!/bin/sh
# math-verify 0.9.0 (PyPI) calls answers equal that differ in their unit, in
# their brackets, in the base of a number or by a factor: what it drops or rounds is not compared.
# Seen: all seven lines below say True. Exits 1 where one of them no longer does.
set -e
folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q math-verify==0.9.0 latex2sympy2-extended==1.11.0 \
    sympy==1.14.0 antlr4-python3-runtime==4.13.2
"$folder/venv/bin/python" - <<'PYTHON'
from math_verify import LatexExtractionConfig, parse, verify

PAIRS = [
    (r"5\text{ km}", r"5\text{ mm}"),
    (r"9\text{ AM}", r"9\text{ PM}"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    ("(1,2)", r"\{1,2\}"),
    ("12_3", "12_4"),
    ("10^{-20}", "10^{-21}"),
]
found = []
for gold, answer in PAIRS:
    read = [parse(rf"\boxed{{{text}}}", [LatexExtractionConfig()]) for text in (gold, answer)]
    found.append(verify(*read))
    print(f"{gold:14} {answer:14} {found[-1]}")
raise SystemExit(not all(found))
PYTHON
