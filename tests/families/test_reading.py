"""A family is read as it reads itself, or refused with the reason, before anything is trained."""

from __future__ import annotations

import copy
import logging
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from peft import LoraConfig, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model

from tests.families.cells import cells
from tests.families.zoo import FAMILIES, build, names
from unisd import UserError
from unisd import testing as tiny
from unisd.backbone import Backbone
from unisd.batching import collate
from unisd.distributed import sharding
from unisd.kernels.attention import PACKED_SDPA
from unisd.models.load import with_adapter
from unisd.rollout.decoding import decode
from unisd.training.setup import check_routers, disable_dropout
from unisd.training.sharded_trainer import weights_without_gradient

PADDED = {
    "qwen3-next", "qwen3.5", "qwen3.5-vision", "llama4", "gpt-oss", "lfm2", "granite-hybrid", "falcon-h1",
    "jamba", "bamba", "nemotron-h", "mamba2", "zamba2",
}  # fmt: skip
"""States and chunks that run on from row to row, and attention with code of its own."""
MOE = [name for name in names() if "router" in FAMILIES[name].traits]


def random_model(kind: str, **options: Any) -> Any:
    """A tiny model of a kind that is not in the zoo."""
    sizes = {
        "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**sizes, **options})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                weight.mul_(8.0)
    return model.eval()


def sparse() -> Any:
    return random_model(
        "DeepseekV32", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=2,
        topk_group=1, kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
        num_key_value_heads=4, first_k_dense_replace=1, index_topk=8, index_n_heads=16, index_head_dim=16,
    )  # fmt: skip


@cells(always=("qwen3-moe", "qwen3.5-vision", "llama4", "gpt-oss", "phi3-longrope", "falcon-h1"))
def test_read(family: str, record_property: Any) -> None:
    backbone = Backbone(build(family)[0])
    packed = backbone.check(0)
    assert packed == (family not in PADDED)
    assert backbone.tells_rows == (family != "gpt-oss" and "mamba" not in family)
    record_property("note", "packed where that is faster" if packed else "padded")


@cells(always=("llama4", "qwen3.5", "gpt-oss"))
def test_answers_do_not_depend_on_padding(family: str) -> None:
    """Rows that are written together have the logits that each has alone."""
    assert_each_is_written_as_if_alone(build(family)[0])


def test_states_in_a_models_own_modules_are_of_one_row() -> None:
    """RecurrentGemma, which takes any cache and keeps states beside it, would mix them up."""
    options = {"lru_width": 32, "attention_window_size": 16, "num_key_value_heads": 1, "head_dim": 8}
    assert_each_is_written_as_if_alone(random_model("RecurrentGemma", **options | {"num_hidden_layers": 3}))


def assert_each_is_written_as_if_alone(model: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(16, 200, (length,), generator=generator).tolist() for length in (40, 9, 23, 40)]
    together = logits_while_writing(model, rows)
    for row, logits in enumerate(together):
        (alone,) = logits_while_writing(model, [rows[row]])
        torch.testing.assert_close(logits, alone, atol=1e-3 * float(alone.abs().max()), rtol=0)


def logits_while_writing(model: Any, rows: list[list[int]]) -> list[torch.Tensor]:
    """What each row's first three tokens are chosen from, whatever they are."""
    found: list[list[torch.Tensor]] = [[] for _ in rows]

    def keep(alive: Any, width: int) -> transformers.LogitsProcessorList:
        def kept(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            for row, of_row in zip(alive, scores, strict=True):
                found[row].append(of_row.clone())
            forced = torch.full_like(scores, -torch.inf)
            forced[:, 20 + ids.shape[1] - width] = 0.0
            return forced

        return transformers.LogitsProcessorList([kept])

    decode(model, rows, 3, eos_ids=[], pad_id=0, processors=keep)
    return [torch.stack(of_row) for of_row in found]


def refused_where_padding_tells(model: Any) -> AbstractContextManager[Any]:
    """Sparse attention of transformers 5.16 chooses padding, too: refused."""
    alone, long = torch.arange(20, 29)[None], torch.arange(20, 60)[None]
    rows = torch.cat([torch.nn.functional.pad(alone, (0, 31)), long])
    together = model(input_ids=rows, attention_mask=(rows > 0).long()).logits[0, :9]
    if torch.allclose(together, model(input_ids=alone).logits[0], atol=1e-3):
        return nullcontext()
    return pytest.raises(UserError, match="a padded row of DeepseekV32ForCausalLM changes the logits of its")


def test_sparse_attention_keeps_its_name() -> None:
    model = sparse()
    refused = refused_where_padding_tells(model)
    backbone = Backbone(model)
    assert model.config._attn_implementation == "sdpa" and not backbone.tells_rows
    with refused:
        backbone.check(0)
    assert model.config._attn_implementation == "sdpa"
    # under our name all of the past is read: another model
    model.set_attn_implementation(PACKED_SDPA)
    ids = torch.randint(200, (1, 40), generator=torch.Generator().manual_seed(0))
    dense = model(input_ids=ids).logits
    model.set_attn_implementation("sdpa")
    assert not torch.allclose(dense, model(input_ids=ids).logits, atol=0.05)


def test_attention_that_gives_other_logits_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisd.backbone.asks_for_attention", lambda model: False)
    refused = refused_where_padding_tells(sparse())
    backbone = Backbone(sparse())
    assert backbone.tells_rows
    with refused:
        backbone.check(0)
    assert backbone.causal_lm.config._attn_implementation == "sdpa" and not backbone.tells_rows


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        pytest.param(
            "DeepseekV4", {"num_hidden_layers": 3, "num_key_value_heads": 2}, marks=pytest.mark.long
        ),
        ("GPTNeo", {"intermediate_size": None, "num_hidden_layers": 2, "num_heads": 4, "num_layers": 2,
                    "attention_types": [[["global", "local"], 1]], "window_size": 16,
                    "max_position_embeddings": 256}),
    ],
)  # fmt: skip
def test_code_of_its_own_is_not_packed(
    kind: str, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    backbone = Backbone(random_model(kind, **options))
    assert backbone.check(0) is False
    assert "Packed rows are not exact" in caplog.text and "rows are padded" in caplog.text
    with pytest.raises(
        UserError, match=r"packing=packed is not exact .* \(eager\): use packing=auto or padded"
    ):
        backbone.check(0, "packed")


def test_a_model_that_looks_ahead_is_refused() -> None:
    model = tiny.FAMILIES["gemma3"]()
    config = model.config.to_dict() | {"use_bidirectional_attention": True}
    model = type(model)(type(model.config)(**config)).eval()
    with pytest.raises(
        UserError, match=r"Gemma3ForCausalLM reads later tokens, too: another ending .* causal model"
    ):
        Backbone(model).check(0)


@pytest.mark.parametrize(
    ("adapter", "kind"),
    [
        (PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PROMPT_TUNING"),
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "PREFIX_TUNING"),
        (PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4), "P_TUNING"),
        (LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5, 6]), "activated LoRA"),
    ],
)
def test_adapters_around_the_model_are_refused(tmp_path: Path, adapter: Any, kind: str) -> None:
    with pytest.raises(UserError, match=rf"peft_config: {kind}.* acts around the model.* use LoRA"):
        tiny.trainer(tmp_path, peft_config=adapter)


def test_a_wrapper_that_changes_logits_is_noticed() -> None:
    model = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear"))
    own = model.forward
    model.forward = lambda *args, **kwargs: _shifted(own(*args, **kwargs))
    with pytest.raises(UserError, match="does not reproduce its logits"):
        Backbone(model).check(0)


def _shifted(output: Any) -> Any:
    output.logits = output.logits * 1.5
    return output


def test_rows_on_both_sides_of_longrope_are_refused(tmp_path: Path) -> None:
    model, tokenizer = build("phi3-longrope")
    given = {"model": model, "processing_class": tokenizer, "max_completion_length": 10}
    rows = tiny.rows(4)
    built = tiny.trainer(tmp_path / "short", train_dataset=rows, **given)
    assert built.backbone.longest_exact == 256
    rows[2]["prompt"] = "long " * 50
    with pytest.raises(
        UserError, match=r"row 2 .* over the limit of 246 .*what LongRoPE reads without turning"
    ):
        tiny.trainer(tmp_path / "long", train_dataset=rows, **given)
    # why: a neighbour beyond the limit turns the positions of all
    backbone = Backbone(model)
    short, long = list(range(10, 60)), [20] * 270
    with torch.no_grad():
        alone = backbone.forward(model, collate([short], False, 0, "cpu")).final
        beside = backbone.forward(model, collate([short, long], False, 0, "cpu")).final
    assert alone is not None and beside is not None
    assert not torch.allclose(alone[0], beside[0, :50], atol=1e-2)


@cells(always=("mixtral", "granite-hybrid"), of=MOE)
def test_routers_that_hand_out_logits(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = build(family)[0]
    model.config.get_text_config().output_router_logits = True
    backbone = Backbone(model)
    backbone.check(0)
    rows = [[20, 21, 22, 23, 24], [20, 21]]
    answers = decode(model, rows, 4, eos_ids=[], pad_id=0)
    check_routers(backbone, 0.0, 0)
    assert caplog.text.count("saved with output_router_logits") == 1
    assert "router_aux_loss_coef=0.001 adds it" in caplog.text
    assert model.config.get_text_config().output_router_logits is True
    model.config.get_text_config().output_router_logits = False
    assert decode(model, rows, 4, eos_ids=[], pad_id=0) == answers


def test_the_routers_loss_is_transformers_own(tmp_path: Path) -> None:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    found = []
    for coefficient in (0.0, 0.3):
        model, tokenizer = build("mixtral")
        built = tiny.trainer(
            tmp_path / str(coefficient), model=model, processing_class=tokenizer,
            per_device_train_batch_size=8, gradient_accumulation_steps=1, router_aux_loss_coef=coefficient,
            packing="padded",
        )  # fmt: skip
        batches, count = built.get_batch_samples(iter(built.get_train_dataloader()), 1, built.args.device)
        model.zero_grad()
        loss = built.compute_loss(model, batches[0], num_items_in_batch=count)
        loss.backward()
        found.append((loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    batch = batches[0]["micro_batch"].batch
    model.zero_grad()
    routed = model(**batch.inputs, output_router_logits=True, use_cache=False).router_logits
    aux = load_balancing_loss_func(routed, 4, 2, batch.attention_mask)
    aux.backward()
    torch.testing.assert_close(found[1][0] - found[0][0], 0.3 * aux.detach(), atol=1e-5, rtol=1e-4)
    for name, p in model.named_parameters():
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        torch.testing.assert_close(
            found[1][1][name] - found[0][1][name], 0.3 * grad, atol=1e-5, rtol=1e-3, msg=name
        )


def test_a_routers_loss_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"router_aux_loss_coef=0.01: LlamaForCausalLM computes no .* unset it"
    ):
        tiny.trainer(tmp_path, router_aux_loss_coef=0.01)


def test_experts_take_no_dropout(caplog: pytest.LogCaptureFixture, recwarn: pytest.WarningsRecorder) -> None:
    config = LoraConfig(
        r=2, lora_dropout=0.05, target_modules=["gate_proj", "up_proj", "down_proj", "q_proj"]
    )
    model = with_adapter(build("qwen3-moe")[0], config, 0, False)
    assert "lora_dropout is 0 here instead of 0.05" in caplog.text
    assert "among them experts" in caplog.text
    experts = model.config.num_experts
    of_gate_and_up = model.get_parameter(
        "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.default.weight"
    )
    assert len(of_gate_and_up) == 2 * config.r * experts  # though peft warned that it ignores this rank
    assert not [one for one in recwarn if "_pattern keys did not match" in str(one.message)]
    assert config.lora_dropout == 0.05 and model.peft_config["default"].lora_dropout == 0.0
    caplog.clear()
    with_adapter(
        build("qwen3-moe")[0], LoraConfig(r=2, lora_dropout=0.05, target_modules=["q_proj"]), 0, False
    )
    assert "experts are not adapted" in caplog.text and re.search(
        r"The adapter reaches \d+ % of the weights", caplog.text
    )
    assert "lora_dropout is 0" not in caplog.text


@cells(always=("qwen3.5-vision", "gemma3-vision", "gemma4"))
def test_blocks(family: str) -> None:
    """FSDP2 finds the classes that it wraps, and wraps each block by itself."""
    model = build(family)[0]
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    state = type("State", (), {"fsdp_plugin": plugin})
    backbone = Backbone(model)
    trainer = type("Trainer", (), {"accelerator": type("Accelerator", (), {"state": state}), "model": model})
    trainer.backbone = backbone  # type: ignore[attr-defined]
    sharding._wrap_blocks(trainer)
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    assert policy is not None and all(policy(block) for block in backbone.blocks())
    assert not policy(model)


def test_both_tied_embeddings_are_refused_by_fsdp() -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    model = get_peft_model(tiny.model("qwen3"), config)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    state = type("State", (), {"fsdp_plugin": plugin})
    trainer = type("Trainer", (), {"accelerator": type("Accelerator", (), {"state": state}), "model": model})
    trainer.backbone = Backbone(model)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"modules_to_save names both .* name only lm_head"):
        sharding._wrap_blocks(trainer)


def test_weights_without_a_gradient_are_found() -> None:
    assert weights_without_gradient(tiny.model()) == []
    adapted = get_peft_model(build("jamba")[0], LoraConfig(r=2, target_modules=["dt_proj", "q_proj"]))
    found = weights_without_gradient(adapted)
    assert found and all("dt_proj" in name for name in found)
    assert all(p.grad is None for p in adapted.parameters())


def test_a_models_own_dropout_is_off_and_the_adapters_is_not(tmp_path: Path) -> None:
    def gpt2() -> Any:
        return random_model("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=512, vocab_size=262)

    model = gpt2()
    ids = torch.arange(10, 40)[None]
    assert not torch.equal(model.train()(ids).logits, model.train()(ids).logits)
    adapter = LoraConfig(r=2, lora_dropout=0.5, target_modules=["c_attn"], fan_in_fan_out=True)
    built = tiny.trainer(tmp_path / "off", model=model, peft_config=adapter)
    inner = built.backbone.causal_lm.train()
    kept = {
        m.p for name, m in inner.named_modules() if isinstance(m, torch.nn.Dropout) and "lora_dropout" in name
    }
    others = {
        m.p for name, m in inner.named_modules() if isinstance(m, torch.nn.Dropout) and "lora" not in name
    }
    assert kept == {0.5} and others == {0.0}
    assert inner.config.resid_pdrop == 0.1  # what is saved is what was given
    other = tiny.trainer(tmp_path / "on", model=gpt2(), disable_dropout=False)
    assert any(m.p for m in other.backbone.causal_lm.modules() if isinstance(m, torch.nn.Dropout))


def test_a_router_that_draws_experts_does_so_no_more(tmp_path: Path) -> None:
    """In training mode PhiMoE sends tokens where chance says: another model than was scored."""

    def phimoe() -> Any:
        model = build("phimoe")[0]
        for module in model.modules():  # far more than usual: seen on any text
            if hasattr(module, "input_jitter_noise"):
                module.input_jitter_noise = 0.5
        return model.eval()

    ids, model, tokenizer = torch.arange(20, 50)[None], phimoe(), build("phimoe")[1]
    expected = model(ids).logits
    assert not torch.allclose(model.train()(ids).logits, expected, atol=1e-2)
    given = {"model": model, "processing_class": tokenizer}
    built = tiny.trainer(tmp_path / "off", **given)
    torch.testing.assert_close(built.model.train()(ids).logits, expected, atol=1e-3, rtol=1e-3)
    noisy = tiny.trainer(tmp_path / "on", **{**given, "model": phimoe()}, disable_dropout=False)
    assert not torch.allclose(noisy.model.train()(ids).logits, expected, atol=1e-2)


def test_layers_that_cannot_be_computed_again_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"gradient_checkpointing: a JetMoeForCausalLM cannot compute its layers again: unset"
    ):
        tiny.trainer(tmp_path, model=build("jetmoe")[0], gradient_checkpointing=True)


STATES: dict[str, dict[str, Any]] = {
    "Mamba": {"state_size": 4},
    "FalconMamba": {"state_size": 4},
    "RecurrentGemma": {
        "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 16, "num_key_value_heads": 1,
        "head_dim": 8,
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", STATES)
def test_models_of_states_take_an_adapter_of_all_linear_maps(tmp_path: Path, kind: str) -> None:
    adapter = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = random_model(kind, vocab_size=262, **STATES[kind])
    built = tiny.trainer(tmp_path, model=model, peft_config=adapter, max_steps=1)
    adapted = [name for name, p in built.model.named_parameters() if p.requires_grad]
    assert adapted and not any("mixer.out_proj" in name for name in adapted)  # a kernel reads it
    loss, gradients = tiny.gradients(built)
    assert loss > 0 and gradients and gradients.keys() <= set(adapted)


def test_dropout_of_attention_is_off_too() -> None:
    model = tiny.model()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    before = copy.deepcopy(model.config.to_dict())
    disable_dropout(model)
    ids = torch.arange(10, 40)[None]
    assert torch.equal(model.train()(ids).logits, model.train()(ids).logits)
    assert model.config.to_dict() == before


@pytest.fixture(autouse=True)
def heard(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("unisd").propagate = True
    caplog.set_level(logging.INFO, logger="unisd")
