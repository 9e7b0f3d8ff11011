"""What a trainer makes of its model, its rows and its machine before the first step."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3TextConfig, TrainingArguments

import unisd.training.setup
from unisd import UniSDConfig, UniSDTrainer, UserError, recipes
from unisd import testing as tiny
from unisd.data.prompts import encode_completion
from unisd.testing import gradients, trainer
from unisd.training.plan import planned_steps
from unisd.training.preflight import check_machine


def with_a_vision_tower() -> Any:
    """What `AutoModelForCausalLM` makes of the smaller Gemma-3 checkpoints."""
    text = Gemma3TextConfig(**tiny.SIZES, head_dim=8, sliding_window=8, query_pre_attn_scalar=8)
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "image_size": 28, "patch_size": 14,
    }  # fmt: skip
    tokens = {
        "mm_tokens_per_image": 4,
        "image_token_index": 261,
        "boi_token_index": 259,
        "eoi_token_index": 260,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        Gemma3Config(text_config=text.to_dict(), vision_config=vision, **tokens)
    )


@pytest.mark.parametrize("lora", [False, True])
def test_only_what_text_passes_through_is_trained(tmp_path: Any, lora: bool) -> None:
    """DDP waits for the gradient of every trained parameter."""
    adapter = (
        {"peft_config": LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")} if lora else {}
    )
    built = trainer(tmp_path, model=with_a_vision_tower(), **adapter)
    trained = {name for name, p in built.model.named_parameters() if p.requires_grad}
    assert trained and not any("vision" in name or "projector" in name for name in trained)
    assert trained == set(gradients(built)[1])
    assert lora == any("q_proj.lora_A" in name for name in trained)
    assert not any("vision" in name and "lora" in name for name, _ in built.model.named_parameters())


def test_a_model_by_name_is_trained_in_float32(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    asked = []

    def load(name: str, dtype: str = "auto") -> Any:
        asked.append(dtype)
        return tiny.model(dtype=torch.bfloat16), tiny.tokenizer(), None

    monkeypatch.setattr(unisd.training.setup, "load_model_and_tokenizer", load)
    args = UniSDConfig(output_dir=str(tmp_path), use_cpu=True)
    with caplog.at_level(logging.WARNING):
        UniSDTrainer("some/model", args, tiny.rows(2))
        assert asked == ["float32"] and caplog.text.count("Trained weights of 16 bits") == 1
        UniSDTrainer(
            "some/model", args, tiny.rows(2), peft_config=LoraConfig(r=2, target_modules="all-linear")
        )
    assert asked == ["float32", "auto"] and caplog.text.count("Trained weights of 16 bits") == 1


def test_several_devices_without_a_launcher(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    setup = TrainingArguments.__post_init__

    def on_four(self: Any) -> None:
        setup(self)
        self._n_gpu = 4

    monkeypatch.setattr(TrainingArguments, "__post_init__", on_four)
    with caplog.at_level(logging.WARNING):
        args = UniSDConfig(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=2)
    assert args.n_gpu == 1 and args.train_batch_size == 2 and "`accelerate launch`" in caplog.text


@pytest.mark.parametrize("layer", [2, -3, 99])
def test_layers_that_are_not_there(tmp_path: Any, layer: int) -> None:
    with pytest.raises(UserError, match=f"feature_layers={layer}: the model has layers 0 to 1"):
        trainer(tmp_path, feature_weight=0.1, feature_layers=[layer])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"token_weights": ["corroboration"], "num_auxiliary_contexts": 0}, "no context to corroboration"),
        ({"teacher_context": "wrong", "token_weights": ["contrast_weight"]}, "the two do not differ"),
        ({"teacher_context": "wrong", "target": "contrast"}, "the two do not differ"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha has no effect here: its noise is scaled"),
        ({"max_grad_norm": None}, "max_grad_norm=None is no number: give 0"),
    ],
)
def test_options_that_nothing_would_look_at(tmp_path: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **options)


def test_options_that_have_no_effect_are_told(tmp_path: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Not refused: a study may give them to all cells."""
    trainer(tmp_path, feature_layers=[0], target_reference_steps=2)
    assert "feature_layers has no effect" in caplog.text and "target_reference_steps has no" in caplog.text


def test_corroboration_needs_one_context_of_a_row(tmp_path: Any) -> None:
    rows = [{**row, "auxiliary_contexts": ["1 + 1 = 2"]} for row in tiny.rows(8)]
    assert trainer(tmp_path, train_dataset=rows, token_weights=["corroboration"])
    with pytest.raises(UserError, match=r"agreement_token needs .*no row has two of them.*agreement=none"):
        trainer(tmp_path, train_dataset=rows, agreement="token")
    rows = [{**row, "auxiliary_contexts": []} for row in rows]
    with pytest.raises(UserError, match=r"corroboration needs .*no row has any.*unset token_weights"):
        trainer(tmp_path, train_dataset=rows, token_weights=["corroboration"])


@pytest.mark.parametrize("shares", [{"split_batches": True}, {"even_batches": False}])
def test_rows_are_dealt_to_processes_in_one_way(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch, shares: dict[str, bool]
) -> None:
    args = UniSDConfig(output_dir=str(tmp_path), use_cpu=True, accelerator_config=shares)
    check_machine(args)
    monkeypatch.setattr(UniSDConfig, "world_size", 2)
    with pytest.raises(UserError, match="leave out split_batches, dispatch_batches and even_batches"):
        check_machine(args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_on_a_base_that_was_changed_in_memory_is_refused(tmp_path: Any, dtype: Any) -> None:
    tiny.model().save_pretrained(tmp_path / "base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=dtype)
    adapter = LoraConfig(r=2, target_modules="all-linear")
    for same in (copy.deepcopy(model), copy.deepcopy(model).float()):
        assert trainer(tmp_path, model=same, peft_config=adapter)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.add_(0.1)
    with pytest.raises(UserError, match=r"up_proj.weight differs.*save it first \(save_pretrained\)"):
        trainer(tmp_path, model=model, peft_config=adapter)


def test_references_end_as_the_model_ends_them() -> None:
    """The template closes a turn with another token than the tokenizer's EOS, as Gemma's and
    Phi-3's do.
    """
    tokenizer = copy.deepcopy(tiny.tokenizer())
    tokenizer.eos_token = "<s>"
    end, eos = tokenizer.convert_tokens_to_ids("<|end|>"), tokenizer.eos_token_id
    assert encode_completion(tokenizer, "a", [eos, end])[1:] == [end]
    assert encode_completion(tokenizer, "a", [eos])[1:] == encode_completion(tokenizer, "a")[1:] == [eos]
    assert encode_completion(tokenizer, "a", [eos, 5])[1:] == [eos]  # closes with a token that ends nothing


def test_the_answer_is_the_reference_by_default(tmp_path: Any) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["privileged_context"]} for row in tiny.rows(8)]
    built = trainer(tmp_path, train_dataset=rows)
    assert [row["privileged_context"] for row in built.rows] == [row["completion"] for row in rows]
    with pytest.raises(UserError, match="no column 'privileged_context'"):
        trainer(tmp_path, train_dataset=[{"prompt": row["prompt"]} for row in rows])


def test_prompts_alone_do_for_the_models_own_answers(tmp_path: Any) -> None:
    rows = [{"prompt": row["prompt"]} for row in tiny.rows(8)]
    trainer(
        tmp_path,
        train_dataset=rows,
        **recipes.load("ssd").options | {"max_completion_length": 8, "max_steps": 1},
    ).train()


def test_checkpointing_of_a_model_that_cannot(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(UserError, match=r"gradient_checkpointing: a LlamaForCausalLM cannot .*: unset it"):
        trainer(tmp_path, model=model, gradient_checkpointing=True)
    assert trainer(tmp_path, model=model)


@pytest.mark.parametrize("rows", [4, 7, 12])
@pytest.mark.parametrize("epochs", [0.5, 1, 2.3])
@pytest.mark.parametrize("iterations", [1, 2])
def test_as_many_steps_are_taken_as_were_announced(
    tmp_path: Any, rows: int, epochs: float, iterations: int
) -> None:
    options = {"num_train_epochs": epochs, "num_iterations": iterations, "max_completion_length": 2}
    for batch, together, drop, steps in [(2, 2, False, -1), (2, 1, True, -1), (1, 3, False, 2)]:
        built = trainer(
            tmp_path,
            train_dataset=tiny.rows(rows, 0),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=together,
            dataloader_drop_last=drop,
            max_steps=steps,
            **options,
        )
        values = built.set_initial_training_values(built.args, built.get_train_dataloader())
        assert planned_steps(built.args, rows) == values[-1]


@pytest.mark.long
@pytest.mark.parametrize("options", [{"num_train_epochs": 0.5}, {"num_iterations": 2}, {"max_steps": 2}])
def test_the_steps_announced_are_the_last_ones_number(tmp_path: Any, options: dict[str, Any]) -> None:
    built = trainer(tmp_path, **{"train_dataset": tiny.rows(20, 0), "max_completion_length": 2, **options})
    built.train()
    assert built.state.global_step == built.state.max_steps == planned_steps(built.args, 20)


def test_no_steps_at_all_is_a_mistake() -> None:
    for name, value in (("max_steps", 0), ("max_steps", -2), ("num_train_epochs", 0.0)):
        with pytest.raises(UserError, match=f"{name}={value} "):
            UniSDConfig(**{name: value})
