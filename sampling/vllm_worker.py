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

    def weights(self, path):
        """Take the weights in this directory in place of those that there are."""
        from vllm.platforms import current_platform

        self.engine.collective_rpc("reload_weights", kwargs={"weights_path": path})
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
