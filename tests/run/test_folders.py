"""The folder of a run: nothing of the user's is lost, and nothing of an earlier run is left."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.commands import of_steps
from unisd import UniSDConfig, UserError
from unisd import testing as tiny
from unisd.cli.main import main
from unisd.data.rows import hold_out
from unisd.files import written_in
from unisd.processes import alone_in
from unisd.run.inputs import RunData, hold_out_validation
from unisd.run.options import RunOptions
from unisd.run.outputs import clear_earlier_run, resolved, resume_command
from unisd.run.resolve import parse


@pytest.fixture(scope="module")
def own(model_dir: Path, rows_file: Path) -> list[str]:
    short = "--recipe sdft --max_steps 1 --max_completion_length 4 --per_device_train_batch_size 2"
    command = ["train", "--train_file", str(rows_file), "--gradient_accumulation_steps", "1", *short.split()]
    return [*command, "--retention", "none", "--model_name_or_path", str(model_dir)]


@pytest.fixture
def refused(own: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    def run(folder: Path, *flags: str, model: Path | None = None) -> str:
        command = [*own[:-1], str(model)] if model else own
        assert main([*command, "--output_dir", str(folder), *flags]) == 2
        error = capsys.readouterr().err
        assert error.count("error: ") == 1
        return error

    return run


# -- the model's own folder ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [[], ["--overwrite_output_dir"], ["--dry_run"], ["--resume_from_checkpoint"]]
)
def test_the_models_own_folder_is_refused(
    refused: Any, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str]
) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    before = {path: path.stat().st_mtime_ns for path in model.rglob("*")}
    (tmp_path / "link").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    for folder in (model, tmp_path / "link", Path("model"), tmp_path / "other" / ".." / "model"):
        text = refused(folder, *flags, model=model)
        assert "is the folder of the model itself" in text and "choose another --output_dir" in text
    assert before == {path: path.stat().st_mtime_ns for path in model.rglob("*")}


def test_the_base_of_an_adapter_and_a_checkpoint_of_the_folder_are_refused(
    refused: Any, model_dir: Path, tmp_path: Path
) -> None:
    base, adapter = Path(shutil.copytree(model_dir, tmp_path / "base")), tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    assert "is the folder of the model itself" in refused(base, "--overwrite_output_dir", model=adapter)
    run = tmp_path / "run"
    shutil.copytree(model_dir, run / "checkpoint-4")
    text = refused(run, "--overwrite_output_dir", model=run / "checkpoint-4")
    assert "is a checkpoint in output_dir" in text and "choose another --output_dir" in text


def test_a_trainer_refuses_its_models_folder(model_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(model_dir, tmp_path / "model"))
    with pytest.raises(UserError, match="is the folder of the model itself"):
        tiny.trainer(model, model=str(model)).train()


def test_a_folder_inside_the_models_is_none_of_its_files(model_dir: Path, tmp_path: Path) -> None:
    from unisd.files import check_not_the_model

    check_not_the_model(model_dir / "run", str(model_dir))
    check_not_the_model(model_dir.parent, str(model_dir))
    check_not_the_model(tmp_path, "some/hub-id")
    check_not_the_model(tmp_path, "")


# -- overwriting -----------------------------------------------------------------------------------


@pytest.mark.long
def test_overwriting_leaves_nothing_of_a_run_of_another_kind(own: list[str], tmp_path: Path) -> None:
    folder, adapter = tmp_path / "run", tmp_path / "adapter"
    assert main([*own, "--output_dir", str(folder)]) == 0
    lora = ["--use_peft", "--lora_r", "2"]
    assert main([*own, "--output_dir", str(adapter), *lora]) == 0
    for run in (folder, adapter):  # the list is whole
        files = {path for path in run.iterdir() if path.is_file()}
        assert files == set(written_in(run)), files - set(written_in(run))
    (folder / "notes.txt").write_text("mine")
    (folder / "chat_template.jinja").write_text("of another model")
    (folder / "model-00001-of-00002.safetensors").write_text("half")
    assert main([*own, "--output_dir", str(folder), *lora, "--overwrite_output_dir"]) == 0
    alone = {path.name for path in adapter.iterdir()}
    assert {path.name for path in folder.iterdir()} == alone | {"notes.txt"}
    assert (folder / "chat_template.jinja").read_text() != "of another model"


def test_clearing_removes_what_a_run_writes_alone(tmp_path: Path) -> None:
    mine = [
        "notes.txt",
        "model.py",
        "data/config.json",
        "checkpoint-best/weights",
        "set-aside/checkpoint-3/x",
    ]
    theirs = ["config.json", "adapter_model.safetensors", "model-00001-of-00003.safetensors", "report.html"]
    for name in (*mine, *theirs, "results.json", "checkpoint-2/trainer_state.json", ".saving/checkpoint-4/x"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    clear_earlier_run(tmp_path)
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert left == set(mine)


def test_overwriting_is_for_the_folder_of_a_run(refused: Any, model_dir: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(model_dir, tmp_path / "other"))
    text = refused(other, "--overwrite_output_dir")
    assert "is not the folder of a run, but holds" in text and "choose another --output_dir" in text
    assert (other / "model.safetensors").exists()


def test_overwriting_and_resuming_contradict_each_other(refused: Any, tmp_path: Path, own: list[str]) -> None:
    text = refused(tmp_path / "run", "--overwrite_output_dir", "--resume_from_checkpoint")
    assert (
        "overwrite_output_dir removes the checkpoint that resume_from_checkpoint continues from:"
        " give one of them"
    ) in text
    options, _ = parse([*own[1:], "--output_dir", "x", "--overwrite_output_dir", "--hub_token", "secret"])
    command = resume_command(options, "x")
    assert (
        "overwrite" not in command
        and "secret" not in command
        and command.endswith("--resume_from_checkpoint")
    )


def test_overwriting_needs_the_name_of_a_folder(own: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*own, "--overwrite_output_dir"]) == 2
    assert "overwrite_output_dir needs a folder that you name" in capsys.readouterr().err


def test_going_on_in_the_folder_of_another_run_is_refused(refused: Any, tmp_path: Path) -> None:
    run = tmp_path / "a" / "checkpoint-2"
    run.mkdir(parents=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "results.json").write_text("{}")
    text = refused(tmp_path / "b", "--resume_from_checkpoint", str(run))
    assert "holds the results of another run" in text


def test_a_checkpoint_of_weights_alone_is_refused_before_anything_is_loaded(
    refused: Any, tmp_path: Path
) -> None:
    from unisd.training.checkpoints import write_manifest

    checkpoint = tmp_path / "run" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text('{"global_step": 2}')
    write_manifest(checkpoint)
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    for asked in ([], [str(checkpoint)]):
        for dry in ([], ["--dry_run"]):
            text = refused(tmp_path / "run", *dry, "--resume_from_checkpoint", *asked)
            assert (
                "checkpoint-2 holds no optimizer (save_only_model)" in text
                and "unset save_only_model" in text
            )


def test_two_runs_at_once_in_one_folder(refused: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with alone_in(folder, "busy"):
        text = refused(folder)
        assert "another run is writing into" in text and "choose another --output_dir" in text
    with alone_in(folder, "busy"):
        pass
    assert list(folder.iterdir()) == []


@pytest.mark.long
def test_what_has_changed_is_told_before_anything_is_measured(
    own: list[str], refused: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*own, "--save_steps", "1", "--output_dir", str(folder)]) == 0
    again = ["--resume_from_checkpoint", "--learning_rate", "0.5", "--num_train_epochs", "2"]
    capsys.readouterr()
    assert main([*of_steps(own, 2), "--output_dir", str(folder), *again, "--dry_run"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "resuming: learning_rate: 2e-05 -> 0.5, takes effect" in shown
    for dry in ([], ["--dry_run"]):
        text = refused(folder, *again, "--use_peft", *dry)
        assert "use_peft is False in it and True in this run: resume with the checkpoint's" in text


# -- secrets ---------------------------------------------------------------------------------------


def test_no_file_holds_a_token(tmp_path: Path) -> None:
    built = tiny.trainer(
        tmp_path / "run", hub_token="hf_secret", max_steps=1, save_steps=1, save_strategy="steps"
    )
    assert built.args.hub_token == built.args.changed("why", seed=1).hub_token == "hf_secret"
    built.train()
    built.save_model()
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert any(path.name == "training_args.bin" for path in files)
    assert [path for path in files if b"hf_secret" in path.read_bytes()] == []
    assert torch.load(tmp_path / "run" / "training_args.bin", weights_only=False).hub_token is None


def test_results_hold_no_token_and_no_password(tmp_path: Path) -> None:
    address = "http://me:pass@host:1/v1"
    options, config = parse(["--hub_token", "hf_secret", "--output_dir", "x"])
    found = json.dumps(resolved(replace(options, writer_url=address), config), default=str)
    assert "hf_secret" not in found and "me:pass" not in found and "http://***@host:1/v1" in found
    server = ["--use_vllm", "--vllm_mode", "server", "--vllm_server_base_url", address]
    for name, flags in (("writer_url", ["--writer_url", address]), ("vllm_server_base_url", server)):
        with pytest.raises(UserError, match=f"^{name}: .* remove the part before @") as raised:
            parse(["--output_dir", "x", *flags])
        assert "pass" not in str(raised.value).replace("password", "")


# -- the rows that a choice is made on -------------------------------------------------------------


def test_rows_with_one_prompt_stay_together() -> None:
    rows = [{"prompt": f"p{i % 7}", "id": str(i)} for i in range(28)]
    for seed in range(5):
        train, held = hold_out(rows, 0.2, seed)
        assert len(train) + len(held) == 28 and 6 <= len(held) < 6 + 4
        assert not {row["prompt"] for row in train} & {row["prompt"] for row in held}
    assert hold_out(rows[::7], 0.5) == (rows[::7], [])
    unlike = [{"prompt": str(i)} for i in range(10)]
    assert [len(part) for part in hold_out(unlike, count=99)] == [1, 9]


def held_out(total: int = 40, **options: Any) -> RunData:
    rows = [{"prompt": str(i)} for i in range(total)]
    data = RunData("rows", rows, [{"prompt": "reported"}])
    split = {name: options.pop(name) for name in ("validation_split", "max_eval_rows") if name in options}
    config = UniSDConfig(
        **{"use_cpu": True, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 1, **options}
    )
    hold_out_validation(data, RunOptions(task="pocket", **split), config)
    return data


def test_a_choice_is_made_on_rows_of_its_own(caplog: pytest.LogCaptureFixture) -> None:
    for choice in (
        {"load_best_model_at_end": True},
        {"save_strategy": "best"},
        {"lr_scheduler_type": "reduce_lr_on_plateau"},
    ):
        data = held_out(**choice)
        assert (len(data.train), len(data.validation)) == (36, 4)
        name = next(iter(choice))
        assert name in caplog.text and "chooses on 4 of 40 training rows, which are held out" in caplog.text
        assert "--validation_split says how many" in caplog.text
        caplog.clear()
    assert len(held_out(load_best_model_at_end=True, max_eval_rows=2).validation) == 2
    assert len(held_out().validation) == 0  # chooses nothing
    for split, count in ((0.25, 10), (3.0, 3)):
        assert len(held_out(validation_split=split).validation) == count
    assert caplog.text.count("chooses") == 1


def test_mistakes_of_the_validation_part() -> None:
    for options, told in (
        ({"validation_split": 0.1, "eval_strategy": "no"}, "set eval_strategy, or unset it"),
        ({"validation_split": 40}, "validation_split=40: 40 training rows .* cannot be split"),
        ({"load_best_model_at_end": True, "total": 1}, "load_best_model_at_end needs rows to choose on"),
        (
            {"save_strategy": "best", "eval_strategy": "no"},
            "save_strategy=best saves nothing without evaluations",
        ),
    ):
        with pytest.raises(UserError, match=told):
            held_out(**options)
    for value in (0.0, -1.0, 1.5):
        with pytest.raises(UserError, match=f"validation_split={value} must be a share between 0 and 1"):
            RunOptions(task="pocket", validation_split=value).check()


@pytest.mark.long
def test_what_was_chosen_is_printed_and_in_the_results(
    own: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    best = "--load_best_model_at_end --eval_strategy steps --eval_steps 1 --save_steps 1 --validation_split 2"
    assert main([*of_steps(own, 2), "--output_dir", str(folder), *best.split()]) == 0
    results, shown = json.loads((folder / "results.json").read_text()), capsys.readouterr().out
    chosen = results["chosen"]
    assert chosen["metric"] == "eval_loss" and chosen["rows"] == 2 and chosen["step"] in (1, 2)
    assert f"chosen: the model of step {chosen['step']} of 2, by eval_loss" in shown
    shown = " ".join(shown.split())
    assert "on 2 validation rows" in shown and "7 training rows, 1 to report on" in shown
    assert ", 2 for evaluations during training" in shown
    assert results["after"]["n_task"] == 1
    state = json.loads((folder / f"checkpoint-{chosen['step']}" / "trainer_state.json").read_text())
    assert state["best_metric"] == pytest.approx(chosen["value"])
