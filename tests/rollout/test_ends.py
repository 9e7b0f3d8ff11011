"""How answers end, and which tokens there are: stop tokens, padding, rows that stand for none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.helpers import templates
from unisd import testing as tiny
from unisd.backbone import Backbone
from unisd.cli.main import main
from unisd.errors import UserError
from unisd.evaluation.accuracy import accuracy
from unisd.losses.chunked import chunked_loss
from unisd.losses.plain import plain_loss
from unisd.losses.terms import LossInputs
from unisd.methods.divergence import DivergenceSpec
from unisd.models.load import load_model_and_tokenizer
from unisd.models.tokens import eos_ids, mark_defined, pad_id
from unisd.rollout.engine import Sampling
from unisd.rollout.transformers_engine import generate
from unisd.rollout.vllm.common import sampling_fields

SAMPLING = Sampling(12, temperature=1.0)
KEYS = [(0, 0, row, 0) for row in range(6)]
PROMPTS = [[10 + row, 11, 12] for row in range(6)]


def model_of(vocabulary: int, tied: bool = False, **options: Any) -> Any:
    torch.manual_seed(0)
    sizes = tiny.SIZES | {"vocab_size": vocabulary, "tie_word_embeddings": tied}
    model = LlamaForCausalLM(LlamaConfig(**sizes | options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5.0)
    return model


def padded(tied: bool = False, bias: bool = False) -> tuple[Any, Any]:
    """A model whose head has 38 rows more than the tokenizer tokens, and which likes them."""
    model, tokenizer = model_of(300, tied), tiny.tokenizer()
    if bias:
        model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, 300))
    with torch.no_grad():
        model.lm_head.weight[262:] *= 4
    mark_defined(model, tokenizer)
    return model, tokenizer


def small(model: Any) -> Any:
    """The same model without the rows beyond its tokens."""
    other = model_of(262, model.config.tie_word_embeddings)
    state = {k: v[:262] if len(v) == 300 else v for k, v in model.state_dict().items()}
    if "lm_head.bias" in state:
        other.lm_head.bias = torch.nn.Parameter(torch.zeros(262))
    other.load_state_dict(state)
    return other


# ---------------------------------------------------------------- stop tokens


def test_the_token_that_closes_a_turn_ends_answers() -> None:
    tokenizer = templates.tokenizer(templates.CHATML, eos="<|endoftext|>")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    model = model_of(len(tokenizer), eos_token_id=1)
    assert eos_ids(model, tokenizer) == [1, end]
    assert sampling_fields(SAMPLING, None, eos_ids(model, tokenizer))["stop_token_ids"] == [1, end]
    with torch.no_grad():  # one that always says the end of a turn
        model.lm_head.weight.zero_()
        model.model.norm.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(
            torch.nn.functional.one_hot(torch.tensor(end), len(tokenizer)).float()
        )
    found = accuracy(model, tokenizer, [{"prompt": "q"}], lambda row, text: text == "", max_new_tokens=5)
    assert found["completion_ids"] == [[end]] and found["overall"]["value"] == 1


# ---------------------------------------------------------------- rows that stand for no token


@pytest.mark.parametrize("keys", [None, KEYS])
def test_undefined_tokens_are_never_sampled(keys: Any) -> None:
    model, _ = padded()
    with_them = generate(model, PROMPTS, SAMPLING, eos_ids=[2], pad_id=0, keys=keys)
    assert all(max(completion.ids) < 262 for completion in with_them)
    alone = generate(small(model), PROMPTS, SAMPLING, eos_ids=[2], pad_id=0, keys=keys)
    assert [c.ids for c in with_them] == [c.ids for c in alone]
    del model.lm_head.defined_tokens
    unmarked = generate(model, PROMPTS, SAMPLING, eos_ids=[2], pad_id=0, keys=keys)
    assert any(max(completion.ids) >= 262 for completion in unmarked)


def test_a_server_is_told_of_undefined_tokens() -> None:
    forbidden = {262: -100.0, 263: -100.0}
    assert sampling_fields(SAMPLING, None, [2], forbidden)["logit_bias"] == forbidden
    assert "logit_bias" not in sampling_fields(SAMPLING, None, [2], {})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_undefined_tokens_are_no_part_of_the_divergence(tied: bool, bias: bool) -> None:
    model, _ = padded(tied, bias)
    hidden_NH = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    targets_N = torch.arange(9) + 20
    found = []
    for one in (model, small(model)):
        for loss in (chunked_loss, plain_loss):
            backbone = Backbone(one)
            assert backbone.head().weight.untyped_storage().data_ptr() == (
                one.lm_head.weight.untyped_storage().data_ptr()  # a view: nothing is copied
            )
            one.zero_grad()
            student_NH = hidden_NH.clone().requires_grad_()
            head = backbone.head()
            inputs = LossInputs(
                student_NH, head, hidden_NH.flip(0), head, targets_N, DivergenceSpec(), torch.ones(9)
            )
            output = loss(inputs)
            output.loss.backward()
            weight = one.lm_head.weight.grad
            assert float(weight[262:].abs().sum()) == 0
            found.append((output.loss.detach(), student_NH.grad, weight[:262]))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_head_as_large_as_the_tokenizer_is_used_whole() -> None:
    model = tiny.model()
    mark_defined(model, tiny.tokenizer())
    assert Backbone(model).head().weight is model.lm_head.weight


def test_a_loaded_model_trains_without_undefined_tokens(tmp_path: Path) -> None:
    model, tokenizer = padded()
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    loaded, tokenizer, _ = load_model_and_tokenizer(str(tmp_path / "model"))
    assert loaded.lm_head.defined_tokens == 262
    built = tiny.trainer(tmp_path / "run", model=loaded, processing_class=tokenizer)
    assert built.scorer.passes.backbone.head().weight.shape == (262, 32)
    loss, gradients = tiny.gradients(built)
    assert loss > 0 and float(gradients["lm_head.weight"][262:].abs().sum()) == 0


# ---------------------------------------------------------------- tokens without a row


def test_padding_is_a_token_that_the_model_has() -> None:
    tokenizer = templates.tokenizer(None, plain=("<pad2>",))
    tokenizer.pad_token = "<pad2>"
    model = model_of(len(tokenizer) - 1, eos_token_id=1)
    assert tokenizer.pad_token_id == len(tokenizer) - 1
    assert pad_id(model, tokenizer) == 1
    assert pad_id(tiny.model(), tiny.tokenizer()) == 0


def test_neither_pad_nor_end_is_one_line() -> None:
    tokenizer = templates.tokenizer(None)
    tokenizer.pad_token = tokenizer.eos_token = None
    model = model_of(len(tokenizer), eos_token_id=None)
    model.generation_config.eos_token_id = None
    with pytest.raises(UserError, match=r"neither a pad nor an end token .*: set the tokenizer's pad_token"):
        pad_id(model, tokenizer)


def test_text_that_the_model_has_no_embedding_of_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = templates.tokenizer(templates.CHATML, plain=("<tool>",))
    model = model_of(len(tokenizer) - 1, eos_token_id=1)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"q{i}" + " <tool>" * (i == 2), "privileged_context": "a"} for i in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["train", "--model_name_or_path", str(tmp_path / "model"), "--dry_run", "--recipe", "sdft"]
    command += ["--train_file", str(tmp_path / "rows.jsonl"), "--eval_file", str(tmp_path / "rows.jsonl")]
    command += ["--max_completion_length", "16", "--output_dir", str(tmp_path / "run"), "--use_cpu"]
    capsys.readouterr()
    assert main(command) == 2
    told = capsys.readouterr().err
    assert f"rows.jsonl, line 3: it holds the token '<tool>' ({len(tokenizer) - 1})" in told
    assert "take its text out" in told
    assert len([line for line in told.strip().splitlines() if not line.startswith("note: ")]) == 1
    with pytest.raises(UserError, match=r"but the model's embedding has .* rows: take its text out of the"):
        generate(model, [[5, len(tokenizer) - 1]], SAMPLING, eos_ids=[1], pad_id=0)


def test_a_prompt_without_a_token_is_named() -> None:
    with pytest.raises(UserError, match="prompt 1 of those to answer has no token"):
        generate(model_of(300), [[5], []], SAMPLING, eos_ids=[1], pad_id=0)
