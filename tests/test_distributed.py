"""Two ranks take the same step as one: same samples, loss and gradients (through DDP's own averaging)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file

STEPS = 2


def train(folder: Path, micro_batches: int) -> None:
    from test_invariants import STAR, trainer

    built = trainer(
        folder, max_steps=STEPS, gradient_accumulation_steps=micro_batches, rows=tiny.rows(16), loss_aggregation="sequence",
        save_strategy="no", eval_strategy="no", weight_decay=0.0, optim="sgd", **STAR,
    )  # fmt: skip
    built.train()
    built.save_model()


@pytest.mark.parametrize("ranks", [2])
def test_ranks_change_nothing(tmp_path: Path, ranks: int) -> None:
    train(tmp_path / "one", micro_batches=4)
    code = tmp_path / "worker.py"
    code.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\nimport test_distributed\nfrom pathlib import Path\n"
        f"test_distributed.train(Path({str(tmp_path / 'two')!r}), micro_batches={4 // ranks})\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--standalone", str(code)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def lines(name: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    one, two = lines("one"), lines("two")
    assert len(one) == len(two) == STEPS
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for key in a.keys() - {key for key in a if key.startswith("step_time")}:
            assert a[key] == pytest.approx(b[key], rel=1e-3, abs=1e-5), key
    weights_one, weights_two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for key, value in weights_one.items():
        torch.testing.assert_close(value, weights_two[key], rtol=1e-4, atol=1e-6)
