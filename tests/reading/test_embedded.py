"""The demo's model is taken out of its GGUF file once."""

from types import SimpleNamespace

import pytest
import torch
from conftest import make_model, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from reading import embedded
from reading.embedded import embedded_folder


@pytest.fixture
def conversions(tmp_path, monkeypatch):
    """A package with a file, a cache of its own, and how often the file was converted."""
    package, made = tmp_path / "package", []
    package.mkdir()
    (package / "a.gguf").write_bytes(b"GGUF")
    found = SimpleNamespace(submodule_search_locations=[str(package)])
    monkeypatch.setattr(embedded.util, "find_spec", lambda name: found)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    embedded._of_this_process.cache_clear()

    def converted(package, file):
        made.append((package / file).read_bytes())
        return make_model("llama"), make_tokenizer("llama")

    monkeypatch.setattr(embedded, "_converted", converted)
    return made


def test_a_file_is_converted_once_and_another_file_again(conversions, tmp_path):
    first = embedded_folder()
    assert first == embedded_folder()
    assert first.parent == tmp_path / "cache" / "grpo"
    assert conversions == [b"GGUF"]
    (tmp_path / "package" / "a.gguf").write_bytes(b"GGUF, another")
    assert embedded_folder() != first
    assert conversions == [b"GGUF", b"GGUF, another"]


def test_what_is_loaded_is_what_was_converted(conversions):
    folder = embedded_folder()
    loaded, made = AutoModelForCausalLM.from_pretrained(folder), make_model("llama")
    for name, weight in made.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
    text = "17 apples, 2 left"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer(text).input_ids == make_tokenizer("llama")(text).input_ids


def test_a_cache_that_cannot_be_written_is_done_without(conversions, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    folder = embedded_folder()
    assert (folder / "config.json").is_file()
    assert folder == embedded_folder()
    assert len(conversions) == 1


def test_a_conversion_that_fails_leaves_nothing(conversions, tmp_path, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(type(make_tokenizer("llama")), "save_pretrained", stopped)
    with pytest.raises(KeyboardInterrupt):
        embedded_folder()
    assert not list((tmp_path / "cache" / "grpo").iterdir())


def test_the_slower_of_two_processes_takes_what_the_faster_one_wrote(conversions, monkeypatch):
    convert = embedded._converted

    def overtaken(*arguments):
        monkeypatch.setattr(embedded, "_converted", convert)
        there.append(embedded_folder())  # the faster one
        return convert(*arguments)

    there = []
    monkeypatch.setattr(embedded, "_converted", overtaken)
    assert [embedded_folder()] == there
    assert [path.name for path in there[0].parent.iterdir()] == [there[0].name]
