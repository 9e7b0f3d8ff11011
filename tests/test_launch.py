"""How several processes are started, and which ways of spreading weights over them are refused."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from accelerate.utils import FullyShardedDataParallelPlugin

from unisd import UserError, launch, sharding
from unisd.outputs import resume_command
from unisd.parsing import parse


def test_launch_commands_and_their_mistakes(tmp_path: Path) -> None:
    on_gpu = launch.command("ddp", 8, ["--recipe", "sdft"], on_cpu=False)
    assert on_gpu[1:4] == ["-m", "accelerate.commands.launch", "--config_file"] and Path(on_gpu[4]).is_file()
    assert on_gpu[5:] == ["--num_processes", "8", "-m", "unisd", "train", "--recipe", "sdft"]
    own = tmp_path / "mine.yaml"
    own.write_text("distributed_type: MULTI_GPU\n")
    assert launch.config_file(str(own)) == own
    for name, message in (("zero3", "DeepSpeed is not supported; fsdp2"), ("dpp", "one of: ddp, fsdp2")):
        with pytest.raises(UserError, match=message):
            launch.config_file(name)
    with pytest.raises(UserError, match="num_processes belongs to accelerate_config"):
        parse(["--num_processes", "2"])


def test_what_a_configuration_says_of_processes(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"

    def options(*flags: str) -> Any:
        return parse(["--use_cpu", *flags])[0]

    own.write_text("distributed_type: MULTI_GPU\nnum_processes: 3\n")
    assert launch.processes_of(options("--accelerate_config", str(own))) == 3
    assert launch.processes_of(options("--accelerate_config", str(own), "--num_processes", "2")) == 2
    assert launch.processes_of(options("--accelerate_config", "ddp")) is None
    sharded = ("--accelerate_config", "fsdp2", "--num_processes", "8")
    assert launch.shards_of(options(*sharded)) == 8 and launch.shards_of(options("--accelerate_config", str(own))) == 1
    own.write_text("num_machines: 2\n")
    with pytest.raises(UserError, match="num_machines must be 1 here: for more use torchrun"):
        launch.processes_of(options("--accelerate_config", str(own)))


def test_dry_run_refuses_what_the_run_would(capsys: pytest.CaptureFixture[str]) -> None:
    from unisd.cli import main

    assert main(["train", "--accelerate_config", "zero3", "--dry_run"]) == 2
    assert "DeepSpeed is not supported; fsdp2" in capsys.readouterr().err


def test_processes_get_time_to_save_before_they_are_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []

    class Child:
        def __init__(self, command: list[str], env: dict[str, str]) -> None:
            started.append(env)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(launch.subprocess, "Popen", Child)
    monkeypatch.delenv(launch.STOP_TIMEOUT, raising=False)
    options = parse(["--use_cpu", "--accelerate_config", "ddp", "--num_processes", "1"])[0]
    assert launch.launch(options, "out") == 0
    monkeypatch.setenv(launch.STOP_TIMEOUT, "900")  # the user's own
    assert launch.launch(options, "out") == 0
    assert [env[launch.STOP_TIMEOUT] for env in started] == ["300", "900"]


def test_command_that_resumes_names_the_newest_checkpoint_only(tmp_path: Path) -> None:
    for given in (("--resume_from_checkpoint", "old"), ("--resume_from_checkpoint=old",), ("--resume_from_checkpoint",), ()):
        options = parse([*given, "--seed", "1"])[0]
        expected = f"unisd train --seed 1 --output_dir {tmp_path} --resume_from_checkpoint"
        assert resume_command(options, tmp_path) == expected


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP")])
def test_packaged_configurations_are_ones_that_accelerate_reads(name: str, kind: str) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(launch.config_file(name)))
    assert str(config.distributed_type).endswith(kind) and config.mixed_precision == "no"


def test_processes_on_a_cpu_are_told_what_accelerates_launcher_would_tell_them(tmp_path: Path) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    assert launch.environment("ddp", on_cpu=True) == launch.environment("fsdp2", on_cpu=False) == {}
    own = tmp_path / "own.yaml"
    content = yaml.safe_load(launch.config_file("fsdp2").read_text())
    content["fsdp_config"]["fsdp_transformer_layer_cls_to_wrap"] = "A,B"
    own.write_text(yaml.safe_dump(content))
    ours = launch.environment(str(own), on_cpu=True)
    arguments = launch_command_parser().parse_args(
        ["--config_file", str(own), "--num_processes", "2", "--main_process_port", "0", "script.py"]
    )
    theirs = prepare_multi_gpu_env(_validate_launch_command(arguments)[0])
    own.write_text("distributed_type: DEEPSPEED\n")
    with pytest.raises(UserError, match="DeepSpeed is not supported; fsdp2"):
        launch.environment(str(own), on_cpu=True)
    assert len(ours) == 9 and ours == {name: theirs.get(name) for name in ours}


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        ({"fsdp_version": 1}, {}, "FSDP1 is not supported: set fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, {}, "fsdp_cpu_ram_efficient_loading is not supported"),
        ({"activation_checkpointing": True}, {}, "fsdp_activation_checkpointing is not supported: set gradient_checkpointing"),
        ({"cpu_offload": True}, {}, "fsdp_offload_params is not supported"),
        ({}, {"use_vllm": True}, "use_vllm does not work with FSDP yet"),
        ({}, {"fp16": True}, "fp16 is not supported with FSDP: use bf16"),
        (None, {}, "DeepSpeed is not supported; fsdp2"),
    ],
)
def test_ways_of_spreading_weights_that_are_refused(plugin: Any, options: dict[str, Any], message: str) -> None:
    plugins = {"fsdp_version": 2, "cpu_ram_efficient_loading": False} | (plugin or {})
    state = SimpleNamespace(distributed_type=None, fsdp_plugin=FullyShardedDataParallelPlugin(**plugins))
    built = SimpleNamespace(
        accelerator=SimpleNamespace(state=state),
        is_fsdp_enabled=plugin is not None,
        is_deepspeed_enabled=plugin is None,
        args=SimpleNamespace(**{"fp16": False, "use_vllm": False, "fsdp_plugin_args": None} | options),
    )
    with pytest.raises(UserError, match=message):
        sharding.set_up(built)


def test_process_on_a_cpu_never_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    from unisd import UniSDConfig

    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)  # it would look for the other processes
    monkeypatch.setattr(TrainingArguments, "n_gpu", 1)  # and so would this
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
