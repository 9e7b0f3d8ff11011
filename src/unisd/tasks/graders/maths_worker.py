"""Compare mathematical expressions with math-verify; a process of its own, a JSON line an answer.

Its limits of time are signals, which need a main thread. This file imports nothing of the package.
"""

import json
import logging
import sys

SECONDS = 3


def judge(gold: list[str], completion: str | None) -> dict[str, object]:
    """Say whether an answer is one of gold's; without one, whether all gold can be read."""
    from math_verify import parse, verify

    def read(text: str) -> list[object]:
        return list(parse(text, parsing_timeout=SECONDS))

    golds = [read(text if "$" in text or "\\boxed" in text else f"${text}$") for text in gold]
    if completion is None:
        return {"unread": [text for text, parsed in zip(gold, golds, strict=True) if not parsed]}
    answer = read(completion)
    right = any(verify(one, answer, timeout_seconds=SECONDS) for one in golds)
    return {"correct": right, "extracted": str(answer[-1])[:400] if answer else None}


def main() -> None:
    logging.disable(logging.CRITICAL)
    for line in sys.stdin:
        try:
            answer = judge(**json.loads(line))
        except Exception as error:  # whatever a library of mathematics raises is no reason to end
            answer = {"error": type(error).__name__}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
