"""Compare the tool calls of a completion with gold's (forms: :mod:`unisd.tasks.tool_calls`)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from unisd.data.thoughts import answer_of
from unisd.errors import UserError
from unisd.tasks.base import Grade
from unisd.tasks.graders.base import Candidate, Grader, Reading, shown
from unisd.tasks.graders.call_grading import grade_calls
from unisd.tasks.tool_calls import TAIL, ToolStep, calls_in, find_calls


class Call(Grader):
    """Gold is a call, a list of calls or a message that holds them, as an object or as text."""

    name = "call"
    takes = "a call"

    def read_gold(self, value: object) -> tuple[ToolStep, ...]:
        if hasattr(value, "tolist"):
            value = value.tolist()
        try:
            found = (
                find_calls(value, len(value) + 1)[0] if isinstance(value, str) else calls_in(_plain(value))
            )
        except RecursionError:
            found = []
        unread = next((step for step in found if step.parsed() is None), None)
        if unread is not None:
            raise UserError(
                f"call: gold {shown(value)}: the arguments of {unread.name} are not a JSON object"
            )
        if not found:
            raise UserError(
                f'call: gold {shown(value)} holds no call: give {{"name": ..., "arguments": {{...}}}}, a list'
                " of them, or a message with tool_calls"
            )
        return tuple(found)

    def read(self, completion: str, tail: int = TAIL) -> Reading:
        steps, form = find_calls(completion, tail)
        if not steps:
            return Reading()
        text = "; ".join(f"{step.name}({' '.join(step.arguments.split())})" for step in steps)[:1000]
        chosen = Candidate(text, tuple(steps), form)
        return Reading((chosen,), chosen)

    def equal(self, value: Any, gold: tuple[ToolStep, ...]) -> bool:
        return grade_calls(value, gold, placeholders=False).correct

    def grade(self, completion: str, gold: tuple[ToolStep, ...]) -> Grade:
        """Judge by parsed gold; details say how far names and arguments are right."""
        longest = sum(len(step.arguments) for step in gold)
        found = self.read(answer_of(completion), max(TAIL, 4 * longest)).chosen
        if found is None:
            return grade_calls((), gold, placeholders=False)
        grade = grade_calls(found.value, gold, placeholders=False)
        return replace(grade, how=found.how)


call = Call()


def _plain(value: Any) -> Any:
    """Lists for tuples and arrays; a pair of name and arguments is a call."""
    if isinstance(value, (list, tuple)):
        if len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], (str, dict)):
            return {"name": value[0], "arguments": value[1]}
        return [_plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): one for key, one in value.items()}
    return value
