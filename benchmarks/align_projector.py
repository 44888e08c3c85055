"""Teach the demo's projector to show SmolLM2 what EfficientNet-Lite0 sees (LLaVA's first stage).

    python benchmarks/align_projector.py --steps 1500

Tower and language model stay as they are; the projector alone learns, from drawn scenes (see
tasks/shapes.py; those of the test split never occur) and what is on them in words. It is written to
vision/projector.safetensors, with the log of its training as metadata.
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
from tasks.shapes import COLOURS, KINDS, in_words, random_scene
from utils import parameters_of
from vision.embedded import PLACEHOLDER, PROJECTOR, sighted

SCENES_FOR_MEANS = 512
BATCH, TEST = 8, 64
WARM_UP, COOL_DOWN = 0.02, 0.4  # shares of the steps
PROMPT = "<|im_start|>user\n{}Name the shapes.<|im_end|>\n<|im_start|>assistant\n"


def scenes(rng, count, held_out=False):
    """So many random scenes of one split."""
    found = []
    while len(found) < count:
        scene = random_scene(rng)
        if is_held_out(in_words(scene)) == held_out:
            found.append(scene)
    return found


def pixels(scenes):
    """(B, 3, 128, 128), from -1 to 1."""
    images = torch.from_numpy(np.stack([np.asarray(scene()) for scene in scenes]))
    return (images.permute(0, 3, 1, 2).float() - 127) / 128


@torch.no_grad()
def seen(model, scenes):
    tower = model.model.vision_tower
    return tower(pixels(scenes)).last_hidden_state  # (B, 16, 768)


def logits_of(model, tokenizer, scenes):
    """(logits (B, C, V), ids (B, C), mask (B, C)) of the scenes' words."""
    prompt = tokenizer(PROMPT.format(PLACEHOLDER * 16), add_special_tokens=False).input_ids
    words = [
        tokenizer(in_words(scene) + "<|im_end|>", add_special_tokens=False).input_ids
        for scene in scenes
    ]
    longest = max(map(len, words))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in words])
    mask = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in words])
    whole = torch.cat([torch.tensor(prompt).expand(len(ids), -1), ids], dim=1)
    embeds = model.get_input_embeddings()(whole)
    features = model.model.multi_modal_projector(seen(model, scenes))
    shown = (whole == model.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(shown, features.to(embeds.dtype))
    hidden = model.get_decoder()(inputs_embeds=embeds, use_cache=False).last_hidden_state
    return model.lm_head(hidden[:, len(prompt) - 1 : -1]), ids, mask


@torch.no_grad()
def right(model, tokenizer, scenes):
    """Shares of colours and of kinds that are the likeliest token after what stands before them."""
    logits, ids, mask = logits_of(model, tokenizer, scenes)
    found = (logits.argmax(-1) == ids) & mask
    shares = {}
    for name, words in (("colour", COLOURS), ("kind", KINDS)):
        starts = {
            tokenizer(text, add_special_tokens=False).input_ids[0]
            for word in words
            for text in (word, f" {word}")
        }
        of_these = torch.isin(ids, torch.tensor(sorted(starts))) & mask
        shares[name] = round(found[of_these].float().mean().item(), 3)
    losses = F.cross_entropy(logits[mask].float(), ids[mask])
    return {"loss": round(losses.item(), 3), **shares}


def align(args):
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    text_model, tokenizer = load_model("smollm2-135m", "cpu")
    model = sighted(text_model, tokenizer).requires_grad_(False).eval()
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    sample = seen(model, scenes(rng, SCENES_FOR_MEANS)).flatten(0, 1)
    tower.mean.copy_(sample.mean(0))
    tower.deviation.copy_(sample.std(0).clamp(min=1e-3))
    with torch.no_grad():  # what comes out is as large as words are
        projector.linear_2.weight.mul_(model.get_input_embeddings().weight.std() / 0.05)
    projector.requires_grad_()
    groups = [{"params": [*projector.parameters()], "top": args.learning_rate}]
    if args.model_rate:
        decoder = model.get_decoder().requires_grad_()
        groups.append({"params": [*decoder.parameters()], "top": args.model_rate})
    optimizer = torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)
    test, log, started = scenes(random.Random("test"), TEST, held_out=True), [], time.time()

    def report(step):
        with torch.autocast("cpu", torch.bfloat16):
            row = {"step": step, **right(model, tokenizer, test),
                   "seconds": round(time.time() - started)}  # fmt: skip
        log.append(row)
        print(row, flush=True)

    for step in range(args.steps):
        if step % args.report == 0:
            report(step)
        warm = min(1.0, (step + 1) / (WARM_UP * args.steps))
        factor = min(warm, (args.steps - step) / (COOL_DOWN * args.steps))
        for group in optimizer.param_groups:
            group["lr"] = group["top"] * factor
        with torch.autocast("cpu", torch.bfloat16):
            logits, ids, mask = logits_of(model, tokenizer, scenes(rng, BATCH))
            loss = F.cross_entropy(logits[mask].float(), ids[mask])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters_of(optimizer), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % args.report == 0:
            save(model, log, args)
    report(args.steps)
    save(model, log, args)


def save(model, log, args):
    tower = model.model.vision_tower
    learnt = {**model.model.multi_modal_projector.state_dict(),
              "mean": tower.mean, "deviation": tower.deviation}  # fmt: skip
    learnt = {name: value.detach().to(torch.bfloat16) for name, value in learnt.items()}
    facts = {"flags": json.dumps(vars(args), default=str), "log": json.dumps(log)}
    save_file(learnt, args.output, metadata=facts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--model_rate", type=float, default=0.0, help="of the language model")
    parser.add_argument("--report", type=int, default=50, help="steps between reports")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=PROJECTOR)
    align(parser.parse_args())
