"""What is opened is what was saved: all of its weights, the adapter on its own base, a model for
images with all its parts; anything else is refused in one line.
"""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from tests.families import zoo
from unisd import testing as tiny
from unisd.errors import UserError
from unisd.models import gguf, tokens
from unisd.models.load import load_model_and_tokenizer

IDS = torch.tensor([[5, 6, 7, 8]])


def saved(folder: Path, model: Any = None, tokenizer: Any = None) -> Path:
    (model or tiny.model("llama")).save_pretrained(folder)
    (tokenizer or tiny.tokenizer()).save_pretrained(folder)
    return folder


def changed(folder: Path, change: Any) -> Path:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def refusal(name: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        load_model_and_tokenizer(str(name))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def adapter(folder: Path, base: Any, **options: Any) -> Any:
    """A saved adapter that says something, with its tokenizer."""
    settings = {"r": 2, "target_modules": ["q_proj"], "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    adapted = get_peft_model(base, LoraConfig(**{**settings, **options})).eval()
    adapted.save_pretrained(folder)
    return adapted


# ---------------------------------------------------------------------------------- missing weights


def test_a_model_without_its_head_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path, tiny.model("llama").model)
    said = refusal(folder)
    assert f"{folder} lacks 1 weights of a LlamaForCausalLM" in said and "lm_head.weight" in said
    assert "give a checkpoint of the whole model, with its head" in said


def test_a_model_without_its_last_layers_is_refused(tmp_path: Path) -> None:
    def cut(weights: dict[str, torch.Tensor]) -> None:
        for name in [name for name in weights if ".layers.1." in name]:
            del weights[name]

    said = refusal(changed(saved(tmp_path), cut))
    assert "lacks 9 weights" in said and "model.layers.1.input_layernorm.weight" in said and "5 more" in said


def test_a_file_that_was_cut_short_is_refused(tmp_path: Path) -> None:
    file = saved(tmp_path) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    assert "cannot load the weights" in refusal(tmp_path)


def test_a_configuration_of_another_size_is_refused(tmp_path: Path) -> None:
    config = json.loads((saved(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 24}))
    said = refusal(tmp_path)
    assert "weights of other shapes than a LlamaForCausalLM" in said and "mlp.down_proj.weight" in said


def test_weights_that_the_model_does_not_have_are_named(tmp_path: Path, caplog: Any) -> None:
    changed(saved(tmp_path), lambda weights: weights.update({"mtp.0.weight": torch.zeros(2)}))
    load_model_and_tokenizer(str(tmp_path))
    assert (
        "holds 1 weights that a LlamaForCausalLM does not have; they are left out: mtp.0.weight"
        in caplog.text
    )


def test_tied_weights_are_not_missed(tmp_path: Path, caplog: Any) -> None:
    model, _, _ = load_model_and_tokenizer(str(saved(tmp_path, tiny.model("qwen3"))))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert caplog.text == ""


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "vocab_size": 262}
    layers = {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
    }
    config = transformers.BartConfig(**sizes, **layers)
    saved(tmp_path, transformers.BartForConditionalGeneration(config))
    assert f"{tmp_path} is an encoder-decoder (bart)" in refusal(tmp_path)


def test_a_model_of_another_kind_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    saved(tmp_path, transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=8, patch_size=4)))
    assert "is a vit, which is not a causal language model" in refusal(tmp_path)


# ----------------------------------------------------------------------------------------- adapters


def test_a_model_and_an_adapter_in_one_folder_are_refused(tmp_path: Path) -> None:
    adapter(saved(tmp_path), tiny.model("llama"))
    said = refusal(tmp_path)
    assert "holds an adapter (adapter_config.json) and a model (model.safetensors)" in said
    assert "move one of them into a separate folder" in said


def test_an_adapter_with_a_stray_configuration_is_an_adapter(tmp_path: Path, caplog: Any) -> None:
    base = load_model_and_tokenizer(str(saved(tmp_path / "base")))[0]
    adapter(tmp_path / "adapter", base)
    base.config.save_pretrained(tmp_path / "adapter")
    info = load_model_and_tokenizer(str(tmp_path / "adapter"))[2]
    assert info.adapter is not None and "is opened as an adapter" in caplog.text


def test_a_base_beside_the_adapter_is_found_from_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path / "base")
    adapter(tmp_path / "adapter", load_model_and_tokenizer(str(tmp_path / "base"))[0])
    file = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"base_model_name_or_path": "../base"}))
    monkeypatch.chdir("/")
    info = load_model_and_tokenizer(str(tmp_path / "adapter"))[2]
    assert Path(info.path).resolve() == tmp_path / "base"
    file.write_text(json.dumps(content | {"base_model_name_or_path": "../gone"}))
    assert "needs its base model" in refusal(tmp_path / "adapter")
    file.write_text(json.dumps(content | {"base_model_name_or_path": None}))
    assert "does not name its base model; set base_model_name_or_path" in refusal(tmp_path / "adapter")


def test_an_adapter_without_some_of_its_weights_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    adapter(tmp_path / "adapter", load_model_and_tokenizer(str(tmp_path / "base"))[0])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    del weights[next(name for name in weights if "layers.1" in name and "lora_B" in name)]
    save_file(weights, file)
    said = refusal(tmp_path / "adapter")
    assert "lacks weights that its adapter_config.json requires: give a complete one" in said
    assert "layers.1.self_attn.q_proj.lora_B" in said


def test_an_adapter_on_an_adapter_is_refused(tmp_path: Path) -> None:
    saved(tmp_path / "base")
    adapter(tmp_path / "adapter", load_model_and_tokenizer(str(tmp_path / "base"))[0])
    second = tmp_path / "second"
    adapter(second, load_model_and_tokenizer(str(tmp_path / "base"))[0])
    content = json.loads((second / "adapter_config.json").read_text())
    content["base_model_name_or_path"] = str(tmp_path / "adapter")
    (second / "adapter_config.json").write_text(json.dumps(content))
    assert "names another adapter as its base" in refusal(second) and "unisd merge" in refusal(second)


def trained_adapter(folder: Path, base: Any, **options: Any) -> str:
    """The base that an adapter names which a trainer has saved."""
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    built = tiny.trainer(folder, model=base, peft_config=config, **options)
    built.save_model()
    return str(json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"])


@pytest.mark.long
def test_an_adapter_names_its_base_for_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    named = trained_adapter(tmp_path / "of-folder", load_model_and_tokenizer("base")[0])
    assert named == str(tmp_path / "base")
    model, tokenizer, _ = load_model_and_tokenizer("pocket")
    assert trained_adapter(tmp_path / "of-pocket", model, processing_class=tokenizer) == "pocket"
    monkeypatch.chdir("/")
    assert load_model_and_tokenizer(str(tmp_path / "of-folder"))[2].path == str(tmp_path / "base")
    assert load_model_and_tokenizer(str(tmp_path / "of-pocket"))[2].adapter is not None


def test_an_adapter_of_a_gguf_file_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(gguf, "_convert", lambda file, folder: saved(folder) and None)
    monkeypatch.setattr(gguf.importlib.util, "find_spec", lambda name: object())
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.chdir(tmp_path)
    named = trained_adapter(tmp_path / "adapter", load_model_and_tokenizer("model.gguf")[0])
    assert named == str(tmp_path / "model.gguf")
    monkeypatch.chdir("/")
    monkeypatch.setenv("UNISD_CACHE", str(tmp_path / "another"))
    assert load_model_and_tokenizer(str(tmp_path / "adapter"))[2].path.startswith(str(tmp_path / "another"))


@pytest.mark.parametrize("images", [False, pytest.param(True, marks=pytest.mark.long)])
def test_tokens_that_were_added_are_opened_with_the_adapter(tmp_path: Path, images: bool) -> None:
    made = zoo.build("gemma3-vision") if images else (tiny.model("llama"), tiny.tokenizer())
    base, tokenizer, _ = load_model_and_tokenizer(str(saved(tmp_path / "base", *made)))
    before = len(tokenizer)
    tokenizer.add_tokens(["<added>", "</added>"])
    torch.manual_seed(0)
    base.resize_token_embeddings(len(tokenizer))
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    options = {"processing_class": tokenizer, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    built = tiny.trainer(tmp_path / "adapter", model=base, peft_config=config, **options)
    built.train()
    built.save_model()
    model, found, _ = load_model_and_tokenizer(str(tmp_path / "adapter"))
    assert len(found) == before + 2 == model.get_input_embeddings().weight.shape[0]
    ids = torch.tensor([[5, before, before + 1]])
    with torch.no_grad():
        assert model(ids).logits.equal(built.model.eval()(ids).logits)
    built.train(resume_from_checkpoint=str(tmp_path / "adapter" / "checkpoint-1"))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model, config: (get_peft_model(model, config), config), "leave peft_config out to continue"),
        (lambda model, config: (get_peft_model(model, config, adapter_name="mine"), None), "named 'default'"),
        (
            lambda model, config: (setattr(model, "peft_config", {"default": config}) or model, None),
            "add_adapter",
        ),
    ],
)
def test_adapters_that_could_not_be_opened_again(tmp_path: Path, make: Any, said: str) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    model, peft_config = make(tiny.model("llama"), config)
    with pytest.raises(UserError, match=said):
        tiny.trainer(tmp_path, model=model, peft_config=peft_config)


def test_an_adapter_by_its_folder_is_trained(tmp_path: Path) -> None:
    base = load_model_and_tokenizer(str(saved(tmp_path / "base")))[0]
    adapter(tmp_path / "adapter", base)
    options = {"model": str(tmp_path / "adapter"), "max_steps": 1, "gradient_accumulation_steps": 1}
    built = tiny.trainer(tmp_path / "out", **options)
    trained = {name for name, p in built.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained)
    before = {name: p.clone() for name, p in built.model.named_parameters() if p.requires_grad}
    assert all(built.teacher.state[name].equal(before[name]) for name in before)  # the adapter as it was
    built.train()
    built.save_model()
    now = load_file(tmp_path / "out" / "adapter_model.safetensors")
    was = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert now.keys() == was.keys() and not any(now[name].equal(was[name]) for name in now)
    with pytest.raises(UserError, match="leave peft_config out"):
        tiny.trainer(tmp_path / "again", **options, peft_config=LoraConfig(target_modules=["q_proj"]))


# ------------------------------------------------------------------------------------- other models


@pytest.mark.long
@pytest.mark.parametrize("name", zoo.names())
def test_what_is_saved_is_what_is_opened(tmp_path: Path, name: str, caplog: Any) -> None:
    """Of every family, text or images, with all its parts and without a complaint."""
    model, tokenizer = zoo.build(name)
    saved(tmp_path, model, tokenizer)
    opened, _, _ = load_model_and_tokenizer(str(tmp_path), dtype="float32")
    assert type(opened) is type(model) and caplog.text == ""
    wanted, found = model.state_dict(), opened.state_dict()
    assert wanted.keys() == found.keys() and all(found[key].equal(wanted[key]) for key in wanted)


def test_a_model_for_images_keeps_its_processor(tmp_path: Path) -> None:
    model, tokenizer = zoo.build("gemma3-vision")
    saved(tmp_path / "base", model, tokenizer)
    for name in ("preprocessor_config.json", "processor_config.json"):
        (tmp_path / "base" / name).write_text(f'{{"name": "{name}"}}')
    model, tokenizer, _ = load_model_and_tokenizer(str(tmp_path / "base"))
    small = {"gradient_accumulation_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    built = tiny.trainer(tmp_path / "out", model=model, processing_class=tokenizer, **small)
    built.train()
    built.save_model()
    for name in ("preprocessor_config.json", "processor_config.json"):
        for folder in (tmp_path / "out", tmp_path / "out" / "checkpoint-1"):
            assert json.loads((folder / name).read_text()) == {"name": name}
    kept = load_file(tmp_path / "out" / "model.safetensors")
    was = load_file(tmp_path / "base" / "model.safetensors")
    towers = [name for name in was if "vision" in name or "projector" in name]
    assert was.keys() == kept.keys() and towers and all(kept[name].equal(was[name]) for name in towers)
    assert any(not kept[name].equal(was[name]) for name in was)
    assert type(load_model_and_tokenizer(str(tmp_path / "out"))[0]) is type(model)


@pytest.mark.parametrize("name", ["falcon-h1", "nemotron-h", "jamba", "qwen3-next"])
def test_an_adapter_of_all_linear_maps_leaves_out_what_kernels_read(tmp_path: Path, name: str) -> None:
    from unisd.models.load import with_adapter

    config = LoraConfig(r=2, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM")
    adapted = with_adapter(zoo.build(name)[0], config, 0, False)
    reached = {where for where, module in adapted.named_modules() if hasattr(module, "lora_A")}
    mixed = {
        where
        for where, module in adapted.named_modules()
        if hasattr(module, "A_log") and hasattr(module, "D")
    }
    assert bool(mixed) == (name != "qwen3-next")
    assert reached and not any(f"{where}.out_proj" in reached for where in mixed)
    assert all(f"{where}.in_proj" in reached for where in mixed)


def test_what_transformers_says_of_a_model_is_told(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command silences it; what it finds odd in a configuration must not be lost with that."""
    monkeypatch.setattr(logging.getLogger("transformers"), "level", logging.ERROR)
    config = json.loads((saved(tmp_path) / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    load_model_and_tokenizer(str(tmp_path))
    assert "transformers: `rope_parameters`'s factor field must be a float or int >= 1" in caplog.text
    assert logging.getLogger("transformers").level == logging.ERROR


def vision_language(name: str) -> Any:
    """A tiny model for images of a kind that is not in the zoo; its tokens are bytes."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
    text = {**tiny.SIZES, "rope_parameters": rope}
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "patch_size": 4}
    qwen = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    kinds = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = dict(zip(kinds, range(250, 254), strict=True))
    torch.manual_seed(0)
    if name == "qwen2.5-vl":
        config = transformers.Qwen2_5_VLConfig(
            text_config=text, vision_config={**qwen, "patch_size": 4}, **ids
        )
        return transformers.Qwen2_5_VLForConditionalGeneration(config)
    if name == "qwen3-vl":
        seen = {**qwen, "patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
        config = transformers.Qwen3VLConfig(text_config={**text, "head_dim": 8}, vision_config=seen, **ids)
        return transformers.Qwen3VLForConditionalGeneration(config)
    if name == "smolvlm":
        text = {**tiny.SIZES, "model_type": "llama"}
        seen = {**tower, "num_hidden_layers": 1, "image_size": 8}
        config = transformers.SmolVLMConfig(
            text_config=text, vision_config=seen, image_token_id=250, scale_factor=2
        )
        return transformers.SmolVLMForConditionalGeneration(config)
    mixed = {"model_type": "lfm2", "layer_types": ["conv", "full_attention"], "block_multiple_of": 8}
    seen = {**tower, "model_type": "siglip2_vision_model", "num_hidden_layers": 1, "num_patches": 16}
    config = transformers.Lfm2VlConfig(
        text_config={**tiny.SIZES, **mixed}, vision_config=seen, image_token_id=250
    )
    return transformers.Lfm2VlForConditionalGeneration(config)


@pytest.mark.long
@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl", "smolvlm", "lfm2-vl"])
def test_models_for_images_are_trained_on_text(tmp_path: Path, name: str) -> None:
    made = vision_language(name)
    saved(tmp_path / "base", made)
    model, tokenizer, _ = load_model_and_tokenizer(str(tmp_path / "base"))
    assert type(model) is type(made)
    model.generate(IDS.expand(4, -1), max_new_tokens=2, do_sample=False)  # leaves its positions behind
    small = {"gradient_accumulation_steps": 1, "max_steps": 1, "per_device_train_batch_size": 4}
    built = tiny.trainer(tmp_path, model=model, processing_class=tokenizer, **small)
    trained = {where for where, p in built.model.named_parameters() if p.requires_grad}
    assert trained and not any("vision" in where or "visual" in where for where in trained)
    built.train()
    now = built.model.state_dict()
    moved = {where for where, value in made.state_dict().items() if not now[where].equal(value)}
    assert moved and all(where in trained or "lm_head" in where for where in moved)


def test_the_tokenizer_of_an_adapter_says_which_tokens_the_head_has(tmp_path: Path) -> None:
    base = load_model_and_tokenizer(str(saved(tmp_path / "base")))[0]
    tokenizer = copy.deepcopy(tiny.tokenizer())  # it is one for all tests
    known = tokens.known_tokens(tokenizer)
    base.resize_token_embeddings(known + 16)
    base = load_model_and_tokenizer(str(saved(tmp_path / "padded", base)))[0]
    assert tokens.defined_tokens(base.get_output_embeddings()) == known
    adapter(tmp_path / "adapter", base)
    tokenizer.add_tokens(["<tool>"])
    tokenizer.save_pretrained(tmp_path / "adapter")
    adapted = load_model_and_tokenizer(str(tmp_path / "adapter"))[0]
    assert tokens.defined_tokens(adapted.get_output_embeddings()) == known + 1
