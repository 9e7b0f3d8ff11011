"""Verdicts on runs, and the page of several runs side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from tests.helpers.report import HOSTILE, Browser, Tags, a_run, judged
from unisd.cli.main import main
from unisd.report import compare_page
from unisd.report.verdict import Tile, sentence, tiles_of


def tiles(folder: Path) -> dict[str, Tile]:
    return {tile.name: tile for tile in tiles_of(json.loads((folder / "results.json").read_text()))}


def test_verdicts_need_more_than_chance(tmp_path: Path) -> None:
    well = tiles(judged(tmp_path / "well", [True] * 8))
    assert [(well[name].word, well[name].kind) for name in ("task", "retention", "drift")] == [
        ("learned", "good"),
        ("no clear loss", "good"),
        ("near the base", "good"),
    ]
    said = sentence(list(well.values()))
    assert said == "0.0 \u2192 100.0 % (learned); retention: no clear loss; drift: near the base"
    open_ = tiles(judged(tmp_path / "open", [True] * 2 + [False] * 6, lost=2))
    assert (open_["task"].word, open_["retention"].word) == ("no clear change", "no clear loss")
    worse = tiles(judged(tmp_path / "worse", [True] * 2, lost=10, nats=0.2))
    assert (worse["retention"].word, worse["drift"].word) == ("forgotten", "far from the base")
    far = json.loads((tmp_path / "well" / "results.json").read_text())
    for kl, nats in ((0.8, (-0.6, -0.7, -0.5)), (0.05, (0.5, -0.1, 1.1))):  # sharper; too few rows
        low = dict(zip(("value", "low", "high"), nats, strict=True))
        far["drift"] |= {"kl": {**far["drift"]["kl"], "after": kl}, "nats": low}
        [drift] = [tile for tile in tiles_of(far) if tile.name == "drift"]
        assert (drift.word, drift.kind) == ("moved; no clear loss", "")
    small = judged(tmp_path / "small", [True] * 2, lost=10)
    results = json.loads((small / "results.json").read_text())
    results["retention"][0]["items"] = {"kept": 386, "lost": 14, "gained": 0, "neither": 0, "p": 0.00012}
    (small / "results.json").write_text(json.dumps(results))
    assert (tiles(small)["retention"].word, tiles(small)["retention"].kind) == ("small loss", "")
    plain = tiles(a_run(tmp_path / "plain"))  # neither items nor drift were measured
    assert plain["task"].word == "" and "drift" not in plain and plain["alarms"].kind == "bad"


def compared(*folders: Path, out: Path) -> tuple[str, Tags]:
    assert main(["report", *map(str, folders), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    return text, Tags(text)


def two_runs(folder: Path) -> tuple[Path, Path]:
    one = judged(folder / "x" / "run", [True] * 9 + [False] * 3, learning_rate=0.1, output_dir="x", seed=1)
    other = judged(
        folder / "y" / "run", [False] * 9 + [True] * 3, learning_rate=HOSTILE, output_dir="y", seed=1
    )
    return one, other


@pytest.mark.long
def test_two_runs_are_compared_on_the_same_rows(tmp_path: Path) -> None:
    text, tags = compared(*two_runs(tmp_path), out=tmp_path / "page.html")
    line = text.partition("<td>x/run / y/run</td>")[2].partition("</tr>")[0]
    assert [cell.partition("<")[0] for cell in line.split(">")[1::2]][:6] == [
        "0",
        "9",
        "3",
        "0",
        "-50.0",
        "0.15",
    ]
    options = tags.text.partition("Options that differ")[2].partition("Answers to")[0]
    assert "learning_rate" in options and "output_dir" not in options and "seed" not in options
    answers = tags.text.partition("Answers to the same prompts")[2].partition("Curves")[0]
    assert answers.count("a guess") == 12 and "before: wrong" in answers and "x/run: right" in answers
    curves = [json.loads(str(attrs["data-curve"])) for _, attrs in tags.found if "data-curve" in attrs]
    assert [name for name, _ in curves[0]["series"]] == ["x/run", "y/run"] and "Loss over 3 steps" in text
    assert not any(tag == "img" for tag, _ in tags.found) and "<script>window.hacked" in tags.text


def test_rows_that_differ_are_not_tested(tmp_path: Path) -> None:
    one, other = two_runs(tmp_path)
    path = other / "answers.json"
    content = json.loads(path.read_text())
    content["task"]["examples"][0]["prompt"] = "another"
    path.write_text(json.dumps(content))
    paired, unpaired = compare_page.paired(compare_page.read([one, other]))
    assert paired == [] and unpaired == "Not the same graded rows, so not tested: x/run and y/run (task)."


def test_what_cannot_be_compared_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, other = two_runs(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "comparison.html").write_text("mine")
    for folders, flags, said in (
        ([one, one], ["--out", "page.html"], "is given twice"),
        ([one, tmp_path / "empty"], ["--out", "page.html"], "holds no results.json"),
        ([one] * 9, ["--out", "page.html"], "at most 8"),
        ([one, other], ["--figures", "f"], "--figures belongs to a study"),
        ([one, other], [], "comparison.html exists already"),
    ):
        assert main(["report", *map(str, folders), *flags]) == 2
        assert said in capsys.readouterr().err
    assert (tmp_path / "comparison.html").read_text() == "mine"


@pytest.mark.real
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_a_comparison_opens_in_chromium(chromium: Any, tmp_path: Path, theme: str, width: int) -> None:
    compared(*two_runs(tmp_path), out=tmp_path / "page.html")
    shown = Browser(chromium, theme, width).open(tmp_path / "page.html")
    wide, seen = shown.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    assert wide <= seen and shown.evaluate("window.hacked") is None
    shown.screenshot(full_page=True, path=tmp_path / "page.png")
    clipped = "e => e.scrollWidth > e.clientWidth"
    if width == 390:
        assert not any(shown.locator(".scroll").nth(n).evaluate(clipped) for n in range(3))
