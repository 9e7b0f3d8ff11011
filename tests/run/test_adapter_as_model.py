"""The folder of an adapter as the model of a run: that adapter is trained further, and measured
from where it began.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from tests.helpers.commands import ROWS
from unisd import testing as tiny
from unisd.cli.main import main
from unisd.models.load import load_model_and_tokenizer

SHORT = {
    "max_steps": "2",
    "max_completion_length": "6",
    "per_device_train_batch_size": "4",
    "gradient_accumulation_steps": "1",
    "learning_rate": "1e-2",
    "agreement": "none",
    "contrastive_weight": "0",
}


@pytest.fixture(scope="module")
def adapter_dir(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(load_model_and_tokenizer(str(model_dir))[0], config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def command(adapter_dir: Path, tmp_path: Path, *flags: str, **others: str) -> list[str]:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    given = {**SHORT, "train_file": str(file), "model_name_or_path": str(adapter_dir), **others}
    return ["train", *(word for name, value in given.items() for word in (f"--{name}", value)), *flags]


@pytest.mark.long
def test_it_is_trained_further_and_measured_from_where_it_began(
    adapter_dir: Path, model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(command(adapter_dir, tmp_path, "--output_dir", str(out), "--grader", "contains")) == 0
    assert f"written to {out}: the adapter, results.json" in capsys.readouterr().out
    was, now = (load_file(folder / "adapter_model.safetensors") for folder in (adapter_dir, out))
    assert was.keys() == now.keys() and not any(was[name].equal(now[name]) for name in was)
    info: Any = load_model_and_tokenizer(str(out))[2]
    assert info.adapter == str(out) and info.path == str(model_dir)
    results = json.loads((out / "results.json").read_text())
    assert results["model"] == str(adapter_dir)
    assert "PeftModel.from_pretrained" in (out / "README.md").read_text()
    # without a step there is no way from the adapter to itself, however far it is from its base
    same = tmp_path / "same"
    assert main(command(adapter_dir, tmp_path, "--output_dir", str(same), learning_rate="0")) == 0
    detail = json.loads((same / "results.json").read_text())["after"]["retention_detail"]
    for way in ("forward", "reverse"):
        assert detail[way]["jsd"] == pytest.approx(0, abs=1e-6), detail


@pytest.mark.parametrize("flags", [["--use_peft"], ["--use_peft", "--dry_run"]])
def test_a_new_adapter_on_it_is_refused(
    adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert main(command(adapter_dir, tmp_path, "--output_dir", str(tmp_path / "out"), *flags)) == 2
    error = capsys.readouterr().err
    assert f"error: {adapter_dir} is an adapter, which is trained further: leave --use_peft out" in error
    assert "unisd merge" in error
