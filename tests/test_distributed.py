"""Several processes train as one: same samples, loss and weights; one that dies ends the run soon, and any number can resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tiny
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from test_invariants import STAR, trainer

from unisd import UserError, launch
from unisd.checkpoints import last_complete_checkpoint, problem_of
from unisd.parsing import parse

STEPS = 10


def build(folder: Path, micro_batches: int, lora: bool, **options: Any) -> Any:
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0) if lora else None
    settings = {
        "max_steps": STEPS,
        "num_train_epochs": 99,
        "gradient_accumulation_steps": micro_batches,
        "rows": tiny.rows(16),
        "peft_config": config,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    return trainer(folder, **{**settings, **STAR, **options})


def train(folder: Path, micro_batches: int, lora: bool) -> None:
    """A run that writes down what was sampled: {step: {row: token ids}}, one file per rank."""
    built = build(folder, micro_batches, lora, save_strategy="steps", save_steps=STEPS // 2)
    sampled: dict[int, dict[int, list[int]]] = {}
    rollout = built._rollout

    def recorded(numbers: Any) -> Any:
        rows, completions = rollout(numbers)
        sampled[built.state.global_step] = {row: c.ids for (row, _), c in zip(numbers, completions, strict=True)}
        return rows, completions

    built._rollout = recorded
    built.train()
    built.save_model()
    (folder / f"sampled-{built.accelerator.process_index}.json").write_text(json.dumps(sampled))


def everything_in(folder: Path, micro_batches: int) -> None:
    for lora in (False, True):
        train(folder / f"lora-{lora}", micro_batches, lora)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in one process and in two."""
    folder = tmp_path_factory.mktemp("runs")
    everything_in(folder / "one", 4)
    code = folder / "worker.py"
    code.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\nimport test_distributed\nfrom pathlib import Path\n"
        f"test_distributed.everything_in(Path({str(folder / 'two')!r}), 2)\n"
    )
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(code)]
    done = subprocess.run(starter, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def sampled(folder: Path) -> dict[str, dict[str, list[int]]]:
    found: dict[str, dict[str, list[int]]] = {}
    for file in folder.glob("sampled-*.json"):
        for step, rows in json.loads(file.read_text()).items():
            found.setdefault(step, {}).update(rows)
    return found


def apart(a: Path, b: Path) -> float:
    """Relative L2 distance of two saved sets of weights."""
    one, two = load_file(a), load_file(b)
    assert one.keys() == two.keys()
    distance = sum(float((one[name] - two[name]).square().sum()) for name in one)
    return (distance / sum(float(value.square().sum()) for value in one.values())) ** 0.5


@pytest.mark.parametrize("lora", [False, True])
def test_ranks_change_nothing(runs: Path, lora: bool) -> None:
    one, two = runs / "one" / f"lora-{lora}", runs / "two" / f"lora-{lora}"
    assert len(list(two.glob("sampled-*.json"))) == 2
    assert sampled(one) == sampled(two)
    assert len(sampled(one)) == STEPS and all(len(rows) == 8 for rows in sampled(one).values())
    a, b = lines(one), lines(two)
    assert len(a) == len(b) == STEPS
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-5)
    for first, second in zip(a, b, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {key for key in first if key.startswith("step_time")}:
            assert first[key] == pytest.approx(second[key], rel=1e-3, abs=1e-5), key
    norms = [
        [
            entry["grad_norm"]
            for entry in json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["log_history"]
        ]
        for folder in (one, two)
    ]
    assert norms[0][0] == pytest.approx(norms[1][0], rel=1e-5)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert apart(one / name, two / name) < 1e-4
    start = runs / "start"
    build(start, 4, lora).save_model(str(start))
    assert apart(start / name, one / name) > 1e-3  # they did move
    assert apart(one / f"checkpoint-{STEPS}" / "teacher.safetensors", two / f"checkpoint-{STEPS}" / "teacher.safetensors") < 1e-4


@pytest.mark.parametrize("lora", [False, True])
def test_one_process_resumes_what_two_have_saved(runs: Path, tmp_path: Path, lora: bool) -> None:
    checkpoint = runs / "two" / f"lora-{lora}" / f"checkpoint-{STEPS // 2}"
    assert problem_of(checkpoint) is None
    resumed = build(tmp_path, 4, lora)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    resumed.save_model()
    assert resumed.state.global_step == STEPS
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert apart(runs / "one" / f"lora-{lora}" / name, tmp_path / name) < 1e-4


def test_a_rank_that_is_killed_ends_the_run_soon_and_resuming_goes_on(tmp_path: Path) -> None:
    model, rows, out = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out"
    tiny.model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    rows.write_text(
        "".join(json.dumps({key: row[key] for key in ("prompt", "privileged_context")}) + "\n" for row in tiny.rows(10))
    )
    arguments = ["--train_file", str(rows), "--model_name_or_path", str(model), "--output_dir", str(out), "--recipe", "sdft"]
    arguments += [
        "--max_steps",
        "500",
        "--max_completion_length",
        "6",
        "--per_device_train_batch_size",
        "2",
        "--max_eval_rows",
        "1",
    ]
    arguments += ["--gradient_accumulation_steps", "1", "--save_steps", "2", "--save_total_limit", "2", "--learning_rate", "1e-4"]
    starter = [sys.executable, "-m", "unisd", "train", *arguments, "--accelerate_config", "ddp", "--num_processes", "2"]
    run = subprocess.Popen(starter, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 240
        while last_complete_checkpoint(out) is None:
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[1][-3000:]
            time.sleep(0.5)
        workers = [p for p in psutil.Process(run.pid).children(recursive=True) if p.environ().get("LOCAL_RANK") == "1"]
        os.kill(workers[0].pid, signal.SIGKILL)
        killed = time.monotonic()
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert time.monotonic() - killed < 60
    assert run.returncode == 2
    message = errors[errors.index("unisd: error: a process of the run has ended early") :]
    assert "resume from checkpoint-" in message and message.rstrip().endswith("--resume_from_checkpoint")
    assert "SIGKILL" in errors

    saved = last_complete_checkpoint(out, contents=True)
    assert saved is not None
    step = int(saved.name.rpartition("-")[2])
    from unisd.cli import main

    # On one process, to the next checkpoint.
    flags = [*arguments, "--max_steps", str(step + 1), "--gradient_accumulation_steps", "2", "--resume_from_checkpoint"]
    assert main(["train", *flags]) == 0
    assert [line["step"] for line in lines(out)] == list(range(1, step + 2))


def test_launch_commands_and_their_mistakes(tmp_path: Path) -> None:
    on_gpu = launch.command("ddp", 8, ["--recipe", "sdft"], on_cpu=False)
    assert on_gpu[1:4] == ["-m", "accelerate.commands.launch", "--config_file"] and Path(on_gpu[4]).is_file()
    assert on_gpu[5:] == ["--num_processes", "8", "-m", "unisd", "train", "--recipe", "sdft"]
    own = tmp_path / "mine.yaml"
    own.write_text("distributed_type: MULTI_GPU\n")
    assert launch.config_file(str(own)) == own
    for name, message in (("fsdp2", "not supported: use ddp"), ("zero3", "not supported"), ("dpp", "one of: ddp")):
        with pytest.raises(UserError, match=message):
            launch.config_file(name)
    with pytest.raises(UserError, match="num_processes belongs to accelerate_config"):
        parse(["--num_processes", "2"])


def test_packaged_configuration_is_one_that_accelerate_reads() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(launch.config_file("ddp")))
    assert str(config.distributed_type).endswith("MULTI_GPU") and config.mixed_precision == "no"


def test_process_on_a_cpu_never_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    from unisd import UniSDConfig

    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it would look for the other processes
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert UniSDConfig().use_cpu
    monkeypatch.delenv("LOCAL_RANK")
    assert not UniSDConfig().use_cpu


def test_module_is_the_command() -> None:
    texts = [
        subprocess.run(how, capture_output=True, text=True, timeout=60)
        for how in ([sys.executable, "-m", "unisd", "nonsense"], [sys.executable, "-m", "unisd.cli", "nonsense"])
    ]
    assert texts[0].returncode == texts[1].returncode == 2
    assert texts[0].stderr == texts[1].stderr and "unknown command 'nonsense'" in texts[0].stderr
