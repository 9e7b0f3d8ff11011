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

from unisd import UserError
from unisd.distributed import sharding, zero
from unisd.run import launch
from unisd.run.outputs import resume_command
from unisd.run.resolve import parse


def test_launch_commands_and_their_mistakes(tmp_path: Path) -> None:
    on_gpu = launch.command("ddp", 8, ["--recipe", "sdft"], on_cpu=False)
    assert on_gpu[1:4] == ["-m", "accelerate.commands.launch", "--config_file"] and Path(on_gpu[4]).is_file()
    assert on_gpu[5:] == ["--num_processes", "8", "-m", "unisd", "train", "--recipe", "sdft"]
    own = tmp_path / "mine.yaml"
    own.write_text("distributed_type: MULTI_GPU\n")
    assert launch.config_file(str(own)) == own
    with pytest.raises(UserError, match="one of: ddp, fsdp2, zero2, zero3"):
        launch.config_file("dpp")
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
    assert (
        launch.shards_of(options(*sharded)) == 8
        and launch.shards_of(options("--accelerate_config", str(own))) == 1
    )
    own.write_text("num_machines: 2\n")
    with pytest.raises(UserError, match="num_machines must be 1 here: for more use torchrun"):
        launch.processes_of(options("--accelerate_config", str(own)))


def test_dry_run_refuses_what_the_run_would(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from unisd.cli.main import main

    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setattr(launch, "find_spec", lambda name: None)
    assert main(["train", "--accelerate_config", "zero3", "--dry_run"]) == 2
    assert (
        'accelerate_config=zero3 needs DeepSpeed: pip install "unisd[deepspeed]"' in capsys.readouterr().err
    )


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
    for given in (
        ("--resume_from_checkpoint", "old"),
        ("--resume_from_checkpoint=old",),
        ("--resume_from_checkpoint",),
        (),
    ):
        options = parse([*given, "--seed", "1"])[0]
        expected = f"unisd train --seed 1 --output_dir {tmp_path} --resume_from_checkpoint"
        assert resume_command(options, tmp_path) == expected


@pytest.mark.parametrize(("name", "kind"), [("ddp", "MULTI_GPU"), ("fsdp2", "FSDP"), ("zero2", "DEEPSPEED")])
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
    assert len(ours) == 9 and ours == {name: theirs.get(name) for name in ours}


@pytest.mark.parametrize(
    ("plugin", "options", "message"),
    [
        ({"fsdp_version": 1}, {}, "FSDP1 is not supported: set fsdp_version: 2"),
        ({"cpu_ram_efficient_loading": True}, {}, "fsdp_cpu_ram_efficient_loading is not supported"),
        (
            {"activation_checkpointing": True},
            {},
            "fsdp_activation_checkpointing is not supported: set gradient_checkpointing",
        ),
        ({"cpu_offload": True}, {}, "fsdp_offload_params is not supported"),
        ({}, {"use_vllm": True}, "use_vllm does not work with FSDP yet"),
        ({}, {"fp16": True}, "fp16 is not supported with FSDP: use bf16"),
    ],
)
def test_ways_of_spreading_weights_that_are_refused(
    plugin: Any, options: dict[str, Any], message: str
) -> None:
    plugins = {"fsdp_version": 2, "cpu_ram_efficient_loading": False} | (plugin or {})
    state = SimpleNamespace(distributed_type=None, fsdp_plugin=FullyShardedDataParallelPlugin(**plugins))
    built = SimpleNamespace(
        accelerator=SimpleNamespace(state=state),
        is_fsdp_enabled=True,
        is_deepspeed_enabled=False,
        args=SimpleNamespace(**{"fp16": False, "use_vllm": False, "fsdp_plugin_args": None} | options),
    )
    with pytest.raises(UserError, match=message):
        sharding.set_up(built)


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_processes_on_a_cpu_are_told_of_deepspeed_too(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env

    monkeypatch.setattr(launch, "find_spec", lambda name: "there")
    arguments = [
        "--config_file",
        str(launch.config_file(name)),
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
        "script.py",
    ]
    monkeypatch.setattr("accelerate.utils.launch.is_port_in_use", lambda port: False)
    validated = _validate_launch_command(launch_command_parser().parse_args(arguments))[0]
    validated.deepspeed_fields_from_accelerate_config = ""
    theirs = prepare_deepspeed_cmd_env(validated)[1]
    ours = launch.environment(name, on_cpu=True)
    assert ours.pop("DS_ACCELERATOR") == "cpu"
    assert len(ours) == 5 and ours == {variable: theirs.get(variable) for variable in ours}
    assert launch.environment(name, on_cpu=False) == {}
    own = tmp_path / "own.yaml"
    content = yaml.safe_load(launch.config_file(name).read_text())
    content["deepspeed_config"] = {"deepspeed_config_file": "/Home/DS.json", "gradient_clipping": 0.5}
    own.write_text(yaml.safe_dump(content))
    assert launch.environment(str(own), on_cpu=True)["ACCELERATE_DEEPSPEED_CONFIG_FILE"] == "/Home/DS.json"
    assert launch.environment(str(own), on_cpu=True)["ACCELERATE_GRADIENT_CLIPPING"] == "0.5"
    shards = launch.shards_of(parse(["--use_cpu", "--accelerate_config", name, "--num_processes", "2"])[0])
    assert shards == (2 if name == "zero3" else 1)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"zero_optimization": {"stage": 0}}, {}, "zero_stage 0 is not supported: use accelerate_config=ddp"),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}},
            {},
            "offload_param is not supported: set its device",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            {},
            "offload_optimizer is not supported",
        ),
        (
            {"zero_optimization": {"stage": 2}, "optimizer": {}},
            {},
            "an optimizer or scheduler of its own .* set optim and lr_sch",
        ),
        ({"zero_optimization": {"stage": 2}}, {"fp16": True}, "fp16 is not supported: use bf16"),
        (
            {"zero_optimization": {"stage": 2}},
            {"use_vllm": True},
            "use_vllm is not supported: use accelerate_config=ddp",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            {},
            "zero_hpz_partition_size is not supported: set it to 1",
        ),
        (
            {"zero_optimization": {"stage": 3, "mics_shard_size": 2}},
            {},
            "mics_shard_size is not supported: unset it",
        ),
    ],
)
def test_ways_of_using_deepspeed_that_are_refused(
    settings: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    plugin = SimpleNamespace(deepspeed_config=settings)
    built = SimpleNamespace(
        accelerator=SimpleNamespace(state=SimpleNamespace(distributed_type=None, deepspeed_plugin=plugin)),
        is_fsdp_enabled=False,
        is_deepspeed_enabled=True,
        args=SimpleNamespace(**{"fp16": False, "use_vllm": False, "gradient_checkpointing": False} | options),
    )
    with pytest.raises(UserError, match=message):
        sharding.set_up(built)


def test_checkpoint_of_deepspeed_is_for_the_same_stage_and_as_many_processes(tmp_path: Path) -> None:
    zero.require_resumable(tmp_path, None, 2)
    with pytest.raises(
        UserError,
        match="was written with no DeepSpeed and this run has zero2: resume with the accelerate_config",
    ):
        zero.require_resumable(tmp_path, 2, 2)
    (tmp_path / "global_step4").mkdir()
    for rank in (0, 1):
        (tmp_path / "global_step4" / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    (tmp_path / "global_step4" / "mp_rank_00_model_states.pt").touch()
    zero.require_resumable(tmp_path, 2, 2)
    with pytest.raises(
        UserError, match="parts of 2 processes and this run has 3: resume with as many, or start a new run"
    ):
        zero.require_resumable(tmp_path, 2, 3)
    for stage, now in ((3, "zero3"), (None, "no DeepSpeed")):
        with pytest.raises(UserError, match=f"was written with zero2 and this run has {now}"):
            zero.require_resumable(tmp_path, stage, 2)
    (tmp_path / "global_step4" / "zero_pp_rank_0_mp_rank_00_model_states.pt").touch()
    zero.require_resumable(tmp_path, 3, 2)


def test_filling_of_a_part_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    like = SimpleNamespace(ds_tensor=torch.zeros(3), ds_numel=5)
    for rank, size in ((0, 3), (1, 2), (2, 0)):
        monkeypatch.setattr(zero.dist, "get_rank", lambda rank=rank: rank)
        assert len(sharding.owned(torch.ones(3), like)) == size  # type: ignore[arg-type]
    plain = torch.ones(3)
    assert sharding.owned(plain, torch.ones(3)) is plain


def test_process_on_a_cpu_never_trains_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    from unisd import UniSDConfig

    # it would look for the other processes
    monkeypatch.setattr(TrainingArguments, "__post_init__", lambda self: None)
    monkeypatch.setattr(TrainingArguments, "n_gpu", 1)  # and so would this
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert UniSDConfig().use_cpu
    monkeypatch.delenv("LOCAL_RANK")
    assert not UniSDConfig().use_cpu


def test_module_is_the_command() -> None:
    how = [sys.executable, "-m", "unisd", "nonsense"]
    done = subprocess.run(how, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "unknown command 'nonsense'" in done.stderr
