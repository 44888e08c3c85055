"""A GRPO step of this checkout against one of another commit of this repository, in turn.

Both run their own code, by their own benchmarks/common.py, on the same questions, seeds and
weights, in this Python; each has a process of its own and works while the other waits. The learning
rate is 0, so that every round starts from the same weights and completions stay comparable: how
many of them are equal is counted. If a few differ, rounding has tipped a draw; if many do, they
come from another distribution.

    python benchmarks/vs_commit.py REV --model_name RUN/model

REV is anything that git can resolve, back to 929c9a9, whose benchmarks were the first to take a
step as today's do. RUN is a run's directory: of `--num_train_iters 0` for the model after the cold
start. The last line is JSON: per stage the median seconds of both, and the ratio this / REV with
its range over rounds.
"""

import io
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import common  # of the checkout that this file stands in

STAGES = ("sampling", "reference", "policy", "evaluation")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    parser = common.training_flags(common.workload_parser(__doc__, rounds=3, warm_up=1))
    parser.add_argument("revision", metavar="REV", help="what to compare this checkout with")
    parser.add_argument("--eval_problems", type=int, default=0,
                        help="held-out problems to answer in every round as well")  # fmt: skip
    args = parser.parse_args(argv)
    if args.worker:
        return work(args)

    with tempfile.TemporaryDirectory() as folder:
        model, other = Path(folder, "model"), Path(folder, "commit")
        check_out(args.revision, other)
        common.save_model(args.model_name, model)
        flags = [*argv, "--model_name", str(model)]  # of two, the last one counts
        scripts = {"this": __file__, "commit": shutil.copy(__file__, other / "benchmarks")}
        workers = [common.Worker(script, flags, name) for name, script in scripts.items()]
        replies = common.take_turns(workers, args, show)
    print(json.dumps(summary(args, replies)))


def check_out(revision, folder):
    """The files of that commit, as git has them."""
    command = ["git", "archive", "--format=tar", revision]
    archive = subprocess.run(command, cwd=common.ROOT, capture_output=True)
    if archive.returncode:
        reason = " ".join(archive.stderr.decode().split())[:150]
        print(f"vs_commit.py: error: {revision}: {reason}", file=sys.stderr)
        sys.exit(2)
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="data")


def show(reply):
    spent = ", ".join(f"{name} {seconds:6.1f} s" for name, seconds in reply["seconds"].items())
    return f"{reply['tokens']:6} tokens, {spent}, peak {reply['peak_gib']:.2f} GiB"


def summary(args, replies):
    """Print the table; returns what goes into the last line."""
    result = {"revision": args.revision, "completions": args.questions * args.group_size,
              "rounds": args.rounds}  # fmt: skip
    rows = [("", "this", args.revision, "ratio")]
    stages = [stage for stage in STAGES if stage in replies["this"][0]["seconds"]]
    for stage in [*stages, "step"]:
        seconds = {
            side: [reply["seconds"][stage] for reply in rounds] for side, rounds in replies.items()
        }
        for side in replies:
            result[f"{side}_{stage}_seconds"] = common.median(seconds[side], 2)
        result |= common.ratios(seconds["this"], seconds["commit"], f"{stage}_")
        rows.append((f"{stage}, s", *(result[f"{side}_{stage}_seconds"] for side in replies),
                     common.span(result, f"{stage}_")))  # fmt: skip
    for side, rounds in replies.items():
        result[f"{side}_peak_gib"] = round(rounds[-1]["peak_gib"], 2)
    result["memory_ratio"] = round(result["this_peak_gib"] / result["commit_peak_gib"], 2)
    rows.append(("peak memory, GiB", result["this_peak_gib"], result["commit_peak_gib"],
                 result["memory_ratio"]))  # fmt: skip
    pairs = [
        pair
        for this, commit in zip(replies["this"], replies["commit"])
        for pair in zip(this["completions"], commit["completions"], strict=True)
    ]
    result["equal_completions"] = f"{sum(ours == theirs for ours, theirs in pairs)} of {len(pairs)}"
    rows.append(("equal completions", result["equal_completions"], "", ""))
    print(common.table(rows))
    return result


def work(args):
    """One worker: a step for every round on standard input. Each reply has the seconds per stage,
    the number of tokens sampled, the completions and the process's peak of memory so far."""
    reply = common.reply_channel()
    from utils import keep_freed_memory

    keep_freed_memory()
    import torch

    from evaluation.held_out import evaluate

    setup, optimizer, scheduler = common.set_up(args, args.model_name, args.questions)
    scheduler.base_lrs = [0.0 for _ in scheduler.base_lrs]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    problems, held_out = common.load_questions(args), setup.task.problems("test")
    held_out = [held_out[i] for i in range(args.eval_problems)]
    reply(f"{torch.get_num_threads()} threads, {setup.accelerator.device}")
    for line in sys.stdin:
        drawn = problems.batch(int(line), args.questions)
        rollouts, seconds = common.our_step(setup, optimizer, scheduler, drawn, int(line))
        seconds["step"] = sum(seconds.values())
        completions = [text for group in rollouts.texts for text in group]
        if held_out:
            with setup.stopwatch("evaluation"), setup.accelerator.autocast():
                records = evaluate(setup, held_out)
            seconds |= setup.stopwatch.lap()
            completions += [record["completion"] for record in records]
        reply({
            "seconds": seconds, "tokens": int(rollouts.completion_mask.sum()),
            "completions": completions, "peak_gib": common.peak_gib(),
        })  # fmt: skip


if __name__ == "__main__":
    main()
