"""Speaks as sampling/vllm_worker.py does, of a model without layers: what vLLM would be asked, it
answers with numpy, from the weights that it was sent. STUB_FAULT says what goes wrong, and from
which request for samples on: "ends 2". STUB_DEVICE is where its one worker is, STUB_WORKER where
the code of vLLM's workers is read, which needs torch and a second."""

import json
import os
import socket
import sys
import time
from functools import cache
from runpy import run_path
from types import SimpleNamespace

import numpy as np
from safetensors.numpy import load_file

FAULT, _, FROM = os.environ.get("STUB_FAULT", "").partition(" ")
asked, weights = 0, {}


def load(settings):
    assert not weights, "comes without any"
    with open(f"{settings['model']}/config.json") as file:
        return json.load(file)["vocab_size"] + (FAULT == "vocabulary")


def take(path=None, layout=None, handles=None):
    if is_wrong("halfway"):
        worker().reload_weights = lambda weights_iterator: (next(weights_iterator), os._exit(7))
    if path is None:
        code().take_weights(worker(), layout, handles)
    elif not (weights and is_wrong("stale")):
        weights.update(read(f"{path}/model.safetensors"))


def read(file):
    try:
        return load_file(file)
    except TypeError:  # numpy has no bf16
        from safetensors.torch import load_file as load_tensors

        return {name: tensor.float().numpy() for name, tensor in load_tensors(file).items()}


@cache
def code():
    return SimpleNamespace(**run_path(os.environ["STUB_WORKER"]))


@cache
def worker():
    import torch

    def reload_weights(weights_iterator):
        arrived = list(weights_iterator)  # vLLM too has many at hand before it copies one
        weights.update((name, tensor.float().cpu().numpy()) for name, tensor in arrived)

    device = torch.device(os.environ.get("STUB_DEVICE", "cpu"))
    return SimpleNamespace(device=device, rank=0, reload_weights=reload_weights)


def devices():
    return [os.environ.get("STUB_NAME") or code().device_of(worker())]


def meet(**where):
    if is_wrong("alone"):
        raise ValueError("nobody there")
    code().meet(worker(), **where)


def is_wrong(fault):
    return fault == FAULT and asked >= int(FROM or 1)


def logprobs(token, temperature):
    """(V,), of what follows the token."""
    x = weights["model.embed_tokens.weight"][token].astype(np.float64)
    x = x / np.sqrt((x * x).mean() + 1e-6) * weights["model.norm.weight"]
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    logits = head @ x / temperature
    logits -= logits.max()
    return logits - np.log(np.exp(logits).sum())


def completion(ids, seed, stops, max_tokens, temperature):
    generator, last, drawn, scores = np.random.default_rng(seed), ids[-1], [], []
    while len(drawn) < max_tokens and not (drawn and last in stops):
        values, before = logprobs(last, temperature), logprobs(last, 1.0)
        last = int(generator.choice(len(values), p=np.exp(values)))
        drawn.append(last)
        scores.append(float((before if is_wrong("temperature") else values)[last]))
    if is_wrong("token"):
        drawn[-1] = 10**6
    if is_wrong("number"):
        scores[-1] = float("nan")
    return drawn, scores[:-1] if is_wrong("length") else scores


def sample(prompts, seeds, stops, max_tokens, temperature):
    global asked
    asked += 1
    if is_wrong("ends"):
        os._exit(7)
    if is_wrong("hangs"):
        time.sleep(60)
    rows = zip(prompts, seeds)
    found = [completion(ids, seed, stops, max_tokens, temperature) for ids, seed in rows]
    return found[:-1] if is_wrong("count") else found


known = {"load": load, "weights": take, "sample": sample, "devices": devices, "meet": meet}
channel = socket.socket(fileno=int(sys.argv[-1]))
for line in channel.makefile():
    what, arguments = json.loads(line)
    try:
        answer = known[what](**arguments)
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    text = "what?" if is_wrong("no_json") else json.dumps(answer)
    channel.sendall(text.encode() + b"\n")
