"""The same `Rollouts` from transformers' continuous batching, as an alternative to groups.py.

There, keys and values lie in pages, and the model's own forward pass reads them: nothing but the
shape of the result is shared with groups.py, which makes it a check on ours.

Letters as in groups.py.
"""

import copy

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from sampling.rollouts import listed_rollouts, padding_and_stops
from utils import UserError


@torch.no_grad()
def sample_rollouts_paged(
    model, tokenizer, prompts, group_size, max_new_tokens, temperature, seeds
):
    """`group_size` completions for every prompt, as groups.sample_rollouts gives them.

    No filters: the engine's log-probs are those of what the filters left, which is not what the
    trainer scores. The engine draws from torch's global generator, in a thread of its own; it is
    seeded from the first of `seeds` and put back afterwards. All requests are queued before the
    engine starts, so that a seed means the same batches, and with them the same draws, every time.
    """
    pad_id, stops = padding_and_stops(model, tokenizer)
    rows, device = len(prompts) * group_size, model.device
    longest = max(map(len, prompts)) + max_new_tokens
    page_size = 256 if device.type == "cuda" else 16  # flash attention takes no smaller page
    seed = next(iter(seeds)) % 2**31
    # Whatever is not said here, the engine would take from defaults (top_k 50) or the model.
    generation = GenerationConfig(
        do_sample=True, temperature=temperature, top_k=0, top_p=1.0, min_p=None,
        repetition_penalty=1.0, num_return_sequences=group_size, max_new_tokens=max_new_tokens,
        eos_token_id=stops, pad_token_id=pad_id,
    )  # fmt: skip
    batching = ContinuousBatchingConfig(
        page_size=page_size,
        num_blocks=rows * (longest // page_size + 2),  # enough for all; else it takes all memory
        max_batch_tokens=max(rows, 1024),
        max_requests_per_batch=rows,
        allow_block_sharing=False,  # it fails where a shared page leaves a prompt one token
        return_logprobs=True,
        seed=seed,
        auto_switch_to_flash=False,
    )
    manager = engine_model(model).init_continuous_batching(generation, batching)
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        requests = manager.add_requests(prompts, max_new_tokens=max_new_tokens)
        outputs = finished_outputs(manager, rows)

    names = [
        name
        for request in requests
        for name in (request, *(f"{request}__child#{i}" for i in range(group_size - 1)))
    ]
    completions = [(outputs[name].generated_tokens, outputs[name].logprobs) for name in names]
    return listed_rollouts(tokenizer, prompts, group_size, completions, (pad_id, stops), device)


def finished_outputs(manager, count):
    """Run the engine until `count` requests are done: what it says of each, by name."""
    outputs = {}
    manager.start()
    try:
        while len(outputs) < count:
            output = manager.get_result(timeout=1)
            if output is None and not manager.is_running():
                raise UserError("--sampler paged: transformers' engine stopped; see its message")
            if output is not None and output.error is not None:
                raise UserError(f"--sampler paged: {' '.join(output.error.split())[:120]}")
            if output is not None and output.is_finished():
                outputs[output.request_id] = output
    finally:
        manager.stop(block=True)
        manager.destroy()
    return outputs


def engine_model(model):
    """A copy for the engine, which changes a model's settings and runs it outside of autocast.

    (Autocast holds for a thread, and the engine has its own.) Under autocast the copy has that
    precision throughout, but for the head: see llms.TokenLogprobs.
    """
    engine = copy.deepcopy(model).requires_grad_(False).eval()
    device_type = model.device.type
    engine.set_attn_implementation("sdpa")  # training has put shared_prefix.py's in its place
    if torch.is_autocast_enabled(device_type):
        head = copy.deepcopy(engine.get_output_embeddings())  # no longer tied to the embedding
        engine.set_output_embeddings(head)
        for parameter in engine.parameters():
            # Not engine.to(): that would round the rotary embedding's frequencies as well, and a
            # thousand tokens on a position would be off by half a radian.
            if parameter is not head.weight:
                parameter.data = parameter.data.to(torch.get_autocast_dtype(device_type))
        head.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(module.weight.dtype),))
    return engine
