"""A token of our sampler on a GPU, as recorded from torch's kernels and from our own, in turn.

Both decode the same random tokens with the same random weights, in the shape of a known model: the
hub is not needed. Timed are the steps alone, 32 at a time, where the completions have just passed a
number of tokens; recording, prompts and drawing are left out. First the logits of one step are
compared: how far they are apart, in standard deviations.

    python benchmarks/decode_step.py

The last line is JSON: per number of tokens the median milliseconds of both, and the ratio fused /
recorded with its range over rounds.
"""

import json
import sys
import time

import common

WINDOW = 32  # steps timed at a time
PROMPT = 128  # tokens


def main(argv=None):
    parser = common.workload_parser(__doc__, rounds=3, warm_up=1)
    parser.set_defaults(
        model_name="Qwen/Qwen2.5-1.5B-Instruct", questions=4, group_size=16,
        max_completion_length=786,
    )  # fmt: skip
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 192, 448, 700],
                        help="tokens of the completions where steps are timed")  # fmt: skip
    args = parser.parse_args(argv)
    import torch

    from sampling.cuda_graph import RECORDERS

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device not in RECORDERS:
        print("decode_step.py: no CUDA device here", file=sys.stderr)
        sys.exit(2)
    with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):
        print(json.dumps(measured(args, device, RECORDERS[device])))


def measured(args, device, recorder):
    """Print the table; returns what goes into the last line."""
    import torch

    from sampling.cuda_graph import GraphDecoder
    from sampling.fused import FusedDecoder

    model = random_model(args.model_name, device)
    ids = torch.randint(1000, (args.questions, PROMPT), device="cpu").tolist()
    shape = (args.group_size, args.max_completion_length, recorder)
    kinds = {"recorded": GraphDecoder, "fused": FusedDecoder}
    tokens = torch.randint(1000, (args.questions * args.group_size,), device=device)
    logits, times = [], {kind: [] for kind in kinds}  # a list of milliseconds by length per round
    for number in range(args.warm_up + args.rounds):
        for kind, decoder_of in kinds.items():
            decoder = decoder_of(model, *shape)
            decoder.prefill(ids)
            if not number:
                logits.append(decoder.step(tokens).float().clone())
            spent = milliseconds(decoder, tokens, args.lengths)
            if number >= args.warm_up:
                times[kind].append(spent)
            del decoder  # its caches, before the next takes its own
    gap = ((logits[0] - logits[1]).abs().max() / logits[0].std()).item()
    result = {"rows": len(tokens), "rounds": args.rounds, "largest_gap_of_logits": round(gap, 4)}
    rows = [("ms per token of the completions", *kinds, "ratio")]
    for i, length in enumerate(args.lengths):
        of = {kind: [spent[i] for spent in rounds] for kind, rounds in times.items()}
        medians = {f"{kind}_ms_at_{length}": common.median(of[kind], 2) for kind in kinds}
        result |= medians | common.ratios(of["fused"], of["recorded"], f"at_{length}_")
        rows.append((f"at {length}", *medians.values(), common.span(result, f"at_{length}_")))
    print(common.table(rows))
    return result


def random_model(name, device):
    """A model of that shape, in fp32, with random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from launch.known_models import KNOWN_MODELS

    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**KNOWN_MODELS[name]))


def milliseconds(decoder, tokens, lengths):
    """Of one step, at each of these lengths."""
    import torch

    synchronize = torch.cuda.synchronize if tokens.is_cuda else (lambda: None)
    spent = []
    for length in lengths:
        while decoder.written < length:
            decoder.step(tokens)
        synchronize()
        started = time.perf_counter()
        for _ in range(WINDOW):
            decoder.step(tokens)
        synchronize()
        spent.append(1000 * (time.perf_counter() - started) / WINDOW)
    return spent


if __name__ == "__main__":
    main()
