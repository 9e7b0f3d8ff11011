"""What `unisd merge` writes computes what the adapter does, of whatever kind, or nothing is
written.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.helpers.commands import without_notes
from unisd import testing as tiny
from unisd.cli import main

pytestmark = pytest.mark.long  # many short trainings, which together take long

IDS = torch.tensor([[1, 7, 45, 99, 200, 7, 8, 31]])
Make = Callable[..., Path]


def saved(folder: Path, family: str, dtype: torch.dtype = torch.float32) -> Path:
    if family == "qwen3_moe":
        torch.manual_seed(0)
        config = Qwen3MoeConfig(
            **tiny.SIZES, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        )
        model: Any = Qwen3MoeForCausalLM(config)
    else:
        model = tiny.model(family, dtype=dtype)
    model.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes a base and an adapter of it that changes much; returns the adapter's folder."""

    def build(family: str = "llama", dtype: torch.dtype = torch.float32, **options: Any) -> Path:
        base = saved(tmp_path / "base", family, dtype)
        torch.manual_seed(1)
        config = LoraConfig(
            **{"r": 4, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False} | options
        )
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "modules_to_save" in name or "trainable_tokens" in name:
                    parameter.add_(torch.randn(parameter.shape) * parameter.std())
        model.save_pretrained(tmp_path / "adapter")
        return tmp_path / "adapter"

    return build


def logits(folder: Path, scale: float = 1.0) -> torch.Tensor:
    """By plain transformers, or by peft: of an adapter with its change times `scale`."""
    if (folder / "adapter_config.json").is_file():
        base = AutoModelForCausalLM.from_pretrained(folder.parent / "base", dtype=torch.float32)
        model: Any = PeftModel.from_pretrained(base, str(folder))
        for module in model.modules():
            if hasattr(module, "scale_layer") and hasattr(module, "scaling"):
                module.scale_layer(scale)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(IDS).logits  # type: ignore[no-any-return]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def merge(*arguments: object) -> int:
    return main(["merge", *map(str, arguments)])


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: object) -> str:
        capsys.readouterr()
        assert merge(*arguments) == 2
        error = without_notes(capsys.readouterr().err)
        assert error.startswith("unisd: error: ") and error.count("\n") == 1
        return error

    return run


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tied": ("qwen3", {"target_modules": "all-linear"}),
    "DoRA": ("llama", {"use_dora": True}),
    "rsLoRA": ("llama", {"use_rslora": True}),
    "head": ("llama", {"modules_to_save": ["lm_head"]}),
    "embedding": ("llama", {"modules_to_save": ["embed_tokens"]}),
    "tokens": ("llama", {"trainable_token_indices": [7, 45]}),
    "tokens, tied": ("qwen3", {"trainable_token_indices": [7, 45]}),
    "adapted tied pair": (
        "qwen3",
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "saved tied pair": ("qwen3", {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}),
    "experts": (
        "qwen3_moe",
        {
            "target_modules": ["q_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
    ),
}


FAST = ("tied", "DoRA", "head", "tokens, tied", "experts")


@pytest.mark.parametrize(
    "kind", [kind if kind in FAST else pytest.param(kind, marks=pytest.mark.long) for kind in KINDS]
)
def test_every_kind_of_adapter(
    kind: str, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    family, options = KINDS[kind]
    adapter = make(family, **options)
    assert (logits(adapter) - logits(tmp_path / "base")).abs().max() > 0.1
    assert merge(adapter) == 0
    merged = tmp_path / "adapter-merged"
    torch.testing.assert_close(logits(merged), logits(adapter), rtol=1e-4, atol=1e-4)
    said = capsys.readouterr().out
    assert f"written to {merged}: a full model in float32\n" in said
    assert "read back and compared with the adapter: logits differ by at most" in said
    assert "the same at 100.0% of" in said
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] == (family == "qwen3")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "adapter-merged"}


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "q_proj"]},
        pytest.param({"target_modules": ["lm_head"]}, marks=pytest.mark.long),
        pytest.param({"modules_to_save": ["lm_head"]}, marks=pytest.mark.long),
    ],
    ids=["embedding", "head", "saved head"],
)
def test_a_tied_pair_of_which_one_changed_is_untied(
    options: dict[str, Any], make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make("qwen3", **options)
    assert merge(adapter, "--scale", 0, 1) == 0
    assert "head and embedding are two matrices now (tie_word_embeddings is false)" in capsys.readouterr().out
    torch.testing.assert_close(logits(tmp_path / "adapter-merged-1"), logits(adapter), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        logits(tmp_path / "adapter-merged-0"), logits(tmp_path / "base"), rtol=0, atol=0
    )
    tied = [
        json.loads((tmp_path / f"adapter-merged-{scale}" / "config.json").read_text())["tie_word_embeddings"]
        for scale in (0, 1)
    ]
    assert tied == [True, False]


def test_scales(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make()
    assert merge(adapter, "--output_dir", tmp_path / "deep" / "many", "--scale", 0.25, -0.5, 0) == 0
    said = capsys.readouterr().out
    for scale in (0.25, -0.5, 0):
        folder = tmp_path / "deep" / "many" / f"{scale:g}"
        assert f"written to {folder}: a full model in float32, the base and {scale:g} x the change\n" in said
        torch.testing.assert_close(logits(folder), logits(adapter, scale), rtol=1e-4, atol=1e-4)
    base = weights(tmp_path / "base")
    for name, value in weights(tmp_path / "deep" / "many" / "0").items():
        assert torch.equal(value, base[name])
    assert merge(adapter, "--scale", 0.25) == 0
    merged = weights(tmp_path / "adapter-merged-0.25")
    for name, value in weights(tmp_path / "deep" / "many" / "0.25").items():
        assert torch.equal(value, merged[name])


@pytest.mark.parametrize(
    "options",
    [{"use_dora": True}, pytest.param({"modules_to_save": ["lm_head"]}, marks=pytest.mark.long)],
    ids=["DoRA", "saved"],
)
def test_scales_of_what_is_no_sum(options: dict[str, Any], make: Make, tmp_path: Path) -> None:
    adapter = make(**options)
    assert merge(adapter, "--scale", 0.5, 1) == 0
    base, half, whole = (
        weights(tmp_path / name) for name in ("base", "adapter-merged-0.5", "adapter-merged-1")
    )
    for name in base:
        torch.testing.assert_close(half[name], base[name] + 0.5 * (whole[name] - base[name]))
    torch.testing.assert_close(logits(tmp_path / "adapter-merged-1"), logits(adapter), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", [pytest.param("llama", marks=pytest.mark.long), "qwen3"])
def test_part_of_what_full_fine_tuning_changed(family: str, tmp_path: Path) -> None:
    base = saved(tmp_path / "base", family)
    tuned = tiny.model(family, seed=1)
    tuned.save_pretrained(tmp_path / "tuned")
    tiny.tokenizer().save_pretrained(tmp_path / "tuned")
    assert merge(tmp_path / "tuned", "--base", base, "--scale", 0.5, 1) == 0
    before, half, after = (weights(tmp_path / name) for name in ("base", "tuned-merged-0.5", "tuned"))
    assert half.keys() == after.keys()
    for name in before:
        torch.testing.assert_close(half[name], before[name] + 0.5 * (after[name] - before[name]))
    for name, value in weights(tmp_path / "tuned-merged-1").items():
        assert torch.equal(value, after[name])


def test_the_bases_precision_is_kept(make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = make(dtype=torch.bfloat16)
    assert merge(adapter) == 0
    assert "a full model in bfloat16\n" in capsys.readouterr().out
    assert {value.dtype for value in weights(tmp_path / "adapter-merged").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "adapter-merged" / "config.json").read_text())["dtype"] == "bfloat16"
    assert merge(adapter, "--dtype", "float32", "--output_dir", tmp_path / "exact") == 0
    torch.testing.assert_close(logits(tmp_path / "exact"), logits(adapter), rtol=1e-4, atol=1e-4)


def test_a_change_below_the_precision_is_told(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = make(dtype=torch.bfloat16, lora_alpha=1e-3)
    assert merge(adapter) == 0
    assert "not much more than rounding: --dtype float32 keeps it" in capsys.readouterr().out


def test_what_a_user_set_is_kept(make: Make, tmp_path: Path) -> None:
    adapter = make()
    settings = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [2, 4], "max_new_tokens": 77}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(settings))
    (tmp_path / "base" / "preprocessor_config.json").write_text('{"size": 5}')
    tokenizer = tiny.tokenizer(chat=False)
    tokenizer.chat_template = "{{ messages[0]['content'] }} mine"
    tokenizer.pad_token, own = None, tokenizer.pad_token
    tokenizer.save_pretrained(adapter)
    tokenizer.pad_token = own
    assert merge(adapter) == 0
    merged = tmp_path / "adapter-merged"
    kept = json.loads((merged / "generation_config.json").read_text())
    assert settings | {"do_sample": True} == {key: kept[key] for key in (*settings, "do_sample")}
    assert (merged / "preprocessor_config.json").read_text() == '{"size": 5}'
    found = AutoTokenizer.from_pretrained(merged)
    assert found.chat_template == tokenizer.chat_template and found.pad_token is None


def test_nothing_is_left_of_what_cannot_be_read_back(
    make: Make, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make()

    model = tiny.model()
    genuine = PreTrainedModel.save_pretrained
    with monkeypatch.context() as patched:
        patched.setattr(PreTrainedModel, "save_pretrained", lambda self, folder: genuine(model, folder))
        error = refused(adapter, "--output_dir", tmp_path / "new" / "merged", "--scale", 0.5, 1)
    assert "what was saved cannot be read back: the logits differ by at most" in error
    assert "Nothing was written: use the adapter as it is" in error
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter"}
    assert merge(adapter, "--output_dir", tmp_path / "new" / "merged") == 0


def test_a_wrong_sum_is_found(
    make: Make, tmp_path: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft.tuners.lora import Linear

    adapter = make()
    monkeypatch.setattr(Linear, "merge", lambda *_, **__: None)
    error = refused(adapter)
    assert "this adapter cannot be merged: with it merged into its base, the logits differ by at" in error
    assert not (tmp_path / "adapter-merged").exists()


def test_adapters_that_change_no_weights(tmp_path: Path, refused: Callable[..., str]) -> None:
    base = saved(tmp_path / "base", "llama")
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    assert "an adapter of type PROMPT_TUNING cannot be merged" in refused(tmp_path / "adapter")


def test_what_peft_cannot_merge(make: Make, tmp_path: Path, refused: Callable[..., str]) -> None:
    error = refused(make(lora_bias=True))
    assert "adapter cannot be merged: " in error and "the base layer has no bias" in error
    assert not (tmp_path / "adapter-merged").exists()


def test_refusals(make: Make, tmp_path: Path, refused: Callable[..., str]) -> None:
    adapter, base = make(), tmp_path / "base"
    other = saved(tmp_path / "other", "qwen3")
    assert "--base NAME --scale L" in refused(base)
    assert "an adapter names its base" in refused(adapter, "--base", base, "--scale", 0.5)
    assert "--base needs --scale L" in refused(base, "--base", other)
    assert "was not trained from --base" in refused(other, "--base", base, "--scale", 0.5)
    assert "give the model that" in refused(base, "--base", adapter, "--scale", 0.5)
    assert "one is given twice" in refused(adapter, "--scale", 0.5, 0.50)
    assert "'x' is not a number (DIR comes before --scale)" in refused("--scale", 0.5, "x")
    assert "nan is not a finite number" in refused(adapter, "--scale", "nan")
    assert "--dtype int8 is not a precision" in refused(adapter, "--dtype", "int8")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "adapter", "other"}


def test_training_in_4_bits_is_told(
    make: Make,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    adapter = make()
    (adapter / "results.json").write_text('{"config": {"load_in_4bit": true}}')
    assert merge(adapter) == 0
    assert "--load_in_4bit merges it into those used in training" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: None)
    assert "load_in_4bit needs bitsandbytes" in refused(adapter, "--load_in_4bit", "--scale", 1)


@pytest.mark.real
@pytest.mark.parametrize("quantized_folder", [False, True])
def test_into_the_4_bit_values(
    quantized_folder: bool, make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from unisd.models.load import load_model_and_tokenizer

    adapter = make(target_modules="all-linear")
    base, tokenizer, _ = load_model_and_tokenizer(str(tmp_path / "base"), dtype="float32", load_in_4bit=True)
    if quantized_folder:
        base.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
    adapted = PeftModel.from_pretrained(base, str(adapter)).eval()
    with torch.no_grad():
        expected = adapted(IDS).logits
    assert merge(adapter, *([] if quantized_folder else ["--load_in_4bit"])) == 0
    assert "read back and compared with the adapter" in capsys.readouterr().out
    torch.testing.assert_close(logits(tmp_path / "adapter-merged"), expected, rtol=1e-3, atol=1e-3)
    assert "quantization_config" not in (tmp_path / "adapter-merged" / "config.json").read_text()
