"""What a person sees of a command: its first line, progress, colours, the completion of a shell."""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from unisd import console as shown
from unisd.cli.main import main
from unisd.run.changes import change_lines, change_styles, items

FIRST = """\
import contextlib, sys
from unisd import console
from unisd.cli.main import main

def first(what):
    heavy = {"torch", "transformers", "peft", "datasets", "accelerate", "numpy"} & {*sys.modules}
    assert not heavy, heavy
    raise KeyboardInterrupt

console.loading = first
for arguments in CALLS:
    assert main(arguments) == 130, arguments
"""


def test_the_first_line_comes_before_anything_heavy(tmp_path: Path) -> None:
    calls = [["train"], ["probe"], ["prepare"], ["eval"], ["contamination", "--task", "pocket"]]
    calls += [["chat", "d"], ["grade", "--task", "pocket", "--completions", "c"], ["study"], ["merge", "d"]]
    calls += [["judge", "d", "--judge_url", "http://127.0.0.1:1"], ["report", "."]]
    calls += [["train", "--weight_decay", "0.1"]]  # of transformers' own
    code = FIRST.replace("CALLS", repr(calls))
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr


# -- loading and progress --------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look at the clock is six seconds later."""
    seconds = iter(range(0, 10_000, 6))
    monkeypatch.setattr(shown.time, "monotonic", lambda: float(next(seconds)))


@pytest.mark.usefixtures("slow")
def test_a_pipe_gets_lines_of_progress(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with shown.loading("model m"), shown.show_progress("answering", 8) as advance:
        for _ in range(4):
            advance(2)
    with shown.show_progress("silent", 2, shown=False) as advance:
        advance(2)
    monkeypatch.setenv("RANK", "1")
    with shown.loading("model m"), shown.show_progress("of another rank", 2) as advance:
        advance(1)
        advance(1)
    lines = ["note: loading model m", "answering: 4/8, 12 s left", "answering: 8/8, 0 s left"]
    assert capsys.readouterr().err.splitlines() == lines


def narrow(width: int, **options: Any) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, _environ={}, **options)


def uncoloured(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("width", [60, 80, 120])
def test_counter_and_time_left_survive_on_a_narrow_terminal(width: int) -> None:
    """Also of a training whose steps take a minute."""
    clock = [0.0]
    console = narrow(width, get_time=lambda: clock[0])
    bar = shown.make_progress(console, metrics=True)
    name = "answering [what must not be lost]: an evaluation file of a long name"
    task = bar.add_task(name, total=12345, metrics="loss 0.4711  divergence 0.4711  lr 4.0e-04")
    for clock[0] in (60.0, 120.0, 180.0):
        bar.advance(task)
    console.print(bar.get_renderable())
    [line] = console.file.getvalue().splitlines()  # type: ignore[attr-defined]
    line = uncoloured(line)
    assert "answering [" in line and "3/12345" in line and "205:42:00" in line and "loss 0.4711" in line
    assert len(line) <= width


def test_bars_of_libraries_are_off(capfd: pytest.CaptureFixture[str]) -> None:
    shown._disable_other_bars()
    from tqdm.auto import tqdm

    assert [*tqdm(range(3), desc="Converting and de-quantizing GGUF tensors...")] == [0, 1, 2]
    assert capfd.readouterr().err == ""


# -- the table of a run ----------------------------------------------------------------------------


def share(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def results(lost: int, gained: int, nats: tuple[float, float]) -> dict[str, Any]:
    """A run that leaves the intervals of the task apart and those of retention in one another."""

    def side(task: dict[str, float], skill: dict[str, float], kept: dict[str, float]) -> dict[str, Any]:
        return {
            "task_accuracy": task, "skills": {"code": skill}, "gold_ppl": 2.0,
            "retention": {"old": {"accuracy": kept, "skills": None}},
        }  # fmt: skip

    was, now = [True] * lost + [False] * gained + [True] * 90, [False] * lost + [True] * (gained + 90)
    move = {"before": 1.0, "after": 1.1, "change": 0.1}
    drift = {"reverse": move, "forward": move, "kl": move, "nats": share(sum(nats) / 2, *nats)}
    return {
        "before": side(share(0.4, 0.3, 0.5), share(0.4, 0.2, 0.6), share(0.9, 0.8, 0.95)),
        "after": side(share(0.6, 0.55, 0.7), share(0.5, 0.3, 0.7), share(0.8, 0.7, 0.9)),
        "acquisition": {"items": None},
        "retention": [{"name": "old", "items": items(was, now)}],
        "drift": drift,
    }


@pytest.mark.parametrize(
    ("lost", "gained", "nats", "kept", "moved"),
    [
        (12, 1, (0.1, 0.2), shown.WORSE, shown.WORSE),
        (6, 4, (-0.1, 0.2), shown.NOISE, shown.NOISE),
        (0, 9, (-0.2, -0.1), shown.BETTER, shown.BETTER),
    ],
)
def test_colours_follow_tests_and_intervals_and_not_signs(
    lost: int, gained: int, nats: tuple[float, float], kept: str, moved: str
) -> None:
    found = results(lost, gained, nats)
    styles = dict(zip((line[0].strip() for line in change_lines(found)), change_styles(found), strict=True))
    assert styles["task accuracy"] == shown.BETTER and styles["code"] == shown.NOISE
    assert styles["retention: old"] == styles["items kept / lost / gained"] == kept
    assert [style for name, style in styles.items() if "drift" in name] == [moved, "", ""]
    assert styles["perplexity of the references"] == ""
    found["acquisition"] = {"items": items([True] * 8, [False] * 8)}
    assert change_styles(found)[0] == shown.WORSE, "the items tell more than the intervals"


def test_the_table_is_coloured_on_a_terminal_only(capsys: pytest.CaptureFixture[str]) -> None:
    rows, styles = [["a", "+1"], ["b", "-1"]], [shown.BETTER, shown.WORSE]
    colourful, plain = narrow(60), narrow(60, no_color=True)
    for console in (colourful, plain, shown.make_console()):
        shown.show_table(console, ("", "change"), rows, styles=styles)
    written = colourful.file.getvalue()  # type: ignore[attr-defined]
    assert re.search(r"\x1b\[32m +\+1", written) and re.search(r"\x1b\[31m +-1", written)
    assert (
        written.splitlines()[-1] == "\x1b[32mbetter\x1b[0m, \x1b[31mworse\x1b[0m, \x1b[2mwithin noise\x1b[0m"
    )
    assert not re.search(r"\x1b\[3[12]m", plain.file.getvalue())  # type: ignore[attr-defined]
    assert capsys.readouterr().out == "   change\na  +1\nb  -1\n"


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_narrow_table_keeps_figures_whole(width: int) -> None:
    """Names are folded before figures, and an interval is never cut in two."""
    console, figure = narrow(width), "100.0 % [61.0, 100.0]"
    names = ["drift: perplexity of the base's answers", "retention: pocket"]
    shown.show_table(
        console, ("", "before", "after", "change"), [[n, figure, figure, "p 0.00012"] for n in names]
    )
    text = uncoloured(console.file.getvalue())  # type: ignore[attr-defined]
    assert text.count("[61.0, 100.0]") == 4 and max(map(len, text.splitlines())) <= width
    assert (figure in text) == (width >= 80)


# -- completion ------------------------------------------------------------------------------------


def completed(script: str, *words: str) -> list[str]:
    """What bash offers for the last word."""
    line = " ".join(f"'{word}'" for word in words)
    ask = f"COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _unisd; printf '%s\n' \"${{COMPREPLY[@]}}\""
    done = subprocess.run(["bash"], input=f"{script}\n{ask}\n", capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script is bash's")
def test_a_shell_completes_commands_options_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out
    assert completed(script, "unisd", "pr") == ["probe", "prepare"]
    assert completed(script, "unisd", "train", "--max_st") == ["--max_steps"]
    assert completed(script, "unisd", "study", "--max_st") == ["--max_steps"]
    assert completed(script, "unisd", "merge", "--sc") == ["--scale"]
    assert completed(script, "unisd", "train", "--recipe", "sdf") == ["sdft"]
    assert completed(script, "unisd", "train", "--save_strategy", "") == ["no", "steps", "epoch", "best"]
    assert completed(script, "unisd", "train", "ro") == []  # files, by the shell itself
    assert main(["completion", "fish"]) == 0
    assert '"__fish_seen_subcommand_from train" -l max_steps' in capsys.readouterr().out
    assert main(["completion", "tcsh"]) == 2 and "tcsh" in capsys.readouterr().err
