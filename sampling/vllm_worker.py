"""vLLM at work for a run: a program of its own, for the Python of vLLM's environment.

    python -I vllm_worker.py FD

engine.py is at the other end of the socket FD. It sends a line of JSON, [what, arguments], and gets
a line back: the answer, or {"error": why there is none}. Whatever else is printed goes to a log.
Nothing of the project is imported.

The engine starts with random weights, so that no answer is ever from weights that it was not sent.
"""

import json
import os
import socket
import sys
import traceback
from contextlib import nullcontext
from datetime import timedelta


class Worker:
    def load(self, settings):
        """Start vLLM with these arguments of its LLM. Returns the size of the vocabulary."""
        from vllm import LLM  # seconds, and a line each where it is not there or does not start

        self.engine = LLM(
            **settings,
            load_format="dummy",
            skip_tokenizer_init=True,
            generation_config="vllm",  # not the model's, which may have a top_k
            logprobs_mode="processed_logprobs",  # at the temperature; by default before it
        )
        real = {"load_config": {"load_format": "safetensors"}}
        self.engine.collective_rpc("update_config", args=(real,))
        return self.engine.llm_engine.model_config.get_vocab_size()

    def devices(self):
        """The device of each of vLLM's workers: a GPU's UUID, or "cpu"."""
        return self.engine.collective_rpc(device_of)

    def meet(self, **where):
        """Let the workers join the trainer's process group."""
        return self.engine.collective_rpc(meet, kwargs=where)

    def weights(self, path=None, layout=None, handles=None):
        """Take other weights in place of those that there are: from the files in this directory, by
        broadcast, each of this name, dtype and shape, or from where these handles say."""
        from vllm.platforms import current_platform

        if path is not None:
            self.engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
        else:
            self.engine.collective_rpc(take_weights, args=(layout, handles))
        if current_platform.is_cpu():
            self.engine.apply_model(pack_heads)
        # It holds keys and values of the weights before: a prompt that comes again would be
        # answered from them.
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("the prefix cache was not emptied")

    def sample(self, prompts, seeds, stops, max_tokens, temperature):
        """A completion for every prompt, a list of ids, from its seed: (ids, their log-probs in the
        whole distribution at this temperature), with the stop token, if one came."""
        from vllm import SamplingParams

        settings = [
            SamplingParams(
                n=1,
                seed=seed,
                temperature=temperature,
                top_p=1.0,
                top_k=0,
                min_p=0.0,
                max_tokens=max_tokens,
                stop_token_ids=stops,
                ignore_eos=True,  # nothing ends a completion but `stops`
                logprobs=0,  # that of the token drawn alone
                detokenize=False,
            )
            for seed in seeds
        ]
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = [
            output.outputs[0] for output in self.engine.generate(asked, settings, use_tqdm=False)
        ]
        return [
            (
                [*output.token_ids],
                [of[token].logprob for of, token in zip(output.logprobs, output.token_ids)],
            )
            for output in outputs
        ]


# --- in vLLM's workers, of which each has a GPU or all a CPU -------------------------------------


def device_of(worker):
    import torch

    if worker.device.type == "cpu":
        return "cpu"
    return str(torch.cuda.get_device_properties(worker.device).uuid)


def meet(worker, host, port, size, seconds):
    from torch.distributed import TCPStore

    try:  # vLLM may have pinned settings of NCCL, which both sides have to share
        from vllm.utils.nccl import unpinned_nccl_env
    except ImportError:
        unpinned_nccl_env = nullcontext
    wait = timedelta(seconds=seconds)
    store = TCPStore(host, port, size, is_master=False, timeout=wait)
    with unpinned_nccl_env():
        worker.trainer = weights_group(worker.device, store, 1 + worker.rank, size, wait)


def weights_group(device, store, rank, size, wait):
    """The process group of the trainer, rank 0, and vLLM's workers, beside those that each has."""
    import torch.distributed as dist

    store = dist.PrefixStore("weights", store)
    if device.type == "cpu":
        return dist.ProcessGroupGloo(store, rank, size, timeout=wait)
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = 2 * wait  # which ends the process; whoever waits says so in a line before
    group = dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)  # here, and not in the first broadcast
    return group


def broadcast(group, tensor):
    """Rank 0's tensor, in everyone's."""
    import torch.distributed as dist

    options = dist.BroadcastOptions()
    options.rootRank, options.rootTensor = 0, 0
    group.broadcast([tensor], options).wait()


def take_weights(worker, layout, handles):
    """vLLM's reload, of weights that come by broadcast or lie on this GPU already."""
    try:
        reload(worker, layout, handles)
    except Exception:
        # vLLM hears its workers in turn: those before this one wait for a broadcast without end.
        if worker.rank:
            traceback.print_exc()
            os._exit(1)
        raise


def reload(worker, layout, handles):
    import torch
    from torch.multiprocessing.reductions import rebuild_cuda_tensor

    def received():
        for name, dtype, shape in layout:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype), device=worker.device)
            broadcast(worker.trainer, tensor)
            yield name, tensor

    def opened():
        for name, handle in handles:
            arguments = [of_torch(value) for value in handle]
            arguments[6] = worker.device.index  # which may have another number here
            yield name, rebuild_cuda_tensor(*arguments)

    def of_torch(value):  # see weights.py, `handle`
        match value:
            case {"bytes": digits}:
                return bytes.fromhex(digits)
            case {"torch": name}:
                return getattr(torch, name)
        return value

    worker.reload_weights(weights_iterator=received() if handles is None else opened())
    if worker.device.type != "cpu":
        torch.cuda.synchronize(worker.device)  # then the trainer may have its memory back


def pack_heads(model):
    """On a CPU vLLM 0.32 multiplies by packed copies of matrices. A reload packs them anew, but for
    a head that is tied to the embedding, which no file has: it would stay as it was at the start.
    """
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

    for layer in model.modules():
        if isinstance(layer, ParallelLMHead):
            layer.quant_method.process_weights_after_loading(layer)


def serve(channel):
    """Answer until nobody asks any more."""
    worker = Worker()
    for line in channel.makefile():
        what, arguments = json.loads(line)
        try:
            answer = getattr(worker, what)(**arguments)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        channel.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)  # else processes of vLLM's would hold it open
    serve(socket.socket(fileno=descriptor))
