"""Turns: a completion that the world answers goes on, and so an episode has several.

What the world says, and what the chat template writes around it, is appended as ids, and the model
reads them token by token where it would else have drawn some. So nothing that was sampled is ever
encoded again (of sampled ids, one completion in four comes back from decode and encode as other
ids), and nothing is computed again. The mask of a completion is True for the policy's tokens alone.

    prompt | 6 * 7 <end> | 42 | It is 42. <end>
    mask     T T T T       F    T T T   T T
"""

from functools import partial

import torch

from llms import rendered, turn_end
from rldatasets import Transcript
from utils import TimedOut, UserError, time_limit, to_device

REPLY, POLICY = "\n--- reply ---\n", "\n--- policy ---\n"  # between turns, where people read them


def between_turns(tokenizer):
    """What the chat template writes from the end of an assistant's turn to the next one, before and
    behind what a user says in between: two texts.

    Raises UserError where the template writes what was said so far in another way once there are
    further turns: ids that are appended to would then be those of no chat.
    """
    answer, reply = "Green", "Which shade"
    more = [{"role": "assistant", "content": answer}, {"role": "user", "content": reply}]
    before, behind, stable = "", "", False
    try:
        once, twice, thrice = (
            rendered(tokenizer, more[1:] + n * more, add_generation_prompt=True, tokenize=False)
            for n in range(3)
        )
        before, _, behind = twice.removeprefix(once + answer).partition(reply)
        told = answer + before + reply + behind
        stable = twice == once + told and thrice == twice + told
    except Exception:  # of a template, which is a program, that takes no such chat
        pass
    end = turn_end(tokenizer)
    if not stable or tokenizer(before, add_special_tokens=False).input_ids[:1] != [end]:
        raise UserError("--model_name: its chat template takes no further turn, or then writes the "
                        "ones before in another way; change the template, or the task")  # fmt: skip
    return before, behind


def told_ids(tokenizer, between, reply):
    """What the policy is told where the world replies, in ids, from the end of its own turn on.

    between: see between_turns. What looks like a special token in the reply stays text.
    """
    text = as_plain_text(tokenizer, reply).join(between)
    return tokenizer(text, add_special_tokens=False).input_ids


def as_plain_text(tokenizer, text):
    """A text in which nothing is a special token to this tokenizer: each has a blank behind its
    first character."""
    special = [x.content for x in tokenizer.added_tokens_decoder.values() if x.special]
    while found := [token for token in special if token in text and len(token) > 1]:
        for token in found:
            text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def told_after(ids, tokenizer, between, reply):
    """The same behind the ids of a turn, which has its own end where no string ended it."""
    told = told_ids(tokenizer, between, reply)
    return told[1:] if told[0] == ids[-1] else told


def worked_ids(tokenizer, problems, task):
    """The worked answers to these problems as completions: for each its ids, with the token that
    ends a turn, and which of them the policy is to write, all but what the world replies."""
    worked = [task.worked_answer(problem) for problem in problems]
    turns = [getattr(text, "turns", (text,)) for text in worked]
    between = between_turns(tokenizer) if any(len(said) > 1 for said in turns) else None
    end = turn_end(tokenizer)
    end = tokenizer.eos_token_id if end is None else end
    firsts = tokenizer([said[0] for said in turns], add_special_tokens=False).input_ids
    completions = []
    for said, first in zip(turns, firsts):
        ids, own = [*first, end], [True] * (len(first) + 1)
        for reply, turn in zip(said[1::2], said[2::2]):
            told = told_ids(tokenizer, between, reply)[1:]
            written = [*tokenizer(turn, add_special_tokens=False).input_ids, end]
            ids += told + written
            own += [False] * len(told) + [True] * len(written)
        completions.append((ids, own))
    return completions


def replies(setup, problems):
    """What the task's world answers in a batch of these problems, (q, turns) -> text or None; None
    for a task without. Raises UserError where it takes more than --reward_timeout seconds."""
    reply, seconds = setup.task.reply, setup.args.reward_timeout
    return reply and partial(in_time, reply, problems, seconds)


def in_time(function, problems, seconds, q, turns, *others):
    """What a task's reply, or its rebut, says of problem q. Raises UserError where it takes more
    than so many seconds."""
    try:
        with time_limit(seconds):
            return function(problems[q], turns, *others)
    except TimedOut:
        raise UserError(
            f"the task's {function.__name__} took more than --reward_timeout {seconds:g} seconds "
            f"for {problems[q].question[:40]!r}, turn {turns[-1][:40]!r}"
        ) from None


class Turns:
    """Who said what in a batch of completions, each of which is a line of its ids (N, C)."""

    def __init__(self, tokenizer, reply, ids, group_size):
        self.tokenizer, self.reply, self.group_size = tokenizer, reply, group_size
        self.between = between_turns(tokenizer)
        self.ids = ids  # (N, C), written to where the world speaks
        self.told = torch.zeros_like(ids, dtype=torch.bool)  # (N, C), which of them it has said
        self.said = [[] for _ in ids]
        self.begun = [0] * len(ids)  # where the turn of each that is being written begins
        self.cut_off = []  # lines whose reply left no room for a further turn

    def go_on(self, lines, end):
        """Ask the world about these lines, whose turns ended before place `end`. Returns those that
        it answers, whose answer the policy is told next; for the others the episode is over."""
        going_on = []
        for line in lines:
            ids = self.ids[line, self.begun[line] : end].tolist()
            self.said[line].append(self._text(ids))
            reply = self.reply(line // self.group_size, tuple(self.said[line]))
            if reply is None:
                continue
            told = told_after(ids, self.tokenizer, self.between, reply)
            begins = end + len(told)
            if begins >= self.ids.shape[1]:
                self.cut_off.append(line)
                continue
            told = torch.tensor(told, device="cpu")
            self.ids[line, end:begins] = to_device(told, self.ids.device)
            self.told[line, end:begins] = True
            self.said[line].append(reply)
            self.begun[line] = begins
            going_on.append(line)
        return going_on

    def transcripts(self, lengths):
        """The Transcripts of all lines, whose numbers of tokens these are."""
        for line, length in enumerate(lengths):
            if len(self.said[line]) % 2 == 0:  # cut off in its turn
                self.said[line].append(
                    self._text(self.ids[line, self.begun[line] : length].tolist())
                )
        return [transcript(said) for said in self.said]

    def _text(self, ids):
        [text] = self.tokenizer.batch_decode([ids], skip_special_tokens=True)
        return text


def transcript(turns):
    """Turns as one text, for people to read."""
    marks = [mark for _ in turns[1::2] for mark in (REPLY, POLICY)]
    text = turns[0] + "".join(mark + turn for mark, turn in zip(marks, turns[1:]))
    return Transcript(text, turns)
