"""Gradient checkpointing is on where it is said to be, by the name that the installed transformers
reads.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from unisd import testing as tiny
from unisd.compat import fill_new_names, set_argument
from unisd.config import UniSDConfig

QUIET = """
import sys
import unisd
unisd.UniSDConfig("out", use_cpu=True)
kept = unisd.UniSDConfig("out", use_cpu=True, gradient_checkpointing=True,
                         gradient_checkpointing_kwargs={"use_reentrant": False})
assert kept.gradient_checkpointing and kept.gradient_checkpointing_kwargs == {"use_reentrant": False}
from unisd.cli import main
sys.exit(main(["train", "--recipe", "sdft", "--dry_run", "--use_cpu", "--gradient_checkpointing", "true"]))
"""


def layer_passes(trainer: Any) -> int:
    """How often a part of the first layer is computed in a step with gradient.

    (Hooks of the layer itself are called once, from transformers 5.24 on.)
    """
    trainer.args.max_steps = 1
    counted = []
    trainer.backbone.blocks()[0].mlp.register_forward_pre_hook(
        lambda module, _: counted.append(None) if module.training else None
    )
    trainer.train()
    return len(counted)


@pytest.mark.parametrize(
    "way", ["switched on", *(pytest.param(way, marks=pytest.mark.long) for way in ("off", "asked for"))]
)
def test_a_step_computes_its_layers_twice(way: str, tmp_path: Path) -> None:
    plain = layer_passes(tiny.trainer(tmp_path / "plain"))
    assert plain
    trainer = tiny.trainer(tmp_path / "run", gradient_checkpointing=way == "asked for")
    if way == "switched on":
        trainer.args = trainer.args.changed("memory is scarce", gradient_checkpointing=True)
        assert [change.name for change in trainer.args.changes] == ["gradient_checkpointing"]
    assert layer_passes(trainer) == plain * (1 if way == "off" else 2)


def test_arguments_have_one_value_by_all_of_their_names() -> None:
    args = UniSDConfig("out", use_cpu=True, gradient_checkpointing=True)
    set_argument(args, "gradient_checkpointing_kwargs", {"use_reentrant": True})
    found = {name: value for name, value in vars(args).items() if "checkpointing" in name}
    flags = {name: value for name, value in found.items() if not name.endswith("kwargs")}
    assert set(flags.values()) == {True}
    assert all(value == {"use_reentrant": True} for name, value in found.items() if name not in flags)


def test_the_new_name_comes_first() -> None:
    args = SimpleNamespace(
        gradient_checkpointing=False,
        gradient_checkpointing_kwargs={"a": 1},
        activation_checkpointing=True,
        activation_checkpointing_kwargs=None,
    )
    fill_new_names(args)
    assert args.activation_checkpointing and args.activation_checkpointing_kwargs == {"a": 1}
    assert not args.gradient_checkpointing  # transformers copies it back
    old = SimpleNamespace(gradient_checkpointing=False, gradient_checkpointing_kwargs=None)
    fill_new_names(old)
    set_argument(old, "gradient_checkpointing", True)
    assert vars(old) == {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": None}


@pytest.mark.long
def test_nothing_is_warned_of_at_a_start(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", QUIET],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert all(line.startswith("note: loading ") for line in done.stderr.splitlines()), done.stderr
