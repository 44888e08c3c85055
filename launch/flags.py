"""The flags of a run: what they are called, what they may be, what they do.

A default that depends on the preset stands in launch/presets.py. Nothing heavy is imported here, so
that a typo is answered in a fraction of a second.
"""

import argparse

from launch.presets import FUSED_TARGETS, LORA_TARGETS, PRESETS
from launch.values import (
    BETA,
    COUNT,
    MOST,
    NOT_NEGATIVE,
    POSITIVE,
    POSITIVE_COUNT,
    RATE,
    SHARE,
    day,
    engine_arguments,
    known_dataset,
    number,
    some_text,
    template_arguments,
    weight,
)
from records.resuming import LATEST
from utils import EMBEDDED_MODEL, EMBEDDED_SIGHTED

TRACKERS = ("tensorboard", "wandb", "trackio")  # the packages' names


def add_flags(parser):
    """Give the parser every flag of a run, in groups."""
    group = parser.add_argument_group
    # fmt: off

    flag = group("experiment").add_argument
    flag("--preset", choices=PRESETS, default="h100", help="set of defaults: h100 is Qwen2.5-1.5B "
         "on GSM8K on one H100, cpu the demo that needs no GPU and no download")
    flag("--output_dir", metavar="DIR", help="where the run is written; None: "
         "runs/DATASET-MODEL-TIME")
    flag("--resume", nargs="?", const=LATEST, metavar="PATH", help="go on where the run in "
         "--output_dir stopped, with its flags; with a PATH, from that run's latest checkpoint, or "
         "from that checkpoint, dropping what came later; a run that has finished stays as it is")
    flag("--resume_or_start", action="store_true", help="the same, or start the run where "
         "--output_dir has none yet: for schedulers, which know one command")
    flag("--allow_changed_rewards", action="store_true", help="let --resume go on with rewards or "
         "an is_correct that are not those the run began with; log and plots show from where on")
    flag("--seed", type=number(int, 0, 2**32 - 1), default=7111994,
         help="fixes data order, problems and sampling")
    flag("--verbose", action="store_true", help="print one completion of every step")
    flag("--plan", action="store_true", help="do not run: print what a run would take in memory "
         "and time, and which flags make it fit")

    flag = group("model").add_argument
    flag("--model_name", metavar="MODEL", help="Hugging Face hub name, local directory, "
         f"{EMBEDDED_MODEL} or {EMBEDDED_SIGHTED}")

    flag("--enable_thinking", action=argparse.BooleanOptionalAction, default=False, help="where "
         "the chat template asks: think first, in <think> tags; rewards and accuracy judge what "
         "follows")
    flag("--image_tokens", type=POSITIVE_COUNT, default=256, metavar="TOKENS", help="of a model "
         "that sees: what an image takes of a prompt, at most; larger ones are made smaller")
    flag("--chat_template_kwargs", type=template_arguments, default={}, metavar="JSON",
         help="further arguments of the chat template, as a JSON object")
    flag("--prompt_date", type=day, metavar="YYYY-MM-DD", help="what chat templates take for "
         "today; None: the day on which the run starts")

    flag = group("data and rewards").add_argument
    flag("--dataset_name", type=known_dataset, metavar="NAME", help="gsm8k, arithmetic (generated "
         "word problems), the name of a file in tasks/, such as countdown, such a FILE.py, or "
         "OWNER/NAME[/CONFIG] of a dataset on the hub")
    flag("--dataset_path", metavar="PATH", help="instead of the hub: one FILE (JSON lines, a JSON "
         "array, CSV, Parquet), a directory with one for train and one for test, or what "
         "save_to_disk left")
    flag("--question_field", metavar="COLUMN", help="column of the question; None: the one that "
         "is called like one, see docs/data.md")
    flag("--answer_field", metavar="COLUMN", help="column of the gold answer, a.b for field b in a")
    flag("--solution_field", metavar="COLUMN", help="column of worked solutions, for a cold start")
    flag("--train_split", metavar="SPLIT", default="train", help="split to train on")
    flag("--test_split", metavar="SPLIT", default="test", help="split to evaluate on; the same as "
         "--train_split: one question in five is held out of it")
    flag("--difficulty", type=number(int, 1, 5), default=1, help="of the arithmetic problems, 1-5")
    flag("--evaluator", metavar="FILE.py", help="a file with REWARD_FUNCTIONS of your own, and an "
         "is_correct and a SYSTEM_PROMPT if you like (see tasks/__init__.py); None, or gsm8k: the "
         "dataset's")
    flag("--reward_weights", type=weight, nargs="+", default=[], metavar="NAME=WEIGHT",
         help="weights in the total reward; 1 where not named")
    flag("--reward_timeout", type=POSITIVE, default=10.0, metavar="SECONDS",
         help="the run ends where one call of a reward function takes longer")
    flag("--reward_workers", type=POSITIVE_COUNT, default=1, metavar="N", help="where the task "
         "has a verifier in a process of its own (math, reasoning_gym): N of them judge a step "
         "side by side, for slow ones; rewards stay the same, and all else runs one by one")
    flag("--allow_weak_verifier", action="store_true", help="take a variant of a task although its "
         "verifier pays for answers that say nothing of the problem")

    flag = group("referee").add_argument
    flag("--referee", metavar="WHO", help="whom rewards such as `tournament` ask which of two "
         "texts is better: start (--model_name as its files are, before any training), or another "
         "model's hub name or directory; None: nobody")
    flag("--referee_url", metavar="URL", help="instead: a server with OpenAI's API, such as "
         "http://127.0.0.1:8000/v1; its key, if it needs one, in the environment variable "
         "REFEREE_API_KEY (for OpenAI itself also OPENAI_API_KEY)")
    flag("--referee_model", metavar="NAME", help="the server's model")
    flag("--eval_referee", metavar="WHO", help="a second referee that rewards nothing: with the "
         "first it judges held-out answers against those of step 0; as --referee")
    flag("--referee_pairs", type=COUNT, default=0, metavar="K", help="in a tournament a completion "
         "meets the K that follow it on a ring, 2 K G asks for a group; 0: all others, G (G - 1)")
    flag("--referee_anyway", action="store_true", help="train although the referee is right on "
         "less than 60 %% of the task's golden pairs, or there are none")
    flag("--rebuttals", type=COUNT, default=0, metavar="N", help="in a debate, so many times each "
         "side hears the other's turn and answers it; 0: one argument each")

    flag = group("sampling").add_argument
    flag("--questions_per_step", "--gradient_accumulation_steps", type=POSITIVE_COUNT, metavar="Q",
         help="questions per step")
    flag("--group_size", "--num_chains", type=number(int, 2, MOST), metavar="G",
         help="completions per question; at least 2, since each is compared with the others")
    flag("--max_prompt_length", type=POSITIVE_COUNT, metavar="TOKENS",
         help="training questions with a longer prompt are left out, and counted")
    flag("--max_completion_length", type=POSITIVE_COUNT, metavar="TOKENS",
         help="longer completions, what a task replies included, are cut off")
    flag("--temperature", type=number(float, 0.01, 100),
         help="of sampling, and of the log-probs in the loss")
    flag("--top_k", type=COUNT, default=0, help="sample from the k likeliest tokens; 0: off")
    flag("--top_p", type=RATE, default=1.0,
         help="sample from the likeliest tokens that hold this share of probability; 1: off")
    flag("--min_p", type=SHARE, default=0.0,
         help="sample from tokens at least this fraction as likely as the likeliest; 0: off")
    flag("--stop", type=some_text, nargs="+", default=[], metavar="STRING", help="texts that end a "
         "completion as its stop tokens do; for base models")
    flag("--sampling_batch_size", type=COUNT, metavar="N", help="completions sampled at once, in "
         "whole groups, for memory; the result is the same; 0: all those of a step")
    flag("--sampler", choices=("shared_prefix", "fused", "paged", "vllm"), default="shared_prefix",
         help="engine of the training samples. shared_prefix: sampling/groups.py; "
         "fused: the same, on a GPU in fewer and larger kernels (sampling/fused.py); paged: "
         "transformers' continuous batching on a copy of the model, without filters, half as fast "
         "on a CPU; vllm: see --vllm_python. A seed gives the same samples with either, but other "
         "ones")

    flag = group("vLLM").add_argument
    flag("--vllm_python", metavar="PATH", help="with --sampler vllm: the Python of an environment "
         "that has vLLM, which is started from it; --tis_cap is 2 then, unless it is given")
    flag("--vllm_devices", metavar="N[,N]", help="GPUs that vLLM sees, as CUDA_VISIBLE_DEVICES "
         "has them; None: all that this program sees")
    flag("--vllm_arguments", type=engine_arguments, default={}, metavar="JSON", help="further "
         "arguments of vLLM's LLM, as a JSON object, e.g. '{\"tensor_parallel_size\": 2}'")
    flag("--vllm_transfer", choices=("file", "broadcast", "ipc"), default="file", help="how "
         "weights reach it. file: in shared memory, on any machine; broadcast: from the run's "
         "device to vLLM's, by NCCL between GPUs; ipc: CUDA IPC, where it is on the run's own GPU")
    flag("--vllm_timeout", type=POSITIVE, default=600.0, metavar="SECONDS",
         help="the run ends where vLLM takes longer to start, or for one step's samples")

    flag = group("objective").add_argument
    flag("--advantage_scale", choices=("std", "batch_std", "max_rl", "gdpo", "none"),
         default="std", help="divide by the group's standard deviation; by the step's; by the "
         "group's mean reward (MaxRL: for rewards of 0 and 1); each reward function by its own "
         "deviation before they are summed (GDPO); by nothing")
    flag("--baseline", choices=("mean", "leave_one_out"), default="mean", help="an advantage "
         "compares with the group's mean, or with that of its other completions (RLOO)")
    flag("--aggregation", choices=("grpo", "dapo", "dr_grpo"), default="grpo",
         help="mean over each sequence, over all tokens, or over a constant length")
    flag("--ratio", choices=("token", "sequence"), default="token", help="to the old policy, of "
         "each token, or one for a completion (GSPO: --clip_epsilon 3e-4 --clip_epsilon_high 4e-4)")
    flag("--clip", choices=("ppo", "cispo", "sapo", "gmpo"), default="ppo",
         help="ppo: no gradient beyond the bounds; cispo: all tokens keep theirs, times the "
         "bounded ratio (--clip_epsilon 1: no lower bound); sapo: a soft gate, no bounds; gmpo: a "
         "completion's geometric mean of clipped ratios, bounds being of their logarithm (0.4)")
    flag("--clip_epsilon", "--clip_epsilon_low", type=SHARE, default=0.2,
         help="the ratio is clipped below 1 - this")
    flag("--clip_epsilon_high", type=NOT_NEGATIVE,
         help="the ratio is clipped above 1 + this; None: as --clip_epsilon")
    flag("--clip_delta", type=NOT_NEGATIVE, default=0.0, metavar="D", help="with --clip ppo, the "
         "ratio of a token with a negative advantage counts at most D (dual clip; 4 is usual); 0: "
         "off")
    flag("--kl_beta", "--kl_weight_beta", type=NOT_NEGATIVE,
         help="weight of the KL to the reference; 0: no reference is kept in memory")
    flag("--kl_estimator", choices=("k1", "k2", "k3"), default="k3", help="k3 is the paper's; as a "
         "loss, only k2 has the gradient of the reverse KL, and k1 has none on average")
    flag("--entropy_bonus", type=NOT_NEGATIVE, default=0.0, help="weight of the policy's entropy, "
         "exact over the vocabulary, in nats per token; 0: off")
    flag("--entropy_target", type=NOT_NEGATIVE, default=0.0, metavar="NATS",
         help="the bonus falls in a straight line from --entropy_bonus, at entropy 0, to nothing "
         "at NATS per token; 0: it is constant")
    flag("--top_entropy", type=RATE, default=1.0, metavar="SHARE", help="the advantage acts on "
         "this share of the step's tokens, those of highest entropy (0.2 is usual), for another "
         "forward pass; 1: on all")
    flag("--tis_cap", type=NOT_NEGATIVE, default=0.0, metavar="CAP", help="correct for a sampler "
         "that is not quite the trainer: weigh tokens by their probability in training over that "
         "when sampled, at most CAP (2 is usual); 0: off")
    flag("--tis_floor", type=NOT_NEGATIVE, default=0.0, metavar="FLOOR",
         help="and at least FLOOR")
    flag("--tis_form", default="token_truncate",
         choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
         help="weigh each token, or all of a completion by their product; hold what is outside at "
         "the bound, or mask it (IcePop: token_mask, cap 5, floor 0.5; MIS: sequence_mask, cap 3)")
    flag("--overlong_buffer", type=COUNT, default=0, metavar="TOKENS", help="a further reward "
         "falls from 0 to -1 over the last TOKENS before --max_completion_length (DAPO); 0: off")
    flag("--num_inner_epochs", type=POSITIVE_COUNT, default=1,
         help="updates on each step's completions; from the second on, the clip acts")
    flag("--train_group_size", type=COUNT, default=0, metavar="M",
         help="train on the M completions of each group whose rewards vary most (PODS); 0: on all")
    flag("--skip_flat_groups", action=argparse.BooleanOptionalAction, default=False, help="leave "
         "groups whose completions all earned the same out of the update, where they have only a "
         "KL; for an --entropy_bonus they stay")
    flag("--max_draws", type=POSITIVE_COUNT, default=1, metavar="N", help="draw questions up to N "
         "times a step, until Q groups have unequal rewards, and train on these (DAPO's dynamic "
         "sampling); 1: off")
    flag("--mask_truncated", action="store_true", help="keep cut-off completions out of the loss")
    flag("--update_ref_model", action="store_true", help="move the reference towards the policy")
    flag("--update_ref_model_freq", type=POSITIVE_COUNT, default=200, metavar="STEPS",
         help="how often it moves")
    flag("--ref_model_mixup_alpha", type=SHARE, default=0.1, metavar="ALPHA",
         help="reference = (1 - ALPHA) reference + ALPHA policy")

    flag = group("self-play").add_argument
    flag("--tremble", type=SHARE, default=0.2, metavar="SHARE", help="of the moves that are not "
         "trained on, those before and after, this share is random; 0: none")
    flag("--opponents", choices=("self", "pool"), default="self", help="games are played by the "
         "policy with itself, or half of them with the reference, an earlier policy (pool; needs "
         "--kl_beta, which keeps it)")

    flag = group("optimizer").add_argument
    flag("--num_train_iters", type=COUNT, metavar="STEPS", help="steps of GRPO; 0: none")
    flag("--learning_rate", type=RATE, help="peak learning rate of AdamW")
    flag("--lr_schedule", choices=("constant", "cosine"), help="after warm-up; cosine falls to 0")
    flag("--warmup_percent", type=SHARE, help="share of the steps that warm up; 0: none")
    flag("--adam_beta1", type=BETA, default=0.9, help="decay of AdamW's first moment")
    flag("--adam_beta2", type=BETA, default=0.99, help="decay of AdamW's second moment")
    flag("--weight_decay", type=NOT_NEGATIVE, default=0.1, help="on matrices only")
    flag("--max_grad_norm", type=NOT_NEGATIVE, help="gradients are clipped to this norm; 0: never")
    flag("--precision", choices=("auto", "fp32", "bf16", "fp16"), default="auto", help="of matrix "
         "products and of the sampler's copy of the weights; weights and moments stay fp32. auto: "
         "bf16 on a GPU that has it, fp16 on one that does not (T4, V100); fp32 on a CPU, but "
         "bf16 with AMX")
    flag("--weights_dtype", choices=("float32", "bfloat16"), default="float32", help="of the "
         "trained weights between updates. bfloat16 is an experiment: they are rounded after every "
         "update, which undoes small ones, so that most never move at a low rate. It saves no "
         "memory")
    flag("--micro_batch_tokens", type=COUNT, metavar="TOKENS", help="tokens per forward and "
         "backward pass, prompts included, for memory; the result is the same; 0: the whole step")
    flag("--gradient_checkpointing", action="store_true", help="compute a layer's activations "
         "again in the backward pass instead of keeping them: less memory, a third more work")
    flag("--cold_start_steps", type=COUNT, metavar="STEPS",
         help="supervised steps on worked solutions before GRPO; 0: none")
    flag("--cold_start_learning_rate", type=RATE, metavar="RATE", help="of the first; AdamW")
    flag("--cold_start_schedule", choices=("constant", "linear"), default="constant",
         help="linear: it falls in a straight line, to 1 / STEPS of it in the last one, so that "
         "what is taught alike ends alike")

    flag = group("LoRA").add_argument
    flag("--lora_rank", type=COUNT, default=0, metavar="R", help="freeze the model and train "
         "matrices of rank R beside its linear layers: far less memory, and about ten times the "
         "--learning_rate is needed; 0: train all weights")
    flag("--lora_alpha", type=POSITIVE, default=32.0,
         help="they are scaled by this over R, so that a good learning rate hardly depends on R")
    flag("--lora_targets", nargs="+", choices=LORA_TARGETS + FUSED_TARGETS, default=[*LORA_TARGETS],
         metavar="LAYER", help="the linear layers that have them, by name")
    flag("--merge_lora", action="store_true", help="make model/ a whole model, not an adapter; for "
         "a run that has ended: --resume with it")

    flag = group("evaluation and saving").add_argument
    flag("--eval_iterations", type=COUNT, metavar="STEPS",
         help="steps between evaluations; 0: only before the first and after the last step")
    flag("--short_eval_iterations", type=COUNT, metavar="STEPS", help="steps between short "
         "evaluations, of a fixed eighth of the held-out problems, and one before a cold start: a "
         "curve in the plots, nothing else; 0: none")
    flag("--eval_problems", type=COUNT, metavar="N", help="held-out problems, by a shuffle that is "
         "the same for every seed (arithmetic: the first ones, which are random); 0: all")
    flag("--eval_batch_size", type=POSITIVE_COUNT, metavar="N", help="problems answered at once")
    flag("--eval_samples", type=COUNT, default=0, metavar="N", help="besides the greedy answer, "
         "sample N answers to every held-out problem at --temperature, for pass@k; 0: none")
    flag("--save_steps", type=COUNT, metavar="STEPS",
         help="steps between checkpoints, each model, AdamW's moments and reference (21 GB at "
         "1.5B, with LoRA little); 0: only after the last step, or when the run is interrupted")
    flag("--keep_checkpoints", type=number(int, 2), default=2, metavar="N",
         help="older checkpoints than the last N are removed; at least 2")
    flag("--save_rollouts", action="store_true", help="keep each step's tokens, log-probs, rewards "
         "and advantages, for benchmarks/replay.py")
    flag("--track", nargs="*", choices=TRACKERS, default=[], metavar="TRACKER",
         help="send metrics, evaluations, some answers, alarms and PNGs to these as well: "
         "tensorboard (files in the run's directory), wandb, trackio; none where none is named")
    # fmt: on
