"""A whole job beside TRL's, and the watch over a long one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import soak
from benchmarks.__main__ import main
from benchmarks.table import table
from benchmarks.whole_run import PHASES


@pytest.mark.long
def test_ours_and_trl_write_as_many_tokens_and_are_timed_by_phase(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is measured here: pip install 'unisd[dev]'")
    file = tmp_path / "result.json"
    size = ["--shape", "tiny", "--prompt", "8", "--completion", "6", "--batch", "2", "--accumulation", "2"]
    assert main(["run", "--json", str(file), *size]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    ours, default, trl = result["rows"]
    assert ours["tokens"] == default["tokens"] == trl["tokens"] == 2 * 2 * 6
    assert result["ratios"] == {
        f"tiny_6{side}_{what}_vs_trl": row[key] / trl[key]
        for side, row in (("", ours), ("_default", default))
        for what, key in (("time", "time_s"), ("memory", "peak_memory_mb"))
    }
    for row in result["rows"]:
        for seconds, suffix in (("time_s", "s"), ("cpu_s", "cpu_s")):
            parts = [row[f"{phase}_{suffix}"] for phase in (*PHASES, "other")]
            assert min(parts) > 0 and sum(parts) == pytest.approx(row[seconds])
        assert f"| {row['impl']} |" in table([result])


def test_prompts_of_a_soak_have_all_lengths_and_end_in_their_own_problem() -> None:
    rows = [{"prompt": f"p{i}.", "privileged_context": str(i)} for i in range(20)]
    found = soak.lengthened(rows)
    assert [len(row["prompt"].split()) for row in found] == [1 + i % soak.LONGEST for i in range(20)]
    assert all(row["prompt"].split()[-1] == f"p{i}." for i, row in enumerate(found))
    assert [row["privileged_context"] for row in found] == [row["privileged_context"] for row in rows]


def test_growth_of_a_soak_is_that_after_the_warm_up(tmp_path: Path) -> None:
    seen = [(10, 50.0, 3, 1, 9), (20, 100.0, 5, 2, 9), (30, 112.0, 5, 2, 9), (200, 110.0, 6, 2, 9)]
    growth = soak.grown(seen, 200)
    assert growth == pytest.approx({"memory": 0.1, "highest_memory": 0.12, "open_files": 1, "threads": 0})
    assert soak.grown(seen, 2000) is None
    soak.plot(seen, tmp_path / "soak.svg")
    assert "optimizer step" in (tmp_path / "soak.svg").read_text(encoding="utf-8")
