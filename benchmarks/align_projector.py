"""Teach the demo's projector to show SmolLM2 what EfficientNet-Lite0 sees (LLaVA's first stage).

    OMP_NUM_THREADS=1 python benchmarks/align_projector.py

Tower and language model stay as they are; the projector alone learns, from drawn scenes (see
tasks/shapes.py; those of the test split never occur), in two parts. First each of the 16 places is
to look like the words of what is drawn there, "red" and "circle", as the language model's embedding
has them: that takes no language model. Then the language model is to write the scene in words, and
the loss on these goes through it to the projector. What comes out is written to
vision/projector.safetensors, with flags and log as metadata.
"""

# ruff: noqa: E402
import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
from utils import keep_freed_memory

keep_freed_memory()
import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from llms import load_model
from rldatasets import is_held_out
from tasks.shapes import COLOURS, COLUMNS, KINDS, ROWS, in_words, random_scene
from vision.embedded import PROJECTOR, sighted

SIDE = 4  # places of a picture in each direction
NOTHING = ("nothing",)
BATCH, WORDS_BATCH, TEST = 8, 64, 64  # scenes
WARM_UP, COOL_DOWN = 0.05, 0.4  # shares of the steps


def scenes(rng, count, held_out=False):
    """So many random scenes of one split."""
    found = []
    while len(found) < count:
        scene = random_scene(rng)
        if is_held_out(repr(scene.cells)) == held_out:
            found.append(scene)
    return found


@torch.no_grad()
def seen(model, scenes):
    """What the tower makes of the scenes' pictures, (B, 16, 768)."""
    images = torch.from_numpy(np.stack([np.asarray(scene()) for scene in scenes]))
    pixels = (images.permute(0, 3, 1, 2).float() - 127) / 128  # (B, 3, 128, 128), from -1 to 1
    return model.model.vision_tower(pixels).last_hidden_state


def drawn_there(scene):
    """The words of what is drawn at each of the 16 places: of the cell that its middle lies in."""
    middles = [(i + 0.5) / SIDE for i in range(SIDE)]
    cells = [int(y * ROWS) * COLUMNS + int(x * COLUMNS) for y in middles for x in middles]
    return [scene.cells[cell] or NOTHING for cell in cells]


def learn_words(model, tokenizer, args, rng):
    """The first part: features near the mean of their words' embeddings."""
    embedding = model.get_input_embeddings().weight
    words = [*((colour, kind) for colour in COLOURS for kind in KINDS), NOTHING]
    ids = [tokenizer([f" {w}" for w in pair], add_special_tokens=False).input_ids for pair in words]
    means = torch.stack([embedding[torch.tensor(rows).flatten()].mean(0) for rows in ids])
    drawn = scenes(rng, args.word_scenes)
    features = torch.cat([seen(model, part) for part in batches(drawn, WORDS_BATCH)])
    tower = model.model.vision_tower
    tower.mean.copy_(features.mean((0, 1)))
    tower.deviation.copy_(features.std((0, 1)).clamp(min=1e-3))
    features = (features - tower.mean) / tower.deviation  # (S, 16, 768)
    numbers = torch.tensor([[words.index(pair) for pair in drawn_there(s)] for s in drawn])
    projector = model.model.multi_modal_projector
    steps = args.word_epochs * len(drawn) // WORDS_BATCH
    optimizer = torch.optim.AdamW(projector.parameters(), lr=args.word_rate, weight_decay=0.0)
    for step in range(steps):
        set_rate(optimizer, args.word_rate, step, steps)
        rows = torch.tensor(rng.sample(range(len(drawn)), WORDS_BATCH))
        loss = F.mse_loss(projector(features[rows]), means[numbers[rows]]) / means.var()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {"words_loss": round(loss.item(), 3)}


def learn_captions(model, tokenizer, args, rng, log):
    """The second part: the loss of the scenes' words, through the language model in bf16, which
    stays as it is."""
    model.set_attn_implementation("eager")  # fastest for sequences this short
    model.model.language_model.to(torch.bfloat16)  # and the head, which is its embedding
    test = scenes(random.Random("test"), TEST, held_out=True)
    projector, started = model.model.multi_modal_projector, time.process_time()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=args.learning_rate, weight_decay=0.0)
    for step in range(args.steps + 1):
        if step % args.report == 0 or step == args.steps:
            row = {"step": step, **right(model, tokenizer, test)}
            log.append(row | {"cpu_seconds": round(time.process_time() - started)})
            print(log[-1], flush=True)
            save(model, log, args)
        if step == args.steps:
            break
        set_rate(optimizer, args.learning_rate, step, args.steps)
        logits, ids = logits_of(model, tokenizer, scenes(rng, BATCH))
        F.cross_entropy(logits, ids).backward()
        torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def set_rate(optimizer, top, step, steps):
    """The rate rises, stays and falls, in straight lines."""
    warm = min(1.0, (step + 1) / (WARM_UP * steps))
    for group in optimizer.param_groups:
        group["lr"] = top * min(warm, (steps - step) / (COOL_DOWN * steps))


def logits_of(model, tokenizer, scenes):
    """(logits (N, V), ids (N,)) of all tokens of the scenes' words."""
    before, after = (
        tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]
        for text in ("<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
    )
    words = [
        tokenizer(f"{in_words(scene)}<|im_end|>", add_special_tokens=False).input_ids
        for scene in scenes
    ]
    lengths = torch.tensor([len(row) for row in words])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in words], batch_first=True)
    embed, count = model.get_input_embeddings(), len(scenes)
    features = model.model.multi_modal_projector(seen(model, scenes))  # (B, 16, D)
    around = (embed(part).expand(count, -1, -1) for part in (before, after))
    embeds = torch.cat([next(around), features.to(embed.weight.dtype), next(around), embed(ids)], 1)
    hidden = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    real = torch.arange(ids.shape[1]) < lengths[:, None]  # (B, C)
    predicting = hidden[:, -ids.shape[1] - 1 : -1][real]  # (N, D)
    return model.lm_head(predicting).float(), ids[real]


@torch.no_grad()
def right(model, tokenizer, scenes):
    """The loss, and the shares of colours and of kinds that are the likeliest token after the true
    ones before them."""
    logits, ids = logits_of(model, tokenizer, scenes)
    found, shares = logits.argmax(-1) == ids, {}
    for name, words in (("colour", COLOURS), ("kind", KINDS)):
        texts = [text for word in words for text in (word, f" {word}")]
        starts = [tokenizer(text, add_special_tokens=False).input_ids[0] for text in texts]
        shares[name] = round(found[torch.isin(ids, torch.tensor(starts))].float().mean().item(), 3)
    return {"loss": round(F.cross_entropy(logits, ids).item(), 3), **shares}


def batches(rows, size):
    return (rows[start : start + size] for start in range(0, len(rows), size))


def save(model, log, args):
    tower = model.model.vision_tower
    learnt = {**model.model.multi_modal_projector.state_dict(),
              "mean": tower.mean, "deviation": tower.deviation}  # fmt: skip
    learnt = {name: value.detach().to(torch.bfloat16) for name, value in learnt.items()}
    flags = {name: value for name, value in vars(args).items() if name != "output"}
    facts = {"flags": json.dumps(flags), "log": json.dumps(log)}
    save_file(learnt, args.output, metadata=facts)


def align(args):
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    text_model, tokenizer = load_model("smollm2-135m", "cpu")
    model = sighted(text_model, tokenizer).requires_grad_(False).eval()
    model.model.multi_modal_projector.requires_grad_()
    log = [learn_words(model, tokenizer, args, rng)]
    print(log[0], flush=True)
    learn_captions(model, tokenizer, args, rng, log)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--word_scenes", type=int, default=4096)
    parser.add_argument("--word_epochs", type=int, default=10)
    parser.add_argument("--word_rate", type=float, default=1e-3)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--learning_rate", type=float, default=5e-4)
    parser.add_argument("--report", type=int, default=25, help="steps between reports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PROJECTOR)
    align(parser.parse_args())
