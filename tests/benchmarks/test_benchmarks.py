"""The harness: no straw man (the plain version and TRL have our losses), a limit that does what it
must, the files it writes.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import field_weights, growth, limit, plain, shapes
from benchmarks import steps as stepping
from benchmarks.__main__ import main
from benchmarks.cases import generate
from benchmarks.measure import Samples, interleave, machine, measure
from benchmarks.options import Options
from benchmarks.settings import Star
from benchmarks.table import table
from unisd.kernels.attention import PACKED_SDPA
from unisd.scoring import prefix_sharing as prefixes

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base() -> Any:
    """A tiny model whose distributions differ between contexts."""
    model = shapes.build("tiny", CPU, torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8.0)
    return model


@pytest.fixture(scope="module")
def rows() -> list[shapes.Example]:
    return shapes.examples(320, 4, (8, 24), (3, 17), reference=6)


@pytest.mark.long
def test_the_plain_version_has_our_losses(base: Any, rows: list[shapes.Example]) -> None:
    """Three steps with a large learning rate: were a gradient different, the second loss would
    be.
    """
    steps = stepping.star_steps(base, rows, Star(learning_rate=3e-3, gamma=1.0, contrast=0.3, feature=0.1), 2)
    calls = {name: steps[name]() for name in ("ours", "plain")}
    found = {name: [call() for _ in range(3)] for name, call in calls.items()}
    assert found["ours"] == pytest.approx(found["plain"], rel=1e-5)
    assert found["ours"][0] > 0.1 and abs(found["ours"][2] / found["ours"][0] - 1) > 1e-3


def test_trl_has_our_losses(base: Any, rows: list[shapes.Example]) -> None:
    pytest.importorskip("trl", reason="TRL is measured here: pip install 'unisd[dev]'")
    steps = stepping.sdft_steps(base, rows, Star(), 2)
    assert steps["ours"]()() == pytest.approx(steps["trl full_logits"]()(), rel=1e-5)


def test_no_straw_man_and_no_monster() -> None:
    for module in (plain, limit):
        assert len(Path(module.__file__).read_text().splitlines()) <= 80, module.__name__
    assert "logits_to_keep" in Path(plain.__file__).read_text()


def test_the_limit_passes_each_token_once_and_projects_completions_only(
    base: Any, rows: list[shapes.Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    passed, projected = [], []
    project = limit.project
    monkeypatch.setattr(limit, "project", lambda h, w, n: projected.append(len(h)) or project(h, w, n))
    model = stepping.get_peft_model(shapes.twin(base), shapes.lora())
    teacher = stepping.Teacher(model, "ema")
    decoder = model.get_base_model().get_decoder()
    decoder.register_forward_pre_hook(
        lambda _m, _a, kwargs: passed.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    limit.star_step(model, teacher.in_place, [rows[:2], rows[2:]], chunk_tokens=5)
    views = sum(
        len(prompt) for row in rows for prompt in (row.student, row.teacher, row.negative, *row.auxiliary)
    )
    answers = sum(len(row.completion) for row in rows)
    # for the right and the wrong reference
    once = sum(len(row.student) for row in rows if len(row.student) >= prefixes.MIN_SHARED_TOKENS)
    assert once > 0 and sum(passed) == views + 6 * answers - once
    assert sum(projected) == 5 * answers  # the student's own projection is in the step, with its gradient
    gradients = {name for name, p in model.named_parameters() if p.grad is not None}
    assert gradients == {name for name, p in model.named_parameters() if p.requires_grad}


def test_packed_states_are_those_of_single_rows(base: Any, rows: list[shapes.Example]) -> None:
    base = shapes.twin(base)
    base.set_attn_implementation(PACKED_SDPA)
    jobs = [(row.teacher, row.completion) for row in rows]
    with torch.no_grad():
        together = limit.states(base.get_decoder(), jobs, CPU)
        alone = torch.cat([limit.states(base.get_decoder(), [job], CPU) for job in jobs])
        shared = limit.states(
            base.get_decoder(), [*jobs, *[(row.negative, row.completion) for row in rows]], CPU, share=True
        )
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shared[: len(alone)], alone, rtol=1e-4, atol=1e-4)


def test_twins_share_weights_but_not_adapters(base: Any) -> None:
    one, other = shapes.twin(base), shapes.twin(base)
    assert (
        all(a is b for a, b in zip(one.parameters(), other.parameters(), strict=True))
        and one.model is not other.model
    )


def test_memory_is_the_highest_point_of_the_call() -> None:
    samples = Samples()
    measure(lambda: float(torch.ones(25_000_000)[0]), CPU, samples)  # 100 MB, gone when it returns
    measure(lambda: 0.0, CPU, samples)
    assert 90 < samples.memories[0] < 120 and samples.memories[1] < 10


def test_rounds_are_interleaved_and_stop_in_time() -> None:
    calls: list[str] = []
    samples = interleave({n: lambda n=n: calls.append(n) or 0.0 for n in "ab"}, CPU, 3, 100.0, warm_up=False)
    assert calls == list("ababab") and len(samples["a"].times) == 3
    assert len(interleave({"a": lambda: 0.0}, CPU, 3, 0.0)["a"].times) == 1


CONTRACT = {
    "loss": {"time_vs_plain", "time_vs_trl", "extra_memory_vs_plain"},
    "step": {
        "sdft_time_vs_trl", "sdft_extra_memory_vs_trl", "star_time_vs_plain",
        "star_extra_memory_vs_plain", "star_time_vs_limit", "star_equal_time_vs_plain",
    },
    "score": {"time_vs_plain"},
    "generate": {"time_vs_plain"},
    "memory": {"predicted_vs_measured star"},
}  # fmt: skip


@pytest.mark.parametrize(
    "bench",
    [pytest.param(b, marks=pytest.mark.long if b in ("memory", "step") else []) for b in sorted(CONTRACT)],
)
def test_the_result_is_a_file_with_the_promised_ratios(bench: str, tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is measured here: pip install 'unisd[dev]'")
    file = tmp_path / "result.json"
    size = ["--shape", "tiny", "--tokens", "24", "--prompt", "8", "--completion", "8", "--repetitions", "1"]
    assert main([bench, "--json", str(file), *size]) == 0
    result = json.loads(file.read_text(encoding="utf-8"))
    assert result["bench"] == bench and result["machine"]["cores"] >= 1 and "torch" in result["versions"]
    for row in result["rows"]:
        assert row["time_s"] > 0 and row["extra_memory_mb"] >= 0 and isinstance(row["impl"], str)
    assert CONTRACT[bench] <= set(result["ratios"]) and all(value >= 0 for value in result["ratios"].values())
    page = table([result])
    assert (
        f"## {bench}" in page
        and all(f"| {row['impl']} |" in page for row in result["rows"])
        and result["command"] in page
    )


class Operations(TorchDispatchMode):
    """Counts what is computed, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.long
def test_no_loop_over_experts(monkeypatch: pytest.MonkeyPatch, rows: list[shapes.Example]) -> None:
    """A step of a mixture of experts has as many products for 8 experts as for 32, under LoRA."""
    counted = []
    for experts in (8, 32):
        small = replace(
            shapes.SHAPES["qwen3-moe-small"], hidden=64, layers=1, vocabulary=320, experts=experts
        )
        monkeypatch.setitem(shapes.SHAPES, "mixture", small)
        step = stepping.star_steps(shapes.build("mixture", CPU, torch.float32), rows, Star(), 2)["ours"]()
        with Operations() as operations:
            step()
        counted.append(operations.found)
    assert counted[0]["aten._grouped_mm.default"] == counted[1]["aten._grouped_mm.default"] > 0
    assert counted[0]["aten.mm.default"] == counted[1]["aten.mm.default"]


@pytest.mark.long
def test_all_writers_write_as_many_tokens() -> None:
    options = Options(
        shape="tiny", prompt=8, completion=8, repetitions=1, impls=("ours", "plain", "continuous")
    )
    rows, ratios = generate(options)
    assert len({row["value"] for row in rows}) == 1 and len(rows) == 3
    assert ratios["continuous_time_vs_ours"] > 0


@pytest.mark.long
def test_growth_along_every_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        growth, "AXES", {"K": [0, 2], "completion": [4, 8], "vocabulary": [320, 640], "rows": [2, 4]}
    )
    found, ratios = growth.growth(Options(shape="tiny", layers=1, prompt=4, repetitions=1))
    assert {(row["axis"], row["at"]) for row in found} == {
        (axis, at) for axis, values in growth.AXES.items() for at in values
    }
    by_axis = {
        axis: [row["passed_tokens"] for row in found if row["axis"] == axis and row["impl"] == "ours"]
        for axis in growth.AXES
    }
    assert (
        by_axis["rows"][1] == 2 * by_axis["rows"][0] and by_axis["vocabulary"][0] == by_axis["vocabulary"][1]
    )
    # rows x contexts x (context, prompt, completion)
    assert by_axis["K"][1] - by_axis["K"][0] == 4 * 2 * (32 + 4 + 64)
    assert {
        "slope_K_vs_limit",
        "slope_rows_vs_limit",
        "r2_completion",
        "memory_growth_vocabulary",
    } <= ratios.keys()
    assert "| K = 2 |" in table(
        [
            {
                "bench": "growth",
                "machine": machine(CPU),
                "versions": {},
                "command": "",
                "rows": found,
                "ratios": {},
            }
        ]
    )


def test_slope_and_linearity_of_a_line() -> None:
    assert growth.slope([(0, 1), (1, 3), (2, 5)]) == pytest.approx(2) and growth.linearity(
        [(0, 1), (1, 3), (2, 5)]
    ) == pytest.approx(1)
    assert growth.linearity([(0, 0), (1, 1), (2, 0), (3, 1)]) < 0.5


def test_the_cost_of_weights_is_measured_beside_its_own_reference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert all(other is None or other in field_weights.STEPS for _, other in field_weights.STEPS.values())
    steps = {name: field_weights.STEPS[name] for name in ("no weight", "dash")}
    monkeypatch.setattr(field_weights, "STEPS", steps)
    size = ["--shape", "tiny", "--prompt", "4", "--completion", "4", "--repetitions", "1"]
    field_weights.main([*size, "--threads", str(torch.get_num_threads())])
    lines = capsys.readouterr().out.splitlines()
    rows = {
        cells[1]: cells[2:4] for line in lines if len(cells := [cell.strip() for cell in line.split("|")]) > 3
    }
    assert lines[0].startswith("tiny, 16 loss tokens of 4 rows")
    for name, (_, other) in steps.items():
        assert float(rows[name][0]) > 0 and rows[name][1].endswith(f"of {other}" if other else "")
