"""Starts the same command in several processes: `unisd train --accelerate_config ddp`.

By accelerate, on a CPU by torchrun.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from unisd.errors import UserError
from unisd.run.options import RunOptions
from unisd.run.outputs import resume_command
from unisd.training.checkpoints import last_complete_checkpoint

STOP_TIMEOUT = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
"""Seconds that torchrun gives its processes after SIGTERM: for the end of a step and a save.

Its own default is 30.
"""

_ZERO = {
    "zero_stage": "ZERO_STAGE",
    "deepspeed_config_file": "CONFIG_FILE",
    "offload_optimizer_device": "OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "OFFLOAD_PARAM_DEVICE",
    "zero3_init_flag": "ZERO3_INIT",
    "zero3_save_16bit_model": "ZERO3_SAVE_16BIT_MODEL",
}
"""Options of accelerate's configuration, and the variables that carry them."""

_OF_STEPS = ("gradient_accumulation_steps", "gradient_clipping")

CONFIGS = Path(__file__).parent / "accelerate_configs"


def is_launched() -> bool:
    """Whether this is one of the processes of a distributed run."""
    return "LOCAL_RANK" in os.environ


def leave() -> None:
    """Let a process of a distributed run end, if this is one.

    A thread of gloo drops the tensors of the last exchange under Python's lock, and while Python
    shuts down that would abort the process. So it is given the lock first. The process group stays:
    an engine for rollouts takes its own part down as it is dropped.
    """
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(0.5)


def config_file(name: str) -> Path:
    """The accelerate configuration called `name`: of this package, or a file.

    Raises:
        UserError: there is none.
    """
    packaged = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    if name in packaged:
        return CONFIGS / f"{name}.yaml"
    if not Path(name).is_file():
        raise UserError(f"accelerate_config={name!r} is neither a file nor one of: {', '.join(packaged)}.")
    return Path(name)


def command(name: str, processes: int, arguments: Sequence[str], on_cpu: bool) -> list[str]:
    """What starts `unisd train ARGUMENTS` in so many processes of this machine."""
    file = config_file(name)
    if on_cpu:  # accelerate would start a single process
        starter = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    else:
        starter = [
            "accelerate.commands.launch",
            "--config_file",
            str(file),
            "--num_processes",
            str(processes),
        ]
    return [sys.executable, "-m", *starter, "-m", "unisd", "train", *arguments]


def _content(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load(config_file(name).read_text(encoding="utf-8")) or {}
    if content.get("distributed_type") == "DEEPSPEED" and find_spec("deepspeed") is None:
        raise UserError(
            f'accelerate_config={name} needs DeepSpeed: pip install "unisd[deepspeed]", or use fsdp2, which'
            " spreads as much as zero3."
        )
    if (content.get("num_machines") or 1) > 1:
        raise UserError(
            f"accelerate_config={name}: num_machines must be 1 here: for more use torchrun (docs/scale.md)."
        )
    return content


def processes_of(options: RunOptions) -> int | None:
    """How many processes were asked for, by the flag or else by the configuration.

    Raises:
        UserError: as `config_file`, or a configuration for several machines.
    """
    assert options.accelerate_config is not None
    asked: int | None = _content(options.accelerate_config).get("num_processes")
    return options.num_processes or asked


def shards_of(options: RunOptions) -> int:
    """Over how many devices the run will spread its weights."""
    if options.accelerate_config is None:
        return 1
    import torch

    processes = processes_of(options) or (
        torch.accelerator.device_count() if torch.accelerator.is_available() else 1
    )
    content = _content(options.accelerate_config)
    cut = (
        content.get("distributed_type") == "FSDP"
        or content.get("deepspeed_config", {}).get("zero_stage") == 3
    )
    return processes if cut else 1


def environment(name: str, on_cpu: bool) -> dict[str, str]:
    """What the processes need beside this one's environment.

    On a CPU, what accelerate's launcher would set for FSDP or DeepSpeed.

    Raises:
        UserError: as `config_file`.
    """
    content = _content(name)
    if not on_cpu:
        return {}
    if content.get("distributed_type") == "DEEPSPEED":
        found = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
        settings = content.get("deepspeed_config", {})
        found |= {
            f"ACCELERATE_DEEPSPEED_{_ZERO[key]}": _said(value)
            for key, value in settings.items()
            if key in _ZERO
        }
        return found | {
            f"ACCELERATE_{key.upper()}": _said(settings[key]) for key in _OF_STEPS if key in settings
        }
    if content.get("distributed_type") != "FSDP":
        return {}
    found = {"ACCELERATE_USE_FSDP": "true"}
    for option, value in content.get("fsdp_config", {}).items():
        variable = option.upper().replace("_LAYER_CLS_", "_CLS_")
        found[variable] = _said(value)
    return found


def _said(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def launch(options: RunOptions, output_dir: str) -> int:
    """Start the run, wait for it, and if a process died say how to go on; returns the exit code.

    Raises:
        UserError: unknown configuration, or more processes than devices.
    """
    import torch

    on_cpu = not torch.accelerator.is_available()
    devices = 1 if on_cpu else torch.accelerator.device_count()
    processes = processes_of(options) or devices
    if not on_cpu and processes > devices:
        raise UserError(
            f"num_processes={processes}, but this machine has {devices} accelerator(s): lower it."
        )
    assert options.accelerate_config is not None
    arguments = command(options.accelerate_config, processes, options.command, on_cpu)
    child = subprocess.Popen(
        arguments, env={STOP_TIMEOUT: "300", **os.environ, **environment(options.accelerate_config, on_cpu)}
    )
    told: list[int] = []

    def pass_on(number: int, frame: Any) -> None:
        told.append(number)
        if number == signal.SIGTERM:  # the terminal sends Ctrl-C to the children itself
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if told:
        return 130
    if code != 0:
        reason = "a process of the run ended early (the reason is above), so all were stopped"
        print(f"unisd: error: {reason}; {_how_on(options, output_dir)}", file=sys.stderr)
        return 2
    return 0


def _how_on(options: RunOptions, output_dir: str) -> str:
    if "output_dir" not in options.explicit:
        return (
            "if it had saved a checkpoint, the same command continues from there with"
            " --resume_from_checkpoint."
        )
    checkpoint = last_complete_checkpoint(output_dir)
    if checkpoint is None:
        return f"{output_dir} holds no checkpoint: fix the cause and start again."
    return f"resume from {checkpoint.name} with:\n  {resume_command(options, output_dir)}"
