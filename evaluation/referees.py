"""The referees that the flags name: made, tried on golden pairs, and handed to the rewards."""

import sys
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from evaluation.referee import START, Referee, bound, shares
from evaluation.referee_lint import cards, complaint, lines_of, remarks
from evaluation.referee_local import LocalReferee
from llms import frozen_copy, load_model, rendering_of
from sampling.probe import probe
from training.lora import has_adapter
from training.precision import DTYPES, resolved
from training.processes import make_accelerator, summed
from training.progress import phase
from training.setup import Setup
from utils import UserError, hub_token

ROLES = ("referee", "eval_referee")  # whom the rewards ask, and who only measures


def with_referees(setup, folder=None):
    """The Setup with its referees, and rewards that ask the first of them; as it is without any.

    folder: a run's directory, where they keep their answers. Raises UserError where the first is
    right on too few of the task's golden pairs, unless --referee_anyway.
    """
    args, task = setup.args, setup.task
    judges = {role: judge for role in ROLES if (judge := judge_of(setup, role))}
    if not judges:
        return setup
    digests = [judge.digest for judge in judges.values() if isinstance(judge, LocalReferee)]
    if len({*digests}) < len(digests):
        raise UserError(f"--eval_referee {args.eval_referee}: has the weights of the --referee, "
                        "which cannot check itself; name another")  # fmt: skip
    number = setup.accelerator.process_index
    file = Path(folder) / f"referee{f'-{number}' if number else ''}.jsonl" if folder else None
    referees = {
        role: Referee(judge, task, args.referee_pairs, file) for role, judge in judges.items()
    }
    with phase("referee"):
        for role, referee in referees.items():
            if role == "referee" and referee.is_new:
                tqdm.write(f"main.py: warning: --{role}: is not who judged this run so far "
                           f"({file}); what was asked is asked again, and may come out "
                           "otherwise", file=sys.stderr)  # fmt: skip
            try_out(role, referee, setup)
    functions = [bound(function, referee=referees["referee"]) for function in task.reward_functions]
    return replace(setup, task=replace(task, reward_functions=functions), referees=referees)


def judge_of(setup, role):
    """Who answers as the referee of this role; None where the flags name nobody."""
    args, device = setup.args, setup.accelerator.device
    name = getattr(args, role)
    if role == "referee" and args.referee_url:
        from evaluation.referee_url import UrlReferee  # openai, seconds, and not a requirement

        return UrlReferee(args.referee_url, args.referee_model)
    if name is None:
        return None
    if name == START:
        model, tokenizer = start_model(setup)
    else:
        try:
            model, tokenizer = load_model(name, device, hub_token(), rendering_of(args))
        except UserError as error:
            raise UserError(str(error).replace("--model_name", f"--{role}")) from None
        probe(model, f"--{role} {name}")
        model = frozen(model, args)
    return LocalReferee(model, tokenizer, setup.accelerator, args.micro_batch_tokens, name)


def start_model(setup):
    """(--model_name as its files are, before any cold start: that a resumed run has too; its
    tokenizer).

    The weights that an adapter leaves alone, and a KL reference that is the same, are shared.
    """
    args, policy = setup.args, setup.policy
    if has_adapter(policy):
        model = frozen_copy(policy)
        model.disable_adapters()
        return model, setup.tokenizer
    if setup.reference is not None and args.cold_start_steps == 0 and not args.update_ref_model:
        return setup.reference, setup.tokenizer
    device = setup.accelerator.device
    model, tokenizer = load_model(args.model_name, device, hub_token(), rendering_of(args))
    return frozen(model, args), tokenizer


def frozen(model, args):
    """The model as it judges: with matrices in what --precision computes in, as those of
    llms.kl_reference are."""
    return frozen_copy(model, DTYPES[resolved(args.precision)])


def report(args, task):
    """What the golden pairs say of the referees that the flags name: the text, and how many of them
    cannot judge."""
    setup, lines, refused = Setup(None, None, task, args, make_accelerator()), [], 0
    for role in ROLES:
        if judge := judge_of(setup, role):
            found = cards(Referee(judge, task), task.reward_functions)
            wrong = complaint(found)
            noted = [*([wrong] if wrong else []), *remarks(found)]
            lines += [*lines_of(role, found), *(f"- {line}" for line in noted), ""]
            refused += bool(wrong)
    return "\n".join(lines).rstrip(), refused


def try_out(role, referee, setup):
    """Print what the golden pairs say of a referee, and set the scale of its margins. Raises
    UserError where it is whom the rewards ask and cannot judge, unless --referee_anyway."""
    try:
        found = cards(referee, setup.task.reward_functions)
        wrong = complaint(found)
        referee.scales = {(card.criterion, card.alone): card.scale for card in found}
        noted, criterion = [*remarks(found)], setup.task.criterion
        if (criterion, False) not in referee.scales:
            noted.append(f"no golden pair is about `{criterion:.40}`, by which answers meet those "
                         "of step 0: there faint margins are no ties")  # fmt: skip
        warnings = (f"main.py: warning: {role}: {line}" for line in noted)
        for line in (*lines_of(role, found), *warnings):
            tqdm.write(line)
    except UserError as error:  # no golden pairs
        wrong = str(error)
    referee.counts()
    if wrong and role == "referee" and not setup.args.referee_anyway:
        raise UserError(wrong)
    if wrong:
        tqdm.write(f"main.py: warning: {role}: {wrong}")


def referee_metrics(setup):
    """What the referee that rewards was asked since the last look, as metrics."""
    if "referee" not in setup.referees:
        return {}
    return shares(summed(setup.referees["referee"].counts(), setup.accelerator))
