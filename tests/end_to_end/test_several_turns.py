"""Answers of several turns, by a tool or given as messages: loss on the student's tokens alone."""

from __future__ import annotations

import copy
import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from unisd import Completion, UserError, load_rows
from unisd import testing as tiny
from unisd.data.trajectories import encode_turns
from unisd.testing import FixedEngine, gradients, trainer

ROOT = Path(__file__).parents[2]
TOKENIZER = tiny.tokenizer()
TURNS = [
    {"role": "assistant", "content": "6 x 3?"},
    {"role": "tool", "content": "18"},
    {"role": "assistant", "content": "It is 18."},
]


class TwoTurns(FixedEngine):
    """Every third token of each answer is a tool's."""

    def generate(self, *given: Any) -> list[Completion]:
        return [
            Completion(c.ids, c.truncated, written=[i % 3 != 1 for i in range(len(c.ids))])
            for c in super().generate(*given)
        ]


def answers(count: int = 5) -> list[list[int]]:
    return [[10 + (7 * i + j) % 50 for j in range(4 + 3 * i)] for i in range(count)]


def test_only_the_students_tokens_carry_loss(tmp_path: Path) -> None:
    built = trainer(tmp_path, engine=TwoTurns(answers()), max_completion_length=32)
    numbers = [(row, 0) for row in range(4)]
    requests = built._requests(numbers, built._rollout(numbers))
    for request in requests:
        assert request.loss_mask == [i % 3 != 1 for i in range(len(request.completion))]


def test_what_a_tool_said_is_read_and_has_no_gradient(tmp_path: Path) -> None:
    """Another text of the tool's changes the loss of what follows; its own tokens add nothing."""
    loss, found = gradients(trainer(tmp_path / "a", engine=TwoTurns(answers()), max_completion_length=32))
    changed = [[id if i % 3 != 1 else id + 1 for i, id in enumerate(ids)] for ids in answers()]
    other, _ = gradients(trainer(tmp_path / "b", engine=TwoTurns(changed), max_completion_length=32))
    assert loss != other
    padded = trainer(tmp_path / "c", engine=TwoTurns(answers()), max_completion_length=32, packing="padded")
    again, gradient = gradients(padded)
    assert again == pytest.approx(loss, rel=1e-5)
    for name, value in found.items():
        torch.testing.assert_close(gradient[name], value, rtol=1e-3, atol=1e-6)


def test_who_wrote_what_is_kept_with_a_rollout(tmp_path: Path) -> None:
    from unisd.rollout.replay import RolloutStore

    store, completion = RolloutStore(2), Completion([5, 6, 7], False, written=[True, False, True])
    store.keep([(0, 0)], [completion], 4)
    store.save(tmp_path, True, 1)
    again = RolloutStore(2)
    again.load(tmp_path)
    assert again.completions([(0, 0)], 5) == [completion]


def test_an_engine_that_miscounts_is_one_line(tmp_path: Path) -> None:
    class Wrong(FixedEngine):
        def generate(self, *given: Any) -> list[Completion]:
            return [Completion(c.ids, c.truncated, written=[True]) for c in super().generate(*given)]

    with pytest.raises(UserError, match="give one per token"):
        trainer(tmp_path, engine=Wrong(answers()), max_completion_length=32).train()


def test_given_turns_carry_loss_where_the_assistant_speaks(tmp_path: Path) -> None:
    rows = tiny.rows(4)
    for row in rows:
        row["completion"] = TURNS
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loaded = load_rows(str(path))
    assert loaded[0]["completion"] == "It is 18." and loaded[0]["completion_turns"] == TURNS
    built = trainer(
        tmp_path / "run",
        train_dataset=loaded,
        completion_source="reference",
        distillation_mode="nll",
        teacher_model_kind="live",
        max_completion_length=64,
    )
    completion = built.completions._reference(0)
    own = [token for token, mine in zip(completion.ids, completion.written or [], strict=True) if mine]
    others = [token for token, mine in zip(completion.ids, completion.written or [], strict=True) if not mine]
    assert TOKENIZER.decode(own, skip_special_tokens=True) == "6 x 3?It is 18."
    assert "18" in TOKENIZER.decode(others) and "It is" not in TOKENIZER.decode(others)
    assert completion.ids[-1] in built.eos_ids and (completion.written or [])[-1]
    built.train()
    assert len(built.state.log_history) > 1


def test_a_template_that_changes_earlier_turns_is_refused() -> None:
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = (
        "{% for m in messages %}{% if loop.last or m['role'] == 'user' %}"
        "{{ m['role'] + m['content'] }}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    with pytest.raises(UserError, match="differently if others follow it"):
        encode_turns(tokenizer, "6 x 3?", TURNS, [])


@pytest.mark.long
def test_the_calculator_trains(tmp_path: Path) -> None:
    """The example: what the calculator says is never a target."""
    example = runpy.run_path(str(ROOT / "examples" / "calculator.py"))
    example["test_calculate"]()
    built = example["main"](str(tmp_path), max_steps=2)
    numbers = [(row, g) for row in range(4) for g in range(4)]
    completions = built.completions.complete(numbers, 0)
    requests = built._requests(numbers, completions)
    told = 0
    for completion, request in zip(completions, requests, strict=True):
        assert completion.written is not None and request.completion == completion.ids
        tool = [token for token, mine in zip(completion.ids, completion.written, strict=True) if not mine]
        assert built.processing_class.decode(tool).strip().startswith("Calculator:")
        assert not any(m and not w for m, w in zip(request.loss_mask, completion.written, strict=True))
        told += any(request.loss_mask)
    assert told and (tmp_path / "metrics.jsonl").read_text().count("\n") == 2
