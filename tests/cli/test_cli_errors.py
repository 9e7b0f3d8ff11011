"""Every mistake of a user that we know of, as a command: exit code 2, one line that says how to
mend it, no traceback.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from unisd import testing as tiny
from unisd.cli.main import main
from unisd.errors import UserError

ROWS = [
    {"prompt": f"What is {i}?", "privileged_context": f"It is {i}.", "auxiliary_contexts": ["a", "b"]}
    for i in range(6)
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plain_model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("plain")
    tiny.model().save_pretrained(folder)
    tiny.tokenizer(chat=False).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def mistake(capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a command in a scratch folder; returns its one line of error."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        code = main(arguments)
        errors = capfd.readouterr().err
        assert code == 2, errors
        assert "Traceback" not in errors
        lines = [line for line in errors.splitlines() if not line.startswith("note: ")]
        assert len(lines) == 1 and lines[0].startswith("unisd: error: "), errors
        return lines[0]

    return run


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def own(mistake: Any, tmp_path: Path, model_dir: str) -> Any:
    """Train on these rows, with more flags."""

    def run(rows: list[dict[str, Any]], *flags: str, model: str = model_dir) -> str:
        file = write_rows(tmp_path / "rows.jsonl", rows)
        short = ("--max_completion_length", "8", "--max_steps", "1", "--recipe", "sdft")
        return str(mistake("train", "--train_file", file, "--model_name_or_path", model, *short, *flags))

    return run


def without(rows: list[dict[str, Any]], *columns: str) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name not in columns} for row in rows]


# -- options ---------------------------------------------------------------------------------------


def test_unknown_key_in_yaml(mistake: Any, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("contrastive_weigth: 0.1\n")
    line = mistake("train", "--config", "run.yaml")
    assert "run.yaml: unknown key 'contrastive_weigth': did you mean contrastive_weight?" in line


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["trian"], "did you mean 'train'?"),
        (["train", "--agrement", "token"], "did you mean --agreement?"),
        (["train", "--recipe", "unisd-str"], "did you mean 'unisd-star'?"),
        (["train", "--task", "pockett"], "did you mean pocket?"),
        (["train", "--token_clip", "0.5", "--token_clip_quantile", "0.9"], "exclude each other"),
        (["train", "--recipe", "sdft", "--distillation_weight", "0"], "distillation_weight=0 leaves no loss"),
        (["train", "--temperature", "0"], "temperature must be above 0"),
        (["train", "--train_file", "missing.jsonl"], "missing.jsonl is not a file"),
        (["recipes", "sdfd"], "did you mean 'sdft'?"),
        (["eval", "--task", "pockett"], "did you mean pocket?"),
        (["eval", "--max_eval_rows", "x"], "invalid int value"),
        (["merge"], "DIR"),
        (["chat"], "DIR"),
    ],
)
def test_mistakes_before_anything_is_loaded(mistake: Any, arguments: list[str], part: str) -> None:
    assert part in mistake(*arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        ["probe", "--json"],
        ["prepare", "--output"],
        ["eval", "--rows"],
        ["eval", "--json"],
        ["grade", "--task", "pocket", "--completions", "c.jsonl", "--rows"],
        ["report", ".", "--out"],
    ],
    ids=" ".join,
)
def test_files_that_cannot_be_written_are_refused_before_any_work(
    mistake: Any, tmp_path: Path, arguments: list[str]
) -> None:
    (tmp_path / "file").write_text("")
    for path in ("file/p", "/proc/nope/p", str(tmp_path)):
        assert f"argument {arguments[-1]}: {path} cannot be written (" in mistake(*arguments, path)


CONSENTS = ("--trust_remote_code", "--allow_unsafe_code_execution")


@pytest.mark.parametrize("command", ["probe", "prepare"])
@pytest.mark.parametrize(
    "flags", [CONSENTS, [f"{flag}=true" for flag in CONSENTS]], ids=["bare", "with value"]
)
def test_consents_of_train_reach_probe_and_prepare(
    mistake: Any, monkeypatch: pytest.MonkeyPatch, command: str, flags: list[str]
) -> None:
    from unisd.pocket.task import PocketTask

    seen = []

    def stop(options: Any, seed: int, whole: bool = False) -> Any:
        seen.append(
            (options.trust_remote_code, options.allow_unsafe_code_execution, options.task_options, seed)
        )
        raise UserError("seen")

    monkeypatch.setattr("unisd.run.inputs.load_data", stop)
    monkeypatch.setattr("unisd.run.inputs.get_task", lambda options: PocketTask())
    mistake(command, "--task", "mbpp", "--task_options", "a=1", "b=2", "--seed", "5", *flags)
    assert seen == [(True, True, ["a=1", "b=2"], 5)]


def test_code_that_comes_with_a_model_runs_only_when_asked(
    mistake: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    seen = []

    def stop(name: str, *, trust_remote_code: bool, **options: Any) -> Any:
        seen.append(trust_remote_code)
        raise UserError("seen")

    monkeypatch.setattr("unisd.run.merge.load_model_and_tokenizer", stop)
    monkeypatch.setattr("unisd.models.load.load_model_and_tokenizer", stop)
    for command in (["eval", "--model", "pocket"], ["chat", "pocket", "--prompt", "x"], ["merge", "adapter"]):
        assert "seen" in mistake(*command)
        assert "seen" in mistake(*command, "--trust_remote_code")
    assert seen == [False, True] * 3


# -- the user's rows -------------------------------------------------------------------------------


def test_missing_column(own: Any) -> None:
    rows = [{"question": row["prompt"], "gold": row["privileged_context"]} for row in ROWS]
    assert (
        "rows.jsonl has no columns 'prompt' and 'privileged_context': its columns are question, gold; pass"
        " --columns prompt=question,privileged_context=NAME" in own(rows)
    )
    line = own(rows, "--columns", "prompt=qestion,completion=gold")
    assert "no column 'qestion' (mapped to 'prompt')" in line
    assert "pass --columns prompt=question,completion=gold" in line


def test_empty_dataset(own: Any) -> None:
    assert "is empty: give at least one row" in own([])


@pytest.mark.parametrize(
    ("prompt", "part"), [(None, "missing"), ("", "empty"), (7, "7 (int)"), ([], "[] (list)")]
)
def test_row_without_prompt(own: Any, prompt: Any, part: str) -> None:
    rows = [*ROWS[:3], {**ROWS[3], "prompt": prompt}]
    line = own(rows)
    assert "rows.jsonl, line 4: " in line and part in line


def test_row_without_reference(own: Any) -> None:
    assert "rows.jsonl, line 2: " in own([ROWS[0], {**ROWS[1], "privileged_context": None}, *ROWS[2:]])


def test_single_row_cannot_be_split(own: Any) -> None:
    assert "--eval_file" in own(ROWS[:1])


def test_broken_line(mistake: Any, tmp_path: Path, model_dir: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n{oops\n")
    assert "rows.jsonl, line 2 is not JSON" in mistake(
        "train", "--train_file", "rows.jsonl", "--model_name_or_path", model_dir
    )


def test_reference_longer_than_the_limit(own: Any) -> None:
    rows = [{**row, "privileged_context": "x" * 2000} if i == 2 else row for i, row in enumerate(ROWS)]
    assert "over the limit" in own(rows)
    assert "max_teacher_prompt_length" in own(ROWS, "--max_teacher_prompt_length", "20")


def test_prompt_longer_than_the_limit(own: Any) -> None:
    rows = [{**row, "prompt": "What? " * 20 + row["prompt"]} for row in ROWS]
    line = own(rows, "--max_prompt_length", "60")
    assert "the prompt has" in line and "over the limit of 60 (max_prompt_length)" in line
    assert "over the limit" not in own(
        rows, "--max_prompt_length", "400", "--agreement", "token", "--contrastive_weight", "1"
    )


def test_agreement_without_contexts(own: Any) -> None:
    assert "auxiliary_contexts" in own(without(ROWS, "auxiliary_contexts"), "--agreement", "token")


def test_contrast_without_negatives(own: Any) -> None:
    assert "negative_context" in own(ROWS, "--contrastive_weight", "0.1")


def test_unknown_grader(own: Any) -> None:
    assert "unknown grader 'nubmer'" in own(ROWS, "--grader", "nubmer")


def test_gold_that_the_grader_cannot_read(own: Any) -> None:
    rows = [{**row, "answer": answer} for row, answer in zip(ROWS, ["1", "2,5", "12,34,5"] * 2, strict=True)]
    for flags in ((), ("--dry_run",)):
        line = own(rows, "--grader", "number", *flags)
        assert "rows.jsonl, line 3: gold '12,34,5' is not a number: give one number" in line


# -- models and folders ----------------------------------------------------------------------------


def test_path_that_is_not_a_model(own: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    own(ROWS, model=str(tmp_path / "empty"))
    own(ROWS, model=str(tmp_path / "rows.jsonl"))


def test_messages_without_chat_template(own: Any, plain_model_dir: str) -> None:
    rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in ROWS]
    assert "no chat template" in own(rows, model=plain_model_dir)


def test_output_dir_that_cannot_be_written(own: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "cannot be written" in own(ROWS, "--output_dir", str(tmp_path / "file" / "run"))
    assert "cannot be written" in own(ROWS, "--output_dir", str(tmp_path / "file"))
    if Path("/proc/self").is_dir():
        assert "cannot be written" in own(ROWS, "--output_dir", "/proc/unisd-run")


def test_output_dir_of_another_run(own: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    assert "--resume_from_checkpoint" in own(ROWS, "--output_dir", str(folder))
    (folder / "results.json").write_text("{}")
    assert "results of another run" in own(ROWS, "--output_dir", str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["metrics.jsonl", "results.json"]


@pytest.mark.parametrize("flags", [[], ["--resume_from_checkpoint"]])
def test_output_dir_with_the_users_own_files(own: Any, tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    assert "holds other files" in own(ROWS, "--output_dir", str(tmp_path / "project"), *flags)
    assert "holds other files" in own(ROWS, "--output_dir", str(tmp_path), *flags)


def test_two_runs_started_together_get_a_folder_each(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from unisd.run.outputs import choose_output_dir
    from unisd.run.resolve import parse

    monkeypatch.chdir(tmp_path)
    folders = [choose_output_dir(*parse([]), "pocket")[0].name for _ in range(2)]
    assert folders == ["unisd-star-pocket-pocket", "unisd-star-pocket-pocket-2"]
    assert choose_output_dir(*parse([]), "pocket", reserve=False)[0].name == "unisd-star-pocket-pocket-3"
    assert not (tmp_path / "unisd-output" / "unisd-star-pocket-pocket-3").exists()


def test_a_mistake_leaves_no_folder_behind(
    mistake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_dir: str
) -> None:
    monkeypatch.chdir(tmp_path)
    file = write_rows(tmp_path / "rows.jsonl", without(ROWS, "auxiliary_contexts"))
    mistake("train", "--train_file", file, "--model_name_or_path", model_dir, "--agreement", "token")
    assert not any((tmp_path / "unisd-output").glob("*"))


def test_nothing_to_resume(own: Any) -> None:
    assert "is not a folder" in own(ROWS, "--resume_from_checkpoint", "checkpoint-7")


def test_merge_of_something_else(mistake: Any, model_dir: str) -> None:
    assert "full model already" in mistake("merge", model_dir)
    assert "is not a folder" in mistake("merge", "nowhere")


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 81344 vs 81236"),
    ],
)
def test_full_disk(mistake: Any, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(arguments: list[str]) -> int:
        raise error

    monkeypatch.setattr("unisd.cli.merge.merge_command", fail)
    assert "the disk is full" in mistake("merge", "x")


# -- as a process ----------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize(
    "arguments", [["train", "--agrement", "token"], ["train", "--train_file", "/x.jsonl"], ["eval", "--x"]]
)
def test_as_a_process(arguments: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "unisd", *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith("unisd: error: ")


def test_overview_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "unisd train" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("unisd 0.")
    assert main(["recipes"]) == 0
    assert "unisd-star" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--dry_run"]], ids=["run", "dry run"])
@pytest.mark.parametrize(
    ("wrong", "part"),
    [
        ("--lr_scheduler_type warmup_stable_decay", "lr_scheduler_type=warmup_stable_decay cannot be built"),
        ("--eval_strategy steps --metric_for_best_model acc", "(loss, runtime; accuracy needs a grader)"),
        ("--push_to_hub", "push_to_hub: the hub refuses or cannot be reached"),
    ],
)
def test_what_would_end_a_run_late(
    own: Any, monkeypatch: pytest.MonkeyPatch, flags: list[str], wrong: str, part: str
) -> None:
    def offline(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", offline)
    monkeypatch.setattr("huggingface_hub.HfApi.whoami", offline)
    assert part in own(ROWS, *wrong.split(), *flags)
