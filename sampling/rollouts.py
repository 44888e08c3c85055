"""`Rollouts`: what the policy wrote. Every sampler makes them, everything after it reads them.

Letters: Q questions, G completions per question, P prompt tokens, C completion tokens.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from evaluator import after_thoughts
from grpo import completion_lengths
from llms import rendering_on, stop_token_ids
from rldatasets import Transcript
from utils import to_device


@dataclass(frozen=True)
class Rollouts:
    """What the policy wrote, token by token: the ids in here are the ids that get trained."""

    prompt_ids: list  # Q tensors (P,)
    completion_ids: torch.Tensor  # (Q, G, C); after a completion's end, the pad token
    # (Q, G, C), True for the policy's tokens, up to and including the stop token. In an episode,
    # False for what the world said in between (see turns.py); its last token is the policy's.
    completion_mask: torch.Tensor
    logprobs: torch.Tensor  # (Q, G, C) of the full distribution at the sampling temperature
    finished: torch.Tensor  # (Q, G), False where max_new_tokens cut the completion off
    texts: list  # Q lists of G strings, without special tokens; of episodes, Transcripts
    pictures: list | None = None  # what each of the Q prompts shows, see training/pictures.py


def padding_and_stops(model, tokenizer):
    """(the id after a completion's end, the ids that end one)."""
    stops = stop_token_ids(model, tokenizer)
    return (stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id), stops


def string_ends(tokenizer, stop, ids, mask, since):
    """{row: number of tokens up to and with the one that completes one of the strings `stop`}, of
    the rows (R, C) whose token at position `since` or later does so, all in one turn."""
    # A token holds a byte at least; one more, because decoding may strip a blank at the start.
    reach = max(len(string.encode()) for string in stop) + 1
    first = max(0, since - reach)
    lengths, ends = completion_lengths(mask).tolist(), {}
    for row, (tokens, own) in enumerate(zip(ids[:, first:].tolist(), mask[:, first:].tolist())):
        tokens = tokens[: max(0, lengths[row] - first)]
        begun = max((i + 1 for i in range(len(tokens)) if not own[i]), default=0)  # its turn
        for end in range(max(since - first, begun) + 1, len(tokens) + 1):
            text = tokenizer.decode(tokens[max(begun, end - reach) : end])
            if any(string in text for string in stop):
                ends[row] = first + end
                break
    return ends


def as_rollouts(tokenizer, prompts, group_size, ids, mask, logprobs, finished, turns=None):
    """Rows, question by question, as Rollouts. ids, mask, logprobs: (Q·G, C), finished: (Q·G,).
    turns: the Turns of episodes."""
    lengths = completion_lengths(mask).tolist()
    if turns:
        texts = turns.transcripts(lengths)
    else:
        rows = [row[:length] for row, length in zip(ids.tolist(), lengths)]
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True)
    shape = (len(prompts), group_size, max(lengths))
    return Rollouts(
        prompt_ids=[to_device(torch.tensor(ids, device="cpu"), mask.device) for ids in prompts],
        completion_ids=ids[:, : shape[-1]].view(shape),
        completion_mask=mask[:, : shape[-1]].view(shape),
        logprobs=logprobs[:, : shape[-1]].view(shape),
        finished=finished.view(shape[:2]),
        texts=[texts[i : i + group_size] for i in range(0, len(texts), group_size)],
    )


def listed_rollouts(tokenizer, prompts, group_size, completions, padding_and_stops, device):
    """The Rollouts that another engine has drawn. completions: Q·G pairs of lists, ids up to and
    with the stop token, if one came, and their log-probs."""
    pad_id, stops = padding_and_stops
    ids, logprobs = (
        [torch.tensor(row, device="cpu") for row in rows] for rows in zip(*completions)
    )
    lengths = torch.tensor([len(row) for row in ids], device="cpu")  # (R,)
    mask = torch.arange(lengths.max(), device="cpu") < lengths[:, None]  # (R, C)
    finished = torch.tensor([row[-1].item() in stops for row in ids], device="cpu")  # (R,)
    ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)  # (R, C)
    parts = (ids, mask, pad_sequence(logprobs, batch_first=True), finished)
    parts = (part.to(device) for part in parts)
    return as_rollouts(tokenizer, prompts, group_size, *parts)


def without_thoughts(rollouts, setup):
    """The Rollouts with texts that are judged, by rewards, formats and accuracy alike: of a model
    that thinks, what follows the last </think> and its blanks, and nothing while it still thinks.
    Of an episode that is what the policy wrote last, a Transcript that knows its other turns: what
    the world said, which may hold any text, is not taken for an answer of the policy's.

    Where the task's system prompt asks for the tags itself, they are a part of the answer, and all
    of it is judged.
    """
    texts = [[judged_text(text, setup) for text in texts] for texts in rollouts.texts]
    return replace(rollouts, texts=texts)


def judged_text(text, setup):
    """What of a completion is judged, see `without_thoughts`."""
    answer = last_turn(text)
    if "<think>" not in setup.task.system_prompt:
        answer = after_thoughts(answer, rendering_on(setup.tokenizer).opens_thinking)
    return Transcript(answer, text.turns) if isinstance(text, Transcript) else answer


def last_turn(text):
    """What the policy wrote last: all of a text that is no Transcript."""
    return text.turns[-1] if isinstance(text, Transcript) else text


def joined_rollouts(parts):
    """The Rollouts of several draws of questions as one, padded to the longest completion."""
    longest = max(part.completion_ids.shape[-1] for part in parts)

    def joined(name, padding=0):
        tensors = [getattr(part, name) for part in parts]
        return torch.cat([F.pad(x, (0, longest - x.shape[-1]), value=padding) for x in tensors])

    pictures = [one for part in parts for one in part.pictures or [None] * len(part.prompt_ids)]
    return Rollouts(
        prompt_ids=[ids for part in parts for ids in part.prompt_ids],
        completion_ids=joined("completion_ids"),
        completion_mask=joined("completion_mask", False),
        logprobs=joined("logprobs"),
        finished=torch.cat([part.finished for part in parts]),
        texts=[texts for part in parts for texts in part.texts],
        pictures=pictures if any(pictures) else None,
    )
