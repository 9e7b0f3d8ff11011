"""What Python users call does what the commands do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model

import unisd
from unisd import UniSDConfig, UserError
from unisd import testing as tiny
from unisd.cli.main import main

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 6?"}]
SHORT: dict[str, Any] = {"max_completion_length": 6, "eval_max_new_tokens": 6}


def of_even_length(row: dict[str, Any], text: str) -> bool:
    return len(text) % 2 == 0


def test_answers_are_those_of_eval(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the trainer, by a function and by the command; greedy, and drawn with the same seed."""
    rows = [{"prompt": p, "completion": "8"} for p in ("What is 1 + 2?", "Add 4 and 4.", CHAT)]
    file, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = [row["prompt"] for row in rows]
    trainer = tiny.trainer(tmp_path, **SHORT)
    for temperature in (0.0, 1.0):
        command = ["eval", "--model", str(model_dir), "--eval_file", str(file), "--seed", "3"]
        flags = ["--eval_max_new_tokens", "6", "--rows", str(out), "--temperature", str(temperature)]
        assert main([*command, *flags, "--retention", "none"]) == 0
        by_eval = [json.loads(line)["completion"] for line in out.read_text().splitlines()]
        assert trainer.generate(prompts, temperature=temperature) == by_eval
        drawn = {"max_new_tokens": 6, "temperature": temperature, "seed": 3}
        assert unisd.generate(str(model_dir), prompts, **drawn) == by_eval
    found = trainer.predict(rows)
    assert found.predictions == trainer.generate(prompts) and found.grades is None
    assert "test_accuracy" not in found.metrics and found.metrics["test_loss"] > 0


def test_predict_grades_and_needs_no_references(tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, grader=of_even_length, **SHORT)
    found = trainer.predict([{"prompt": f"What is {i}?"} for i in range(3)], metric_key_prefix="new")
    assert found.grades is not None and len(found.grades) == 3
    right = sum(grade.correct for grade in found.grades)
    assert found.metrics["new_accuracy"] == right / 3 and "new_loss" not in found.metrics
    assert right == sum(len(text) % 2 == 0 for text in found.predictions)
    with pytest.raises(UserError, match="give a list of prompts"):
        trainer.generate("What?")
    with pytest.raises(UserError, match="give a list of prompts"):
        trainer.generate(CHAT)
    with pytest.raises(UserError, match=r"prompt 1 .* the model's context is 512"):
        trainer.generate(["What?", "What? " * 100])
    with pytest.raises(UserError, match="row 0 of the test data"):
        trainer.predict([{"prompt": "What? " * 100}])


def test_before_and_after(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1)} for i in range(4)]
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    args = UniSDConfig(output_dir=str(tmp_path), use_cpu=True, **SHORT)
    given: dict[str, Any] = {"retention": str(kept), "args": args, "tokenizer": tiny.tokenizer()}
    model, other = tiny.model(), tiny.model(seed=1)
    found = unisd.compare(model, other, rows, of_even_length, **given)
    items = found["acquisition"]["items"]
    assert items["kept"] + items["lost"] + items["gained"] + items["neither"] == 4
    assert found["acquisition"]["accuracy"]["after"] == found["after"]["task_accuracy"]["value"]
    assert [one["name"] for one in found["retention"]] == ["kept"] and found["drift"]["kl"]["change"] > 0
    assert [len(found["answers"][part]["ids"]) for part in ("task", "retention")] == [4, 2]
    table = str(found).splitlines()
    assert table[0].split() == ["before", "after", "change"] and table[1].startswith("task accuracy  ")
    assert "| task accuracy |" in found._repr_markdown_()
    json.dumps(found)
    same = unisd.compare(other, tiny.model(seed=1), rows, of_even_length, **given)
    assert same["before"]["task_accuracy"] == found["after"]["task_accuracy"]
    assert same["drift"]["nats"]["value"] == 0 and same["forgotten"] is None


def test_before_and_after_of_an_adapter(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1)} for i in range(2)]
    args = UniSDConfig(output_dir=str(tmp_path), use_cpu=True, **SHORT)
    base = tiny.model()
    config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(base, config)
    given: dict[str, Any] = {"retention": "none", "args": args, "tokenizer": tiny.tokenizer()}
    found = [unisd.compare(before, adapted, rows, **given) for before in (None, base, tiny.model())]
    assert found[0] == found[1] and found[0]["before"]["gold_ppl"] != found[0]["after"]["gold_ppl"]
    assert found[0]["before"]["gold_ppl"] == pytest.approx(found[2]["before"]["gold_ppl"])
    for options, told in ({"init_lora_weights": "pissa"}, "=pissa changes"), ({"bias": "all"}, "bias=all"):
        changing = get_peft_model(tiny.model(), LoraConfig(r=2, target_modules="all-linear", **options))
        with pytest.raises(UserError, match=f"{told}.*give the base itself"):
            unisd.compare(None, changing, rows, **given)
    model = tiny.model()
    with pytest.raises(UserError, match="before and after are one model"):
        unisd.compare(model, model, rows, **given)
