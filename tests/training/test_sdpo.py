"""SDPO's teacher prompts against TRL's trainer: the same parts, in the same order (the words are
ours).
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.helpers.engines import ByKey
from unisd import testing as tiny
from unisd.data.prompts import AFTER_ROLLOUT_END, FEEDBACK_PART, SIBLING_PART
from unisd.tasks.base import Verdict
from unisd.testing import trainer

TOKENIZER = tiny.tokenizer()
END = TOKENIZER.convert_tokens_to_ids("<|end|>")
GROUPS = {
    "all passed": [1, 1, 1],
    "none": [0, 0, 0],
    "mixed": [0, 1, 1],
    "one passed": [0, 0, 1],
    "one generation": [1],
    "one that failed": [0],
}


def answer(row: int, generation: int) -> str:
    return f"answer {generation} to {row}"


def trl_texts(
    prompts: list[str], passed: list[int], feedback: list[str], group: int, both: bool
) -> list[Any]:
    """The user turns that TRL's builder makes with our words in its templates, and which answers
    carry loss.
    """
    from trl.experimental.sdpo.sdpo_trainer import SuccessfulRolloutTeacherContextBuilder

    options = SimpleNamespace(
        reprompt_template="{prompt}{solution}{feedback}" + AFTER_ROLLOUT_END,
        solution_template=SIBLING_PART.replace("{sibling}", "{successful_previous_attempt}"),
        feedback_template=FEEDBACK_PART.replace("{feedback}", "{feedback_raw}"),
        success_reward_threshold=1.0,
        dont_reprompt_on_self_success=True,
        use_successful_as_teacher=True,
        include_environment_feedback=True,
        environment_feedback_only_without_solution=not both,
        remove_thinking_from_demonstration=True,
        max_reprompt_len=10_000,
    )
    same = lambda value, **_: value  # noqa: E731
    accelerator = SimpleNamespace(
        device="cpu", process_index=0, gather=same, pad_across_processes=lambda value, **_: value
    )
    seen: list[Any] = []

    def tokenized(messages: list[Any]) -> list[list[int]]:
        seen.extend(messages)
        return [[1]] * len(messages)

    pad = TOKENIZER.pad_token_id
    ids = [
        TOKENIZER(answer(i // group, i % group), add_special_tokens=False)["input_ids"]
        for i in range(len(prompts))
    ]
    width = max(map(len, ids))
    padded = torch.tensor([row + [pad] * (width - len(row)) for row in ids])
    fake = SimpleNamespace(
        args=options, accelerator=accelerator, model=SimpleNamespace(training=True), num_generations=group,
        _tokenizer=TOKENIZER, processing_class=TOKENIZER, _tokenize_prompts_untruncated=tokenized,
    )  # fmt: skip
    built = SuccessfulRolloutTeacherContextBuilder(fake).build(
        {"completion_ids": padded, "completion_mask": (padded != pad).long()},
        prompts,
        torch.tensor(passed, dtype=torch.float),
        feedback,
    )
    return list(zip(seen, built["self_distillation_mask"].bool().tolist(), strict=True))


@pytest.mark.parametrize("both", [False, True], ids=["feedback where there is no sibling", "both"])
@pytest.mark.parametrize("name", GROUPS)
def test_the_parts_are_those_of_trl(name: str, both: bool, tmp_path: Path) -> None:
    group, rows = len(GROUPS[name]), tiny.rows(2)
    numbers = [(row, g) for row in range(2) for g in range(group)]
    passed = GROUPS[name] * 2
    feedback = ["" if good else f"answer {i} is too short" for i, good in enumerate(passed)]
    verdicts = {
        answer(*number): Verdict(p, bool(p), f)
        for number, p, f in zip(numbers, passed, feedback, strict=True)
    }

    def written(key: Any) -> list[int]:
        return [*TOKENIZER(answer(*key[2:]), add_special_tokens=False)["input_ids"], END]

    contexts = [*(["sibling+feedback"] if both else []), "sibling", "feedback", "none"]
    built = trainer(
        tmp_path,
        train_dataset=rows,
        grader=lambda row, text: verdicts[text],
        engine=ByKey(written),
        num_generations=max(group, 2),
        rollout_contexts=contexts,
        max_completion_length=16,
    )
    completions = built._rollout(numbers)
    requests = built._requests(numbers, completions)
    theirs = trl_texts([rows[row]["prompt"] for row, _ in numbers], passed, feedback, group, both)
    for request, (text, carries), (row, _) in zip(requests, theirs, numbers, strict=True):
        assert any(request.loss_mask) == carries
        if carries:
            expected = built.prompts._encode(text)
            assert request.teacher == expected
        else:
            assert text == rows[row]["prompt"]
