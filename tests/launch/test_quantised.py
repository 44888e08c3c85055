"""A quantised checkpoint is called that, with what to use instead, before anything is loaded."""

import json

import pytest

from launch.parser import parse_args

KINDS = {  # {what it is called: its quantization_config}
    "bitsandbytes, 4-bit": {"quant_method": "bitsandbytes", "load_in_4bit": True,
                            "load_in_8bit": False, "bnb_4bit_quant_type": "nf4"},
    "bitsandbytes, 8-bit": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "awq, 4-bit": {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"},
    "gptq, 8-bit": {"quant_method": "gptq", "bits": 8, "desc_act": False},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "quantization_config": {"bnb_4bit_use_double_quant": True},
}  # fmt: skip


def model_with(folder, how, model_type="qwen2"):
    folder.mkdir()
    config = {"model_type": model_type, "max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how}))
    (folder / "model.safetensors").touch()
    return folder


def refusal(capsys, model, *argv):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--preset", "cpu", "--model_name", str(model), *argv])
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and len(line) <= 201
    return line


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["qwen2", "gpt_oss"])
def test_a_quantised_model_is_refused_by_name(kind, model_type, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model_with(tmp_path / "m", KINDS[kind], model_type)
    line = refusal(capsys, "m")
    assert f"is quantised ({kind}); name the model that it was made from" in line


def test_so_is_an_adapter_on_one_and_in_a_plan(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model_with(tmp_path / "m", KINDS["bitsandbytes, 4-bit"])
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "adapter_config.json").write_text('{"base_model_name_or_path": "m"}')
    (tmp_path / "a" / "adapter_model.safetensors").touch()
    line = refusal(capsys, "a")
    assert (
        "bitsandbytes, 4-bit" in line and "adapter_config.json name that model's original" in line
    )
    assert "quantised" in refusal(capsys, "m", "--plan")


def test_a_model_that_says_it_is_not_quantised_is_none(tmp_path):
    model = model_with(tmp_path / "m", None)
    args = parse_args(["--preset", "cpu", "--model_name", str(model), "--output_dir",
                       str(tmp_path / "run")])  # fmt: skip
    assert args.model_name == str(model)
