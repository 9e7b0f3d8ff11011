"""The documentation site: built strictly, without a broken link, found by its search, offline."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "pyproject.toml").exists())
SITE = ROOT / "site"
FROM_TRL = ROOT / "docs/reference/from-trl.md"
METRICS = ROOT / "docs/reference/metrics.md"


@pytest.fixture(scope="module")
def site() -> Path:
    built = subprocess.run(
        [sys.executable, "docs/build.py"], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return SITE


class Page(HTMLParser):
    """What a page leads to, what it loads, and the anchors that it has."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.anchors: set[str] = set()
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.anchors |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("img", "script", "iframe") and "src" in values:
            self.loaded.append(values["src"])
        elif tag == "link" and values.get("rel") != "canonical" and "href" in values:
            self.loaded.append(values["href"])


page = cache(Page)


def broken(folder: Path) -> list[str]:
    """Links and files that lead nowhere; what would be loaded from elsewhere."""
    found = []
    for file in sorted(folder.rglob("*.html")):
        if file.name == "404.html":  # its links begin at the root of a server
            continue
        for link in [*page(file).links, *page(file).loaded]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                if link in page(file).loaded and parts.scheme != "data":
                    found.append(f"{file.relative_to(folder)} loads {link}")
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            anchor = unquote(parts.fragment)
            if target.is_dir():
                target /= "index.html"
            if not target.exists():
                found.append(f"{file.relative_to(folder)}: there is no {link}")
            elif anchor and target.suffix == ".html" and anchor not in page(target).anchors:
                found.append(f"{file.relative_to(folder)}: there is no anchor {link}")
    return found


@pytest.mark.site
def test_no_link_is_broken_and_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    assert not broken(site), "\n".join(broken(site))
    assert len(list(site.rglob("*.html"))) > 40


def test_the_link_checker_finds_what_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        '<a id="x" href="b.html">1</a> <a href="#x">2</a> <a href="#y">3</a> <a href="c/">4</a>'
        '<a href="https://x.org">5</a> <script src="https://x.org/y.js"></script> <a href="b.html#z">6</a>'
    )
    (tmp_path / "b.html").write_text("<p>no anchor</p>")
    (tmp_path / "c").mkdir()
    assert broken(tmp_path) == [
        "a.html: there is no anchor #y",
        "a.html: there is no c/",
        "a.html: there is no anchor b.html#z",
        "a.html loads https://x.org/y.js",
    ]


# -- what the site says of TRL's options -----------------------------------------------------------


def rows_of_trl() -> Iterator[tuple[str, str, str, str]]:
    """TRL's name and default, our name and default; "none" and nothing where there is none."""
    table = FROM_TRL.read_text(encoding="utf-8").partition("## Option by option")[2].partition("\n## ")[0]
    for line in table.splitlines():
        if line.startswith("| `"):
            theirs, ours, _ = line.strip("|").split("|")
            name, default = re.findall("`([^`]+)`", theirs)
            yield (name, default, *(re.findall("`([^`]+)`", ours) or ("none", "")))


def search_index(site: Path) -> list[dict[str, Any]]:
    text = (site / "search.js").read_text(encoding="utf-8")
    items = json.loads(text[text.index("{") : text.rindex("}") + 1])["items"]
    assert len(items) > 300
    return list(items)


@pytest.mark.site
def test_the_search_knows_every_option_of_trl(site: Path) -> None:
    index, missing = search_index(site), []
    rows = list(rows_of_trl())
    for name, *_ in rows:
        found = [item["location"] for item in index if name in item["title"] + " " + item["text"]]
        own = f"reference/options.html#{name}"
        if own not in found and not any(place.startswith("reference/from-trl.html") for place in found):
            missing.append(name)
    assert not missing and len(rows) >= 30
    titles = {item["location"]: re.sub("<[^>]*>", "", item["title"]) for item in index}
    assert "--teacher_model_kind" in titles["reference/options.html#teacher_model_kind"]


@pytest.mark.site
def test_the_table_of_trl_names_all_of_its_options_with_both_defaults(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from transformers import TrainingArguments
    from trl.experimental.sdft import SDFTConfig

    from unisd.config import UniSDConfig
    from unisd.run.options import RunOptions

    of_transformers = {item.name: item.default for item in dataclasses.fields(TrainingArguments)}
    theirs = {
        item.name: item.default
        for item in dataclasses.fields(SDFTConfig)
        if item.name not in of_transformers or of_transformers[item.name] != item.default
    }
    ours = {
        item.name: item.default for kind in (UniSDConfig, RunOptions) for item in dataclasses.fields(kind)
    }
    rows = {name: (default, here, own) for name, default, here, own in rows_of_trl()}
    assert rows.keys() == theirs.keys()
    wrong = []
    for name, (default, here, own) in rows.items():
        if default != str(theirs[name]).replace("\n", "\\n"):
            wrong.append(f"TRL's {name} is {theirs[name]!r}")
        if here == "none":
            wrong += [f"{name} is here, too"] * (name in ours)
        elif own != str(getattr(ours[here], "value", ours[here])):
            wrong.append(f"our {here} is {ours[here]!r}")
    assert not wrong, "\n".join(wrong)


# -- what the site says of metrics -----------------------------------------------------------------


def metrics_of_the_code() -> set[str]:
    """Names that are written out where metrics are made."""
    kinds = {name.partition("/")[0] for name in documented_metrics()}
    found = set()
    for folder in ("monitoring", "training", "methods", "."):
        files = (ROOT / "src/unisd" / folder).glob("*.py")
        for file in files:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                text = node.value if isinstance(node, ast.Constant) else None
                if isinstance(text, str) and re.fullmatch(r"[a-z]+/[a-z_0-9]+", text):
                    found |= {text} if text.partition("/")[0] in kinds else set()
    return {name for name in found if not name.endswith("_")} - SOURCES


SOURCES = {"teacher/plain", "teacher/negative", "teacher/unconditioned"}  # what a target is made of


def documented_metrics() -> set[str]:
    return set(re.findall(r"^\| `([^`]+)` \|", METRICS.read_text(encoding="utf-8"), re.M))


@pytest.mark.site
def test_every_metric_has_a_line_and_every_line_a_metric() -> None:
    named, here = documented_metrics(), metrics_of_the_code()
    stems = {name[:-1] for name in named if name.endswith("*")}
    assert not {name for name in here - named if not name.startswith(tuple(stems))}
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "src/unisd").rglob("*.py"))
    made = {name for name in named if not name.endswith("*")} - here
    assert {name for name in made if f"{name.rpartition('_')[0]}_" not in source} <= MADE
    assert all(stem in source for stem in stems)


MADE = {"agreement/max", "leak/wrong_cosine", "leak/full_wrong_cosine"}  # their names are put together


# -- in a browser ----------------------------------------------------------------------------------


OPEN_SHADOWS = """
const attach = Element.prototype.attachShadow;
Element.prototype.attachShadow = function () { return attach.call(this, {mode: "open"}); };
"""  # the search stands in a closed one, which nothing can look into


@pytest.mark.site
@pytest.mark.parametrize("width", [1366, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_the_search_works_without_a_server(
    site: Path, chromium: Any, tmp_path: Path, width: int, scheme: str
) -> None:
    """The pictures stay where pytest keeps the folders of its last runs, to be looked at."""
    context = chromium.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    context.add_init_script(OPEN_SHADOWS)
    shown, asked = context.new_page(), []
    shown.on("request", lambda request: asked.append(request.url))
    for name in ("index", "reference/options", "reference/from-trl", "methods", "results/speed", "field"):
        shown.goto((site / f"{name}.html").as_uri())
        wide, seen = shown.evaluate(
            "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
        )
        assert wide <= seen, f"{name} sticks out at {width} px"
        shown.screenshot(path=tmp_path / f"{name.replace('/', '-')}.png")
    paper = shown.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 300) == (scheme == "dark")
    shown.keyboard.press("Control+k")
    shown.get_by_placeholder("Search").fill("teacher_update_rate")
    link = shown.locator("a[href*='reference/options.html']").filter(has_text="teacher_update_rate").first
    link.wait_for(state="visible", timeout=60_000)  # the first search builds the index
    assert all(url.startswith(("file:", "data:", "blob:")) for url in asked)
    context.close()
