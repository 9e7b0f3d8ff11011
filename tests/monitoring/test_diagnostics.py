"""Diagnostics: counts against hand-made answers, the leak numbers against numpy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.steps import assert_same
from unisd import testing as tiny
from unisd.errors import UserError
from unisd.monitoring.alarms import pull_cosine
from unisd.monitoring.diagnostics import (
    Answers,
    Counting,
    answer_tokens,
    answers_to_keep,
    distributions,
    first_place,
    leak_numbers,
    load_words,
    probe_contexts,
    pull_products,
    repeated_share,
)
from unisd.rollout.engine import Completion
from unisd.testing import gradients, trainer


def counting() -> Counting:
    return Counting(tiny.tokenizer(), "en")


def answer(text: str) -> list[int]:
    return tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]


def test_counts_by_hand() -> None:
    row = {"prompt": "p", "privileged_context": "Steps. Answer: 42"}
    texts = ["Wait, maybe checks. Maybe 42. Answer: 42", "It is 420"]
    found = counting().count([row, row], [answer(texts[0]), answer(texts[1])])
    assert found.words == {"wait": 1, "maybe": 2, "check": 1}
    assert (found.answers, found.gradable, found.stated, found.with_form) == (2, 2, 1, 2)
    values = found.metrics(["wait", "maybe"])
    tokens = sum(len(text.encode()) for text in texts)
    assert values["words/maybe"] == pytest.approx(2000 / tokens) and values["words/all"] == pytest.approx(
        4000 / tokens
    )
    assert values["leak/gold_first_place"] == pytest.approx(4 / 7) and values["leak/gold_stated_share"] == 0.5
    style = sum(not character.isalnum() for text in texts for character in text)
    assert values["collapse/style_token_share"] == pytest.approx(style / tokens)  # a token is a byte here


def test_counts_add_up() -> None:
    row = {"prompt": "p", "privileged_context": "Answer: 1"}
    answers = [answer("wait 1"), answer("hmm hmm hmm")]
    whole = counting().count([row, row], answers)
    assert sum((counting().count([row], [one]) for one in answers), Answers()) == whole
    assert "leak/gold_first_place" not in Answers().metrics(["wait"])


def test_repetition_and_place() -> None:
    assert repeated_share([1, 2, 3, 4, 5]) == 0 and repeated_share([1, 2, 3]) == 0
    assert repeated_share([1] * 8) == pytest.approx(1 - 1 / 5)
    assert (
        first_place("so it is 4", "4") == 0.75
        and first_place("4", "4") == 0
        and first_place("it is 42", "4") is None
    )
    assert (
        first_place("A magnet attracts iron. Answer: A", "A") == 5 / 6
        and first_place("A magnet. Answer: B", "A") is None
    )
    assert first_place("so \\boxed{B}", "B") == 0.5 and first_place("the answer is (C).", "C") == 0.75


def test_final_answer_tokens() -> None:
    ids = answer("So 42. Answer: 42")
    # the last place, not the first
    assert answer_tokens(tiny.tokenizer(), ids) == [False] * 15 + [True, True]
    assert (
        not any(answer_tokens(tiny.tokenizer(), answer("word " * 9)))
        and answer_tokens(tiny.tokenizer(), []) == []
    )


def test_words_are_data(tmp_path: Any) -> None:
    assert load_words("hedges", "en")["checking"] == "check" and "vielleicht" in load_words("hedges", "de")
    own = tmp_path / "words.txt"
    own.write_text("# mine\npeut-être\nhein, heu\nnot sure\n", encoding="utf-8")
    assert load_words("hedges", str(own)) == {
        "peut-être": "peut-être",
        "hein": "hein",
        "heu": "hein",
        "not sure": "not sure",
    }
    count = Counting(tiny.tokenizer(), str(own)).count
    found = count([{"prompt": "p"}], [answer("Not\nsure, peut-être. Sure not! heu")])
    assert found.words == {"not sure": 1, "peut-être": 1, "hein": 1}
    (tmp_path / "hedges.txt").write_text("maybe\n")
    (tmp_path / "style.txt").write_text("x\n")
    assert Counting(tiny.tokenizer(), str(tmp_path)).style(answer("x s")) == [True, True, False]
    with pytest.raises(UserError, match=r"neither a language \(de, en\)"):
        load_words("hedges", "xx")


def test_style_tokens_are_found_as_they_come() -> None:
    counts = counting()
    counts._style_words = {"a": "a"}
    assert counts.style(answer("a.b")) == [True, True, False] and len(counts._style) == 3
    assert counts.style(answer(".a")) == [True, True] and counts.style([]) == []


def test_a_large_vocabulary_is_not_decoded_at_the_start() -> None:
    class Decoded(Exception):
        pass

    class Never:
        def decode(self, ids: Any) -> str:
            raise Decoded

    with pytest.raises(Decoded):
        Counting(Never(), "en").style([5])


def test_answers_to_keep_are_written_once(tmp_path: Path) -> None:
    rows, file = [{"prompt": "p", "completion": "theirs"}], tmp_path / "probe.json"
    mine, nothing = [Completion(answer("mine"), False)], [Completion([], False)]
    first = answers_to_keep(rows, lambda rows: mine, tiny.tokenizer(), file, resumed=False)
    assert first == [{"prompt": "p", "completion": "mine"}]
    assert answers_to_keep(rows, lambda rows: nothing, tiny.tokenizer(), file, resumed=True) == first
    assert (
        answers_to_keep(rows, lambda rows: nothing, tiny.tokenizer(), file, resumed=False, is_writer=False)
        != first
    )
    assert json.loads(file.read_text(encoding="utf-8")) == first


def test_leak_numbers() -> None:
    g = torch.Generator().manual_seed(0)
    p, q, wrong, reference = (
        torch.randn(3, 6, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(4)
    )
    found = leak_numbers(p, q, wrong, reference)
    P, Q, W, R = (x.numpy() for x in (p, q, wrong, reference))
    M = np.log((np.exp(Q) + np.exp(W)) / 2)
    assert found["leak/wrong_jsd"] == pytest.approx(
        np.mean(0.5 * (np.exp(Q) * (Q - M) + np.exp(W) * (W - M)).sum(-1))
    )
    a, b = ((x - P) - (x - P).mean(-1, keepdims=True) for x in (Q, R))
    norms = [np.linalg.norm(x, axis=-1) for x in (a, b)]
    assert found["leak/shift_cosine"] == pytest.approx(np.mean((a * b).sum(-1) / norms[0] / norms[1]))
    assert found["leak/shift_ratio"] == pytest.approx(np.mean(norms[1] / norms[0]))
    same = leak_numbers(p, q, q, q)
    assert same["leak/wrong_jsd"] == pytest.approx(0, abs=1e-12) and same[
        "leak/shift_cosine"
    ] == pytest.approx(1)
    assert leak_numbers(p, q) == {}
    kl = (np.exp(P) * (P - R)).sum(-1).mean()
    assert leak_numbers(p, q, base_TV=reference) == {"retained/kl_to_base": pytest.approx(kl)}


def test_the_pull_that_a_wrong_reference_shares() -> None:
    g = torch.Generator().manual_seed(1)
    p, q, wrong = (torch.randn(4, 5, generator=g, dtype=torch.float64).log_softmax(-1) for _ in range(3))
    P, Q, W = (np.exp(x.numpy()) for x in (p, q, wrong))
    found = pull_products(p, q, wrong).numpy()
    assert found == pytest.approx(
        np.array([((Q - P) * (W - P)).sum(), ((Q - P) ** 2).sum(), ((W - P) ** 2).sum()])
    )
    assert pull_cosine(*pull_products(p, q, q).tolist()) == pytest.approx(1)


@pytest.mark.parametrize("level", ["full", "answer", "plain"])
def test_the_probe_tells_the_wrong_teacher_as_much_as_the_right_one(tmp_path: Any, level: str) -> None:
    built = trainer(tmp_path, teacher_context=level, diagnostics_probe_steps=1)
    asked: list[tuple[str, str]] = []
    prompts = built.prompts
    at_level = type(prompts).at_level

    def recorded(self: Any, row: Any, level: str, question: bool = True) -> Any:
        ids = at_level(self, row, level, question)
        asked.append((str(row.get("privileged_context")), built.processing_class.decode(ids or [])))
        return ids

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(prompts), "at_level", recorded)
        gradients(built)
    wrong = {row["negative_context"] for row in built.rows}
    shown = [text for reference, text in asked if reference in wrong]
    assert bool(shown) == (level != "plain")
    told_all = [text for text in shown if "Answer: It is" not in text]
    assert len(told_all) == {"full": len(shown), "answer": len(shown) // 2, "plain": 0}[level]
    assert ("leak/wrong_cosine" in built.metrics.values) == (level != "plain")
    assert ("leak/full_wrong_cosine" in built.metrics.values) == (level == "answer")


def test_the_probe_has_each_set_of_weights_in_mixed_precision(tmp_path: Any) -> None:
    """Autocast keeps its casts of the parameters: those of the teacher must not stand in for the
    student's.
    """
    built = trainer(tmp_path, bf16=True)
    gradients(built, perturb=0.5)  # moves the student
    numbers = [(0, 0), (1, 0)]
    requests = built._requests(numbers, built._rollout(numbers))
    contexts = [probe_contexts(built.prompts, built.rows[request.number], request) for request in requests]

    def student() -> list[torch.Tensor]:
        return [views["student"] for views in distributions(built.scorer, requests, contexts, "cpu", 8)]

    found = student()
    built.scorer.passes.autocast = lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)
    for ours, without_cache in zip(found, student(), strict=True):
        assert torch.equal(ours, without_cache)


def test_diagnostics_watch_and_do_not_touch(tmp_path: Any) -> None:
    on, off = trainer(tmp_path), trainer(tmp_path, diagnostics=False)
    untouched = gradients(off)
    assert_same(gradients(on), untouched)
    probing = trainer(tmp_path, diagnostics_probe_steps=1)
    assert_same(gradients(probing), untouched)
    assert "words/all" in on.metrics.values and "words/all" not in off.metrics.values
    assert -1 <= probing.metrics.values["leak/wrong_cosine"] <= 1
    assert (
        0 < probing.metrics.values["leak/wrong_jsd"] < 0.7
        and -1 <= probing.metrics.values["leak/shift_cosine"] <= 1
    )
    assert probing.metrics.values["retained/kl_to_base"] > 0  # the student was moved off
    assert "leak/wrong_jsd" not in on.metrics.values


@pytest.mark.long
def test_diagnostics_are_in_the_metrics_file(tmp_path: Any) -> None:
    built = trainer(tmp_path, max_steps=2, num_train_epochs=9, diagnostics_probe_steps=2)
    built.observer.probes.rows = [{"prompt": "p", "completion": "c", "privileged_context": "c"}]
    built.train()
    lines = [
        json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert all(
        line["step_time/diagnostics"] > 0 and 0 <= line["words/style_loss_share"] <= 1 for line in lines
    )
    assert "retained/nll" in lines[0] and "retained/nll" not in lines[1]
    kept = json.loads((tmp_path / "probe.json").read_text(encoding="utf-8"))
    assert kept[0]["prompt"] == "p" and isinstance(kept[0]["completion"], str)
    assert {alarm.name for alarm in built.health.alarms} <= {"never ends"}  # of a random model
