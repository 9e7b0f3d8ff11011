"""The pages of a run and a study: what they show, that hostile text stays text, and (marked `real`)
how they behave in Chromium.
"""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib")

from tests.helpers.report import HOSTILE, LONG, Browser, Tags, a_run, a_study, built, record
from unisd.cli.main import main
from unisd.evaluation import judge
from unisd.report import compare_page, plots, run_page, study_page
from unisd.report.html import clean, data_block, escape, render
from unisd.report.supervision import MAX_SHOWN, shades, spread, supervision
from unisd.study.store import Store


def test_a_run_page_shows_what_the_run_wrote(tmp_path: Path) -> None:
    text, tags = built(a_run(tmp_path / "run"))
    for shown in (
        "25.0 % [10.0, 50.0]",
        "+25.0",
        "1,024 MiB",
        "an answer",
        "agreement",
        "25.0 %",
        "unknown: it needs device_tdp",
        "the teacher's most likely tokens",
    ):
        assert shown in tags.text, shown
    assert 'data-top="&lt;i&gt;other"' in text and '"teacher_top":[null,null' in text
    titles = re.findall("<h2>(.*?)</h2>", text)
    assert titles[:3] == ["Before and after", "Answers before and after", "Supervision, token by token"]
    curve = next(attrs["data-curve"] for tag, attrs in tags.found if "data-curve" in attrs)
    assert json.loads(str(curve))["series"] == [["loss", [[1, 1.0], [2, 0.5], [3, 0.3333]]]]
    assert "<title>task, before: 25.0 % [10.0, 50.0]</title>" in text
    assert sum(tag == "svg" for tag, _ in tags.found) >= 5
    assert len(re.findall(r'class="t[ "]', text)) == 6
    assert len({attrs["id"] for _, attrs in tags.found if "id" in attrs}) == sum(
        "id" in attrs for _, attrs in tags.found
    )


def with_diagnostics(folder: Path, alarms: Any, **metrics: float) -> Path:
    """A run of ten steps whose probes ran in every fifth, with `alarms` in its results."""
    results = json.loads((a_run(folder) / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({**results, "alarms": alarms}))
    lines: list[dict[str, Any]] = []
    for step in range(1, 11):
        probe = {"leak/wrong_jsd": 0.1 * step, "retained/nll": 0.2} if step % 5 == 1 else {}
        lines.append(
            {"step": step, "loss": 1.0, "words/all": 9.0 - step / 2, "words/wait": 3.0, **probe, **metrics}
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def diagnostics_of(folder: Path) -> str:
    text, _ = built(folder)
    return text.partition("<h2>Diagnostics</h2>")[2].partition("</section>")[0]


@pytest.mark.long
def test_a_run_page_shows_diagnostics_and_alarms(tmp_path: Path) -> None:
    alarms = [{"name": "collapse", "step": 7, "text": "repetition rose & rose: lower the rate."}]
    shown = diagnostics_of(with_diagnostics(tmp_path / "run", alarms))
    assert "step 7, <b>collapse</b>: repetition rose &amp; rose: lower the rate." in shown
    for title, points in (
        ("Words of doubt", 10),
        ("Teacher under a wrong reference", 2),
        ("Word of doubt: wait", 10),
    ):
        assert re.search(rf'aria-label="[^"]*{title} over {points} steps"', shown), title
    assert "Repeated 4-grams" not in shown  # nothing was repeated, and nothing logged
    assert shown.count("stroke-dasharray") == shown.count("<figure")  # the step of the alarm, in each


@pytest.mark.long
def test_a_run_page_says_when_nothing_was_wrong_or_watched(tmp_path: Path) -> None:
    well = with_diagnostics(tmp_path / "well", [])
    assert "<p>No alarm was raised.</p>" in diagnostics_of(well)
    (well / "metrics.jsonl").write_text('{"step": 10, "words/all": 1.0}\n')  # without probes
    assert "No alarm was raised. Not measured: forgetting" in diagnostics_of(well)
    (well / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n')
    assert "Not measured: words of doubt" in diagnostics_of(well)
    (well / "metrics.jsonl").write_text('{"step": 9, "words/all": 1.0}\n')
    assert "No alarm could be raised: 9 steps are fewer than the 5 first and 5 last" in diagnostics_of(well)
    assert "alarm" not in diagnostics_of(with_diagnostics(tmp_path / "off", None))
    old = with_diagnostics(tmp_path / "old", None)
    (old / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert diagnostics_of(old).strip() == ""


def test_a_run_that_did_not_finish_has_a_page_with_its_alarms(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    (folder / "results.json").unlink()
    lines = [
        {"step": step, "step_time": 1.0, "completions/mean_length": 100.0 if step < 6 else 5.0}
        for step in range(1, 13)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, tags = built(folder)
    assert "unfinished" in tags.text and "short answers: answers shrank from 100 to 5 tokens" in tags.text
    assert 'id="supervision"' in text


def test_every_weight_has_its_curve_and_those_not_recorded_no_mode(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", records=[{**record(), "weight": [1.0] * len(record()["tokens"])}])
    lines = [
        {"step": step, "weight/dash/mean": 1.4, "weight/dash/min": 0.2, "weight/dash/max": 2.0}
        for step in (1, 2)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, tags = built(folder)
    assert "Reliability weight dash over 2 steps" in text and 'value="weight"' not in text
    assert '"weight":null' in text and "agreement weight" not in tags.text.lower()


def test_a_run_page_shows_answers_that_nobody_graded_and_what_a_judge_said(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    sides = {when: {"text": f"answer {when}", "correct": None, "reason": ""} for when in ("before", "after")}
    same = {"id": "same", "prompt": "p", "reference": "", **dict.fromkeys(sides, sides["before"])}
    examples = [same, *({**same, "id": f"row {n}", **sides} for n in range(30))]
    part = {"ids": ["same"], "skills": [None], "before": None, "after": None, "examples": examples}
    (folder / "answers.json").write_text(json.dumps({"task": part}))
    pairs = [judge.Pair(f"{n}", "p", "", "old", "new") for n in range(4)]
    found = judge.judged(pairs, lambda asked: [judge.Reply("[[B]]"), judge.Reply("[[A]]")] * 4)
    judge.keep(folder, {"judge": "<b>J</b>", "of": ["before", "after"], **found})
    text, tags = built(folder)
    section = text.partition("<h2>Answers before and after</h2>")[2].partition("</section>")[0]
    assert "24 of 31 kept answers" in section and "<h3>after</h3><pre>answer after</pre>" in section
    assert "row 0" in section and ">same<" not in section  # what changed comes first
    assert "right" not in section and "wrong" not in section
    assert "Judged by <b>J</b>" in tags.text and "100.0 % [51.0, 100.0]" in tags.text


def test_a_run_page_shows_what_the_grader_said(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run", records=[record()])
    names = ("passed", "score", "no_verdict", "groups_all", "groups_some", "groups_none")
    lines = [{"step": step, **{f"outcome/{name}": 0.25 * step for name in names}} for step in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text, _ = built(folder)
    assert "Verdicts on the answers over 2 steps" in text
    assert "Groups of which answers passed over 2 steps" in text
    assert "feedback: what the &lt;b&gt;grader&lt;/b&gt; says" in text


@pytest.mark.long
def test_alarms_and_words_of_a_run_page_are_bounded_and_escaped(tmp_path: Path) -> None:
    alarms = [{"name": HOSTILE, "step": step, "text": HOSTILE} for step in range(1000)]
    words = {f"words/{HOSTILE}{n}": 5.0 for n in range(30)}
    shown = diagnostics_of(with_diagnostics(tmp_path / "run", alarms, **words))
    assert "<script>window" not in shown and "<img" not in shown and "and 950 more" in shown
    assert shown.count("<li>") == 51 and shown.count(escape(HOSTILE)) >= 100
    alone = with_diagnostics(tmp_path / "alone", [], **{"words/wait": 0.0, f"words/{HOSTILE[9:]}": 5.0})
    assert (
        "Word of doubt: " in (shown := diagnostics_of(alone))
        and "<script>window" not in shown
        and "\x00" not in shown
    )


@pytest.mark.long
def test_nothing_is_fetched_and_every_colour_follows_the_theme(tmp_path: Path) -> None:
    text, tags = built(a_run(tmp_path / "run"))
    for _, attrs in tags.found:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attrs.get(name) or "#").startswith(("#", "data:")), attrs
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    assert not set(plots.COLOURS.values()) & set(re.findall(r"#[0-9a-f]{6}", text)), (
        "a stand-in colour was left"
    )
    assert "var(--c1)" in text


@pytest.mark.long
def test_hostile_text_stays_text(tmp_path: Path) -> None:
    text, tags = built(a_run(tmp_path / "run", LONG))
    assert [tag for tag, _ in tags.found if tag in ("img", "b")].count("img") == 0
    assert sum(tag == "script" for tag, _ in tags.found) == 2, "the data and ours"
    assert not any(name.startswith("on") for _, attrs in tags.found for name in attrs)
    assert "<script>window.hacked" in tags.text and "\u27e8U+202E\u27e9evil?\u2400\u241b[31m" in tags.text
    assert len(text.encode()) < 6e6


def test_clean_and_escape() -> None:
    assert clean("a\r\nb\tc\x00") == "a\nb\tc\u2400"
    assert escape('<a href="x">\'&') == "&lt;a href=&#34;x&#34;&gt;&#39;&amp;"
    assert clean("x" * 300_000).endswith("(100000 more characters)")
    block = data_block("d", {"x": "</script><!--&"})
    assert block.count("<") == 2 and json.loads(block[block.index(">") + 1 : block.rindex("<")]) == {
        "x": "</script><!--&"
    }
    shown = render("health.html", alarms=[], more=0, silence="<b>\u202e", drawn=[])
    assert "<p>&lt;b&gt;\u27e8U+202E\u27e9</p>" in shown


def test_shades_say_where_the_teachers_disagree() -> None:
    shade = shades(record())
    assert shade["contexts"] == [None, 2.0, 2.0, 2.0, 2.0, 2.0]
    assert shade["weight"] == [None, 0.0, 0.0, 0.0, 0.0, 0.75]
    assert shade["contrast"] == [None, 0.0, 0.0, 0.0, 0.0, 2.0]
    plain = {
        **record(),
        "auxiliary_logp": [],
        "negative_logp": None,
        "contrast": None,
        "weight": [None, *[1.0] * 5],
    }
    shown = supervision([plain])
    assert 'value="divergence" checked' in shown and 'value="contexts"' not in shown
    assert supervision([]).strip() == ""


def test_a_long_training_is_shown_from_first_to_last() -> None:
    chosen = spread([record(step) for step in range(1, 201)])
    assert len(chosen) == MAX_SHOWN and (chosen[0]["step"], chosen[-1]["step"]) == (1, 200)
    assert spread([{"step": 1}]) == [], "a record that was cut short"


@pytest.mark.long
def test_a_study_page_shows_effects_and_links_its_runs(tmp_path: Path) -> None:
    folder = a_study(tmp_path / "study")
    first = next(iter(Store(folder, writes=False).runs()))
    built(folder / "runs" / first)
    assert main(["report", str(folder), "--no_run_pages", "--figures", str(tmp_path / "figures")]) == 0
    tags = Tags((folder / "report.html").read_text())
    links = [attrs["href"] for tag, attrs in tags.found if tag == "a"]
    assert len(links) == 8 and all((folder / str(link)).is_file() for link in links)
    assert (
        links.count(f"runs/{first}/report.html") == 1
        and links[1] == f"runs/{str(links[1]).split('/')[1]}/results.json"
    )
    assert "ema: task +" in tags.text and "Pareto front" in tags.text and "Shapley" in tags.text
    drawn = {path.name for path in (tmp_path / "figures").iterdir()}
    assert drawn == {
        "main.svg",
        "one-in.svg",
        "leave-one-out.svg",
        "shapley.svg",
        "interaction.svg",
        "trade-off.svg",
        "analysis.md",
    }
    assert "#010203" not in (tmp_path / "figures" / "main.svg").read_text()


def test_levels_may_hold_the_sign_between_two_factors() -> None:
    names = {"size=8 x 1", "size=4 x 2", "rate=2"}
    assert study_page._factors("size=8 x 1 x rate=2", names) == ("size=8 x 1", "rate=2")
    assert study_page._factors("a x b", set()) == ("a", "b")


def test_the_cost_of_a_resumed_run_says_what_it_counts(tmp_path: Path) -> None:
    folder = a_run(tmp_path / "run")
    results = json.loads((folder / "results.json").read_text())
    results["cost"]["steps"] = results["steps"] - 1
    (folder / "results.json").write_text(json.dumps(results))
    other = a_run(tmp_path / "other")
    told = f"cost of the last {results['steps'] - 1} steps, since a resume"
    assert told in run_page.build(folder) and f"(last {results['steps'] - 1} steps)" in str(
        compare_page._table(compare_page.read([folder, other]))
    )


def test_mistakes_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(tmp_path / "nothing")]) == 2 and "is not a folder" in capsys.readouterr().err
    assert (
        main(["report", str(tmp_path)]) == 2
        and "neither results.json, metrics.jsonl nor" in capsys.readouterr().err
    )
    (tmp_path / "results.json").write_text("{")
    assert main(["report", str(tmp_path)]) == 2 and "cannot be read" in capsys.readouterr().err


# ---------------------------------------------------------------- in a browser


@pytest.mark.real
@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_open_in_chromium(chromium: Any, tmp_path: Path, theme: str, width: int) -> None:
    for folder in (a_run(tmp_path / "run"), a_study(tmp_path / "study")):
        built(folder)
        shown = Browser(chromium, theme, width).open(folder / "report.html")
        wide, seen = shown.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= seen, "nothing sticks out on a phone"
        paper, ink = shown.evaluate(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
        )
        dark = [sum(map(int, re.findall(r"\d+", colour))) < 300 for colour in (paper, ink)]
        assert dark == ([False, True] if theme == "light" else [True, False])
        # In the pictures too: text of a plot against its paper.
        label = shown.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
        assert (sum(map(int, re.findall(r"\d+", label))) < 330) == (theme == "light")
        pixels = shown.screenshot(full_page=True, path=tmp_path / f"{folder.name}.png")
        assert len(pixels) > 20_000


@pytest.mark.real
def test_a_token_tells_what_every_view_said(chromium: Any, tmp_path: Path) -> None:
    built(a_run(tmp_path / "run"))
    shown = Browser(chromium, "light", 1280).open(tmp_path / "run" / "report.html")
    token, tip = shown.locator(".t").nth(5), shown.locator("#tip")
    assert not tip.is_visible()
    token.hover()
    tip.wait_for(state="visible", timeout=5000)
    said = tip.inner_text()
    for line in (
        "student\t-1.500",
        "teacher (reference)\t-0.500",
        "context 1\t-1.000",
        "context 2\t-3.000",
        "wrong reference\t-4.000",
    ):
        assert line in said, said
    assert "(clipped)" in said and "0.250" in said and 'teacher\'s own: "<i>other"\t-0.250' in said
    shown.locator("#tops").check()
    after = "e => getComputedStyle(e, '::after').content"
    assert "<i>other" in shown.locator(".t").nth(5).evaluate(after)

    def colour(nth: int) -> str:
        return str(shown.locator(".t").nth(nth).evaluate("e => getComputedStyle(e).backgroundColor"))

    by_divergence = colour(5)
    shown.locator("input[value=weight]").check()
    assert colour(5) != by_divergence and colour(2) != colour(5)
    shown.keyboard.press("Escape")
    assert not tip.is_visible()
    figure = shown.locator("figure[data-curve]").first  # values of a curve, by pointer and keyboard
    figure.hover()
    assert tip.inner_text().startswith("step 2") and "loss\t0.5" in tip.inner_text()
    shown.keyboard.press("Escape")
    shown.locator(".tokens").last.focus()
    shown.keyboard.press("Tab")
    assert tip.inner_text().startswith("step ")
    shown.keyboard.press("ArrowLeft")
    assert "loss\t" in tip.inner_text() and not tip.is_hidden()


@pytest.mark.real
def test_a_hostile_answer_is_shown_as_text(chromium: Any, tmp_path: Path) -> None:
    built(a_run(tmp_path / "run", LONG))
    browser = Browser(chromium, "light", 1280)
    shown = browser.open(tmp_path / "run" / "report.html", within_s=10.0)  # 100 kB in nine places
    shown.locator(".t").nth(2).hover()
    assert shown.evaluate("window.hacked") is None
    assert "<script>window.hacked=1</script>" in shown.locator(".pair pre").first.inner_text()
    assert "<script>" in shown.locator("#tip").inner_text() and not browser.errors


def test_names_of_points_at_one_place_do_not_cover_each_other() -> None:
    names = [f"+cell{n}" for n in range(8)]
    svg = plots.trade_off(
        [(name, 21.8 + 0.05 * (n // 4), -1.8) for n, name in enumerate(names)], names[:1]
    ).svg
    places = [re.search(rf'rotate\(-0 ([\d.]+) ([\d.]+)\)">{re.escape(name)}<', svg) for name in names]
    found = [(float(place[1]), float(place[2])) for place in places if place is not None]
    assert len(found) == len(names)
    for (x, y), (other_x, other_y) in itertools.combinations(found, 2):
        assert abs(x - other_x) >= 4 * len(names[0]) or abs(y - other_y) >= 8
