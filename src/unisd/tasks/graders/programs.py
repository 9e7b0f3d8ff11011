"""Run the program that a completion holds against gold's tests."""

from __future__ import annotations

from unisd.tasks.base import Grade
from unisd.tasks.graders.base import TAIL, as_text

_CODE_STARTS = ("def ", "class ", "import ", "from ", "@", "async def ")


def extract_code(completion: str) -> str | None:
    """Extract the program that a completion holds; None where there is none.

    It is the longest fenced block with a definition, else the longest fenced block, else what
    follows the first line that begins like a program.
    """
    text = as_text(completion)[-TAIL:].replace("\r\n", "\n")
    blocks = []
    for number, part in enumerate(text.split("```")):
        if number % 2:  # inside a fence; the first line names the language
            language, newline, body = part.partition("\n")
            blocks.append(body if newline and " " not in language.strip() else part)
    if blocks:
        best = max(blocks, key=lambda block: ("def " in block or "class " in block, len(block)))
        return best.rstrip() if best.strip() else None
    lines = text.split("\n")
    start = next((i for i, line in enumerate(lines) if line.startswith(_CODE_STARTS)), None)
    return None if start is None else "\n".join(lines[start:]).rstrip()


def code(completion: str, gold: str) -> Grade:
    """The program passes the tests `gold` (Python source with assertions).

    Raises `UserError` where nothing can be isolated.
    """
    from unisd.tasks import sandbox

    program = extract_code(completion)
    if program is None:
        return Grade(False, None, "no code")
    verdict = sandbox.run_program(program, gold)
    return Grade(verdict.passed, program, verdict.reason)
