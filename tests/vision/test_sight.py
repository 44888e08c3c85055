"""Loading models that see, and their prompts: ids as transformers' own processors write them."""

import json

import pytest
import torch
from conftest import CHATML, TASK, make_tokenizer
from sighted import PARTS, SIGHTED, Sized, make_seeing
from transformers import Idefics3Processor, LlavaProcessor

from llms import Rendering, load_model, prompt_of, settle_rendering
from rldatasets import Problem
from utils import UserError
from vision.sight import picture_of, save_reader, sight_on


def save(family, folder):
    """A directory with a tiny model of the family, as the hub has them."""
    model, tokenizer = make_seeing(family)
    model.save_pretrained(folder)
    save_reader(tokenizer, folder)
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {family: tmp_path_factory.mktemp(family) for family in SIGHTED}
    models = {family: save(family, folder) for family, folder in made.items()}
    return made, models


@pytest.mark.parametrize("family", SIGHTED)
def test_what_is_loaded_is_what_was_saved_and_its_tower_stays_frozen(family, folders):
    made, models = folders
    model, tokenizer = load_model(str(made[family]), "cpu")
    assert type(model) is type(models[family])
    saved = models[family].state_dict()
    assert all(torch.equal(saved[name], value) for name, value in model.state_dict().items())
    parts = {name.split(".")[1]: set() for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parts[name.split(".")[1]].add(parameter.requires_grad)
    read = {"language_model", "text_model"} & {*parts}
    assert {part: learn for part, learn in parts.items() if learn != {False}} == {
        part: {True} for part in read
    }
    assert read and len(parts) > 1
    problem = Problem("What?", "1", "", images=(Sized(64, 48), Sized(30, 60)))
    prompt = prompt_of(tokenizer, TASK, problem)
    assert picture_of(model, tokenizer, prompt, problem.images).features.shape[1] == 32
    with pytest.raises(UserError, match="take it out"):
        prompt_of(tokenizer, TASK, Problem("An <image> of what?", "1", ""))


def rendered_for(tokenizer, images):
    content = [*[{"type": "image"}] * len(images), {"type": "text", "text": "What?"}]
    messages = [{"role": "system", "content": [{"type": "text", "text": TASK.system_prompt}]},
                {"role": "user", "content": content}]  # fmt: skip
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("splits", [True, False])
def test_idefics3s_ids_and_pixels_are_its_processors(splits, folders):
    tokenizer = load_model(
        str(folders[0]["idefics3"]), "cpu", rendering=Rendering(image_tokens=20 if splits else 4)
    )[1]
    images = (Sized(64, 40), Sized(20, 20, 1))
    text = rendered_for(tokenizer, images)
    processor = Idefics3Processor(sight_on(tokenizer).processor, tokenizer, image_seq_len=4)
    theirs = processor(text=text, images=[[one() for one in images]])["input_ids"][0]
    ours = prompt_of(tokenizer, TASK, Problem("What?", "1", "", images=images))
    assert ours == theirs
    assert ours.count(sight_on(tokenizer).config.image_token_id) == (2 * 5 * 4 if splits else 8)


def test_llavas_ids_are_its_processors(folders):
    tokenizer = load_model(str(folders[0]["llava"]), "cpu")[1]
    processor = LlavaProcessor(
        sight_on(tokenizer).processor, tokenizer, patch_size=8, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", image_token="<image>",
    )  # fmt: skip
    images = (Sized(64, 40),)
    text = rendered_for(tokenizer, images)
    theirs = processor(text=text, images=[one() for one in images])["input_ids"][0]
    assert prompt_of(tokenizer, TASK, Problem("What?", "1", "", images=images)) == theirs


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_a_large_image_is_made_smaller_until_it_takes_image_tokens(family, folders):
    for most in (4, 12, 30):
        rendering = Rendering(image_tokens=most)
        model, tokenizer = load_model(str(folders[0][family]), "cpu", rendering=rendering)
        images = (Sized(300, 200),)
        prompt = prompt_of(tokenizer, TASK, Problem("What?", "1", "", images=images))
        places = len(picture_of(model, tokenizer, prompt, images).places)
        assert most / 2 <= places <= most


def test_an_image_that_cannot_be_that_small_is_refused(folders):
    with pytest.raises(UserError, match="--image_tokens 3: this model's images take 16; raise it"):
        load_model(str(folders[0]["llava"]), "cpu", rendering=Rendering(image_tokens=3))


def test_the_template_of_older_repositories_is_read(folders, tmp_path):
    save("llava", tmp_path)
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "OLD" + PARTS}))
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = load_model(str(tmp_path), "cpu")[1]
    assert tokenizer.decode(prompt_of(tokenizer, TASK, Problem("What?", "1", ""))).startswith("OLD")


def test_a_model_that_reads_text_alone_refuses_images():
    tokenizer = make_tokenizer()
    assert tokenizer.chat_template == CHATML
    settle_rendering(tokenizer, Rendering(), "MODEL")
    with pytest.raises(UserError, match="reads text alone"):
        prompt_of(tokenizer, TASK, Problem("What?", "1", "", images=(Sized(8, 8),)))
