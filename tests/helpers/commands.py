"""Commands as tests give them."""

from __future__ import annotations

ROWS = [{"prompt": f"What is {i} and {i}?", "privileged_context": f"It is {2 * i}."} for i in range(10)]


def of_steps(command: list[str], steps: int) -> list[str]:
    """The same command with another number of steps: no flag may be given twice."""
    place = command.index("--max_steps") + 1
    return [*command[:place], str(steps), *command[place + 1 :]]


def without_notes(text: str) -> str:
    """What stderr holds beside the notes of what was being loaded."""
    return "".join(line for line in text.splitlines(True) if not line.startswith("note: loading "))
