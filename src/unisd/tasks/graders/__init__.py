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
| `similarity` | half of the words of completion and gold are shared (token F1 of 0.5 or more) |

Gold may be a list of right answers for `exact`, `contains`, `number`, `math` and `similarity`;
what a grader cannot read is refused before anything runs. No grader raises, whatever the
completion, and each takes time linear in its length.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unisd.errors import UserError, unknown
from unisd.tasks.graders.base import Grader
from unisd.tasks.graders.calls import call
from unisd.tasks.graders.choices import choice
from unisd.tasks.graders.maths import math
from unisd.tasks.graders.numbers import number
from unisd.tasks.graders.programs import code
from unisd.tasks.graders.similarity import similarity
from unisd.tasks.graders.text import contains, exact

GRADERS: dict[str, Grader] = {
    grader.name: grader for grader in (exact, contains, choice, number, math, call, code, similarity)
}


def get_grader(name: str) -> Grader:
    """The grader of that name; raises `UserError` where there is none, with the nearest."""
    if name not in GRADERS:
        raise unknown("grader", name, sorted(GRADERS))
    return GRADERS[name]


def check_gold(grader: Grader, row: Mapping[str, Any], answer: object, where: str) -> None:
    """Refuse gold of a user's row that a grader cannot read, before anything runs.

    Raises:
        UserError: says where (a file and its row), what it is, and what is needed.
    """
    try:
        grader.read_gold(grader.gold_of(row, answer))
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
