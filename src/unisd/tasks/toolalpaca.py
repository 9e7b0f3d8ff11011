"""ToolAlpaca (Tang et al., 2023; Apache-2.0): tool calls in ReAct form, often several in a row.

    Action: searchAnime
    Action Input: {"genre": "comedy"}

From the project's own nested files (one record a tool): `eval_simulated.json`, `eval_real.json`
(`Instructions`, `Golden_Answers`), or `train_data.json` (`Instances` with `intermediate_steps`).
There is no copy on the Hub that is the authors' own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from decimal import Decimal
from pathlib import Path

from unisd.errors import UserError, flag
from unisd.tasks.base import Grade, Row
from unisd.tasks.benchmark import Benchmark, Problem, Raw, as_list
from unisd.tasks.graders.call_grading import grade_calls
from unisd.tasks.tool_calls import ToolStep, extract_calls

FORM = (
    "Answer with the calls that are needed, in order, each as two lines:\nAction: <function>\nAction Input:"
    " <JSON object>\nUse a value from an earlier result as a placeholder: ${what from which function}."
)


class ToolAlpacaTask(Benchmark):
    """Args:
    short_prompt: functions with their parameters only, without descriptions of what comes back.
    """

    name = "toolalpaca"
    fields = {"instruction": str, "steps": list, "functions": dict}

    def __init__(
        self,
        data_files: str | Path | Sequence[str | Path] | None = None,
        num_auxiliary_contexts: int = 3,
        short_prompt: bool = False,
    ) -> None:
        if data_files is None:
            raise UserError(
                f"toolalpaca needs {flag('data_files')}: eval_simulated.json or train_data.json of the"
                " project tangqiaoyu/ToolAlpaca on GitHub"
            )
        super().__init__(data_files, num_auxiliary_contexts)
        self.short_prompt = short_prompt

    def flatten(self, raw: Raw) -> Iterator[Raw]:
        """Tool by tool, instruction by instruction."""
        functions = raw.get("Function_Description")
        if not isinstance(functions, dict):
            yield raw  # refused for its fields
            return
        about = {
            "tool": raw.get("Name", ""),
            "description": raw.get("Description", ""),
            "functions": functions,
        }
        for instruction, answers in zip(
            as_list(raw.get("Instructions")), as_list(raw.get("Golden_Answers")), strict=False
        ):
            if raw.get("Instances"):
                break
            yield about | {
                "instruction": instruction,
                "steps": [(s.get("Action"), s.get("Action_Input")) for s in answers],
            }
        for instance in as_list(raw.get("Instances")):
            steps = [
                step[0][:2] for step in instance.get("intermediate_steps") or [] if step and len(step[0]) >= 2
            ]
            if steps and instance.get("input"):  # some were never solved
                yield about | {"instruction": instance["input"], "steps": steps}

    def problem(self, raw: Raw, where: str) -> Problem:
        steps = [
            ToolStep(str(name), text if isinstance(text, str) else json.dumps(text))
            for name, text in raw["steps"]
        ]
        if not steps:
            raise UserError(
                f"toolalpaca: {where}: the instruction {raw['instruction']!r:.80} has no gold step"
            )
        functions = {k: v for k, v in raw["functions"].items() if k != "components" and isinstance(v, str)}
        return {
            **raw,
            "functions": functions,
            "steps": steps,
            "key": f"{raw['tool']}\n{raw['instruction'].strip()}",
        }

    def row(self, problem: Problem, rng: random.Random) -> Row:
        reference = render(problem["steps"])
        row = {
            "prompt": self._prompt(problem),
            "privileged_context": reference,
            "completion": reference,
            "gold": [[step.name, step.arguments] for step in problem["steps"]],
            "skill": "one call" if len(problem["steps"]) == 1 else "several calls",
        }
        if wrong := wrong_steps(problem["steps"], list(problem["functions"]), rng):
            row["negative_context"] = render(wrong)
        return row

    def solved(self, problem: Problem) -> str:
        return f"Problem: {problem['instruction'].strip()}\nSolution:\n{render(problem['steps'])}"

    def grade(self, row: Row, completion: str) -> Grade:
        """Match all steps exactly; `details` hold the shares of right names and right arguments."""
        return grade_calls(extract_calls(completion), [ToolStep(*step) for step in row["gold"]])

    def _prompt(self, problem: Problem) -> str:
        listed = []
        for name, text in problem["functions"].items():
            kept = text.partition("\nOutput:")[0] if self.short_prompt else text
            listed.append(f"- {name}: {kept.strip()}")
        head = f"You can call these functions of {problem['tool']}:\n" + "\n".join(listed)
        return f"{head}\n\nRequest: {problem['instruction'].strip()}\n\n{FORM}"


def render(steps: Sequence[ToolStep]) -> str:
    return "\n".join(f"Action: {step.name}\nAction Input: {step.arguments}" for step in steps)


def wrong_steps(steps: Sequence[ToolStep], functions: list[str], rng: random.Random) -> list[ToolStep] | None:
    """The same calls with one mutated: another function, or another value of one argument."""
    place = rng.randrange(len(steps))
    step = steps[place]
    arguments = step.parsed()
    changed: ToolStep | None = None
    if arguments and rng.random() < 0.7:
        name = rng.choice(sorted(arguments))
        arguments = {key: _plain(value) for key, value in arguments.items()}
        value = arguments[name]
        other: object = (
            value + 1
            if type(value) in (int, float)
            else f"not {value}"
            if isinstance(value, str) and value
            else "unknown"
        )
        changed = ToolStep(step.name, json.dumps(arguments | {name: other}, default=float))
    others = [name for name in functions if name != step.name]
    if changed is None and others:
        changed = ToolStep(rng.choice(others), step.arguments)
    if changed is None:
        return None
    wrong = [*steps[:place], changed, *steps[place + 1 :]]
    # Another value where gold has a placeholder would be as good as any.
    return None if grade_calls(wrong, steps).correct else wrong


def _plain(value: object) -> object:
    """A number as Python's own."""
    return float(value) if isinstance(value, Decimal) else value
