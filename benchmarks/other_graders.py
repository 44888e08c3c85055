"""What lm-eval and lighteval would make of the answers that a run has saved, beside our verdicts.

Nothing is generated: both harnesses look for a number in the text, and here their rules look for it
in the held-out answers of runs/NAME/completions/. lm-eval 0.4.13 has two rules for `gsm8k`, which
are written down here as its gsm8k.yaml has them; lighteval 0.13 has one, `expr_gold_metric`, which
is asked itself where it is installed.

    python benchmarks/other_graders.py runs/NAME [--step N]

The last line is JSON: answers, and for each rule how many it calls right, how many of those our
strict verdict calls wrong, and the other way round.
"""

import argparse
import json
import re
from importlib import util
from pathlib import Path

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")  # the first one counts
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")  # the last one counts
IGNORED = (",", r"\$", "(?s).*#### ", r"\.$")  # in answer and gold, in this order
SHOWN = 2  # answers, of each kind on which a rule and we differ


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--step", type=int, help="of which evaluation; None: the last")
    args = parser.parse_args(argv)
    step = "*" if args.step is None else f"{args.step:05d}"
    files = sorted(args.run.glob(f"completions/eval_{step}.jsonl"))
    if not files:
        parser.error(f"no answers in {args.run}/completions")
    answers = [json.loads(line) for line in files[-1].read_text(encoding="utf-8").splitlines()]
    result = {"file": str(files[-1]), "answers": len(answers)}
    ours = [answer["correct"] for answer in answers]
    print(f"{'rule':26} right  we: wrong  we alone")
    for name, rule in rules().items():
        theirs = [rule(answer) for answer in answers]
        differing = {
            "theirs alone": [a for a, us, they in zip(answers, ours, theirs) if they and not us],
            "ours alone": [a for a, us, they in zip(answers, ours, theirs) if us and not they],
        }
        counts = [sum(theirs), *map(len, differing.values())]
        result[name] = dict(zip(("right", *differing), counts))
        print(f"{name:26} {counts[0]:5} {counts[1]:10} {counts[2]:9}")
        for kind, some in differing.items():
            for answer in some[:SHOWN]:
                print(f"    {kind}: gold {answer['answer']}, {answer['completion'][-70:]!r}")
    print(json.dumps(result))


def rules():
    """{name: function from a saved answer to whether it is right}."""
    known = {
        "ours, in the tags": lambda answer: answer["correct"],
        "ours, or the last number": lambda answer: answer["lenient_correct"],
        "lm-eval strict-match": lambda answer: lm_eval(answer, STRICT, 0),
        "lm-eval flexible-extract": lambda answer: lm_eval(answer, FLEXIBLE, -1),
    }
    return {**known, "lighteval": lighteval()} if util.find_spec("lighteval") else known


def lm_eval(answer, pattern, which):
    """Whether lm-eval finds the gold answer: its exact_match after a regex filter."""
    found = [*pattern.finditer(answer["completion"])]
    said = found[which].group(1) or found[which].group() if found else "[invalid]"
    return plain(said.strip()) == plain(answer["answer"])


def plain(text):
    for ignored in IGNORED:
        text = re.sub(ignored, "", text)
    return text.lower()


def lighteval():
    """lighteval's own rule, as a function from a saved answer."""
    from lighteval.metrics.metrics import Metrics
    from lighteval.models.model_output import ModelResponse
    from lighteval.tasks.requests import Doc

    metric = Metrics.expr_gold_metric.value

    def is_right(answer):
        doc = Doc(
            query=answer["question"],
            choices=[f"#### {answer['answer']}"],
            gold_index=0,
            task_name="",
        )
        response = ModelResponse(text=[answer["completion"]])
        [value] = metric.compute_sample(doc=doc, model_response=response).values()
        return value == 1

    return is_right


if __name__ == "__main__":
    main()
