"""Named graders for the user's own rows: `GRADERS[name](completion, gold) -> Grade`.

| name | correct when |
|---|---|
| `exact` | completion and gold are equal up to case, typography and white space |
| `contains` | gold occurs in the completion likewise, as whole words |
| `choice` | the option letter that the completion settles on is gold's |
| `number` | the number that the completion settles on equals gold's |
| `math` | the expression that the completion ends in equals gold's, by math-verify |
| `call` | the completion's tool calls are gold's (forms: :mod:`unisd.tasks.tool_calls`) |
| `code` | the completion's program passes gold's tests, in :mod:`unisd.tasks.sandbox` |

Gold may be a list of right answers for `exact`, `contains`, `number` and `math`; what a grader
cannot read is refused before anything runs. No grader raises, whatever the completion, and each
takes time linear in its length.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from unisd.errors import UserError
from unisd.tasks.base import Grade
from unisd.tasks.graders.base import Grader
from unisd.tasks.graders.calls import call
from unisd.tasks.graders.choices import choice
from unisd.tasks.graders.maths import math
from unisd.tasks.graders.numbers import number
from unisd.tasks.graders.programs import code
from unisd.tasks.graders.text import contains, exact

Graded = Callable[[Any, Any], Grade]

GRADERS: dict[str, Graded] = {
    "exact": exact,
    "contains": contains,
    "choice": choice,
    "number": number,
    "math": math,
    "call": call,
    "code": code,
}


def gold_of(name: str, row: Mapping[str, Any], answer: object) -> object:
    """Gold of a user's row for the grader of that name: the answer, with the row's options."""
    grader = GRADERS[name]
    return grader.gold_of(row, answer) if isinstance(grader, Grader) else answer


def check_gold(name: str, row: Mapping[str, Any], answer: object, where: str) -> None:
    """Refuse gold of a user's row that the grader of that name cannot read, before anything runs.

    Raises:
        UserError: says where (a file and its row), what it is, and what is needed.
    """
    grader = GRADERS[name]
    if isinstance(grader, Grader):
        try:
            grader.read_gold(grader.gold_of(row, answer))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
