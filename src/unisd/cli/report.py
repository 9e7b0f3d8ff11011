"""`unisd report`: folders of runs or of a study in, one self-contained HTML file out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from unisd.cli.parser import CommandParser, output_file
from unisd.console import loading
from unisd.errors import UserError
from unisd.files import GRAFTING, JUDGE, METRICS, REPORT, RESULTS, write_text

COMPARISON = "comparison.html"
PAGE_HEAD = b'name="generator" content="unisd"'
FIGURES_OF_A_STUDY = "--figures belongs to a study; a run's page holds its figures."


def report_command(arguments: Sequence[str]) -> int:
    """Write the page; returns the exit code.

    Raises:
        UserError: a folder holds neither a run nor a study, or the page cannot be written.
    """
    parser = CommandParser(
        "report",
        "Show a run, several runs side by side or a study as one HTML page. It works offline, on a"
        " phone and in print.",
    )
    parser.add_argument(
        "folders",
        nargs="+",
        type=Path,
        metavar="RUN_OR_STUDY_DIR",
        help="folder that `unisd train` or `unisd study` wrote; one page compares several runs",
    )
    parser.add_argument(
        "--out",
        type=output_file,
        metavar="FILE.html",
        help=f"the page (default: {REPORT} in that folder; for several runs {COMPARISON} here)",
    )
    parser.add_argument(
        "--figures",
        metavar="DIR",
        help="for a study: also write its figures (SVG) and tables (Markdown) to this folder",
    )
    parser.add_argument("--no_run_pages", action="store_true", help="for a study: make no pages for its runs")
    options = parser.parse(arguments)
    if options is None:
        return 0
    for folder in options.folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a folder: give one that `unisd train` or `unisd study` wrote.")
    with loading(" ".join(map(str, options.folders))):
        if len(options.folders) > 1:
            out, text = _comparison(options.folders, options.out, options.figures)
        else:
            folder = options.folders[0]
            out = options.out or folder / REPORT
            text = _one(folder, out, options.figures, not options.no_run_pages)
        write_text(out, text)
    print(f"written to {out} ({len(text.encode()) / 1e6:.1f} MB)")
    return 0


def _comparison(folders: Sequence[Path], out: Path | None, figures: str | None) -> tuple[Path, str]:
    """Where the page of several runs goes, and the page."""
    from unisd.report import compare_page
    from unisd.study.store import RUNS

    if study := next((folder for folder in folders if (folder / RUNS).is_file()), None):
        raise UserError(f"{study} is a study: give it alone, or several runs.")
    if figures:
        raise UserError(FIGURES_OF_A_STUDY)
    target = out or Path(COMPARISON)
    if out is None and target.exists() and PAGE_HEAD not in target.read_bytes()[:2000]:
        raise UserError(
            f"{target} exists already and is not a page of unisd: choose another name with --out."
        )
    return target, compare_page.build(folders)


def _one(folder: Path, out: Path, figures: str | None, run_pages: bool) -> str:
    """The page of a run or of a study."""
    from unisd.study.store import RUNS

    if (folder / RUNS).is_file():
        return _study(folder, out, figures, run_pages)
    if not ((folder / RESULTS).is_file() or (folder / METRICS).is_file()):
        raise UserError(
            f"{folder} holds neither results.json, {METRICS} nor {RUNS}: give the folder of a run or of a"
            " study."
        )
    from unisd.report import run_page

    if figures:
        raise UserError(FIGURES_OF_A_STUDY)
    return run_page.build(folder)


def _study(folder: Path, out: Path, figures: str | None, run_pages: bool) -> str:
    from unisd.cli.study import STUDY_FILE
    from unisd.report import run_page, study_page
    from unisd.study import analysis, design, recommend
    from unisd.study.store import Store

    margin = recommend.read(folder)["margin"] if (folder / "analysis.json").is_file() else 1.0
    store = Store(folder, writes=False)
    found = analysis.analyse(design.load(folder / STUDY_FILE), store, margin)
    if found is None:
        raise UserError(f"no run of the study in {folder} has finished yet.")
    if run_pages:
        for run_id in store.runs():
            one = store.run_folder(run_id)
            page, source = one / REPORT, one / RESULTS
            source = source if source.is_file() else one / METRICS  # of a run that failed
            shown = [file for file in (source, one / GRAFTING, one / JUDGE) if file.is_file()]
            newest = max((file.stat().st_mtime for file in shown), default=0.0)
            if source.is_file() and (not page.exists() or page.stat().st_mtime < newest):
                write_text(page, run_page.build(one))
    if figures is not None:
        target = Path(figures)
        write_text(target / "analysis.md", recommend.markdown(found))
        for task, of_task in found["tasks"].items():
            for name, plot in study_page.figures_of(of_task, found["margin"]).items():
                plot.write(target / (f"{name}.svg" if len(found["tasks"]) == 1 else f"{task}-{name}.svg"))
        print(f"figures and tables written to {target}")
    return study_page.build(folder, found, out.parent)
