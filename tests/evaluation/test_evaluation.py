"""Evaluation against plain, slow float64 arithmetic on tiny models, and decoding against one token
at a time.
"""

import copy
import math
import random
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

from unisd import testing as tiny
from unisd.backbone import Backbone
from unisd.data.prompts import encode_completion, encode_prompt
from unisd.errors import UserError
from unisd.evaluation import likelihood
from unisd.evaluation.accuracy import accuracy, generate_greedy
from unisd.evaluation.grading import wilson
from unisd.evaluation.likelihood import corpus_ppl, gold_ppl, reference_nll, sequence_logprobs
from unisd.evaluation.retention import jsd, paired_delta, retention
from unisd.kernels.attention import PACKED_SDPA
from unisd.rollout import decoding
from unisd.rollout.decoding import decode
from unisd.tasks.base import Grade


def some_ids(count: int, most: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(6, 262) for _ in range(rng.randint(1, most))] for _ in range(count)]


def slow_logp(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Log-probabilities [T,V] at the completion's positions: one row, one forward pass, float64."""
    with torch.no_grad():
        logits = (
            copy.deepcopy(model).double().eval()(torch.tensor([[*prompt, *completion]])).logits[0].double()
        )
    return logits[len(prompt) - 1 : -1].log_softmax(-1)


def slow_greedy(model, prompt: list[int], limit: int, ends: set[int]) -> list[int]:
    ids: list[int] = []
    while len(ids) < limit and not ends & set(ids):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([[*prompt, *ids]])).logits[0, -1].argmax()))
    return ids


def near_copy(model, scale: float = 0.02):
    """An adapted model: the same weights, a little moved."""
    moved = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.add_(torch.randn_like(parameter) * scale * parameter.std())
    return moved


# ---------------------------------------------------------------- intervals


def test_wilson():
    interval = wilson(8, 10)
    assert interval["value"] == 0.8 and interval["n"] == 10
    assert interval["low"] == pytest.approx(0.4901625, abs=1e-6) and interval["high"] == pytest.approx(
        0.9433178, abs=1e-6
    )
    assert wilson(0, 5)["low"] == 0 and wilson(5, 5)["high"] == pytest.approx(1.0)
    assert math.isnan(wilson(0, 0)["value"])


def test_paired_delta():
    counts = torch.tensor([10, 20, 30])
    assert paired_delta(torch.zeros(3, dtype=torch.float64), counts) == {
        "value": 0.0,
        "low": 0.0,
        "high": 0.0,
    }
    delta = paired_delta(torch.tensor([1.0, 2.5, 2.5], dtype=torch.float64), counts)
    assert delta["value"] == pytest.approx(0.1) and delta["low"] < 0.1 < delta["high"]
    assert math.isinf(paired_delta(torch.ones(1), torch.tensor([4]))["high"])
    assert math.isnan(paired_delta(torch.zeros(1), torch.tensor([0]))["value"])


# ---------------------------------------------------------------- decoding


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(f, marks=[] if f in ("gemma3", "qwen3") else pytest.mark.long)
        for f in sorted(tiny.FAMILIES)
    ],
)
def test_batched_decoding_is_decoding_one_by_one(family):
    model = tiny.model(family)
    prompts = some_ids(7, 30)
    ends = {2, *range(100, 106)}  # a few tokens end a row, so that rows leave the batch at different times
    seen = []
    got = decode(model, prompts, 40, eos_ids=sorted(ends), pad_id=0, batch_size=5, on_rows=seen.append)
    assert got == [slow_greedy(model, prompt, 40, ends) for prompt in prompts]
    assert sum(seen) == 7


OTHER_STATES = {
    # Takes no key/value cache. With a tied head a random one would repeat its last token for ever.
    "mamba": lambda: MambaForCausalLM(MambaConfig(**tiny.SIZES, state_size=4, tie_word_embeddings=False)),
    "falcon_h1": lambda: FalconH1ForCausalLM(  # attention and states in one layer
        FalconH1Config(
            **tiny.SIZES,
            mamba_d_ssm=32,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=1,
            mamba_chunk_size=8,
        )
    ),
    # no mask
    "rwkv": lambda: RwkvForCausalLM(RwkvConfig(**tiny.SIZES, attention_hidden_size=32, context_length=128)),
}


@pytest.mark.parametrize("family", sorted(OTHER_STATES))
def test_decoding_with_states_that_are_not_keys_and_values(family, monkeypatch):
    monkeypatch.setitem(tiny.FAMILIES, family, OTHER_STATES[family])
    model = tiny.model(family)
    prompts = some_ids(5, 12, seed=1)
    ends = set(range(2, 262, 9))  # many, so that rows end before and after the first look at who is done
    expected = [slow_greedy(model, prompt, 36, ends) for prompt in prompts]
    assert min(map(len, expected)) < max(map(len, expected))
    assert decode(model, prompts, 36, eos_ids=sorted(ends), pad_id=0) == expected


def test_rows_leave_the_batch(monkeypatch):
    """Rows that are done cost nothing any more."""
    model, sizes = tiny.model("qwen3"), []
    prompts = some_ids(12, 20, seed=3)
    ends = list(range(60, 140))
    plain = model.generate

    def spy(*args, **kwargs):
        sizes.append(len(kwargs["input_ids"]))
        return plain(*args, **kwargs)

    monkeypatch.setattr(model, "generate", spy)
    decode(model, prompts, 64, eos_ids=ends, pad_id=0, batch_size=12)
    assert sizes[0] == 12 and sizes[-1] < 12 and sizes == sorted(sizes, reverse=True)


def test_a_repeated_prompt_is_read_once():
    model = tiny.model("llama")
    different = some_ids(3, 9, seed=2)
    prompts = [different[i] for i in (0, 1, 0, 2, 1, 0)]
    read = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    got = decode(model, prompts, 6, eos_ids=[], pad_id=0)
    handle.remove()
    assert got == [slow_greedy(model, prompt, 6, set()) for prompt in prompts]
    assert read[0] == (3, max(map(len, different))) and all(shape == (6, 1) for shape in read[1:])


def test_prompts_of_unlike_length_are_read_apart(monkeypatch):
    """No short prompt is padded to the longest, and none of what is written changes."""
    monkeypatch.setattr(decoding, "READ_AT_ONCE_CPU", 64)
    model = tiny.model("llama")
    prompts = [*some_ids(6, 60, seed=4), [7], [7]]
    read = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    got = decode(model, prompts, 40, eos_ids=[2, 50], pad_id=0)
    handle.remove()
    assert got == [slow_greedy(model, prompt, 40, {2, 50}) for prompt in prompts]
    passes = [shape for shape in read if shape[1] > 1]
    assert len(passes) > 1 and sum(rows * tokens for rows, tokens in passes) < 7 * max(map(len, prompts))


def test_decoding_leaves_the_model_as_it_was():
    model = tiny.model("llama").train()
    model.model.layers[0].eval()
    model.generation_config.repetition_penalty = 5.0
    model.generation_config.top_k = 3
    own = model.generation_config
    prompts = some_ids(3, 9)
    got = decode(model, prompts, 12, eos_ids=[2], pad_id=0)
    assert model.generation_config is own and model.config._attn_implementation != PACKED_SDPA
    assert model.training and not model.model.layers[0].training and model.model.layers[1].training
    assert got == [slow_greedy(model.eval(), prompt, 12, {2}) for prompt in prompts]  # no penalty was applied


def test_decoding_through_an_adapter():
    model = get_peft_model(
        tiny.model("llama"),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    ).eval()
    own = model.get_base_model().generation_config
    prompts = some_ids(3, 9)
    assert decode(model, prompts, 8, eos_ids=[2], pad_id=0) == [
        slow_greedy(model, prompt, 8, {2}) for prompt in prompts
    ]
    assert model.get_base_model().generation_config is own


def test_nothing_to_decode():
    model = tiny.model("llama")
    assert decode(model, [], 8, eos_ids=[2], pad_id=0) == []
    assert decode(model, [[5]], 0, eos_ids=[2], pad_id=0) == [[]]


def test_every_end_token_and_every_kind_of_prompt():
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    ids = encode_prompt(tokenizer, "Hi")
    first = slow_greedy(model, ids, 5, set())
    model.generation_config.eos_token_id = [2, first[2]]
    message = [{"role": "user", "content": "Hi"}]
    for prompt in ("Hi", message, ids):
        out = generate_greedy(model, tokenizer, [prompt], 5, progress=False)
        assert out == [first[: first.index(first[2]) + 1]]


def test_the_progress_bar_is_shown_only_when_wanted(capsys):
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    generate_greedy(model, tokenizer, ["a", "b"], 2)
    assert capsys.readouterr().err == ""
    generate_greedy(model, tokenizer, ["a", "b"], 2, progress=True, description="answering")
    assert "answering" in capsys.readouterr().err


# ---------------------------------------------------------------- accuracy


def test_accuracy_overall_and_by_skill():
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    rows = [{"prompt": f"Say {i}", "skill": "odd" if i % 2 else "even", "i": i} for i in range(6)]
    result = accuracy(
        model,
        tokenizer,
        rows,
        lambda row, text: Grade(row["i"] in (1, 3, 4), "x" if row["i"] else None),
        max_new_tokens=4,
    )
    assert result["overall"]["value"] == 0.5 and result["overall"]["n"] == 6
    assert result["by_skill"]["odd"]["value"] == pytest.approx(2 / 3) and result["by_skill"]["even"][
        "value"
    ] == pytest.approx(1 / 3)
    assert len(result["completions"]) == 6 and [*map(len, result["completion_ids"])] == [4] * 6
    plain = accuracy(model, tokenizer, rows[:2], lambda row, text: True, max_new_tokens=2)
    assert plain["overall"]["value"] == 1 and plain["outcomes"] is None
    assert accuracy(model, tokenizer, [], lambda row, text: True)["overall"]["n"] == 0
    nothing = accuracy(model, tokenizer, rows[:2], lambda row, text: Grade(False, None, "no answer found"))
    assert nothing["outcomes"]["unanswered"] == 2


# ---------------------------------------------------------------- likelihood


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("chunk", [1, 3, 100])
def test_log_probabilities_equal_slow_float64(family, chunk, monkeypatch):
    model = tiny.model(family).train()  # dropout-free, but the mode must be put back
    monkeypatch.setattr(likelihood, "CHUNK_ENTRIES", chunk * model.config.vocab_size)
    prompts, completions = some_ids(6, 12), [*some_ids(5, 17, seed=1), []]
    logp, count = sequence_logprobs(model, prompts, completions, token_budget=40)
    want = [
        slow_logp(model, p, c)[range(len(c)), c].sum().item() if c else 0.0
        for p, c in zip(prompts, completions, strict=True)
    ]
    assert count.tolist() == [len(c) for c in completions] and model.training
    for got, expected, c in zip(logp.tolist(), want, completions, strict=True):
        assert got == pytest.approx(expected, abs=2e-6 * max(len(c), 1), rel=1e-6)
    assert corpus_ppl(logp, count) == pytest.approx(
        math.exp(-sum(want) / sum(map(len, completions))), rel=2e-6
    )


def test_in_float64_the_difference_is_rounding():
    model = tiny.model("llama").double()
    prompts, completions = some_ids(4, 12), some_ids(4, 17, seed=1)
    logp, _ = sequence_logprobs(model, prompts, completions)
    for got, p, c in zip(logp.tolist(), prompts, completions, strict=True):
        assert got == pytest.approx(slow_logp(model, p, c)[range(len(c)), c].sum().item(), rel=1e-12)


def test_a_model_with_an_unknown_head_is_scored_by_its_logits(monkeypatch):
    model = tiny.model("llama")
    prompts, completions = some_ids(4, 12), some_ids(4, 17, seed=1)
    want = sequence_logprobs(model, prompts, completions)[0]

    def refuse(*args, **kwargs):
        raise UserError("unknown")

    monkeypatch.setattr("unisd.backbone.Backbone.check", refuse)
    assert torch.allclose(sequence_logprobs(model, prompts, completions)[0], want, rtol=1e-6)


def test_mistakes_in_pairs():
    model = tiny.model("llama")
    with pytest.raises(UserError, match="one completion per prompt"):
        sequence_logprobs(model, [[5]], [])
    with pytest.raises(UserError, match="row 0 has an empty prompt"):
        sequence_logprobs(model, [[]], [[5]])


def test_perplexity_of_references():
    model, tokenizer = tiny.model("llama"), tiny.tokenizer()
    rows = [{"prompt": "a", "completion": "bc"}, {"prompt": "d", "privileged_context": "e"}, {"prompt": "f"}]
    pairs = [
        (encode_prompt(tokenizer, p), encode_completion(tokenizer, c)) for p, c in (("a", "bc"), ("d", "e"))
    ]
    total = -sum(slow_logp(model, p, c)[range(len(c)), c].sum().item() for p, c in pairs)
    nll, tokens = reference_nll(model, tokenizer, rows)
    assert tokens == sum(len(c) for _, c in pairs) and nll == pytest.approx(total, rel=1e-6)
    assert gold_ppl(model, tokenizer, rows) == pytest.approx(math.exp(total / tokens), rel=1e-6)
    other, _ = reference_nll(model, tokenizer, rows, prompt_ids=[[9], [9], [9]])
    assert other != nll
    assert gold_ppl(model, tokenizer, rows[2:]) is None


# ---------------------------------------------------------------- retention


def test_jsd_of_known_distributions():
    p, q = torch.tensor([[1.0, 0.0], [0.5, 0.5]]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])
    assert jsd(p.log(), q.log()).tolist() == pytest.approx([math.log(2), 0.0])
    logp = torch.randn(50, 300).log_softmax(-1)
    assert jsd(logp, logp).eq(0).all()


@pytest.mark.parametrize("chunk", [2, 1000])
@pytest.mark.long
def test_retention_equals_slow_float64(chunk, monkeypatch):
    base = tiny.model("llama")
    model, tokenizer = near_copy(base), tiny.tokenizer()
    monkeypatch.setattr(likelihood, "CHUNK_ENTRIES", chunk * base.config.vocab_size)
    rows = tiny.rows(5)
    result = retention(model, base, tokenizer, rows, max_new_tokens=20, token_budget=100)
    prompts = [encode_prompt(tokenizer, row["prompt"]) for row in rows]
    for way, writer, other in (("forward", model, base), ("reverse", base, model)):
        answers = [slow_greedy(writer, prompt, 20, {2}) for prompt in prompts]
        ours = [slow_logp(writer, p, a) for p, a in zip(prompts, answers, strict=True)]
        theirs = [slow_logp(other, p, a) for p, a in zip(prompts, answers, strict=True)]
        tokens = sum(map(len, answers))
        total = {
            name: sum(lp[range(len(a)), a].sum().item() for lp, a in zip(parts, answers, strict=True))
            for name, parts in (("own", ours), ("other", theirs))
        }
        divergence = 0.0
        for p, q in zip(torch.cat(ours).exp(), torch.cat(theirs).exp(), strict=True):
            m = (p + q) / 2
            divergence += 0.5 * float((p * (p / m).log()).sum() + (q * (q / m).log()).sum())
        got = result[way]
        assert got["tokens"] == tokens
        assert got["ppl"] == pytest.approx(math.exp(-total["other"] / tokens), rel=1e-6, abs=1e-6)
        assert got["own_ppl"] == pytest.approx(math.exp(-total["own"] / tokens), rel=1e-6, abs=1e-6)
        assert got["jsd"] == pytest.approx(divergence / tokens, abs=1e-6) and got["jsd"] > 1e-5
        assert got["delta"]["value"] == pytest.approx((total["own"] - total["other"]) / tokens, abs=1e-6)
        assert got["delta"]["low"] < got["delta"]["value"] < got["delta"]["high"]
    assert result["n"] == 5


def test_identical_models_have_not_moved():
    model, tokenizer = tiny.model("gemma3"), tiny.tokenizer()
    result = retention(model, copy.deepcopy(model), tokenizer, tiny.rows(4), max_new_tokens=12)
    for way in ("forward", "reverse"):
        assert result[way]["jsd"] == 0 and result[way]["delta"] == {"value": 0.0, "low": 0.0, "high": 0.0}
        assert result[way]["ppl"] == result[way]["own_ppl"]


def test_an_adapter_is_compared_with_itself_taken_off():
    base, tokenizer = tiny.model("llama"), tiny.tokenizer()
    model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    rows = tiny.rows(3)
    off = retention(model, None, tokenizer, rows, max_new_tokens=8)
    apart = retention(model, base, tokenizer, rows, max_new_tokens=8)
    for way in ("forward", "reverse"):
        assert off[way]["jsd"] == pytest.approx(apart[way]["jsd"], abs=1e-7) and off[way]["jsd"] > 0
        assert off[way]["ppl"] == pytest.approx(apart[way]["ppl"], rel=1e-6)
    with pytest.raises(UserError, match="needs the base model"):
        retention(base, None, tokenizer, rows)


def test_logits_of_a_large_vocabulary_never_exist_at_once(monkeypatch):
    """One chunk holds CHUNK_ENTRIES logits, however long the rows are."""
    model = tiny.model("llama")
    monkeypatch.setattr(likelihood, "CHUNK_ENTRIES", 4 * model.config.vocab_size)
    sizes = []
    plain = likelihood._States.logp
    monkeypatch.setattr(likelihood._States, "logp", lambda self, h: sizes.append(len(h)) or plain(self, h))
    sequence_logprobs(model, some_ids(3, 10), [[7] * 50] * 3)
    assert max(sizes) == 4
    other = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=10**9)))
    assert likelihood._States.chunk.fget(SimpleNamespace(model=other)) == 1


# ---------------------------------------------------------------- a real model


@pytest.mark.real
def test_smollm2_uses_a_reference():
    """On a few GSM8K-like problems: shown the solution, the real model does far better than
    without.
    """
    from unisd.data.prompts import PromptBuilder
    from unisd.models.load import load_model_and_tokenizer
    from unisd.tasks.gsm8k import INSTRUCTION, GSM8KTask

    model, tokenizer, _ = load_model_and_tokenizer("smollm2-135m")
    rows = []
    for i in range(8):
        a, b, c = 17 + 6 * i, 4 + i, 3 + i % 4
        total = (a - b) * c
        reference = (
            f"Each bag keeps {a} - {b} = {a - b} nuts.\nIn all {c} * {a - b} = {total} nuts are left.\n####"
            f" {total}"
        )
        question = (
            f"A bag holds {a} nuts. From each of {c} bags {b} nuts are eaten. How many nuts are left in all"
            " bags?"
        )
        rows.append(
            {"prompt": f"{question}\n\n{INSTRUCTION}", "privileged_context": reference, "answer": str(total)}
        )
    builder = PromptBuilder(tokenizer)
    grade = GSM8KTask().grade
    plain = accuracy(model, tokenizer, rows, grade, max_new_tokens=96)
    told = [{**row, "prompt": builder.teacher(row)} for row in rows]
    taught = accuracy(model, tokenizer, told, grade, max_new_tokens=96)
    assert taught["overall"]["value"] >= plain["overall"]["value"] + 0.25


def test_a_model_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own logits are computed for that, which takes seconds of a larger one."""
    model, checks = tiny.model(), []
    check = Backbone.check
    monkeypatch.setattr(Backbone, "check", lambda self, *a, **k: checks.append(1) or check(self, *a, **k))
    values = [sequence_logprobs(model, [[5, 6]], [[7, 8]])[0] for _ in range(3)]
    assert len(checks) == 1 and values[0] == values[1] == values[2]
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    sequence_logprobs(adapted, [[5, 6]], [[7, 8]])
    assert len(checks) == 2  # another wrapper may change logits
