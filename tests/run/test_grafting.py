"""The grafting curve: parts of what training changed, by `unisd train` and by `unisd eval`."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from unisd import UserError
from unisd.cli.main import main
from unisd.models.inference import load_any
from unisd.run import grafting
from unisd.run.resolve import parse

SHORT_SFT = ["--recipe", "sft", "--max_steps", "2", "--max_eval_rows", "8", "--learning_rate", "3e-3"]


def test_a_part_is_the_base_and_so_much_of_the_change(tmp_path: Path) -> None:
    base, _ = load_any("pocket")
    trained = AutoModelForCausalLM.from_pretrained(base.name_or_path)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    trained.save_pretrained(tmp_path / "trained")
    load_any("pocket")[1].save_pretrained(tmp_path / "trained")
    with grafting.part(str(tmp_path / "trained"), 0.25, "pocket") as place:
        part = dict(load_any(place)[0].named_parameters())
    assert not Path(place).exists() and not list(tmp_path.glob(".unisd*"))
    for (name, before), after in zip(base.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(part[name], 0.75 * before + 0.25 * after)


@pytest.mark.long
@pytest.mark.parametrize("adapter", [False, True])
def test_a_run_measures_parts_of_its_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], adapter: bool
) -> None:
    folder = tmp_path / "run"
    kind = ["--use_peft", "--lora_r", "4"] if adapter else []
    kept = ["--retention", "pocket", "general"] if adapter else []  # whose free prompts nobody grades
    assert (
        main(["train", *SHORT_SFT, *kind, *kept, "--graft_scales", "0.5", "--output_dir", str(folder)]) == 0
    )
    assert "part of the change" in capsys.readouterr().out
    results = json.loads((folder / "results.json").read_text())
    [curve] = grafting.read(folder)
    assert [point["scale"] for point in curve] == [0.0, 0.5, 1.0]
    assert [curve[0]["gold_ppl"], curve[2]["gold_ppl"]] == [
        results[when]["gold_ppl"] for when in ("before", "after")
    ]
    assert curve[1]["gold_ppl"] not in (curve[0]["gold_ppl"], curve[2]["gold_ppl"])
    assert all(len(point["correct"]["task"]) == 8 for point in curve)

    # another curve, on other rows, is added, and nothing of the first is lost
    assert main(["eval", "--model", str(folder), "--scales", "0.5", "--max_eval_rows", "4"]) == 0
    first, second = grafting.read(folder)
    assert first == curve and [point["scale"] for point in second] == [0.0, 0.5, 1.0]
    assert second[0]["task_accuracy"]["n"] == 4
    assert main(["report", str(folder)]) == 0
    page = (folder / "report.html").read_text()
    assert page.count("Parts of the change") == 2 and "of parts of the change" in page


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--graft_scales", "0.5", "1"], "graft_scales: 1 is not a part to measure"),
        (["--graft_scales", "0.5", "0.5"], "one is given twice"),
        (["--graft_scales", "0.5", "--accelerate_config", "ddp"], "measured by one process"),
    ],
)
def test_what_is_no_part_is_refused(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse([*SHORT_SFT, *flags])


def test_of_what_a_model_was_trained_is_known_or_asked_for(tmp_path: Path) -> None:
    def says(name: str) -> None:
        (tmp_path / "results.json").write_text(json.dumps({"config": {"model_name_or_path": name}}))

    with pytest.raises(UserError, match="give --base"):
        grafting.base_of(str(tmp_path), None)
    with pytest.raises(UserError, match="is not a folder"):
        grafting.base_of("some/model", "pocket")
    says("pocket")
    assert grafting.base_of(str(tmp_path), None) == "pocket"
    assert grafting.base_of(str(tmp_path), "other") == "other"
    says("gone/base")
    with pytest.raises(UserError, match=r"gone/base, which .* is not there: give --base"):
        grafting.base_of(str(tmp_path), None)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    says(str(adapter))
    assert grafting.base_of(str(adapter), None) is None
    (adapter / "results.json").write_text((tmp_path / "results.json").read_text())
    with pytest.raises(UserError, match="parts of both trainings"):
        grafting.base_of(str(adapter), None)
    with pytest.raises(UserError, match="leave --base out"):
        grafting.base_of(str(adapter), "pocket")


def test_what_a_killed_process_has_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left, busy = tmp_path / ".unisd-graft-999999999-x", tmp_path / f".unisd-graft-{os.getpid()}-x"
    left.mkdir()
    busy.mkdir()
    monkeypatch.setattr("unisd.run.merge.Merge", lambda *args, **options: args)
    monkeypatch.setattr("unisd.run.merge.merge", lambda asked, advance: [])
    with grafting.part(str(tmp_path), 0.5, "pocket") as place:
        assert not left.exists() and busy.exists() and Path(place).parent.parent == tmp_path
    assert [path.name for path in tmp_path.iterdir()] == [busy.name]


@pytest.mark.long
def test_a_curve_that_fails_takes_no_results_along(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fails(*args: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("unisd.run.merge.merge", fails)
    folder = tmp_path / "run"
    assert main(["train", *SHORT_SFT, "--graft_scales", "0.5", "--output_dir", str(folder)]) == 0
    assert (folder / "results.json").is_file() and not (folder / "grafting.json").exists()
    told = caplog.text + capsys.readouterr().err
    assert "No space left on device" in told and f"{folder} --scales 0.5" in told
