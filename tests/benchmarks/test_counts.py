"""What a step asks of a device is bounded, and counted as torch would tell of it; the script for a
GPU runs.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import counts

ROOT = Path(__file__).resolve().parents[2]

# of each: a code, and the operations and waits that it stands for
COUNTED = {
    "x + y": (1, []),
    "x.view(3, 1).T[0].unsqueeze(0)": (0, []),
    "torch.empty_like(x)": (0, []),
    "x[:0] + y[:0]": (0, []),
    "float(x.sum())": (1, ["value"]),
    "bool((x > 1).any())": (2, ["value"]),
    "x.cpu()": (1, ["copy to the host"]),
    "x.tolist()": (1, ["copy to the host"]),
    "torch.tensor([1.0, 2.0], device=x.device)": (1, ["copy to the device"]),
    "torch.ones(3).to(x.device, non_blocking=True)": (1, []),
    "x[x > 1]": (2, ["mask as index"]),
    "x[torch.tensor([0, 2])]": (1, ["index on the host"]),
    "x[torch.tensor([0, 2]).to(x.device, non_blocking=True)]": (2, []),
    "x.nonzero()": (1, ["nonzero"]),
    "torch.ones(3) + torch.ones(3)": (0, []),
    "torch._foreach_add_([x, y], 1.0)": (1, []),
    "torch.accelerator.synchronize()": (0, ["synchronize"]),
}
SMALL = """
import json, os, sys, torch
from benchmarks.pretend_device import Counting, register
device, counting, found = register(), Counting(), {}
with counting:
    x, y = torch.tensor([1.0, 2.0, 3.0]).to(device), torch.ones(3).to(device)
    for code in json.loads(sys.argv[1]):
        counting.operations.clear(), counting.wait_sites.clear()
        counting.active = True
        exec(code)
        counting.active = False
        found[code] = [sum(counting.operations.values()), [why for *_, why in counting.wait_sites]]
print(json.dumps(found), flush=True)
os._exit(0)
"""


def python(*arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    return done.stdout


@pytest.mark.long
def test_what_counts() -> None:
    assert json.loads(python("-c", SMALL, json.dumps(list(COUNTED)))) == {
        code: list(expected) for code, expected in COUNTED.items()
    }


@pytest.mark.long
def test_a_step_waits_once_from_the_students_first_pass_to_the_optimizer(tmp_path: Path) -> None:
    """Bounds are what was counted, with little room (docs/results/speed.md)."""
    python("-m", "benchmarks.counts", "--layers", "2", "--json", str(tmp_path / "counts.json"))
    found = json.loads((tmp_path / "counts.json").read_text(encoding="utf-8"))
    assert found["waits"]["student"] == 1  # the guard's
    assert found["waits"]["update"] == 1  # the metrics'
    assert found["waits"]["score"] <= 5
    most = {"score": 300, "student": 1500, "update": 40}
    assert {phase: n for phase, n in found["operations"].items() if n > most[phase]} == {}
    on_cpu = counts.trainer(torch.device("cpu"), layers=2)
    on_cpu.train()
    assert found["losses"] == pytest.approx(counts.losses_of(on_cpu), rel=1e-4)


@pytest.mark.long
def test_the_script_for_a_gpu_runs_on_a_cpu(tmp_path: Path) -> None:
    env = {**os.environ, "TINY": "1", "PYTHON": sys.executable, "PYTHONPATH": str(ROOT / "src")}
    script = subprocess.run(
        ["bash", "benchmarks/gpu.sh", str(tmp_path)], capture_output=True, text=True, cwd=ROOT, env=env
    )
    parts = [json.loads(line) for line in (tmp_path / "parts.jsonl").read_text(encoding="utf-8").splitlines()]
    logs = {
        part["part"]: (tmp_path / f"{part['part']}.log").read_text()[-500:] for part in parts if part["exit"]
    }
    assert script.returncode == 0 and not logs, logs
    names = {"loss", "step-0.5b", "step-0.5b-long-passes", "step-7b", "generate"}
    assert {part["part"] for part in parts} == names | {"tests", "run"}
    for name in names:
        assert json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8"))["rows"], name
    assert (tmp_path / "run" / "results.json").is_file()
