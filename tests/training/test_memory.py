"""The memory plan: its formulae, what a real step takes, and when gradient checkpointing is
chosen.
"""

from __future__ import annotations

import logging
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import cases
from benchmarks.options import Options
from experiments.grid import run_apart
from unisd import memory
from unisd import testing as tiny
from unisd.kernels import cpu_linear
from unisd.kernels import cpu_memory as heap
from unisd.kernels.cpu_linear import kernel_bytes
from unisd.memory import ModelSize, available, estimate, wants_checkpointing
from unisd.run import train as run
from unisd.run.resolve import parse


def config(*options: str) -> Any:
    return parse(["--model_name_or_path", "some/model", "--recipe", "unisd-star", "--use_cpu", *options])[1]


SIZE = ModelSize(1000, 100, 2.0, 4.0, hidden=8, layers=2, vocabulary=50, intermediate=20, key_value=4)


def test_other_copies_of_the_student_are_counted() -> None:
    options = ["--completion_source", "initial", "--refresh_rollouts_every", "4"]
    assert estimate(SIZE, config(*options))["teacher"] == estimate(SIZE, config())["teacher"] + 400


def test_the_estimate_follows_its_formulae() -> None:
    settings = config("--max_completion_length", "100")
    sizes = estimate(SIZE, settings, prompt_tokens=20)
    assert (sizes["weights"], sizes["gradients"], sizes["optimizer"], sizes["teacher"]) == (
        2000,
        400,
        800,
        400,
    )
    assert sizes["teacher_states"] == 16 * 100 * 8 * 2
    assert sizes["logits"] == 2 * 4 * 4 * 100 * 50
    layer = 4 * 120 * 2 * (13 * 8 + 5 * 20)
    assert sizes["activations"] == 2 * layer
    assert sizes["rollout"] == 16 * (2 * 120 * 4 * 2 * 2 + 24 * 50)
    assert sizes["student"] == 400 + sizes["teacher_states"] + 2 * layer + sizes["logits"]
    assert sizes["kernels"] == kernel_bytes(torch.device("cpu"))
    assert sizes["total"] == 3200 + sizes["kernels"] + max(
        sizes[phase] for phase in ("rollout", "scoring", "student")
    )
    settings.gradient_checkpointing = True
    sizes = estimate(SIZE, settings, prompt_tokens=20)
    assert sizes["activations"] == 4 * 120 * 2 * 8 * 2
    assert sizes["student"] == 400 + sizes["teacher_states"] + sizes["activations"] + max(
        sizes["logits"], layer
    )
    settings.teacher_model_kind = "live"
    assert estimate(SIZE, settings)["teacher"] == 0
    assert (
        estimate(replace(SIZE, merged=300), settings)["rollout"] == estimate(SIZE, settings)["rollout"] + 300
    )


def test_what_is_spread_over_devices_is_divided_and_what_is_gathered_is_added() -> None:
    settings = config("--max_completion_length", "100")
    one, four = (estimate(SIZE, settings, prompt_tokens=20, shards=shards) for shards in (1, 4))
    for name in ("weights", "gradients", "optimizer", "teacher"):
        assert four[name] * 4 == one[name]
    assert four["gathered"] == 2 * (3 * 50 * 8 + 2 * 1000 / 2)
    assert four["scoring"] == one["scoring"] + 100  # the student's trained weights, put aside
    assert all(four[name] == one[name] for name in ("teacher_states", "activations", "logits", "rollout"))


def test_flat_in_the_vocabulary_once_a_chunk_is_full() -> None:
    def at(vocabulary: int, *options: str) -> int:
        return estimate(
            ModelSize(1000, 100, 2.0, 4.0, hidden=8, layers=2, vocabulary=vocabulary), config(*options)
        )["logits"]

    assert (
        at(100_000)
        == at(400_000)
        < at(100_000, "--loss_implementation", "plain")
        < at(400_000, "--loss_implementation", "plain")
    )


def planned(name: str) -> dict[str, Any]:
    options = Options(
        shape="llama-32k", layers=3, prompt=24, completion=40, batch=4, accumulation=1, impls=(name,)
    )
    rows, ratios = cases.memory_plan(options)
    return {"rows": rows, "ratios": ratios}


@pytest.mark.long
@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_step_takes_what_was_predicted(checkpointing: bool) -> None:
    """Weights, optimizer, teacher and one UniSD* step of a small model with a large head, within
    the promised 20 %.

    In a process of its own: what other tests have left in this one's heap is not part of the plan.
    """
    name = "star" if checkpointing else "star, no checkpointing"
    found = run_apart(planned, name)
    assert found["rows"][0]["extra_memory_mb"] > 300
    assert found["ratios"][f"predicted_vs_measured {name}"] == pytest.approx(1, abs=0.2)


def test_checkpointing_is_chosen_where_the_step_would_not_fit() -> None:
    settings = config()
    sizes = estimate(SIZE, settings, 20)
    needed = sizes["total"] - sizes["weights"]
    assert wants_checkpointing(SIZE, settings, 20, needed) and not wants_checkpointing(
        SIZE, settings, 20, 2 * needed
    )
    settings.feature_layers = [0]
    assert not wants_checkpointing(SIZE, settings, 20, 1)


def test_the_user_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.memory, "available", lambda device: 1)
    monkeypatch.setattr(run.memory.ModelSize, "of", lambda model: SIZE)
    monkeypatch.setattr(run, "longest_prompt", lambda trainer: 20)
    trainer: Any = type("Trainer", (), {"model": None})
    for given, expected in (((), True), (("--gradient_checkpointing", "false"), False)):
        options, settings = parse(
            ["--model_name_or_path", "some/model", "--recipe", "unisd-star", "--use_cpu", *given]
        )
        found = run._within_memory(trainer, options, settings)
        assert found.gradient_checkpointing is expected and not settings.gradient_checkpointing
        assert [change.name for change in found.changes] == ["gradient_checkpointing"] * expected


def test_free_memory_is_known_on_a_cpu() -> None:
    free = available(torch.device("cpu"))
    assert free is None or free > 1 << 20


def test_free_memory_of_a_cpu_is_within_a_containers_limit_and_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in (("max", "1000\n"), ("current", "700\n"), ("stat", "anon 500\ninactive_file 100\n")):
        (tmp_path / f"memory.{name}").write_text(content)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert available(torch.device("cpu")) == 400
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available(torch.device("cpu")) == 100
    (tmp_path / "memory.max").write_text("max\n")
    assert (available(torch.device("cpu")) or 1 << 20) > 1 << 16


def test_checkpointing_is_chosen_on_all_ranks_if_on_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.memory, "available", lambda device: 1 << 60)
    monkeypatch.setattr(run.memory.ModelSize, "of", lambda model: SIZE)
    monkeypatch.setattr(run, "longest_prompt", lambda trainer: 20)
    monkeypatch.setattr(run, "on_any_rank", lambda mine, world_size: not mine)  # another rank's answer
    options, settings = parse(["--model_name_or_path", "some/model", "--recipe", "unisd-star", "--use_cpu"])
    trainer: Any = type("Trainer", (), {"model": None})
    assert run._within_memory(trainer, options, settings).gradient_checkpointing


FAULTS = """
import torch
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from unisd.kernels import cpu_linear
from unisd.kernels import cpu_memory as heap
from unisd.kernels.cpu_linear import kernel_bytes

def faults():
    before = getrusage(RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(16 << 20)  # 64 MiB, which are 16,384 pages
    return getrusage(RUSAGE_SELF).ru_minflt - before

def in_heap(x):
    line = next(line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("[heap]"))
    first, last = (int(end, 16) for end in line.split()[0].split("-"))
    return int(first <= x.data_ptr() < last)

def resident():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))

mapped = faults()
with heap.keep_freed_memory(torch.device("cpu")):
    faults()
    kept = faults()
    print(mapped, kept, in_heap(torch.ones(1 << 18)), in_heap(heap.own_block((1 << 18,), torch.float32)))
    before = resident()  # with 64 MiB that are free
    small = heap.passing_block((2 << 20,), torch.float32).zero_()
    beside = resident() - before
    large = heap.passing_block((16 << 20,), torch.float32).zero_()
    print(beside, resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="an option of glibc")
@pytest.mark.long
def test_freed_memory_is_used_again_and_what_stays_lies_apart() -> None:
    run = subprocess.run([sys.executable, "-c", FAULTS], capture_output=True, text=True, check=True)
    mapped, kept, *places, beside, instead = map(int, run.stdout.split())
    assert kept <= 16_384 < mapped  # in the second case nine blocks more had to be asked for
    assert places == [1, 0]
    assert beside == pytest.approx(8192, abs=1024)  # KiB
    assert instead < beside + 1024  # 64 MiB more took the place of others


def test_outputs_in_own_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("llama")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    copied: list[Any] = []
    own_block = heap.own_block
    monkeypatch.setattr(
        heap, "own_block", lambda shape, dtype: copied.append(tuple(shape)) or own_block(shape, dtype)
    )

    def gradients() -> list[torch.Tensor]:
        model.train().zero_grad()
        model(input_ids=torch.arange(20)[None]).logits.square().sum().backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients()
    with heap.outputs_in_own_blocks(model.model.layers):
        apart = gradients()
        with torch.no_grad():
            model(input_ids=torch.arange(20)[None])
    assert all(torch.equal(a, b) for a, b in zip(apart, plain, strict=True))
    assert copied == [(1, 20, 32)] * 2  # when they are computed again, it ends before
    gradients()
    assert len(copied) == 2


def test_own_blocks() -> None:
    x = torch.arange(6, dtype=torch.bfloat16).view(2, 3).requires_grad_()
    copy = heap.own_block(x.shape, x.dtype).copy_(x)
    assert torch.equal(copy, x) and copy.dtype == x.dtype
    (copy * 2).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, torch.full_like(x, 2))
    assert heap.own_block((0, 3), torch.float32).shape == (0, 3)
    with pytest.raises(MemoryError, match="no mapping of 4611686018427387904 bytes"):
        heap.own_block((1 << 60,), torch.float32)


def gemma(kind: str) -> Any:
    """Gemma 3n names an MLP size for each layer, Gemma 4 heads of two kinds."""
    import transformers

    own = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 262, "hidden_size_per_layer_input": 4}
    of_kind = {"laurel_rank": 4} if kind == "Gemma3n" else {"global_head_dim": 16}
    config = getattr(transformers, f"{kind}TextConfig")(**tiny.SIZES, head_dim=8, **own, **of_kind)
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize("kind", ["Gemma3n", "Gemma4"])
def test_sizes_by_layer(kind: str) -> None:
    size = ModelSize.of(gemma(kind))
    assert (size.hidden, size.layers, size.intermediate, size.vocabulary) == (32, 2, 48, 262)
    assert size.key_value == 2 * (8 if kind == "Gemma3n" else 16)
    assert estimate(size, config())["total"] > 0


def test_an_estimate_never_ends_a_run(caplog: Any) -> None:
    model = tiny.model()
    known = ModelSize.of(model)
    vars(model.config).update(intermediate_size={"a": 1}, num_hidden_layers=None)
    with caplog.at_level(logging.WARNING):
        size = ModelSize.of(model)
    assert size == replace(known, intermediate=0)
    assert "The memory estimate does not know intermediate_size={'a': 1} of this model" in caplog.text
    assert estimate(size, config())["total"] > 0


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux which pages are those of a file")
def test_weights_as_in_their_file_give_their_memory_back_and_changed_ones_do_not(tmp_path: Path) -> None:
    whole = {name: torch.full((1 << 21,), value) for name, value in (("base", 1.0), ("changed", 2.0))}
    save_file(whole, str(tmp_path / "model.safetensors"))
    found = load_file(str(tmp_path / "model.safetensors"))
    found["changed"][1 << 20] = 7.0
    assert float(found["base"].sum()) == 1 << 21  # read, so that it is held
    held = []
    for tensor in (found["base"], found["changed"], torch.ones(1 << 21)):
        before = psutil.Process().memory_info().rss
        expected = tensor.clone() if tensor is not found["base"] else whole["base"]
        middle = psutil.Process().memory_info().rss
        heap.give_back_unchanged(tensor)
        held.append(middle - psutil.Process().memory_info().rss)
        assert torch.equal(tensor, expected) and before > 0
    assert held[0] > 7 << 20 and max(held[1:]) < 1 << 20


def kernels_kept(shapes: int) -> float:
    """MiB that kernels of so many shapes leave in this process."""
    weight, x = torch.randn(512, 64), torch.ones(64 * shapes, 64)
    cpu_linear.matmul_nt(x, weight)
    heap.give_back()
    before = psutil.Process().memory_info().rss
    for i in range(1, shapes):
        cpu_linear.matmul_nt(x[: 64 * i], weight)
    heap.give_back()
    return (psutil.Process().memory_info().rss - before) / 2**20


@pytest.mark.long
@pytest.mark.skipif(not cpu_linear._has_onednn(), reason="this processor's torch has no oneDNN")
def test_kernels_of_many_shapes_take_no_more_than_is_planned() -> None:
    found = run_apart(kernels_kept, 400)
    assert found < kernel_bytes(torch.device("cpu")) / 2**20
