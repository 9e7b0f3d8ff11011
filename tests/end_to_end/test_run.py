"""The command end to end: what it writes, that plain transformers and peft load it, and what one
does with it afterwards.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.helpers.commands import ROWS, of_steps
from unisd.cli.main import main
from unisd.console import show_example
from unisd.data.text import problem_mark
from unisd.evaluation.accuracy import generate_greedy
from unisd.models.load import load_model_and_tokenizer
from unisd.run import measure
from unisd.run import train as run
from unisd.run.resolve import parse

SHORT = [
    "--max_steps",
    "2",
    "--max_completion_length",
    "6",
    "--per_device_train_batch_size",
    "4",
    "--learning_rate",
    "1e-2",
]
SHORT += ["--gradient_accumulation_steps", "1"]
ACCURACY = {"value", "low", "high", "n"}


@pytest.fixture(scope="module")
def own(model_dir: Path, rows_file: Path) -> list[str]:
    rows = ["--train_file", str(rows_file), "--retention_rows", "2"]
    return ["train", *rows, "--model_name_or_path", str(model_dir), *SHORT]


@pytest.fixture(scope="module")
def adapter(own: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("out") / "adapter"
    assert main([*own, "--use_peft", "--lora_r", "4", "--grader", "number", "--output_dir", str(folder)]) == 0
    return folder


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return content


@pytest.mark.long
def test_pocket_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [
        "train",
        "--max_steps",
        "2",
        "--per_device_train_batch_size",
        "8",
        "--max_eval_rows",
        "8",
        "--max_train_rows",
        "32",
    ]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "\x1b[" not in shown
    for name in (
        "student sees:",
        "teacher sees:",
        "student answers:",
        "step 2/2",
        "task accuracy",
        "retention: pocket",
    ):
        assert any(line.startswith(name) for line in shown.splitlines()), name
    folder = tmp_path / "unisd-output" / "unisd-star-pocket-pocket"
    results = read(folder)
    assert (results["schema_version"], results["recipe"], results["model"], results["task"]) == (
        2,
        "unisd-star",
        "pocket",
        "pocket",
    )
    assert results["seed"] == results["config"]["seed"] and results["config"]["recipe"] == "unisd-star"
    assert {"rollout", "score", "student", "eval"} <= set(results["phases_s"]) and results["wall_s"] > 0
    for part in ("before", "after"):
        for name in ("task_accuracy", "retention_accuracy"):
            assert set(results[part][name]) == ACCURACY and results[part][name]["n"] == 8
        assert set(results[part]["skills"]) == {"arith", "code", "mcq", "tool"}
        assert results[part]["gold_ppl"] > 1
    assert set(results["after"]["retention_ppl"]) == {"forward", "reverse"}
    assert (results["after"]["n_task"], results["after"]["n_retention"]) == (8, 8)
    steps = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == [1, 2]
    assert {
        "agreement/min",
        "contrastive/active_share",
        "features/distance",
        "clip/share",
        "teacher/weight_distance",
    } <= set(steps[1])
    assert "task accuracy" in (folder / "README.md").read_text()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template is not None and plain.config.vocab_size == len(tokenizer)

    # The README's first command works twice: nothing of the first run is touched.
    options, config = parse([])
    from unisd.run.outputs import choose_output_dir

    assert choose_output_dir(options, config, "pocket")[0].name == "unisd-star-pocket-pocket-2"


def test_own_rows_without_contexts(own: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main([*own, "--output_dir", str(tmp_path / "run")]) == 0
    said = capfd.readouterr()
    assert "1 to report on (1 answered before and after, because nothing grades them)" in said.out
    answers = json.loads((tmp_path / "run" / "answers.json").read_text())
    [example] = answers["task"]["examples"]
    assert answers["task"]["before"] is answers["task"]["after"] is example["before"]["correct"] is None
    place = said.out.splitlines().index(f"  {example['prompt']}")
    assert said.out.splitlines()[place + 1].startswith("    before:  ")
    notes = [line for line in said.err.splitlines() if line.startswith("note: recipe")]
    assert len(notes) == 1 and "agreement" not in notes[0] and "--negatives corrupt" in notes[0]
    results = read(tmp_path / "run")
    assert results["task"] == "sums"
    assert results["config"]["agreement"] == "token" and results["config"]["contrastive_weight"] == 0
    assert results["config"]["agreement_contexts"] == "retrieval"
    assert results["before"]["task_accuracy"] is None
    assert [(one["name"], one["rows"]) for one in results["retention"]] == [("general", 2)]
    assert results["after"]["n_task"] == 1  # a tenth, held out
    assert results["after"]["gold_ppl"] != results["before"]["gold_ppl"]


def test_evaluation_file_columns_and_grader(model_dir: Path, tmp_path: Path) -> None:
    foreign = [{"question": row["prompt"], "answer": row["privileged_context"]} for row in ROWS]
    (tmp_path / "train.json").write_text(json.dumps(foreign[:7]))
    (tmp_path / "eval.json").write_text(json.dumps(foreign[7:]))
    (tmp_path / "run.yaml").write_text(
        f"train_file: {tmp_path}/train.json\neval_file: {tmp_path}/eval.json\ngrader: number\nrecipe:"
        " sdft\ncolumns: {prompt: question, privileged_context: answer}\nmodel_name_or_path:"
        f" {model_dir}\noutput_dir: {tmp_path}/run\n"
    )
    assert main(["train", "--config", str(tmp_path / "run.yaml"), *SHORT]) == 0
    results = read(tmp_path / "run")
    assert results["before"]["task_accuracy"]["n"] == results["after"]["n_task"] == 3
    trained_on = json.loads((tmp_path / "run" / "trained_on.json").read_text())
    assert trained_on == {"problems": sorted(problem_mark(row["prompt"]) for row in ROWS[:7])}


def test_adapter_loads_in_plain_peft(adapter: Path, model_dir: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_dir), adapter)
    changed = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert changed and all(parameter.abs().sum() > 0 for parameter in changed)
    assert "library_name: peft" in (adapter / "README.md").read_text()
    assert read(adapter)["after"]["retention_ppl"]["forward"] > 1


def test_merge_keeps_what_the_adapter_says(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["merge", str(adapter), "--output_dir", str(tmp_path / "full")]) == 0
    assert str(tmp_path / "full") in capsys.readouterr().out
    merged, tokenizer, _ = load_model_and_tokenizer(str(tmp_path / "full"))
    adapted, _, _ = load_model_and_tokenizer(str(adapter))
    ids = torch.tensor([tokenizer("What is 4 and 4?")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted(ids).logits, rtol=1e-4, atol=1e-5)
    assert main(["merge", str(adapter), "--output_dir", str(tmp_path / "full")]) == 2  # never overwrites


def test_chat_beside_the_base(
    adapter: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        main(["chat", str(adapter), "--compare", "base", "--prompt", "What is 3?", "--max_new_tokens", "4"])
        == 0
    )
    assert [line for line in capsys.readouterr().out.splitlines() if line.endswith(":")] == [
        "base:",
        f"{adapter}:",
    ]
    import io

    monkeypatch.setattr("sys.stdin", io.StringIO("/examples\n1\n"))
    assert main(["chat", str(adapter), "--max_new_tokens", "6"]) == 0
    example = json.loads((adapter / "answers.json").read_text())["task"]["examples"][0]
    assert capsys.readouterr().out.endswith(f"{example['after']['text']}\n")  # as the run was answered
    monkeypatch.setattr("sys.stdin", io.StringIO("What is 3?\n"))
    assert main(["chat", str(adapter), "--max_new_tokens", "4", "--temperature", "1"]) == 0


def test_eval_of_the_pocket(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [
        "--max_eval_rows",
        "8",
        "--eval_max_new_tokens",
        "8",
        "--base",
        "pocket",
        "--json",
        str(tmp_path / "figures.json"),
    ]
    assert main(["eval", *arguments]) == 0
    names = {line.split("  ")[0] for line in capsys.readouterr().out.splitlines()}
    assert {"pocket", "task", "retention", "test_hard", "perplexity of the references"} <= names
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["task_accuracy"]["n"] == 8 and set(figures["test_hard_skills"]) == {
        "arith",
        "code",
        "mcq",
        "tool",
    }
    assert figures["retention_ppl"]["forward"] == pytest.approx(figures["retention_ppl"]["reverse"])


def test_dry_run_writes_nothing(
    own: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([*own, "--dry_run"]) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert len(lines) <= 10 and "learning_rate=0.01" in said.out and lines[-3].startswith("memory of one")
    [teacher] = [line for line in lines if line.startswith("teacher sees: ")]
    rows = Path(own[own.index("--train_file") + 1]).read_text().splitlines()
    references = [json.loads(row)["privileged_context"] for row in rows]
    assert any(reference[:10] in teacher for reference in references)  # what a template may have hidden
    model = own[own.index("--model_name_or_path") + 1]
    told = [line for line in said.err.splitlines() if "loading" in line]
    assert told == ["note: loading libraries", f"note: loading model {model}"]
    assert main([*own, "--dry_run", "--verbose"]) == 0
    assert list(tmp_path.iterdir()) == []
    shown = capsys.readouterr().out
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.strip()}
    assert lines["learning_rate"][2:] == ["0.01", "*"]
    assert lines["total"][-1] in ("MiB", "GiB")
    assert "student sees:" in shown and "nothing was trained" in shown


@pytest.mark.long
def test_ctrl_c_says_how_to_resume_and_resuming_ends_alike(
    own: list[str], tmp_path: Path, capsys: Any
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    three = [*of_steps(own, 3), "--use_peft", "--lora_r", "4"]
    assert main([*three, "--output_dir", str(whole)]) == 0

    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            os.kill(os.getpid(), signal.SIGINT)

    assert threading.current_thread() is threading.main_thread()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Interruption, "on_step_begin", interrupt)
        assert main([*three, "--output_dir", str(broken)]) == 130
    shown = capsys.readouterr().out
    assert "resume from checkpoint-1 with:" in shown and "--resume_from_checkpoint" in shown.splitlines()[-1]
    assert not (broken / "results.json").exists()
    assert main([*three, "--output_dir", str(broken), "--resume_from_checkpoint"]) == 0

    from safetensors.torch import load_file

    expected, found = (load_file(folder / "adapter_model.safetensors") for folder in (whole, broken))
    assert set(expected) == set(found) and all(torch.equal(expected[name], found[name]) for name in expected)
    finished = read(broken)
    capsys.readouterr()
    assert main([*three, "--output_dir", str(broken), "--resume_from_checkpoint"]) == 0
    assert "nothing was left to train" in capsys.readouterr().out
    assert [read(broken)[name] for name in ("wall_s", "cost")] == [finished[n] for n in ("wall_s", "cost")]


def test_training_without_a_teacher_shows_none(capsys: Any) -> None:
    for reference in (None, "b"):
        show_example(Console(), "a", None, "b", reference)
    shown = capsys.readouterr().out
    assert shown.count("student sees") == 2 and "teacher" not in shown


@pytest.mark.long
def test_resuming_where_nothing_was_saved_starts_anew(own: list[str], tmp_path: Path, capsys: Any) -> None:
    """As a scheduler's command does that is given again after a machine was lost."""
    again = [
        *of_steps(own, 1),
        "--output_dir",
        str(tmp_path / "run"),
        "--save_strategy",
        "no",
        "--resume_from_checkpoint",
    ]
    measured = measure.measure

    def interrupted(*args: Any) -> Any:
        if (tmp_path / "run" / "metrics.jsonl").exists():
            raise KeyboardInterrupt
        return measured(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure, "measure", interrupted)
        assert main(again) == 130  # after training
    assert (tmp_path / "run" / "model.safetensors").exists() and not (
        tmp_path / "run" / "results.json"
    ).exists()
    assert main(again) == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 1
    assert main(again) == 2
    assert "holds the results of another run" in capsys.readouterr().err


def test_overwriting_removes_only_what_a_run_wrote(own: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoint-9").mkdir(parents=True)
    (folder / "checkpoint-9" / "trainer_state.json").write_text("{}")
    (folder / "results.json").write_text("{}")
    (folder / "notes.txt").write_text("mine")
    assert main([*own, "--output_dir", str(folder), "--overwrite_output_dir"]) == 0
    assert (folder / "notes.txt").exists() and not (folder / "checkpoint-9").exists()
    assert read(folder)["schema_version"] == 2


@pytest.mark.long
def test_answers_are_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How far a model has drifted is read off the answers that its accuracy was measured by, before
    and after.
    """
    batches: list[int] = []
    written = generate_greedy

    def watched(model: Any, tokenizer: Any, prompts: Any, *rest: Any) -> Any:
        batches.append(len(prompts))
        return written(model, tokenizer, prompts, *rest)

    # by name: the package re-exports functions called like its modules
    for name in ("accuracy", "retention"):
        monkeypatch.setattr(importlib.import_module(f"unisd.evaluation.{name}"), "generate_greedy", watched)
    flags = [
        "--max_steps",
        "1",
        "--max_train_rows",
        "8",
        "--max_eval_rows",
        "6",
        "--max_completion_length",
        "8",
    ]
    assert main(["train", *flags, "--output_dir", str(tmp_path / "out")]) == 0
    assert batches == [6, 6, 6, 6]  # task and retention, before and after
    found = json.loads((tmp_path / "out" / "results.json").read_text())["after"]["retention_ppl"]
    drift = measure.drift
    monkeypatch.setattr("unisd.run.measure.drift", lambda *args: drift(*args[:-1]))
    assert main(["train", *flags, "--output_dir", str(tmp_path / "anew")]) == 0
    assert batches[4:] == [6] * 6
    anew = json.loads((tmp_path / "anew" / "results.json").read_text())["after"]["retention_ppl"]
    assert found == pytest.approx(anew, rel=1e-6)
