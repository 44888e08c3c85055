"""Does the suite notice? `python tests/mutants.py [--only NAME ...] [--jobs N]`.

One bug at a time goes into a copy of the repository; the tests of the changed module then have to
fail. Bugs of the kind that GRPO code has had: none of them raises, all of them train something. A
bug is a text that stands exactly once in the modules, and what replaces it.
"""

import argparse
import ast
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
GSM8K = os.environ.get("GSM8K_DIR", str(ROOT.parent / "shared" / "gsm8k"))
# What takes seconds to import, imported once and shared by all forks. Nothing of the repository.
LIBRARIES = ("torch", "transformers.models.auto.modeling_auto", "transformers.generation",
             "transformers.models.qwen2.modeling_qwen2", "accelerate", "datasets", "hypothesis",
             "matplotlib.figure")  # fmt: skip
FOLDERS = ("sampling", "training", "evaluation", "records", "launch", "tasks", "reading", "vision")


@dataclass(frozen=True)
class Mutant:
    """A bug: `old`, found once in the repository's modules, becomes `new`; these tests see it."""

    name: str
    old: str
    new: str
    tests: str


SELF_PLAY = "sampling/test_self_play.py"
TURNS, SEEING = "sampling/test_turns.py", "vision/test_seeing_families.py"
EMBEDDED = "vision/test_embedded_sighted.py"
GRPO, OBJECTIVES, DATA, LLMS = (
    "test_grpo.py", "test_objectives.py", "test_rldatasets.py", "test_llms.py",
)  # fmt: skip
REWARDS, RUNS = "test_reward_parser.py test_evaluator.py", "test_main.py"
SAMPLER, DECODER, GRAPHS = (
    "sampling/test_groups.py", "sampling/test_decoder.py", "sampling/test_cuda_graph.py",
)  # fmt: skip
UPDATE, OPTIMIZER, COLD_START, LOGPROBS, PREFIX, LORA, PROCESSES = (
    "training/test_update.py", "training/test_optimizer.py", "training/test_cold_start.py",
    "training/test_logprobs.py", "training/test_shared_prefix.py", "training/test_lora.py",
    "training/test_processes.py",
)  # fmt: skip
EVALUATION, SCORING, CHAT = (
    "evaluation/test_held_out.py", "evaluation/test_scoring.py", "evaluation/test_chat.py",
)  # fmt: skip
REFEREE = "evaluation/test_referee.py"
TRACKERS, TASKS, COUNTDOWN = (
    "records/test_trackers.py", "tasks/test_tasks.py", "tasks/test_countdown.py",
)  # fmt: skip
TOKENIZERS, TEMPLATES, THINKING, PROMPTS, ADAPTERS, EXPORTS = (
    "test_tokenizers.py", "test_templates.py", "evaluation/test_thinking.py",
    "launch/test_prompt_flags.py", "training/test_adapter_tokenizer.py", "records/test_exports.py",
)  # fmt: skip
ANSWERS, MATH, VERDICTS = (
    "test_answers.py", "tasks/test_math_answers.py", "evaluation/test_verdicts.py",
)  # fmt: skip
SHARING, TREE = "sampling/test_sharing.py", "training/test_tree.py"
ADVANTAGES, SURROGATES = "test_advantages.py", "test_surrogates.py"
SHAPES, MALFORMED = "reading/test_shapes.py", "reading/test_malformed.py"
FAMILIES, ENGINE = "sampling/test_families.py", "sampling/test_engine.py"
WEIGHTS = "sampling/test_weights.py"

MUTANTS = [
    # --- advantages
    Mutant(
        "population standard deviation",
        "variance = advantages.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)",
        "variance = advantages.square().sum(-1, keepdim=True) / count",
        GRPO,
    ),
    Mutant("no epsilon in the advantage", "(variance.sqrt() + STD_EPSILON)",
           "(variance.sqrt() + 1e-8)", GRPO),
    Mutant("equal rewards get what rounding leaves",
           "return advantages.where(has_signal(rewards, chosen)[:, None], 0.0)",
           "return advantages", GRPO),
    Mutant("mean over the batch, not the group",
           "mean = rewards.where(chosen, 0).sum(-1, keepdim=True) / count",
           "mean = rewards.where(chosen, 0).sum() / chosen.sum()", GRPO),
    Mutant("PODS keeps the best alone",
           "(ranks < size - k) | (ranks >= group_size - k)", "ranks >= group_size - size", GRPO),
    # --- objective
    Mutant("KL the other way round", "log_ratio = ref_logprobs - logprobs  #",
           "log_ratio = logprobs - ref_logprobs  #", GRPO),
    Mutant("k1 for k3", "return ratio - 1 - log_ratio", "return -log_ratio", GRPO),
    Mutant("k2 without its half", "return 0.5 * log_ratio.square()",
           "return log_ratio.square()", GRPO),
    Mutant("KL rewarded", "gain - objective.kl_beta * kl",
           "gain + objective.kl_beta * kl", GRPO),
    Mutant("max of ratio and clipped ratio", "gain = torch.minimum(", "gain = torch.maximum(",
           GRPO),
    Mutant("ratio always 1",
           "logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs",
           "logprobs.detach()", GRPO),
    Mutant("one clip bound for both sides", "= objective.clip_epsilon, objective.clip_epsilon_high",
           "= objective.clip_epsilon, objective.clip_epsilon", GRPO),
    Mutant("ascent", "return -(weights * gain).sum()", "return (weights * gain).sum()", GRPO),
    Mutant("padding counts in a sequence's mean",
           "(sequences * mask.sum(-1, keepdim=True).clamp(min=1))", "(sequences * mask.shape[-1])",
           GRPO),
    Mutant("dapo averages each sequence", "return mask / mask.sum().clamp(min=1)",
           "return mask / (len(mask) * mask.sum(-1, keepdim=True).clamp(min=1))", GRPO),
    Mutant("dr_grpo divides by the longest", "return mask / (sequences * max_completion_length)",
           "return mask / (sequences * mask.shape[-1])", GRPO),
    Mutant("the sequence's ratio counts padding", "/ (~padding).sum(-1, keepdim=True).clamp(min=1)",
           "/ padding.shape[-1]", OBJECTIVES),
    Mutant("cispo's bounded ratio has a gradient of its own", "bounded.detach() * advantages",
           "bounded * advantages", OBJECTIVES),
    Mutant("importance weights without their cap",
           "gap.clamp(objective.tis_floor, objective.tis_cap)", "gap.clamp(objective.tis_floor)",
           OBJECTIVES),
    Mutant("leave one out the other way round",
           "count / (count - 1).clamp(min=1)\n    return", "(count - 1) / count\n    return",
           OBJECTIVES),
    Mutant("entropy punished", "gain + objective.entropy_bonus *",
           "gain - objective.entropy_bonus *", OBJECTIVES),
    Mutant("length rewarded",
           "(max_completion_length - buffer - lengths.double()) / buffer",
           "(lengths.double() + buffer - max_completion_length) / buffer", OBJECTIVES),
    # --- update
    Mutant("micro-batches each averaged", "forward_and_backward(setup, one, objective)\n",
           "forward_and_backward(\n                    setup,\n"
           "                    replace(\n                        one,\n"
           "                        batch=replace(\n"
           "                            one.batch, weights=one.batch.weights * len(passes)\n"
           "                        ),\n                    ),\n"
           "                    objective,\n                )\n", UPDATE),
    Mutant("the last micro-batch's gradient alone",
           "    (loss * setup.loss_scale.scale).backward()\n    return",
           "    setup.policy.zero_grad()\n"
           "    (loss * setup.loss_scale.scale).backward()\n    return", UPDATE),
    Mutant(
        "gradients clipped per micro-batch",
        "    (loss * setup.loss_scale.scale).backward()\n    return",
        "    (loss * setup.loss_scale.scale).backward()\n"
        "    torch.nn.utils.clip_grad_norm_(\n"
        "        setup.policy.parameters(), args.max_grad_norm or float('inf')\n"
        "    )\n    return",
        UPDATE,
    ),
    Mutant("a gradient that replaces what passes before gave",
           "return weight.grad, None", "return weight.grad.zero_(), None",
           "training/test_lean_layers.py"),
    Mutant("a product that replaces what passes before gave", "leaf.grad.addmm_(a, b)",
           "leaf.grad.addmm_(a, b, beta=0)", "training/test_lean_layers.py"),
    Mutant("linear layers without their bias", "return product(x, weight, bias)",
           "return product(x, weight)", "training/test_lean_layers.py"),
    Mutant("flat groups that are not skipped", " or not setup.args.skip_flat_groups", " or True",
           UPDATE),
    Mutant("flat groups skipped although they have an entropy bonus",
           "setup.args.entropy_bonus > 0 or not", "not", UPDATE),
    Mutant("an old run that takes a preset's new habit", "_without_preset() if saved else {}",
           "{}", "launch/test_prompt_flags.py"),
    Mutant("flat groups left out of the mean", "sequences = chosen.sum().clamp(min=1)",
           "sequences = (chosen & (advantages != 0)).sum().clamp(min=1)", UPDATE),
    Mutant("one inner epoch whatever is asked", "for _ in range(args.num_inner_epochs):",
           "for _ in range(1):", UPDATE),
    Mutant("truncated completions trained on anyway", "mask = mask & rollouts.finished[:, :, None]",
           "mask = mask.clone()", UPDATE),
    Mutant("the reference is the policy",
           "logprobs_without_gradient(\n            setup.reference,",
           "logprobs_without_gradient(\n            setup.policy,", UPDATE),
    Mutant("mismatch includes what was learnt", '"mismatch": log_gap.abs().sum()',
           '"mismatch": (logprobs - sampled_logprobs).abs().sum()', UPDATE),
    Mutant("a step that is not finite is taken",
           "    if finite:\n        optimizer.step()\n", "    optimizer.step()\n", UPDATE),
    Mutant("a gradient that is not finite is taken",
           "torch.isfinite(grad_norm) & torch.isfinite(loss)", "torch.isfinite(loss)", OPTIMIZER),
    Mutant("gradients never cleared", "    optimizer.zero_grad()\n    loss_scale.learn",
           "    loss_scale.learn", UPDATE),
    Mutant("the norm is logged after clipping",
           "return whole_tensor(norm)\n",
           "return whole_tensor(norm).clamp(max=max_grad_norm or math.inf)\n", UPDATE),
    Mutant("weight decay on norms and biases", '{"params": vectors, "weight_decay": 0.0}',
           '{"params": vectors, "weight_decay": args.weight_decay}', OPTIMIZER),
    Mutant("warm-up starts at 0", "return (step + 1) / warmup", "return step / warmup", OPTIMIZER),
    Mutant("a later epoch corrects for itself", "replace(one.batch, old_logprobs=logprobs)",
           "replace(one.batch, old_logprobs=None)", UPDATE),
    # --- the run
    Mutant("the schedule steps before its rate is logged and used",
           '            update |= meter.shares() | {"learning_rate": scheduler.get_last_lr()[0]}\n'
           "            scheduler.step()\n",
           "            scheduler.step()\n"
           '            update |= meter.shares() | {"learning_rate": scheduler.get_last_lr()[0]}\n',
           RUNS),
    Mutant("evaluation on training problems",
           "held_out_problems(args, test, start, task.together)\n    counts",
           "held_out_problems(args, train, start, task.together)\n    counts", RUNS),
    Mutant("over-long questions stay in",
           "if prompt_length(p) <= args.max_prompt_length]", "if p]", RUNS),
    Mutant("dynamic sampling draws once",
           "if has_signal(rewards.total).sum() >= args.questions_per_step:", "if True:", RUNS),
    Mutant("every step samples with the same numbers",
           "[mixed_seed(args.seed, draw, q)", "[mixed_seed(args.seed, q)", RUNS),
    Mutant("the cold start averages each solution", "mine[batch.rows]).sum() / tokens",
           "mine[batch.rows]).sum() / logprobs.numel()", COLD_START),
    Mutant("the cold start teaches no end",
           "[*first, end], [True] * (len(first) + 1)", "[*first], [True] * len(first)", COLD_START),
    Mutant("a resumed run warms up again", "last_epoch=done - 1", "last_epoch=-1",
           OPTIMIZER),
    # --- data
    Mutant("the seed does not shuffle", "mixed_seed(self.seed, epoch)", "mixed_seed(0, epoch)",
           DATA),
    Mutant("every step has the same batch",
           "positions = range(step * size, (step + 1) * size)", "positions = range(size)", DATA),
    Mutant("generated test problems in training",
           'if is_held_out(calculation) == (split == "test"):', "if calculation:", DATA),
    Mutant("a file's test problems in training",
           "zip(problems, firsts) if is_held_out(key) == wanted]", "zip(problems, firsts)]", DATA),
    # --- prompts, log-probs, reference
    Mutant("no generation prompt",
           "return rendered(tokenizer, messages, add_generation_prompt=True)",
           "return rendered(tokenizer, messages)",
           LLMS),
    Mutant("two BOS",
           "return tokenizer.apply_chat_template(\n"
           "            messages, return_dict=False, **rendering.arguments, **more\n        )",
           "text = tokenizer.apply_chat_template(\n"
           "            messages, tokenize=False, **rendering.arguments, **more\n        )\n"
           "        return tokenizer(text).input_ids", LLMS),
    Mutant("one stop token of several",
           "stops.update(declared if isinstance(declared, list) else [declared])", "pass", LLMS),
    Mutant("log-probs without the temperature",
           "hidden.to(head.weight.dtype) / (temperature / head.scale)",
           "hidden.to(head.weight.dtype) / (1 / head.scale)", LOGPROBS),
    Mutant("weights in the file's precision",
           'dtype=torch.float32, token=token',
           'dtype="auto", token=token', LLMS),
    Mutant("a reference that learns",
           "reference = copied.requires_grad_(False).eval()",
           "reference = copied.eval()", LLMS),
    Mutant("a reference that is the policy",
           "reference = frozen_copy(policy, dtype)",
           "reference = policy", LLMS),
    Mutant("the reference moves by 1 - alpha", "old.lerp_(whole_tensor(new), alpha)",
           "old.lerp_(whole_tensor(new), 1 - alpha)",
           LLMS),
    # --- several processes
    Mutant("every process keeps its own gradient", "torch.distributed.all_reduce(parameter.grad)",
           "pass", PROCESSES),
    Mutant("all processes train on all groups", "[owner == accelerator.process_index for owner",
           "[True for owner", PROCESSES),
    Mutant("every process samples the same numbers", "seeds = own_part([mixed_seed",
           "seeds = list([mixed_seed", PROCESSES),
    Mutant("sharded gradients are averaged", "module.set_gradient_divide_factor(1.0)",
           "module.set_gradient_divide_factor(2.0)", PROCESSES),
    Mutant("an idle pass has weight", "weights * weights.new_tensor(own)[:, None, None]",
           "weights", PROCESSES),
    # --- adapters
    Mutant("the sampler leaves the adapter out",
           'names = [] if getattr(linear, "disable_adapters", True) else linear.active_adapters',
           "names = []", LORA),
    Mutant("an adapter folded into the nearest bf16",
           "return dithered(weight) if names and dtype == torch.bfloat16 else weight.to(dtype)",
           "return weight.to(dtype)", LORA),
    Mutant("a reference with the policy's adapter",
           "shared = {id(p): p for p in model.parameters() if not p.requires_grad}",
           "shared = {id(p): p for p in model.parameters()}", LORA),
    Mutant("a reference from before the cold start",
           "if has_adapter(policy) and args.cold_start_steps == 0:", "if has_adapter(policy):",
           LORA),
    Mutant("moments of frozen weights", "    if has_adapter(model):\n        return [parameter",
           "    if False:\n        return [parameter", LORA),
    # --- the shared prefix
    Mutant("positions start anew after the prompt",
           "position = (after[question[rows], None] + depth)[in_own]", "position = depth[in_own]",
           PREFIX),
    Mutant("off by one in the logits",
           "last = prompts[question, prompt_lengths[question] - 1, None]",
           "last = prompts[question, prompt_lengths[question] - 2, None]", PREFIX),
    Mutant("a completion sees what comes after", "c <= depth[:, :, None]",
           "c <= depth[:, :, None] + 1", PREFIX),
    Mutant("a completion sees its prompt's padding", "in_prompt[question[rows], None], (*in_own",
           "np.ones_like(in_prompt)[question[rows], None], (*in_own", PREFIX),
    Mutant("the last token is not scored", "- 1, c < lengths[:, None]  #",
           "- 1, c < np.maximum(lengths[:, None] - 1, 1)  #", PREFIX),
    Mutant("dropout while scoring",
           "F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scaling)",
           "F.scaled_dot_product_attention(\n            q, k, v, attn_mask=bias, scale=scaling, "
           "dropout_p=0.5 * module.training)", PREFIX),
    # --- sampling
    Mutant("padding on the right", "padded = [[0] * (longest - len(ids)) + list(ids) for",
           "padded = [list(ids) + [0] * (longest - len(ids)) for", DECODER),
    Mutant("padding counts as position", "(mask.cumsum(-1) - 1).clamp(min=0)",
           "torch.arange(mask.shape[1], device=mask.device)", DECODER),
    Mutant("graphs let a row read what it has not written",
           "> self.now  # (C,)", "> self.now + 1  # (C,)", GRAPHS),
    Mutant("graphs write every token to the same place", "        self.now += 1\n", "", GRAPHS),
    Mutant("a graph for the rows there were goes on", "        self.length = self.graph = None\n"
           "        return rows", "        return rows", GRAPHS),
    Mutant("graphs read the token they were recorded with", "self.tokens.copy_(tokens)",
           "self.tokens = tokens", GRAPHS),
    Mutant("rows of graphs are never dropped", "if 2 * len(parents) > len(self.position):",
           "if True:", GRAPHS),
    Mutant("positions stay with the row that has gone",
           "self.position = self.position[self._on_device(parents)]",
           "self.position = self.position[: len(parents)]", DECODER),
    Mutant("rows change places when others finish",
           "live, tokens, row = live[there], tokens[there], row[left.numpy()]",
           "live, tokens, row = live[: len(left)], tokens[there], row[left.numpy()]", SAMPLER),
    Mutant("the stop token is masked", "mask[live, t] = drawing",
           "mask[live, t] = drawing & ~(tokens[:, None] == stops).any(-1)", SAMPLER),
    Mutant("what follows the stop token is not", "drawing = ~finished[live]",
           "drawing = torch.ones_like(finished[live])", SAMPLER),
    Mutant("cut off counts as finished", "finished=finished.view(shape[:2])",
           "finished=torch.ones_like(finished).view(shape[:2])", SAMPLER),
    Mutant("sampled log-probs without the temperature",
           "return tokens, probs[row, tokens].log()",
           "return tokens, logits.softmax(-1)[row, tokens].log()", SAMPLER),
    Mutant("log-probs of the filtered distribution",
           "tokens = _draw(_filtered(probs, filters), uniforms, row)",
           "probs = _filtered(probs, filters)\n"
           "        probs = probs / probs.sum(-1, keepdim=True)\n"
           "        tokens = _draw(probs, uniforms, row)", SAMPLER),
    # --- rewards and evaluation
    Mutant("the first number anywhere", "match := NUMBER.fullmatch(text)",
           "match := NUMBER.search(text)", REWARDS),
    Mutant("no tags, so all of it is the answer",
           'if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:\n'
           "        return None",
           'if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:\n'
           "        return completion", REWARDS),
    Mutant("a tax on length where the answer is not closed",
           "excess = len(after.strip()) if closing else 0", "excess = len(after.strip())", REWARDS),
    Mutant("a format of one line",
           "return 0.5 if tags and reasoning.strip() and answer.strip() else 0.0",
           "return 0.5 if tags and reasoning.strip() and answer.strip() and '\\n' not in reasoning "
           "else 0.0", REWARDS),
    Mutant("reward weights without effect", "(per_function * factors).sum(-1)",
           "per_function.sum(-1)", SCORING),
    Mutant("a gold answer anywhere in the answer",
           "return value == number and (unit", "return gold in answer or (unit", REWARDS),
    Mutant("evaluation at a temperature", "group_size=1, temperature=0)",
           "group_size=1, temperature=1)", EVALUATION),
    Mutant("accuracy is the reward's", 'task, timeout),\n                "format',
           'task, timeout), "correct": row[0] >= 2,\n                "format', EVALUATION),
    # --- tasks
    Mutant("the default judges every task", "call(task.is_correct, completion",
           "call(is_correct_leniently, completion", TASKS),
    Mutant("a cold start without the task's prompt",
           "chat_prompt(setup.tokenizer, setup.task.system_prompt, p.question, p.images)",
           "chat_prompt(setup.tokenizer, '', p.question, p.images)", TASKS),
    Mutant("any numbers will do", "sorted(expression.numbers) == problem", "None != problem",
           COUNTDOWN),
    Mutant("a minus takes all that follows it", "value = CALCULATE[take()](value, operand(depth))",
           "value = CALCULATE[take()](value, chain(operations, operand, depth))", COUNTDOWN),
    Mutant("what is left over is ignored", " if tokens[at] is None else None", "", COUNTDOWN),
    Mutant("test problems in the training data", "if is_held_out(key) == (split",
           "if True or (split", COUNTDOWN),
    Mutant("the gym's test questions in training",
           '() if split == "test" else problems("test", 0, variant)', "()", TASKS),
    Mutant("a verdict that comes late answers the next question",

           "                self._end(process)\n                raise\n        return",
           "                raise\n        return", TASKS),
    # --- trackers, and a model tried by hand
    Mutant("TensorBoard shows what a resumed run makes again twice",
           '"tensorboard": {"purge_step": first}', '"tensorboard": {}', TRACKERS),
    Mutant("an evaluation's figures among the steps'",
           'f"eval/{name}" if name.startswith(ALSO_OF_A_STEP) else name', "name", TRACKERS),
    Mutant("a tracker that fails ends the run", "except Exception as error:  # the network",
           "except OverflowError as error:  # the network", TRACKERS),
    Mutant("a terminal obeys what a model wrote", 'print(printable(text, kept="\\n"), end=',
           "print(text, end=", CHAT),
    Mutant("a question without the system prompt",
           "return chat_prompt(tokenizer, task.system_prompt, problem.question, problem.images)",
           'return chat_prompt(tokenizer, "", problem.question, problem.images)', CHAT),
    Mutant("advantages of another baseline", "args.advantage_scale, chosen, args.baseline)",
           'args.advantage_scale, chosen, "leave_one_out")', CHAT),
    # --- templates, tokenizers, thoughts and exports
    Mutant("the embedded model's digits are not split off", "[digits, core.pre_tokenizer]",
           "[core.pre_tokenizer]", TOKENIZERS),
    Mutant("a class may drop what tokenizer.json says",
           "if _splits(tokenizer.backend_tokenizer) == _splits(said)", "if True", TOKENIZERS),
    Mutant("a class adds special tokens of its own",
           "if isinstance(token, str) and said.token_to_id(token) is not None",
           "if isinstance(token, str)", TOKENIZERS),
    Mutant("the end of the chat turn is no stop", "{tokenizer.eos_token_id, turn_end(tokenizer)}",
           "{tokenizer.eos_token_id}", TEMPLATES),
    Mutant("a prompt goes by the clock", "datetime = OnDay", "datetime = clock", TEMPLATES),
    Mutant("a system message that is refused is lost", "replace(rendering, system_in_user=True)",
           "replace(rendering, system_in_user=False)", TEMPLATES),
    Mutant("a stop is seen at looks alone", "range(max(since - first, begun) + 1, len(tokens) + 1)",
           "range(len(tokens), len(tokens) + 1)", TEMPLATES),
    Mutant("what follows a stop is trained",
           "mask[line, end:], logprobs[line, end:] = pad_id, False",
           "finished[line], logprobs[line, end:] = pad_id, True", TEMPLATES),
    Mutant("thoughts are judged", "return answer.lstrip()", "return text", THINKING),
    Mutant("thoughts that the template opened are judged",
           '"" if thinking or completion', '"" if completion', THINKING),
    Mutant("a resumed run takes other prompts", "if said.get(name, value) != value}",
           "if said.get(name, value) != value} - {'prompts_sha256'}", PROMPTS),
    Mutant("a run of before is refused for what it does not say", "if said.get(name, value) !=",
           "if said and said.get(name) !=", PROMPTS),
    Mutant("a run's model is asked on another day", "flags.get(name, ours[name])", "ours[name]",
           PROMPTS),
    Mutant("an adapter's tokenizer is ignored", "tokenizer = tokenizer_with(folder, tokenizer)",
           "pass", ADAPTERS),
    Mutant("an adapter's embeddings do not fit", "if rows not in (None,", "if rows in (None,",
           ADAPTERS),
    Mutant("transformers 4 reads no scaling of positions", '"rope_scaling": scaling}',
           '"rope_scaling": None}', EXPORTS),
    Mutant("a quantised model is of a known type", 'if config.get("quantization_config"):',
           "if False:", "launch/test_quantised.py"),
    # --- the tree of a group
    Mutant("copies share a row for good",
           "first, own = first_of_each(row * (tokens.max() + 1) + tokens)",
           "first, own = first_of_each(row)", SHARING),
    Mutant("equal draws of other rows join", "first_of_each(row * (tokens.max() + 1) + tokens)",
           "first_of_each(tokens)", SHARING),
    Mutant("a row that parts has no past",
           "self._copy((*self.keys, *self.values), to, of, self.written)", "pass", SHARING),
    Mutant("a prefix goes by its token alone", "np.unique(before[rows] * base + ids[rows, c], ",
           "np.unique(ids[rows, c], ", TREE),
    Mutant("what is shared has the gradient of one", "values.index_select(0, packing.same)",
           "values.new_zeros(len(packing.same)).index_copy(\n"
           "            0, packing.same.unique(), values)", TREE),
    Mutant("own tokens see the whole completion", "c <= depth[:, :, None]", "c <= c.max()", TREE),
    Mutant("a prompt ends where it would if none shared its beginning",
           "prompts[question, prompt_lengths[question] - 1, None]",
           "(starts + prompt_lengths - 1)[question, None]", TREE),
    Mutant("the budget counts what prompts share once for each",
           "cost = own + len(begins - read)", "cost = own + len(begins)", TREE),
    # --- numbers
    Mutant("the ratio compares with the sampler",
           "logprobs.detach() if batch.old_logprobs is None else batch.old_logprobs",
           "batch.sampled_logprobs", UPDATE),
    Mutant("the gradient's norm in one fp32 sum",
           "torch.linalg.vector_norm(gradient, dim=-1) for gradient in gradients",
           "torch.linalg.vector_norm(gradient) for gradient in gradients",
           "training/test_gradient_norm.py"),
    Mutant("k3 overflows", "bounded = log_ratio.clamp(max=LINEAR_ABOVE)", "bounded = log_ratio",
           "test_kl_bound.py"),
    Mutant("a resumed run forgets its first command",
           "first = {name: saved[name] for name in now if name in saved} if saved else now",
           "first = now", "records/test_resuming.py"),
    Mutant("edited rewards go unnoticed", "all(saved.get(name, value) == value", "all(True",
           "records/test_resuming.py"),
    Mutant("a comment changes a reward", "node.body = node.body[1:] or [ast.Pass()]", "pass",
           "evaluation/test_sources.py"),
    # --- answers: what a lenient reader may let through
    Mutant("what follows the gold number is dropped",
           'and (unit in ("", written_unit) or (noted', 'and (True or (noted', ANSWERS),
    Mutant("a unit in brackets may be another one", "(noted and not written_unit)", "noted",
           ANSWERS),
    Mutant("units in any case", "part if len(part) <= 3 else part.lower()", "part.lower()",
           ANSWERS),
    Mutant("two boxes are one answer", "return match[1] if min(depths) >= 0 else None",
           "return match[1]", ANSWERS),
    Mutant("fractions that can be reduced are numbers",
           'if gcd(over, under) > 1 or (match["whole"] and over > under):',
           'if match["whole"] and over > under:', ANSWERS),
    Mutant("a minus rounds to 28 digits",
           "value.copy_negate() if isinstance(value, Decimal) else -value", "-value", ANSWERS),
    Mutant("integers are paid for any gold answer", "all(map(INTEGER.fullmatch, answers))",
           "INTEGER.fullmatch(answers[1])", ANSWERS),
    Mutant("a false result behind an expression", "result and result.value == first.value",
           "result", "tasks/test_countdown_writings.py"),
    Mutant("any bracket closes any", "if take() == BRACKETS[token]:",
           "if take() in BRACKETS.values():", "tasks/test_countdown_writings.py"),
    Mutant("math: units and bases are passed over",
           "or marks != Counter(map(mark, MARK.finditer(gold)))", "or False", MATH),
    Mutant("math: ratios by their first number", '":" in gold + answer', "False", MATH),
    Mutant("math: a pair is a set",
           "brackets(bare) != brackets(bare_gold) and not RELATION.search(bare + bare_gold)",
           "False", MATH),
    Mutant("math: x is X", "or other_case(bare, bare_gold)", "or False", MATH),
    Mutant("math: small numbers are equal",
           "timeout_seconds=None) and close(gold[0], answer[0])", "timeout_seconds=None)", MATH),
    Mutant("math: two boxes are a set", 'if text.count(r"\\boxed") > 1:', "if False:", MATH),
    Mutant("what is right for nothing is not told", "facts.right[EMPTY] > 0", "False", VERDICTS),
    Mutant("a constant's share is not told",
           "any(facts.right[text] >= 0.5 for text in constants)", "False", VERDICTS),
    Mutant("a gold answer with a unit counts as a number",
           "return value is not None and (noted or not unit)", "return value is not None",
           VERDICTS),
    Mutant("the golden set knows tags alone", "forms = FORMS if own in (\"tags\", None)",
           "forms = FORMS if True", VERDICTS),
    # --- data, rewards' numbers and verifiers of other people ---
    Mutant("rounding is signal", "highest - lowest > ROUNDING * torch",
           "highest - lowest > 0 * torch", "test_signal.py"),
    Mutant("rewards in fp32", "columns, dtype=torch.float64", "columns, dtype=torch.float32",
           "evaluation/test_reward_numbers.py"),
    Mutant("the penalty for length in fp32", "lengths.double()", "lengths", "test_signal.py"),
    Mutant("a huge int is a traceback", "    except OverflowError:\n        return None\n",
           "    except ZeroDivisionError:\n        return None\n",
           "evaluation/test_reward_numbers.py"),
    Mutant("the loss in fp64 by accident", "advantages.to(policy.device, rollouts.logprobs.dtype)",
           "advantages.to(policy.device)", "evaluation/test_reward_numbers.py"),
    Mutant("a number's digits by str()",
           "written = json.loads(text, parse_float=str, parse_int=str)",
           "written = {name: str(value) for name, value in row.items()}", "test_reading_data.py"),
    Mutant("of a key given twice the last wins", "        if key in row:\n",
           "        if key in ():\n", "test_reading_data.py"),
    Mutant("text after the gold line is gold", 'answer.strip().partition("\\n")[0] if mark',
           "answer.strip() if mark", "test_reading_data.py"),
    Mutant("case makes another question", 'unicodedata.normalize("NFKC", question).casefold()',
           'unicodedata.normalize("NFKC", question)', "test_reading_data.py"),
    Mutant("test questions are trained on",
           "kept = whole_blocks(train, without_overlap(train, test), task.together)",
           "kept = list(train)", "launch/test_splits.py"),
    Mutant("the first lines are held out", "sorted(order[: -(-count // together)])",
           "range(-(-count // together))", "launch/test_splits.py"),
    Mutant("a judge starts on the clock",
           "            with not_counted():\n                self.start()\n",
           "            self.start()\n", "tasks/test_judges.py"),
    Mutant("judges work one by one", "for process in self.processes[:workers]:",
           "for process in self.processes[:1]:", "tasks/test_judges.py"),
    Mutant("problems of a hash seed", '**os.environ, "PYTHONHASHSEED": "0"', "**os.environ",
           "tasks/test_gym_problems.py"),
    Mutant("problems of global random numbers", '        random.seed(f"{seed} {index}")\n', "",
           "tasks/test_gym_problems.py"),
    Mutant("a weak verifier is taken", "if right > share * len(sample):", "if right > len(sample):",
           "tasks/test_gym_problems.py"),
    Mutant("above 1 is solved", "**problem.extra) == 1\n", "**problem.extra) >= 1\n",
           "tasks/test_gym_problems.py"),
    Mutant("files beside an evaluator before ours", "sys.path.append(folder)",
           "sys.path.insert(0, folder)", "tasks/test_evaluator_files.py"),
    Mutant("a cold start on what is cut off", "if len(ids) <= most]", "if ids]",
           "training/test_cold_start_fit.py"),
    # --- the first hour
    Mutant("a finished run that has to be merged is taken for finished",
           "return there and not (left_out or merges)", "return there and not left_out",
           "records/test_where_to_resume.py"),
    Mutant("a run begins where none was found", "if not (may_start or holds_run(output_dir)):",
           "if False:", "records/test_where_to_resume.py"),
    Mutant("a flag of the preset is blamed", 'flag in getattr(args, "typed", vars(args))', "True",
           "launch/test_said_at_the_start.py"),
    Mutant("own rewards are not told what accuracy counts",
           "if own and task.is_correct is is_correct:", "if False:",
           "launch/test_said_at_the_start.py"),
    Mutant("what runs is not written anew", "            time.sleep(1)\n            self.draw()",
           "            time.sleep(1)", "test_progress.py"),
    Mutant("curves far apart are one", "abs(a - b) <= near", "abs(a - b) <= 9 * near",
           "records/test_figures.py"),
    # --- objectives: further scales, clips and corrections
    Mutant("max_rl flips the sign of groups below 0", "rewards.abs().where(chosen, 0)",
           "rewards.where(chosen, 0)", ADVANTAGES),
    Mutant("batch deviation about the mean of all", "values.where(chosen, 0).sum() / count.clamp",
           "values.sum() / count.clamp", ADVANTAGES),
    Mutant("gdpo without the weights", "(torch.stack(each, -1) * weights).sum(-1)",
           "torch.stack(each, -1).sum(-1)", ADVANTAGES),
    Mutant("gdpo leaves the step's scale as it falls",
           "return total / (_step_deviation(total, chosen) + STD_EPSILON)", "return total",
           ADVANTAGES),
    Mutant("the penalty for length has no weight of its own", "rewards.weights.new_ones(1)",
           "rewards.weights.new_zeros(1)", ADVANTAGES),
    Mutant("dual clip from below", "held = ratios.clamp(max=objective.clip_delta)",
           "held = ratios.clamp(min=objective.clip_delta)", SURROGATES),
    Mutant("sapo without the 4", ".sigmoid() * 4 / tau", ".sigmoid() / tau", SURROGATES),
    Mutant("sapo's temperatures swapped", "tau.masked_fill(advantages > 0, SAPO_TEMPERATURE)",
           "tau.masked_fill(advantages < 0, SAPO_TEMPERATURE)", SURROGATES),
    Mutant("gmpo clips both sides", "return sequence_mean(one_sided, padding)",
           "return sequence_mean(bounded, padding)", SURROGATES),
    Mutant("masked importance weights are held instead",
           "return gap.masked_fill(outside, 0.0), outside",
           "return gap.clamp(objective.tis_floor), outside", SURROGATES),
    Mutant("a sequence's correction is a mean", "log_gap = log_gap.sum(-1, keepdim=True)",
           "log_gap = log_gap.mean(-1, keepdim=True)", SURROGATES),
    Mutant("the most certain tokens act", "acting=entropy >= least", "acting=entropy <= least",
           UPDATE),
    Mutant("uncertain among those without advantage too", " & (one.batch.advantages != 0)[:, None]",
           "", UPDATE),
    Mutant("the bonus grows towards its target", "max(0.0, 1 - entropy / target)",
           "entropy / target", SURROGATES),
    Mutant("each process has a threshold of its own",
           "torch.cat(everyones(own, setup.accelerator))", "own", PROCESSES),
    # --- reading data
    Mutant("csv is split at every line", 'io.StringIO(text, newline="")',
           "text.splitlines()", SHAPES),
    Mutant("an array's numbers lose their digits", "written[name] for name in as_written",
           "row[name] for name in as_written", SHAPES),
    Mutant("NaN is an answer", "type(value) is float and math.isfinite(value)\n\n\ndef _last",
           "type(value) is float\n\n\ndef _last", MALFORMED),
    Mutant("the first box is the answer", "if start > found[0]:", "if found[0] < 0 < start:",
           SHAPES),
    Mutant("an answer is counted from 1", "labels[index]  # counted",
           "labels[index - 1]  # counted", SHAPES),
    Mutant("choices stay out of the prompt", 'return "\\n".join([question, *lines]), label',
           "return question, label", SHAPES),
    Mutant("the worked solution is the question's", "_last(value, turn, where, name)",
           '_last(value, "user", where, name)', SHAPES),
    Mutant("two columns that may be the answer: the first", "if len(there) > 1:",
           "if len(there) > 9:", MALFORMED),
    Mutant("a saved table in the order of its file", 'dataset.with_format("arrow")[:].to_pylist()',
           "dataset.data.table.to_pylist()", SHAPES),
    Mutant("shards are a set", "for file in sorted(place.iterdir()) if",
           "for file in sorted(place.iterdir(), reverse=True) if", SHAPES),
    Mutant("--test_split reads the training split", "return splits[names[split]], names",
           'return splits[names["train"]], names', SHAPES),
    # Plans and precision.
    Mutant("a plan from a single layer, the first and the last", "FEW, MORE = 2, 3",
           "FEW, MORE = 1, 2", "launch/test_planned_step.py"),
    Mutant("a plan that takes caches and the head before them for one",
           "decoder._make_room = lambda: (tracker.begin(), make_room()())  # caches of all layers "
           "come", "pass", "launch/test_planned_step.py"),
    Mutant("a change of flags planned for the wrong phase", 'if phase in UPDATE else {phase}',
           'if phase in UPDATE else set()', "launch/test_planner.py"),
    # --- families of models
    Mutant("the probe is not asked", "    probe(policy, flag)\n", "", FAMILIES),
    Mutant("the decoder is taken without comparing",
           "            model.falls_back = not differences[1] <= TOLERANCE\n", "", FAMILIES),
    Mutant("a training pass that differs is not refused",
           "if not differences[0] <= TOLERANCE:", "if False:", FAMILIES),
    Mutant("the probe's windows are as wide as ever",
           "            holder.sliding_window = WINDOW\n", "            pass\n", FAMILIES),
    Mutant("attention's soft cap ignored", 'softcap = kwargs.pop("softcap", None)',
           'softcap = kwargs.pop("softcap", None) and None', FAMILIES),
    Mutant("the logits' soft cap ignored",
           'getattr(config, "final_logit_softcapping", None))', "None)", FAMILIES),
    Mutant("the cap has no slope", "to_logits.mul_(slope)", "pass", FAMILIES),
    Mutant("sliding window ignored in training",
           'packing.biases(kwargs.pop("sliding_window", None))',
           'packing.biases(kwargs.pop("sliding_window", None) and None)', FAMILIES),
    Mutant("a window a token too wide", "far = (distance >= window)", "far = (distance > window)",
           FAMILIES),
    Mutant("families with a window take the decoder", " and window is None", "", FAMILIES),
    Mutant("scaled embeddings and residuals take the decoder", 'WRITTEN_OUT = {"qwen2",',
           'WRITTEN_OUT = {"granite", "smollm3", "qwen2",', FAMILIES),
    Mutant("logits scale ignored", 'getattr(config, "logits_scaling", None) or 1.0', "1.0",
           FAMILIES),
    Mutant("the other logits scale ignored", 'getattr(config, "logit_scale", None) or 1.0', "1.0",
           FAMILIES),
    Mutant("what attention asks for besides is ignored", 'if asked - {"is_causal"}:', "if False:",
           FAMILIES),
    Mutant("a layer norm is taken for an RMS norm", "if _has_code_of(LlamaRMSNorm, module):",
           'if hasattr(module, "variance_epsilon"):', FAMILIES),
    Mutant("own layers keep the rows that have ended", "self.cache.batch_select_indices(parents)",
           "pass", FAMILIES),
    Mutant("checkpointed layers sample without a cache", "            layer.training = False\n",
           "            pass\n", FAMILIES),
    Mutant("checkpointing turns dropout on", "        layer.training = True\n\n\ndef checkpointed",
           "        layer.train()\n\n\ndef checkpointed", FAMILIES),
    Mutant("layers with a state are not refused",
           "if layers & MIXING_LAYERS or kind._is_stateful:", "if False:", FAMILIES),
    Mutant("longrope's context is the long one", "context = min(context, rope.get(",
           "context = max(context, rope.get(", "launch/test_parser.py"),
    # episodes of several turns
    Mutant("what the world says is trained", "mask[live, t] = drawing", "mask[live, t] = writing",
           TURNS),
    Mutant("the end of a turn is read twice",
           "return told[1:] if told[0] == ids[-1] else told", "return told", TURNS),
    Mutant("an episode is as long as its mask sums up to",
           "return (completion_mask * places).amax(-1)", "return completion_mask.sum(-1)", TURNS),
    Mutant("special tokens in a reply act", "while found := [token for token in special if",
           "while found := [token for token in () if", TURNS),
    Mutant("rewards read what the world said",
           "return text.turns[-1] if isinstance(text, Transcript) else text", "return text", TURNS),
    Mutant("a string that ended a turn ends the next", "tokens[max(begun, end - reach) : end]",
           "tokens[max(0, end - reach) : end]", TURNS),
    Mutant("a reply without room for a turn is read", "if begins >= self.ids.shape[1]:",
           "if begins > self.ids.shape[1]:", TURNS),
    Mutant("templates that rewrite earlier turns pass", "if not stable or", "if", TURNS),
    Mutant("gradients stay scaled", "parameter.grad.mul_(1 / self.scale)", "pass",
           "training/test_precision.py"),
    Mutant("an overflow leaves the loss scale", "self.scale = max(1.0, self.scale / 2)", "pass",
           "training/test_precision.py"),
    Mutant("a resumed run begins with a new loss scale",
           "vars(self.loss_scale).update(start.loss_scale)", "pass", "training/test_precision.py"),

    # --- rewards that compare, and the referee
    Mutant("one order of a pair counts", "(one - other) / 2", "one", REFEREE),
    Mutant("a liking for the first place is added up", "(one - other) / 2", "(one + other) / 2",
           REFEREE),
    Mutant("unread is lost", "found[pair] = None if None in (one, other)",
           "found[pair] = -9.0 if None in (one, other)", REFEREE),
    Mutant("whatever is above 0 is told apart", "if abs(margin) <= self.tie:",
           "if margin == 0:", REFEREE),
    Mutant("copies count as further opponents", "games[a].append((chance, texts.count(b)))",
           "games[a].append((chance, 1))", REFEREE),
    Mutant("answers by the texts alone", "return _digest(self.judge.name, SYSTEM, ask.text)",
           "return _digest(ask.first, ask.second or str())", REFEREE),
    Mutant("another referee's answers are taken", 'row["log_odds"] if row["referee"] == name else',
           'row["log_odds"] if row["referee"] else', REFEREE),
    Mutant("a text may begin a line", 'text = " ".join(text.split())', "text = text.strip()",
           REFEREE),
    Mutant("the state of the dummy token", "cumsum(0) - 1  # (R,), of scored ones",
           "cumsum(0) - 2  # (R,), of scored ones", REFEREE),
    Mutant("golden pairs in one order", "share_right(of_kind) for kind, of_kind in margins.items()",
           "1.0 for kind, of_kind in margins.items()", REFEREE),
    Mutant("the start model is the policy", "if has_adapter(policy):",
           "if policy is not None:", "evaluation/test_referee_run.py"),
    Mutant("the earlier answer is asked for as the later", "for one in (after, before)",
           "for one in (before, after)", "evaluation/test_referee_run.py"),
    Mutant("a group is scored one by one", "if sees_group(function):\n            return call_on",
           "if len(texts) < 0:\n            return call_on", "evaluation/test_group_rewards.py"),
    Mutant("both sides shuffled apart", "len(self) // self.together) * self.together",
           "len(self) // self.together)", "tasks/test_debate.py"),
    Mutant("the other side's own answer", 'said(problem.extra["against"], other)',
           "said(problem.answer, other)", "tasks/test_debate.py"),
    # Self-play.
    Mutant("both players are paid what one of them has", "next(earned)[game.mover(state)]",
           "next(earned)[0]", SELF_PLAY),
    Mutant("both players' moves are one group",
           'return torch.tensor(rows, dtype=torch.float64, device="cpu")  # (Q, G)',
           'return torch.tensor(rows, dtype=torch.float64, device="cpu").T.reshape(len(rows), -1)',
           SELF_PLAY),
    Mutant("a mistake pays the other player", "if seat == match.fault else 0.0",
           "if seat == match.fault else game.FORFEIT", SELF_PLAY),
    Mutant("a position of the opponent is drawn",
           "if match.players[game.mover(state)] is learner]", "]", SELF_PLAY),
    Mutant("the best answer sees all cards",
           "value(game.play(state, choice(game.prompt(state))))",
           "max(value(game.play(state, move)) for move in game.moves(state))",
           "evaluation/test_exploitability.py"),
    Mutant("equal prompts are read twice", "places.setdefault(item, place) for", "place for",
           "training/test_tree.py sampling/test_sharing.py"),
    # pictures
    Mutant("positions in a picture count up", "return index[:, 0].numpy()", "return None", SEEING),
    Mutant("a picture's features stand in another order",
           "features = torch.cat(list(seen.pooler_output))",
           "features = torch.cat(list(seen.pooler_output)).flip(0)", SEEING),
    Mutant("all pictures are the first", "common = min(common, first_place(pictures))", "pass",
           SEEING),
    Mutant("what follows a picture counts its places", "[p.max() + 1 for p in positions]",
           "lengths", SEEING),
    Mutant("one question about two pictures is a repeat",
           "return normal(problem.question), problem.images", "return normal(problem.question)",
           "vision/test_runs.py"),
    Mutant("the blind see", "images=problems[other].images", "images=problems[i].images",
           "evaluation/test_blind.py"),
    # --- where a game, a referee and episodes meet ---
    Mutant("a label within a label stays", "while LABEL.search(text):", "if LABEL.search(text):",
           REFEREE),
    Mutant("an answer is written behind a torn line", "            cut_torn_end(file)\n", "",
           REFEREE),
    Mutant("a whole episode meets a last turn", "judged_text(completion_of(one), setup)",
           'judged_text(one["completion"], setup)', "evaluation/test_referee_run.py"),
    Mutant("one side of a debate is held out", "in_order, together)", "in_order)",
           "tasks/test_debate.py"),
    Mutant("chips are told as a share", 'if key.startswith("against_"):', "if False:",
           "evaluation/test_game_commands.py"),
    # --- where two features meet ---
    Mutant("auto, given again, is another precision than the run's",
           'args.precision = saved.get("precision", "auto")', "pass",
           "records/test_where_to_resume.py"),
    Mutant("joined draws show what the first of them shows",
           "pictures=pictures if any(pictures) else None,", "pictures=parts[0].pictures,", SAMPLER),
    Mutant("a referee's logits are not scaled", "last.to(head.weight.dtype) * head.scale",
           "last.to(head.weight.dtype)", "evaluation/test_referee.py"),
    Mutant("a referee's logits are not bounded",
           "capped_(torch.linalg.vecdot(last, head.weight.index_select(0, side)), head.cap)",
           "torch.linalg.vecdot(last, head.weight.index_select(0, side))",
           "evaluation/test_referee.py"),
    Mutant("a referee's name changes with the adapter beside it",
           'if ".lora_" not in name:\n            numbers', "if True:\n            numbers",
           "evaluation/test_referee_run.py"),
    Mutant("a text may show a referee a picture", "<(?:image|bos", "<(?:bos",
           "evaluation/test_referee.py"),
    Mutant("twice the same look before the cold start",
           "if looks and not run.short_evaluations:", "if looks:", "test_short_evaluations.py"),
    Mutant("a plan without the look for uncertain tokens", "for batch in largest if looks else ():",
           "for batch in ():", "launch/test_planned_step.py"),
    # --- the model that sees, and what it is shown ---
    Mutant("a convolution pads on both sides", "(missing // 2, missing - missing // 2) * 2",
           "(missing - missing // 2, missing // 2) * 2", EMBEDDED),
    Mutant("a tower forgets its standardisation", 'tower.mean.copy_(learnt.pop("mean"))',
           'learnt.pop("mean")', EMBEDDED),
    Mutant("the means of a tower are not saved", "in model.named_buffers() if name in kept",
           "in model.named_buffers() if name not in kept", EMBEDDED),
    Mutant("images in a table are all alike", "hashlib.sha256(held).hexdigest()[:16]", '"image"',
           "reading/test_images.py"),
    Mutant("a record shows any file of the disk", 're.fullmatch("[0-9a-f]{16}", str(name))',
           "str(name)", "records/test_thumbnails.py"),
    Mutant("a group stands beside the first question's picture",
           'problems[records[0]["row"] // len(records)]', "problems[0]",
           "records/test_thumbnails.py"),
    # --- another engine
    Mutant("adapters are left out of what the engine is sent",
           'if ".base_layer." in name and kind == "weight":', "if False:", WEIGHTS),
    Mutant("what the engine is sent changes the policy's own configuration",
           "config = copy.deepcopy(policy.config)  # from_config changes it",
           "config = policy.config", WEIGHTS),
    Mutant("experts are broadcast as transformers has put them together",
           "return revert_weight_conversion(_empty_model(policy, dtype), "
           "dict(plain_weights(policy, dtype)))", "return dict(plain_weights(policy, dtype))",
           WEIGHTS),
    Mutant("vLLM opens the GPU that has the trainer's number",
           "arguments[6] = worker.device.index", "pass", WEIGHTS),
    Mutant("an engine with other weights is believed",
           "if not off <= TOLERANCE[args.precision]:", "if False:", ENGINE),
    Mutant("the engine draws a group from one seed",
           "mixed_seed(seed, g)) for ids, seed in asked",
           "mixed_seed(seed, 0)) for ids, seed in asked", ENGINE),
    Mutant("every process takes the first one's completions",
           "before = sum(map(len, parts[: accelerator.process_index]))", "before = 0", ENGINE),
    Mutant("vLLM answers from the old weights' keys",
           "if not self.engine.reset_prefix_cache():", "if False:", ENGINE),
    Mutant("vLLM's samples are not corrected for",
           "args.tis_cap = TIS_CAP", "pass", ENGINE),
    # --- a cold start that ends even, lessons for a referee, rebuttals
    Mutant("a cold start's rate does not fall", "share = left / args.cold_start_steps if",
           "share = 1 if", "training/test_cold_start.py"),
    Mutant("in a lesson the better reply is always A",
           '"B": (worse, better)}', '"B": (better, worse)}', "tasks/test_judging.py"),
    Mutant("a referee is tried on its lessons", "GOLDEN, LESSONS = PAIRS[:TRIED], PAIRS[TRIED:]",
           "GOLDEN, LESSONS = PAIRS[:TRIED], PAIRS", "tasks/test_judging.py"),
    Mutant("all hear the first argument of the other side",
           "said[g] for p, said in zip(problems, turns)",
           "said[0] for p, said in zip(problems, turns)", "sampling/test_rebuttals.py"),
    Mutant("what a side hears is trained on", "(told, none.bool(), none.float())",
           "(told, ~none.bool(), none.float())", "sampling/test_rebuttals.py"),
    Mutant("a rebuttal's draws depend on what is sampled beside it",
           "[mixed_seed(seeds[q], g) for q, g in begun]",
           "[mixed_seed(seeds[q], n) for n, (q, g) in enumerate(begun)]",
           "sampling/test_rebuttals.py"),
    Mutant("held-out sides are sorted apart", "key=lambda i: len(prompts[i - i % task.together])",
           "key=lambda i: len(prompts[i])", "sampling/test_rebuttals.py"),
    Mutant("the referee reads what a side was told", '"turns", (argument,))[::2]',
           '"turns", (argument,))', "tasks/test_debate.py"),
]  # fmt: skip

# The fused step. Its tests need triton, without which they are skipped and would notice nothing.
FUSED = "sampling/test_fused.py"
OF_FUSED = [
    Mutant("heads turn the other way", "tl.where(s < SIZE // 2, -1.0, 1.0)",
           "tl.where(s < SIZE // 2, 1.0, -1.0)", FUSED),
    Mutant("only the first block of a completion is read", "for start in range(0, now, BLOCK):",
           "for start in range(0, min(now, BLOCK), BLOCK):", FUSED),
    Mutant("padding of the prompt is attended to",
           "scores += tl.load(bias + c, c < stop, 0.0)[None, :]", "pass", FUSED),
    Mutant("a softmax forgets that its maximum grew", "total = total * shrunk + tl.sum(weights, 1)",
           "total = total + tl.sum(weights, 1)", FUSED),
    Mutant("the residual stays as it was", "tl.store(x + at, value, real)", "pass", FUSED),
    Mutant("a kernel more for every norm", "out = torch.empty_like(x, dtype=dtype)",
           "out = torch.zeros_like(x, dtype=dtype)", FUSED),
]  # fmt: skip
MUTANTS += OF_FUSED if find_spec("triton") else []


def modules(root=ROOT):
    folders = (root, *(root / name for name in FOLDERS))
    return sorted(path for folder in folders for path in folder.glob("*.py"))


def apply(mutant, root=ROOT):
    """(file, its text with the bug in). Raises ValueError unless the text stands there once."""
    holds = [
        (path, count) for path in modules(root) if (count := path.read_text().count(mutant.old))
    ]
    if sum(count for _, count in holds) != 1:
        places = ", ".join(f"{path.name} ({count})" for path, count in holds) or "nowhere"
        raise ValueError(f"{mutant.name}: not exactly once, but {places}: {mutant.old!r}")
    path = holds[0][0]
    return path, path.read_text().replace(mutant.old, mutant.new)


def check(mutants=MUTANTS):
    """What is wrong with the list itself, as lines: it must fit the code as it is."""
    for mutant in mutants:
        try:
            path, text = apply(mutant)
            ast.parse(text, path.name)
        except (ValueError, SyntaxError) as error:
            yield str(error)
        for test in mutant.tests.split():
            if not (ROOT / "tests" / test).is_file():
                yield f"{mutant.name}: no tests/{test}"


class FirstFailure:
    """A pytest plugin that remembers what failed first."""

    name = None

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.name = self.name or report.nodeid.removeprefix("tests/")

    pytest_collectreport = pytest_runtest_logreport


def run(mutant):
    """(mutant, file, the test that noticed, None if none did, seconds).

    Ends this process's use for anything else: it is a fork made for one bug.
    """
    started, first = time.monotonic(), FirstFailure()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "__pycache__"))
        path, text = apply(mutant, copy)
        path.write_text(text)
        os.chdir(copy)
        sys.path.remove(str(Path(__file__).parent))
        with open(Path(folder) / "output", "w+") as output:
            for number in (1, 2):
                os.dup2(output.fileno(), number)
            tests = [f"tests/{test}" for test in mutant.tests.split()]
            status = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[first])
            sys.stdout.flush()
            if status not in (0, 1):
                output.seek(0)
                raise RuntimeError(f"{mutant.name}: pytest failed of itself\n{output.read()}")
        os.chdir("/")
    return mutant, path.relative_to(copy), first.name, time.monotonic() - started


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or parts of them")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="at once")
    args = parser.parse_args()
    mutants = [m for m in MUTANTS if not args.only or any(part in m.name for part in args.only)]
    if problems := [f"no bug is called {args.only}"] if not mutants else list(check(mutants)):
        print("\n".join(problems), file=sys.stderr)
        return 2
    os.environ.update(GSM8K_DIR=GSM8K, PYTHONDONTWRITEBYTECODE="1", TRITON_INTERPRET="1")
    sys.dont_write_bytecode = True
    for library in LIBRARIES:
        importlib.import_module(library)
    width = max(len(mutant.name) for mutant in mutants)
    survivors, started = [], time.monotonic()
    with multiprocessing.get_context("fork").Pool(args.jobs, maxtasksperchild=1) as pool:
        for mutant, file, killer, seconds in pool.imap(run, mutants):
            noticed = killer or f"SURVIVES {mutant.tests}"
            print(f"{mutant.name:{width}}  {file!s:24}  {seconds:5.0f} s  {noticed}", flush=True)
            survivors += [] if killer else [mutant.name]
    noticed, seconds = len(mutants) - len(survivors), time.monotonic() - started
    print(f"{noticed} of {len(mutants)} noticed in {seconds:.0f} s; surviving: {survivors}")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
