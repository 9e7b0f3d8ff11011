"""A trained checkpoint in EleutherAI's lm-evaluation-harness: the documented way gives the accuracy
that our own evaluation gives.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytestmark = pytest.mark.real

TASK = """\
task: pocket_mcq
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: []
  max_gen_toks: 56
  do_sample: false
filter_list:
  - name: letter
    filter:
      - function: regex
        regex_pattern: "Answer: ([A-C])"
      - function: take_first
metric_list:
  - metric: exact_match
"""


def harness_accuracy(model_dir: str, rows: list[dict], tmp_path: Path) -> float:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    file = tmp_path / "rows.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": row["prompt"], "answer": row["answer"]}) + "\n" for row in rows)
    )
    (tmp_path / "pocket_mcq.yaml").write_text(TASK.format(file=file))
    found = simple_evaluate(
        model="hf",
        model_args={"pretrained": model_dir, "dtype": "float32"},
        tasks=["pocket_mcq"],
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        batch_size=16,
        device="cpu",
    )
    return float(found["results"]["pocket_mcq"]["exact_match,letter"])


def test_the_pocket_model_in_the_harness(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from unisd import tasks
    from unisd.evaluation.accuracy import accuracy
    from unisd.models.inference import load_any

    task = tasks.get("pocket")
    rows = [row for row in task.load("test") if row["skill"] == "mcq"][:48]
    model, tokenizer = load_any("pocket", "float32")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    ours = accuracy(model, tokenizer, rows, task.grade, max_new_tokens=56)["overall"]["value"]
    assert harness_accuracy(str(tmp_path / "model"), rows, tmp_path) == pytest.approx(ours, abs=0.05)


def test_smollm2_in_the_harness(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    from unisd.models.load import load_model_and_tokenizer

    _, _, info = load_model_and_tokenizer("smollm2-135m")
    rows = [
        {"prompt": f'Which letter stands between {a} and {c}? Reply with "Answer: <letter>".', "answer": b}
        for a, b, c in ("ABC", "BCD", "ABC")
    ]
    assert 0.0 <= harness_accuracy(str(info.path), rows, tmp_path) <= 1.0
