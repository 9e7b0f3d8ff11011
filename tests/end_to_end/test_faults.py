"""Injected faults: nothing is lost, and every message says what to do."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.steps import STAR
from unisd import UserError
from unisd import testing as tiny
from unisd import trainer as trainer_module
from unisd.errors import RolloutError
from unisd.memory import is_out_of_memory, smaller_until_it_fits
from unisd.monitoring import alarms
from unisd.testing import trainer
from unisd.training import checkpoints
from unisd.training.guards import FiniteGuard, Interruption, pieces_of

SAVING = {"save_strategy": "steps", "save_steps": 1, "num_train_epochs": 99}


def build(folder: Path, **options: Any) -> Any:
    """Two micro-batches of two rows a step, saved after every step."""
    return trainer(
        folder, **{"gradient_accumulation_steps": 2, "train_dataset": tiny.rows(8), **SAVING, **options}
    )


def weights(built: Any) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in built.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.long
def test_sigterm_saves_and_the_resumed_run_ends_alike(tmp_path: Path, capsys: Any) -> None:
    whole = build(tmp_path / "whole", max_steps=3, **STAR)
    whole.train()

    broken = build(tmp_path / "broken", max_steps=3, save_steps=100, eval_strategy="no", **STAR)
    interruption = Interruption()
    broken.add_callback(interruption)
    score = broken.scorer.score

    def terminated(*args: Any, **named: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # launcher and scheduler both send one
        return score(*args, **named)

    broken.scorer.score = terminated
    before = signal.getsignal(signal.SIGTERM)
    with interruption.listening():
        broken.train()
    assert interruption.asked and broken.state.global_step == 1
    assert signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().out.count("stopping after this step") == 1
    assert checkpoints.problem_of(tmp_path / "broken" / "checkpoint-1") is None

    resumed = build(tmp_path / "broken", max_steps=3, **STAR)
    resumed.train(resume_from_checkpoint=True)
    assert same(weights(whole), weights(resumed))


def test_second_ctrl_c_stops_at_once() -> None:
    interruption = Interruption()
    with interruption.listening():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # the same key press, passed on by a launcher
        interruption._asked_at -= 2 * Interruption.SAME_KEYPRESS
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


# -- the disk --------------------------------------------------------------------------------------


def full_at_fsync(patch: pytest.MonkeyPatch) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(os, "fsync", fsync)


def full_in_torch(patch: pytest.MonkeyPatch) -> None:
    def save(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError(
            "[enforce fail at inline_container.cc:664] PytorchStreamWriter failed writing file data/0: file"
            " write failed"
        )

    patch.setattr(torch, "save", save)


def full_in_safetensors(patch: pytest.MonkeyPatch) -> None:
    def save_file(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("I/O error: No space left on device (os error 28)")

    patch.setattr("unisd.teacher.save_file", save_file)


@pytest.mark.long
@pytest.mark.parametrize("fault", [full_at_fsync, full_in_torch, full_in_safetensors])
def test_full_disk_leaves_the_last_good_checkpoint(tmp_path: Path, fault: Any) -> None:
    build(tmp_path, max_steps=1, save_total_limit=1).train()
    good = {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()}
    going_on = build(tmp_path, max_steps=2, save_total_limit=1)
    with pytest.MonkeyPatch.context() as patch:
        fault(patch)
        with pytest.raises(
            UserError, match=r"disk was full while checkpoint-2 .* checkpoint-1 is complete: free some space"
        ):
            going_on.train(resume_from_checkpoint=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "checkpoint-1").iterdir()} == good
    assert not (tmp_path / "checkpoint-2").exists() and not checkpoints.staging_folder(tmp_path).exists()
    build(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert checkpoints.last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_kill_while_saving_is_no_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def killed(folder: Path) -> None:
        raise Killed

    built = build(tmp_path, max_steps=2)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        publish = checkpoints.publish

        def second_time(folder: Any, name: str) -> Path:
            if name == "checkpoint-2":
                patch.setattr(checkpoints, "_sync_tree", killed)
            return publish(folder, name)

        patch.setattr(checkpoints, "publish", second_time)
        built.train()
    assert (checkpoints.staging_folder(tmp_path) / "checkpoint-2").is_dir()  # what a kill leaves behind
    assert checkpoints.last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"
    build(tmp_path, max_steps=2).train(resume_from_checkpoint=True)
    assert not checkpoints.staging_folder(tmp_path).exists()


def truncate(folder: Path) -> str:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    return "model.safetensors has .* bytes instead of"


def flip_a_bit(folder: Path) -> str:
    content = bytearray((folder / "optimizer.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "optimizer.pt").write_bytes(bytes(content))
    return "content of optimizer.pt has changed"


def lose_a_file(folder: Path) -> str:
    (folder / "teacher.safetensors").unlink()
    return "teacher.safetensors is missing"


def lose_the_manifest(folder: Path) -> str:
    (folder / checkpoints.MANIFEST).unlink()
    return "has no manifest.json"


def garble_the_manifest(folder: Path) -> str:
    (folder / checkpoints.MANIFEST).write_text('{"files": ')
    return "manifest.json cannot be read"


@pytest.mark.parametrize(
    "damage",
    [
        flip_a_bit,
        lose_the_manifest,
        *(pytest.param(d, marks=pytest.mark.long) for d in (truncate, lose_a_file, garble_the_manifest)),
    ],
)
def test_broken_checkpoint_is_found_and_the_newest_good_one_named(
    tmp_path: Path, damage: Any, caplog: pytest.LogCaptureFixture
) -> None:
    build(tmp_path, max_steps=2).train()
    what = damage(tmp_path / "checkpoint-2")
    again = build(tmp_path, max_steps=2)
    with pytest.raises(UserError, match=rf"checkpoint-2 is broken: .*{what}.*resume from .*checkpoint-1"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with caplog.at_level(logging.WARNING):
        again.train(resume_from_checkpoint=True)  # the newest whole one
    assert "checkpoint-2 is passed over" in caplog.text
    assert checkpoints.problem_of(tmp_path / "checkpoint-2") is None  # written anew


def test_best_checkpoint_is_named_by_its_place(tmp_path: Path) -> None:
    built = build(
        tmp_path,
        max_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        eval_dataset=[{**row, "completion": row["privileged_context"]} for row in tiny.rows(2)],
    )
    built.train()
    best = Path(built.state.best_model_checkpoint)
    assert best.parent == tmp_path and checkpoints.problem_of(best) is None
    state = json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())
    assert Path(state["best_model_checkpoint"]) == best


# -- bad steps -------------------------------------------------------------------------------------


def poison(built: Any, bad_row: int) -> None:
    """The teacher's states of one row of the dataset are NaN."""
    score = built.scorer.score

    def poisoned(rows: Any, device: Any, **named: Any) -> Any:
        scores, states = score(rows, device, **named)
        for i, row in enumerate(rows):
            if row.number == bad_row:
                states.final[i] = torch.full_like(states.final[i], float("nan"))
        return scores, states

    built.scorer.score = poisoned


def test_nan_step_is_skipped_and_the_row_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    built = build(tmp_path, max_steps=2, teacher_model_kind="ema", save_strategy="no")
    poison(built, 5)
    before, steps = weights(built), []

    class Look(Interruption):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.append(
                (weights(built), {name: value.clone() for name, value in built.teacher.state.items()})
            )

    built.add_callback(Look())
    with caplog.at_level(logging.WARNING):
        built.train()
    loss = [line["loss"] for line in lines(tmp_path)]
    bad = loss.index(None)  # 8 rows in two steps of 4: one of them holds row 5
    assert [value is None for value in loss].count(True) == 1
    assert "the loss is not finite, because of row 5 of the training data" in caplog.text
    previous = before if bad == 0 else steps[0][0]
    assert same(previous, steps[bad][0])
    assert not same(steps[bad][0], steps[1 - bad][0])  # the other one did train
    if bad == 1:
        assert same(steps[0][1], steps[1][1])  # the teacher does not move either
    assert all(
        torch.isfinite(value).all() for value in [*weights(built).values(), *built.teacher.state.values()]
    )
    assert lines(tmp_path)[-1]["guard/skipped_steps"] == 1


def test_a_restart_comes_also_at_a_step_that_is_skipped(tmp_path: Path) -> None:
    options: dict[str, Any] = {"teacher_model_kind": "restart", "teacher_restart_steps": 2}
    built = build(tmp_path, max_steps=2, save_strategy="no", **options)
    compute_loss = built.compute_loss

    def second_is_bad(*args: Any, **kwargs: Any) -> Any:
        return compute_loss(*args, **kwargs) * (float("nan") if built.state.global_step == 1 else 1.0)

    built.compute_loss = second_is_bad
    before = weights(built)
    built.train()
    assert lines(tmp_path)[-1]["guard/skipped_steps"] == 1
    after = weights(built)
    assert not same(before, after)  # the first step did train
    assert all(value.equal(after[name]) for name, value in built.teacher.state.items())


def test_many_bad_steps_stop_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    built = build(tmp_path, max_steps=9, max_skipped_steps=2, save_steps=100)
    for row in range(8):
        poison(built, row)
    with pytest.raises(
        UserError, match=r"2 steps in a row .* were skipped; the last, step 2: .* rows .* lower learning_rate"
    ):
        built.train()
    assert checkpoints.last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_infinite_gradient_of_a_finite_loss_is_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    built = build(tmp_path, max_steps=1, save_strategy="no")
    built.model.model.norm.weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights(built)
    with caplog.at_level(logging.WARNING):
        built.train()
    assert same(before, weights(built))
    assert "the loss is finite, but its gradient is not" in caplog.text
    assert lines(tmp_path)[0]["loss"] is not None


def test_finite_guard_counts_in_a_row() -> None:
    guard = FiniteGuard(limit=2, world_size=1)
    rows = torch.tensor([4, 4, 9])
    for number, loss in enumerate([1.0, float("nan"), 1.0, float("inf"), float("nan")]):
        assert guard.too_many is None
        guard.see(rows, torch.tensor([0.0, 0.0, loss]))
        assert guard.is_bad(number, loss) == (loss != 1.0)
    assert (
        guard.skipped == 3
        and "row 9 of" in str(guard.too_many)
        and "4" not in guard.message.partition(":")[2]
    )


# -- alarms ----------------------------------------------------------------------------------------


def alarmed(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """The rules say that all is well until step `at`, and then that answers shrank."""
    seen: list[int] = []

    def find(first: Any, last: Any) -> dict[str, str]:
        seen.append(0)
        return {"short answers": "answers shrank."} if len(seen) >= at - 1 else {}

    monkeypatch.setattr(alarms, "find", find)
    monkeypatch.setattr(alarms, "never_ends", lambda first: None)


def test_an_alarm_warns_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    alarmed(monkeypatch, at=2)
    built = build(tmp_path, max_steps=3, save_strategy="no", alarm_window=1)
    built.train()
    assert [(alarm.name, alarm.step) for alarm in built.health.alarms] == [("short answers", 2)]
    assert "Step 2, short answers: answers shrank." in caplog.text and built.state.global_step == 3


def test_an_alarm_can_stop_the_run_and_a_resumed_run_knows_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 4, "save_steps": 100, "alarm_window": 1}
    alarmed(monkeypatch, at=2)
    with pytest.raises(
        UserError, match=r"stopped at step 2 by the alarm 'short answers' .* resume from an earlier"
    ):
        build(tmp_path, alarms="stop", **settings).train()
    assert checkpoints.problem_of(tmp_path / "checkpoint-2") is None
    alarmed(monkeypatch, at=2)
    resumed = build(tmp_path, alarms="stop", **settings)
    resumed.train(resume_from_checkpoint=True)  # the same alarm, still there, is no news
    assert [alarm.step for alarm in resumed.health.alarms] == [2] and resumed.state.global_step == 4


def test_alarms_can_be_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alarmed(monkeypatch, at=2)
    built = build(tmp_path, max_steps=2, save_strategy="no", alarm_window=1, alarms="off")
    built.train()
    assert built.health.alarms == []


# -- memory ----------------------------------------------------------------------------------------


def out_of_memory() -> RuntimeError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_student_out_of_memory_gives_the_same_step_in_smaller_micro_batches(
    tmp_path: Path, where: str
) -> None:
    settings = {"max_steps": 2, "save_strategy": "no", "optim": "sgd", **STAR}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    built = build(tmp_path / "small", **settings)
    compute_loss, failures = built.compute_loss, []

    def limited(model: Any, inputs: Any, **kwargs: Any) -> Any:
        loss = compute_loss(model, inputs, **kwargs)
        if len(inputs["micro_batch"].part) > 1 and inputs["micro_batch"].part != built._first_part:
            failures.append(len(inputs["micro_batch"].part))
            if where == "forward":
                raise out_of_memory()
            # Some gradients of this micro-batch have arrived by then.
            handle = built.model.model.embed_tokens.weight.register_hook(fail)
            handles.append(handle)
        return loss

    def fail(gradient: Any) -> None:
        while handles:
            handles.pop().remove()
        raise out_of_memory()

    handles: list[Any] = []
    built._first_part = None
    begin = built.begin_student_phase

    def begin_with_one_good_part(*found: Any) -> None:
        begin(*found)
        built._first_part = None if failures else "to be set"

    def step(model: Any, inputs: Any, items: Any = None) -> Any:
        if built._first_part == "to be set":
            # the first micro-batch fits: its gradient is there when the second fails
            built._first_part = inputs["micro_batch"].part
        return training_step(model, inputs, items)

    training_step = built.training_step
    built.begin_student_phase, built.training_step, built.compute_loss = (
        begin_with_one_good_part,
        step,
        limited,
    )
    built.train()
    assert failures == [2] and built.most_rows == 1  # and it stays so in the second step
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(built)[name], value, rtol=1e-4, atol=1e-6)
    for a, b in zip(lines(tmp_path / "whole"), lines(tmp_path / "small"), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["completions/loss_tokens"] == a["completions/loss_tokens"]


def test_weights_that_wait_for_the_student_survive_a_loss_without_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_steps": 1, "save_strategy": "no", "token_weights": ["dash"], "optim": "sgd"}
    whole = build(tmp_path / "whole", **settings)
    whole.train()
    chunked_loss, calls = trainer_module.chunked_loss, []

    def limited(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        output = chunked_loss(*args, **kwargs)
        if len(calls) == 2:  # the first micro-batch is done by then, and is done again
            raise out_of_memory()
        return output

    monkeypatch.setattr(trainer_module, "chunked_loss", limited)
    built = build(tmp_path / "small", **settings)
    built.train()
    assert len(calls) == 6
    [a], [b] = lines(tmp_path / "whole"), lines(tmp_path / "small")
    weight = [key for key in a if key.startswith("weight/dash")]
    assert len(weight) > 3 and all(b[key] == pytest.approx(a[key], rel=1e-4) for key in ["loss", *weight])


@pytest.mark.parametrize("rows", [1, 4])
def test_a_row_that_does_not_fit_is_an_error_with_a_remedy(tmp_path: Path, rows: int) -> None:
    built = build(tmp_path, max_steps=1, per_device_train_batch_size=rows)

    def limited(*args: Any, **kwargs: Any) -> Any:
        raise out_of_memory()

    built.compute_loss = limited
    with pytest.raises(UserError, match="a single row does not fit into memory: lower max_completion_length"):
        built.train()


@pytest.mark.long
def test_scoring_and_rollout_out_of_memory_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    whole = build(tmp_path / "whole", max_steps=1, save_strategy="no", **STAR)
    whole.train()
    built = build(
        tmp_path / "small", max_steps=1, save_strategy="no", rollout_batch_size=4, token_budget=1024, **STAR
    )
    from unisd.rollout import transformers_engine as rollout
    from unisd.scoring import passes as scoring

    decode, shared_batches = rollout.decode, scoring.shared_batches
    asked: dict[str, list[int]] = {"rollout": [], "scoring": []}

    def limited_decode(*args: Any, batch_size: int, **kwargs: Any) -> Any:
        asked["rollout"].append(batch_size)
        if batch_size > 1:
            raise out_of_memory()
        return decode(*args, batch_size=batch_size, **kwargs)

    def limited_batches(sequences: Any, shareable: Any, budget: int) -> Any:
        asked["scoring"].append(budget)
        if budget > 300:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
        return shared_batches(sequences, shareable, budget)

    monkeypatch.setattr(rollout, "decode", limited_decode)
    monkeypatch.setattr(scoring, "shared_batches", limited_batches)
    built.train()
    assert asked["rollout"] == [4, 2, 1] and asked["scoring"][:3] == [1024, 512, 256]
    assert "batches of rows to write hold 1 from now on" in caplog.text
    assert "scoring passes (in tokens) hold 256 from now on; results are the same" in caplog.text
    assert lines(tmp_path / "small")[0]["loss"] == pytest.approx(
        lines(tmp_path / "whole")[0]["loss"], rel=1e-4
    )


@pytest.mark.long
@pytest.mark.parametrize("where", ["student", "scoring"])
def test_memory_that_never_suffices_saves_the_finished_steps(tmp_path: Path, where: str) -> None:
    built = build(tmp_path, max_steps=2, save_steps=100)
    part = built if where == "student" else built.scorer
    name = "compute_loss" if where == "student" else "score"
    works = getattr(part, name)

    def limited(*args: Any, **kwargs: Any) -> Any:
        if built.state.global_step == 1:
            raise out_of_memory()
        return works(*args, **kwargs)

    setattr(part, name, limited)
    with pytest.raises(
        UserError, match=r"a single row does not fit into memory: lower .* Step 1 is saved in checkpoint-1"
    ):
        built.train()
    assert checkpoints.last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-1"


def test_ranks_choose_uncertain_rows_once_however_often_one_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = build(tmp_path, max_steps=2, save_strategy="no", agreement="token", agreement_uncertain_share=0.5)
    most_uncertain, chosen, score, failed = trainer_module.most_uncertain, [], built.scorer.score, []

    def counted(*args: Any) -> Any:
        chosen.append(built.state.global_step)
        return most_uncertain(*args)

    def limited(*args: Any, **named: Any) -> Any:
        found = score(*args, **named)
        if not failed:
            failed.append(None)
            raise out_of_memory()
        return found

    monkeypatch.setattr(trainer_module, "most_uncertain", counted)
    built.scorer.score = limited
    built.train()
    assert chosen == [0, 1] and failed  # all ranks gather there


def test_an_engine_that_fails_in_an_evaluation_fails_on_all_ranks(tmp_path: Path) -> None:
    built = build(tmp_path, max_steps=1)
    built.grader = lambda row, text: True

    def gone(*args: Any) -> Any:
        raise UserError("no server")

    built.engine.generate = gone
    with pytest.raises(RolloutError, match="no server"):
        built.evaluate(tiny.rows(2))


def test_an_evaluation_asks_the_student_as_it_is_now(tmp_path: Path) -> None:
    """An engine with weights of its own (vLLM) has those of its last rollout until it is synced."""
    built = build(tmp_path, max_steps=1)
    built.grader = lambda row, text: True
    calls: list[str] = []
    answer = built.engine.generate
    built.engine.sync = lambda: calls.append("sync")
    built.engine.generate = lambda *given: calls.append("generate") or answer(*given)
    built.evaluate(tiny.rows(2))
    assert calls == ["sync", "generate"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_merge_adapters_only_without_checkpointing(tmp_path: Path, checkpointing: bool) -> None:
    """Also where a run has switched it on after set-up, because memory is scarce."""
    built = build(tmp_path, max_steps=1)
    built.args = built.args.changed("memory is scarce", gradient_checkpointing=checkpointing)
    merged: list[bool] = []
    score = built.scorer.score

    def watched(*given: Any, **named: Any) -> Any:
        merged.append(built.scorer.passes.layout.merge_once)
        return score(*given, **named)

    built.scorer.score = watched
    built.train()
    assert merged == [not checkpointing]


def test_other_errors_are_not_taken_for_missing_memory() -> None:
    assert not is_out_of_memory(RuntimeError("shape mismatch")) and is_out_of_memory(MemoryError())

    def work(size: int) -> int:
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape"):
        smaller_until_it_fits(work, 8)
    assert pieces_of([1, 2, 3, 4, 5], 2) == [[1, 2], [3, 4], [5]] and pieces_of([], 2) == []


def test_memory_that_runs_out_where_ranks_compute_together_names_the_option() -> None:
    def work(size: int) -> int:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(UserError, match="set token_budget below 512, and resume"):
        smaller_until_it_fits(work, 512, together="token_budget")
