"""Several processes train as one, with a whole model each (DDP, ZeRO-2) or shards of one (FSDP2,
ZeRO-3): same samples, loss and weights.

One that dies ends the run soon, and any number can resume.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import StateDictType
from transformers import AutoModelForCausalLM

from tests.families import zoo
from tests.helpers.steps import STAR
from unisd import testing as tiny
from unisd.distributed import sharding
from unisd.distributed import zero as zero_stages
from unisd.models.load import load_model_and_tokenizer
from unisd.run import launch
from unisd.tasks import get
from unisd.tasks.base import Verdict
from unisd.testing import trainer
from unisd.training.checkpoints import last_complete_checkpoint, problem_of
from unisd.training.step import rows_to_fill

STEPS = {"one": 10, "ddp": 10, "fsdp": 4}
"""Of the runs on the tiny model; on the pocket (with `-m real`) all make 10."""
# What looks at the model in other ways: several generations, listed layers, other teachers' heads,
# agreement on some rows.
OTHERS: dict[str, Any] = {
    "target": "geometric:source=base/plain",
    "num_generations": 2,
    "per_device_train_batch_size": 1,
    "feature_layers": [0],
    "agreement_uncertain_share": 0.5,
    "max_steps": 2,
}


# Answers are judged: teachers are told of others of the group, some answers carry no loss.
JUDGED: dict[str, Any] = {
    "num_generations": 4,
    "per_device_train_batch_size": 1,
    "rollout_contexts": ["sibling+feedback", "sibling", "feedback", "none"],
    "rollout_keep": "mixed_groups",
    "max_steps": 3,
}


def by_their_letters(row: dict[str, Any], text: str) -> Verdict:
    """A verdict that any process gives alike."""
    rest = sum(map(ord, text)) % 3
    return Verdict(rest / 2, rest == 2, f"the letters leave {rest}" if rest == 1 else "")


def build(folder: Path, micro_batches: int, lora: bool, pocket: bool = False, **options: Any) -> Any:
    """16 rows, a step of 8 over all processes; a tiny random model, or the pocket on its own
    task.
    """
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.0) if lora else None
    settings = {
        "max_steps": STEPS["one"],
        "num_train_epochs": 99,
        "gradient_accumulation_steps": micro_batches,
        "train_dataset": tiny.rows(16),
        "peft_config": config,
        "optim": "sgd",
        "learning_rate": 0.1,
    }
    if pocket:
        model, tokenizer, _ = load_model_and_tokenizer("pocket")
        settings |= {
            "model": model,
            "processing_class": tokenizer,
            "train_dataset": get("pocket").load("train", limit=16),
        }
        settings |= {"learning_rate": 1.0, "max_completion_length": 16}
    return trainer(folder, **{**settings, **STAR, **options})


def train(folder: Path, kind: str, lora: bool, pocket: bool) -> None:
    """A run that writes down what was sampled: {step: {row: token ids}}, one file per rank.

    The last two steps are saved, or all.
    """
    steps = STEPS["one" if pocket else kind]
    options = {"max_steps": steps, "save_strategy": "steps", "save_steps": 1 if kind == "one" else steps - 1}
    built = build(folder / kind / f"lora-{lora}", 4 if kind == "one" else 2, lora, pocket, **options)
    folder = Path(built.args.output_dir)
    sampled: dict[int, dict[int, list[int]]] = {}
    rollout = built._rollout

    def recorded(numbers: Any) -> Any:
        completions = rollout(numbers)
        sampled[built.state.global_step] = {
            row: c.ids for (row, _), c in zip(numbers, completions, strict=True)
        }
        return completions

    built._rollout = recorded
    built.train()
    built.save_model()
    rank = built.accelerator.process_index
    (folder / f"sampled-{rank}.json").write_text(json.dumps(sampled))
    held = [sum(value.numel() for value in built.teacher.state.values())]
    held += [sum(sharding.local_shard(p).numel() for p in built.model.parameters())]
    (folder / f"held-{rank}.json").write_text(json.dumps(held))


def resume(
    folder: Path, checkpoint: Path, micro_batches: int, lora: bool, steps: int, **options: Any
) -> None:
    """The rest of a run that has saved a checkpoint."""
    assert problem_of(checkpoint) is None
    built = build(folder, micro_batches, lora, max_steps=steps, **options)
    built.train(resume_from_checkpoint=str(checkpoint))
    built.save_model()
    assert built.state.global_step == steps


def others(folder: Path, micro_batches: int) -> None:
    """A short run with everything else; three rows are evaluated, then one."""
    built = build(folder, micro_batches, False, **OTHERS)
    built.train()
    built.save_model()
    losses = [built.evaluate(tiny.rows(count))["eval_loss"] for count in (3, 1)]
    (folder / "eval.json").write_text(json.dumps(losses))


def judged(folder: Path, micro_batches: int) -> None:
    built = build(folder, micro_batches, False, grader=by_their_letters, **JUDGED)
    built.train()
    built.save_model()


def in_one_process(folder: Path, pocket: bool) -> None:
    for lora in (False, True):
        train(folder, "one", lora, pocket)
    if not pocket:
        others(folder / "one" / "others", 4)
        judged(folder / "one" / "judged", 4)
        ragged(folder / "one" / "ragged", 4)


def in_two_processes(folder: Path, pocket: bool) -> None:
    """Under DDP, then under FSDP2; what one process has begun too, and what is saved in shards."""
    for kind in ("ddp", "fsdp"):
        if kind == "fsdp":
            os.environ.update(launch.environment("fsdp2", on_cpu=True))
        if not pocket:
            ragged(folder / kind / "ragged", 2)
            judged(folder / kind / "judged", 2)
        for lora in (False, True):
            train(folder, kind, lora, pocket)
            if not pocket:
                steps = STEPS[kind]
                begun = folder / "one" / f"lora-{lora}" / f"checkpoint-{steps - 1}"
                resume(folder / f"{kind}-from-one" / f"lora-{lora}", begun, 2, lora, steps)
        if not pocket:
            best(folder / kind / "best")
    if not pocket:
        others(folder / "fsdp" / "others", 2)
        for lora in (False, True):
            in_shards(folder / "shards" / f"lora-{lora}", lora)


def ragged(folder: Path, micro_batches: int) -> None:
    """10 rows in micro-batches of 2: at the end of an epoch two processes have one micro-batch of
    rows, and one that fills it.
    """
    built = build(folder, micro_batches, False, train_dataset=tiny.rows(10), max_steps=3)
    built.train()
    built.save_model()


def best(folder: Path) -> None:
    """The first of two steps is the better one; each rank leaves a file if it has that one's
    weights in the end.
    """
    often: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    which: dict[str, Any] = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "eval_dataset": tiny.rows(2),
    }
    # its files have other names than its modules
    model, tokenizer = zoo.build("qwen3-moe")
    named: dict[str, Any] = {"model": model, "processing_class": tokenizer}
    built = build(folder, 2, False, max_steps=2, **often, **which, **named)
    kept: dict[str, Tensor] = {}

    def keep(*args: Any, **kwargs: Any) -> dict[str, float]:
        if not kept:
            kept.update((name, sharding.full_tensor(p).clone()) for name, p in built.model.named_parameters())
        return {"eval_loss": float(built.state.global_step)}

    built.evaluate = keep
    built.train()
    assert built.state.best_model_checkpoint == str(folder / "checkpoint-1")
    assert all(
        sharding.full_tensor(value).equal(kept[name]) for name, value in built.model.named_parameters()
    )
    (folder / f"rank-{built.accelerator.process_index}").touch()


# An optimizer with a state; its epsilon is large, because Adam makes much of the rounding of small
# gradients.
STATEFUL = {"optim": "adamw_torch", "adam_epsilon": 1e-2, "learning_rate": 1e-2}


def in_shards(folder: Path, lora: bool) -> None:
    """A run with a checkpoint in shards, and its second half again; with gradient checkpointing."""
    whole = build(
        folder,
        2,
        lora,
        max_steps=4,
        save_strategy="steps",
        save_steps=2,
        gradient_checkpointing=True,
        **STATEFUL,
    )
    whole.accelerator.state.fsdp_plugin.state_dict_type = StateDictType.SHARDED_STATE_DICT
    whole.train()
    whole.save_model()
    resume(folder / "resumed", folder / "checkpoint-2", 2, lora, 4, gradient_checkpointing=True, **STATEFUL)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same runs in one process and in two."""
    return in_one_and_two(tmp_path_factory.mktemp("runs"), pocket=False)


@pytest.fixture(scope="module")
def pocket_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_one_and_two(tmp_path_factory.mktemp("pocket"), pocket=True)


def in_one_and_two(folder: Path, pocket: bool) -> Path:
    in_one_process(folder, pocket)
    on_two_ranks(folder, f"in_two_processes(Path({str(folder)!r}), {pocket})", {})
    return folder


def on_two_ranks(folder: Path, call: str, environment: dict[str, str]) -> None:
    """Run a function of this file in two processes."""
    code = folder / "worker.py"
    code.write_text(
        f"import sys; sys.path[:0] = {sys.path!r}\nfrom tests.distributed import test_distributed\n"
        f"from pathlib import Path\nfrom unisd.run import launch\ntest_distributed.{call}\nlaunch.leave()\n"
    )
    starter = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(code)]
    done = subprocess.run(
        starter, capture_output=True, text=True, timeout=600, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the runs under DeepSpeed are compared with: the same in one process."""
    folder = tmp_path_factory.mktemp("alone")
    in_one_process(folder, pocket=True)
    others(folder / "one" / "others", 4)
    ragged(folder / "one" / "ragged", 4)
    return folder


@pytest.fixture(scope="module", params=[pytest.param("zero2", marks=pytest.mark.slow), "zero3"])
def zero(request: pytest.FixtureRequest, alone: Path) -> Path:
    """The folder of runs under one stage; each stage in processes of its own, since accelerate
    cannot change it.
    """
    kind = str(request.param)
    on_two_ranks(alone, f"under_zero(Path({str(alone)!r}), {kind!r})", launch.environment(kind, on_cpu=True))
    return alone / kind


def under_zero(folder: Path, kind: str) -> None:
    for lora in (False, True):
        train(folder, kind, lora, pocket=True)
    folder, check = folder / kind, zero_stages.check_deepspeed
    ragged(folder / "ragged", 2)  # a model so small that DeepSpeed keeps all of it whole

    def nothing_stays_whole(trainer: Any) -> None:
        check(trainer)
        trainer.accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"][
            "stage3_param_persistence_threshold"
        ] = 0

    zero_stages.check_deepspeed = nothing_stays_whole
    others(folder / "others", 2)
    best(folder / "best")
    bad_step(folder / "bad-step")
    options: dict[str, Any] = {"gradient_checkpointing": True, **STATEFUL}
    for lora in (False, True):
        micro_batches = 1 if lora else 2
        whole = build(
            folder / f"whole-{lora}",
            micro_batches,
            lora,
            max_steps=4,
            save_strategy="steps",
            save_steps=2,
            **options,
        )
        whole.train()
        whole.save_model()
        resume(
            folder / f"resumed-{lora}",
            folder / f"whole-{lora}" / "checkpoint-2",
            micro_batches,
            lora,
            4,
            **options,
        )


def bad_step(folder: Path) -> None:
    """The second of three steps has no finite gradient, on one rank only."""
    built = build(folder, 2, False, max_steps=3, save_strategy="steps", save_steps=1)
    compute_loss = built.compute_loss

    def poisoned(*args: Any, **kwargs: Any) -> Any:
        loss = compute_loss(*args, **kwargs)
        return (
            loss * float("nan")
            if built.state.global_step == 1 and built.accelerator.process_index == 1
            else loss
        )

    built.compute_loss = poisoned
    built.train()


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


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_change_nothing(runs: Path, kind: str, lora: bool) -> None:
    same_in_one_and_two(runs, kind, lora, pocket=False)


@pytest.mark.long
def test_everything_else_is_the_same_too(runs: Path) -> None:
    one, two = runs / "one" / "others", runs / "fsdp" / "others"
    same_lines(lines(one), lines(two))
    assert len(lines(one)) == 2
    assert apart(one / "model.safetensors", two / "model.safetensors") < 1e-4
    assert json.loads((one / "eval.json").read_text()) == pytest.approx(
        json.loads((two / "eval.json").read_text()), rel=1e-4
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_change_nothing_of_what_verdicts_do(runs: Path, kind: str) -> None:
    one, two = runs / "one" / "judged", runs / kind / "judged"
    same_lines(lines(one), lines(two))
    assert all(0 < line["outcome/passed"] < 1 for line in lines(one))
    assert any(line["outcome/groups_some"] for line in lines(one)) and len(lines(one)) == 3
    assert apart(one / "model.safetensors", two / "model.safetensors") < 1e-4


def same_lines(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    for first, second in zip(a, b, strict=True):
        assert first.keys() == second.keys()
        for key in first.keys() - {key for key in first if key.startswith("step_time")}:
            # A token on the edge of the hinge or of the clip falls to either side by rounding.
            counted = key in ("contrastive/active_share", "clip/share")
            near = 1.5 / first["completions/loss_tokens"] if counted else 1e-5
            assert first[key] == pytest.approx(second[key], rel=1e-3, abs=near), key


@pytest.mark.real
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_change_nothing_on_the_pocket(pocket_runs: Path, kind: str, lora: bool) -> None:
    same_in_one_and_two(pocket_runs, kind, lora, pocket=True)


def same_in_one_and_two(runs: Path, kind: str, lora: bool, pocket: bool) -> None:
    one, two = runs / "one" / f"lora-{lora}", runs / kind / f"lora-{lora}"
    steps = STEPS["one" if pocket else kind]
    assert len(list(two.glob("sampled-*.json"))) == 2
    drawn = sampled(two)
    assert len(drawn) == steps and all(len(rows) == 8 for rows in drawn.values())
    assert drawn == {step: rows for step, rows in sampled(one).items() if step in drawn}
    a, b = lines(one)[:steps], lines(two)
    assert len(a) == len(b) == steps
    assert a[0]["loss"] == pytest.approx(b[0]["loss"], rel=1e-5)
    same_lines(a, b)
    last = f"checkpoint-{steps}"
    norms = [
        json.loads((folder / last / "trainer_state.json").read_text())["log_history"][0]["grad_norm"]
        for folder in (one, two)
    ]
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert apart(one / last / name, two / name) < 1e-4
    assert apart(one / "checkpoint-1" / name, two / name) > 1e-3  # they did move
    assert apart(one / last / "teacher.safetensors", two / last / "teacher.safetensors") < 1e-4


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
def test_nobody_holds_a_whole_model_or_teacher(runs: Path, lora: bool) -> None:
    def held(kind: str) -> list[list[int]]:
        return [json.loads(file.read_text()) for file in (runs / kind / f"lora-{lora}").glob("held-*.json")]

    [whole] = held("one")
    assert held("ddp") == [whole, whole]
    first, second = held("fsdp")
    assert [a + b for a, b in zip(first, second, strict=True)] == whole
    assert all(0.4 < part / all_of_it < 0.6 for part, all_of_it in zip(first, whole, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_one_process_resumes_what_two_have_saved_and_two_what_one_has(
    runs: Path, tmp_path: Path, kind: str, lora: bool
) -> None:
    steps = STEPS[kind]
    resume(tmp_path, runs / kind / f"lora-{lora}" / f"checkpoint-{steps - 1}", 4, lora, steps)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    whole = runs / "one" / f"lora-{lora}" / f"checkpoint-{steps}" / name
    assert apart(whole, tmp_path / name) < 1e-4
    assert apart(whole, runs / f"{kind}-from-one" / f"lora-{lora}" / name) < 1e-4
    assert apart(whole, whole.parents[1] / f"checkpoint-{steps - 1}" / name) > 3e-4


@pytest.mark.long
@pytest.mark.parametrize("lora", [False, True])
def test_checkpoint_in_shards_is_resumed_by_two_processes_and_by_one(
    runs: Path, tmp_path: Path, lora: bool
) -> None:
    folder = runs / "shards" / f"lora-{lora}"
    half = folder / "checkpoint-2"
    assert (
        len(list((half / "shards").glob("*.distcp"))) == 2
        and len(list((half / "teacher").glob("*.distcp"))) == 2
    )
    assert not list(half.glob("*model*.safetensors")) and not (half / "optimizer.pt").exists()
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    resume(tmp_path, half, 4, lora, 4, **STATEFUL)
    for other in (folder / "resumed", tmp_path):
        assert apart(folder / name, other / name) < 1e-4


@pytest.mark.long
def test_what_a_sharded_run_saves_is_an_ordinary_model(runs: Path) -> None:
    last = f"checkpoint-{STEPS['fsdp']}"
    plain = [
        AutoModelForCausalLM.from_pretrained(runs / part)
        for part in ("fsdp/lora-False", f"one/lora-False/{last}")
    ]
    adapted = [
        PeftModel.from_pretrained(tiny.model(), str(runs / part))
        for part in ("fsdp/lora-True", f"one/lora-True/{last}")
    ]
    for ours, theirs in (plain, adapted):
        with torch.no_grad():
            one, other, start = (
                m.eval()(input_ids=torch.arange(10, 30)[None]).logits for m in (ours, theirs, tiny.model())
            )
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
        assert (one - start).abs().max() > 0.05


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_rows_that_fill_the_end_of_an_epoch_carry_no_loss(runs: Path, kind: str) -> None:
    one, two = runs / "one" / "ragged", runs / kind / "ragged"
    a, b = lines(one), lines(two)
    assert [line["completions/loss_tokens"] for line in a] == [line["completions/loss_tokens"] for line in b]
    assert [line["loss"] for line in a] == pytest.approx([line["loss"] for line in b], rel=1e-4)
    assert apart(one / "model.safetensors", two / "model.safetensors") < 1e-4


def test_how_many_rows_fill() -> None:
    assert [rows_to_fill(10, 2, rank, 2) for rank in (0, 1)] == [0, 2]
    assert [rows_to_fill(9, 2, rank, 3) for rank in (0, 1, 2)] == [0, 1, 2]
    assert rows_to_fill(8, 2, 1, 2) == rows_to_fill(9, 2, 0, 1) == 0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_rank_loads_the_best_checkpoint_at_the_end(runs: Path, kind: str) -> None:
    assert sorted(path.name for path in (runs / kind / "best").glob("rank-*")) == ["rank-0", "rank-1"]


@pytest.mark.deepspeed
@pytest.mark.parametrize("lora", [False, True])
def test_zero_changes_nothing(zero: Path, lora: bool) -> None:
    same_in_one_and_two(zero.parent, zero.name, lora, pocket=True)
    parts = [json.loads(file.read_text()) for file in (zero / f"lora-{lora}").glob("held-*.json")]
    [whole] = [
        json.loads(file.read_text()) for file in (zero.parent / "one" / f"lora-{lora}").glob("held-*.json")
    ]
    share = 0.5 if zero.name == "zero3" else 1.0
    # the last is filled up
    assert all(part == pytest.approx([share * number for number in whole], rel=0.01) for part in parts)
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    assert apart(zero / f"whole-{lora}" / name, zero / f"resumed-{lora}" / name) < 1e-6
    assert apart(zero / f"whole-{lora}" / "checkpoint-2" / name, zero / f"whole-{lora}" / name) > 1e-4


@pytest.mark.deepspeed
def test_everything_else_is_the_same_under_zero(zero: Path) -> None:
    alone = zero.parent / "one"
    for part in ("others", "ragged"):
        assert [line["loss"] for line in lines(alone / part)] == pytest.approx(
            [x["loss"] for x in lines(zero / part)], rel=1e-4
        )
        assert apart(alone / part / "model.safetensors", zero / part / "model.safetensors") < 1e-4
    evaluated = [json.loads((folder / "others" / "eval.json").read_text()) for folder in (alone, zero)]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-4)
    assert sorted(path.name for path in (zero / "best").glob("rank-*")) == ["rank-0", "rank-1"]


@pytest.mark.deepspeed
def test_zero_skips_a_step_without_a_finite_gradient(zero: Path) -> None:
    folders = [zero / "bad-step" / f"checkpoint-{step}" for step in (1, 2, 3)]
    for name, least in (("model.safetensors", 1e-4), ("teacher.safetensors", 1e-6)):
        moved = [apart(a / name, b / name) for a, b in pairwise(folders)]
        assert moved[0] == 0 and moved[1] > least
    assert [line["guard/skipped_steps"] for line in lines(zero / "bad-step")] == [0, 1, 1]


KINDS = [
    pytest.param("fsdp2", marks=pytest.mark.long),
    pytest.param("ddp", marks=pytest.mark.real),
    pytest.param("zero3", marks=pytest.mark.deepspeed),
]


@pytest.mark.parametrize("kind", KINDS)
def test_a_rank_that_is_killed_and_a_launcher_that_is_told_to_stop_lose_nothing(
    tmp_path: Path, kind: str
) -> None:
    """Killed, resumed and stopped by SIGTERM, on two ranks; the weights are those of one process
    that was left alone.
    """
    from unisd.cli.main import main

    model, rows, out = tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "out"
    tiny.model().save_pretrained(model)
    tiny.tokenizer().save_pretrained(model)
    # one is held out
    texts = [json.dumps({key: row[key] for key in ("prompt", "privileged_context")}) for row in tiny.rows(13)]
    rows.write_text("\n".join(texts) + "\n")
    arguments = ["--train_file", str(rows), "--model_name_or_path", str(model), "--recipe", "sdft"]
    arguments += [
        "--max_completion_length",
        "6",
        "--per_device_train_batch_size",
        "2",
        "--max_eval_rows",
        "1",
    ]
    arguments += ["--optim", "sgd", "--learning_rate", "0.03"]
    arguments += ["--lr_scheduler_type", "constant", "--warmup_steps", "0"]
    flags = [
        "--output_dir",
        str(out),
        "--max_steps",
        "500",
        "--gradient_accumulation_steps",
        "1",
        "--save_steps",
        "2",
    ]
    flags += ["--save_total_limit", "2", "--accelerate_config", kind, "--num_processes", "2"]

    def until_saved(run: subprocess.Popen[str], after: int) -> int:
        """The number of the first checkpoint after this one."""
        deadline = time.monotonic() + 240
        while (saved := last_complete_checkpoint(out)) is None or int(saved.name.rpartition("-")[2]) <= after:
            assert run.poll() is None and time.monotonic() < deadline, run.communicate()[1][-3000:]
            time.sleep(0.1)
        return int(saved.name.rpartition("-")[2])

    def start(*more: str) -> subprocess.Popen[str]:
        starter = [sys.executable, "-m", "unisd", "train", *arguments, *flags, *more]
        return subprocess.Popen(starter, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    run = start()
    try:
        until_saved(run, 0)
        workers = [
            p
            for p in psutil.Process(run.pid).children(recursive=True)
            if p.environ().get("LOCAL_RANK") == "1"
        ]
        os.kill(workers[0].pid, signal.SIGKILL)
        _, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 2
    message = errors[errors.index("unisd: error: a process of the run ended early") :]
    assert "resume from checkpoint-" in message and message.rstrip().endswith("--resume_from_checkpoint")
    assert "SIGKILL" in errors

    run = start("--resume_from_checkpoint")
    try:
        saved = last_complete_checkpoint(out, contents=True)
        assert saved is not None
        until_saved(run, int(saved.name.rpartition("-")[2]))
        run.terminate()
        shown, errors = run.communicate(timeout=60)
    finally:
        run.kill()
    assert run.returncode == 130, errors[-3000:]
    saved = last_complete_checkpoint(out, contents=True)
    assert saved is not None and f"interrupted; resume from {saved.name} with:" in shown
    steps = int(saved.name.rpartition("-")[2])
    assert [line["step"] for line in lines(out)] == list(range(1, steps + 1))

    alone = [
        "--output_dir",
        str(tmp_path / "alone"),
        "--gradient_accumulation_steps",
        "2",
        "--save_strategy",
        "no",
    ]
    assert main(["train", *arguments, *alone, "--max_steps", str(steps)]) == 0
    whole = tmp_path / "alone" / "model.safetensors"
    assert apart(whole, saved / "model.safetensors") < 1e-4
    assert apart(whole, model / "model.safetensors") > 1e-3
