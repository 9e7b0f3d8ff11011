"""Draws figures as inline SVG, by matplotlib.

In named colours that the page's style sheet fills in for its light and dark theme.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from markupsafe import Markup

from unisd.report.html import clean, escape

# Stand-ins: each occurs in the SVG where the style sheet's colour shall be.
COLOURS = {"--ink": "#010203", "--soft": "#010204", "--line": "#010205", "--paper": "#010206"}
COLOURS |= {f"--c{n}": f"#0102{n:02x}" for n in range(16, 20)}
SERIES = ("--c16", "--c17", "--c18", "--c19")
PRINTED = {"--ink": "#1d2126", "--soft": "#5b6470", "--line": "#d9dde3", "--paper": "#ffffff"}
PRINTED |= dict(zip(SERIES, ("#1f6fb4", "#c2571a", "#2f7d4f", "#8a4a9e"), strict=True))
_numbers = itertools.count(1)


@contextmanager
def _figure(width: float, height: float, **options: Any) -> Iterator[tuple[Any, Any]]:
    import matplotlib  # takes a second
    from matplotlib.figure import Figure

    ink, soft, line = COLOURS["--ink"], COLOURS["--soft"], COLOURS["--line"]
    style = {
        "svg.fonttype": "none",
        "svg.hashsalt": "unisd",
        "font.family": "sans-serif",
        "font.size": 9,
        "text.color": ink,
        "text.parse_math": False,
        "axes.edgecolor": line,
        "axes.labelcolor": soft,
        "axes.titlesize": 10,
        "axes.titlecolor": ink,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": line,
        "grid.linewidth": 0.5,
        "xtick.color": soft,
        "ytick.color": soft,
        "legend.frameon": False,
        "legend.fontsize": 8,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.subplots(**options)


class Plot:
    """A figure: `inline` for a page, or written to a file with the light theme's colours.

    told: what is said of the artists whose `gid` is a key of it, under the pointer. points: of a
    curve, what the page's script says of its steps.
    """

    def __init__(self, figure: Any, label: str, told: Mapping[str, str] | None = None) -> None:
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        self.svg = buffer.getvalue()
        for gid, text in (told or {}).items():
            self.svg = self.svg.replace(f'<g id="{gid}">', f"<g><title>{escape(text)}</title>")
        self.label = label
        self.points: dict[str, Any] | None = None

    def inline(self, wide: bool = False) -> Markup:
        """A `figure` element; its colours follow the page's theme.

        `wide`: alone in its line, not one of a grid.
        """
        svg = self.svg[self.svg.index("<svg") :]
        svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
        svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
        svg = re.sub(
            r'(<svg[^>]*?) height="[^"]*"', rf'\1 role="img" aria-label="{escape(self.label)}"', svg, count=1
        )
        # Several figures share a page: names must not.
        prefix = f"f{next(_numbers)}-"
        svg = re.sub(r'\bid="', f'id="{prefix}', svg)
        svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{prefix}", svg)
        for number, name in enumerate(SERIES, 1):
            svg = svg.replace(COLOURS[name], f"var(--c{number})")
        for name in ("--ink", "--soft", "--line", "--paper"):
            svg = svg.replace(COLOURS[name], f"var({name})")
        size = re.search(r'viewBox="0 0 ([\d.]+)', svg)
        # 1 pt drawn: at most 1.6 px shown
        limit = f' style="max-width:{float(size[1]) * 1.6:.0f}px"' if wide and size else ""
        points = (
            "" if self.points is None else f' tabindex="0" data-curve="{escape(json.dumps(self.points))}"'
        )
        return Markup(f"<figure{limit}{points}>{svg}</figure>")

    def write(self, path: Path) -> None:
        svg = self.svg
        for name, colour in PRINTED.items():
            svg = svg.replace(COLOURS[name], colour)
        path.write_text(svg, encoding="utf-8")


Points = Sequence[tuple[float, float | None]]
"""Step and value; None leaves a gap."""
FEW_POINTS = 30
"""Fewer are shown one by one; of more a moving mean is drawn."""


def curve(
    title: str,
    series: Mapping[str, Points],
    unit: str = "",
    marks: Sequence[float] = (),
    pale: bool = True,
) -> Plot:
    """Values over optimizer steps.

    marks: steps with a vertical line. pale: draw the single values too where a mean is drawn.
    """
    with _figure(3.4, 2.1) as (figure, axes):
        styles = itertools.product(("-", ":"), SERIES)
        for (name, points), (dash, colour) in zip(series.items(), itertools.cycle(styles)):
            x = [step for step, _ in points]
            y = [float("nan") if value is None else value for _, value in points]
            look = {"color": COLOURS[colour], "linestyle": dash, "label": clean(name)}
            if len(points) < FEW_POINTS:
                axes.plot(x, y, linewidth=1.4, marker="o", markersize=2.5, **look)
                continue
            if pale:
                axes.plot(x, y, color=COLOURS[colour], linewidth=0.8, alpha=0.35)
            axes.plot(x, _moving_mean(y), linewidth=1.6, **look)
        for step in marks:
            axes.axvline(step, color=COLOURS["--soft"], linewidth=1.0, linestyle="--")
        axes.set_title(clean(title), loc="left")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        if len(series) > 1:
            axes.legend()
        count = max(len(points) for points in series.values())
        plot = Plot(figure, f"{title} over {count} steps")
        box = axes.get_position()  # as drawn
        plot.points = {
            "box": [round(box.x0, 4), round(box.x1, 4)],
            "steps": list(axes.get_xlim()),
            "series": [[clean(name), _for_script(points)] for name, points in series.items()],
        }
        return plot


def _moving_mean(values: Sequence[float]) -> list[float]:
    """Mean over a twentieth of the values around each; nan where it is nan itself."""
    reach = max(len(values) // 40, 1)
    means = []
    for place, value in enumerate(values):
        near = [x for x in values[max(place - reach, 0) : place + reach + 1] if math.isfinite(x)]
        means.append(sum(near) / len(near) if near and math.isfinite(value) else float("nan"))
    return means


def _for_script(points: Points) -> list[list[float]]:
    return [[step, float(f"{y:.4g}")] for step, y in points if y is not None and math.isfinite(y)]


Wanted = Sequence[tuple[str, str, Mapping[str, str]]]
"""Title, unit, and name -> metric of each figure."""


def curves(wanted: Wanted, metrics: Sequence[Mapping[str, Any]], marks: Sequence[float] = ()) -> list[Markup]:
    """The wanted figures, without those whose metrics are not there or 0 throughout.

    Each is drawn over the steps that have its metrics: a probe taken every fifth step is a line
    too.
    """
    drawn = []
    for title, unit, names in wanted:
        lines = [line for line in metrics if any(key in line for key in names.values())]
        series = {name: [(line["step"], line.get(key)) for line in lines] for name, key in names.items()}
        series = {name: points for name, points in series.items() if any(y for _, y in points)}
        if series:
            drawn.append(curve(title, series, unit, marks).inline())
    return drawn


def overlaid(wanted: Wanted, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[Markup]:
    """The metrics of several runs in one figure each, without those that no run has."""
    drawn = []
    for title, unit, names in wanted:
        for name, key in names.items():
            series = {
                run: [(line["step"], line[key]) for line in metrics if key in line]
                for run, metrics in runs.items()
            }
            series = {run: points for run, points in series.items() if any(y for _, y in points)}
            if series:
                said = title if len(names) == 1 else f"{title}: {name}"
                drawn.append(curve(said, series, unit, pale=False).inline())
    return drawn


def before_after(rows: Sequence[tuple[str, Mapping[str, float], Mapping[str, float]]]) -> Plot:
    """Accuracies in percent with their intervals, before and after, one line each."""
    with _figure(5.0, 0.7 + 0.38 * len(rows)) as (figure, axes):
        sides = (("before", -0.13, "--soft", "o"), ("after", 0.13, SERIES[0], "D"))
        told: dict[str, str] = {}
        for place, (row, *both) in enumerate(rows):
            for side, (name, offset, colour, mark) in zip(both, sides, strict=True):
                value, low, high = (100 * side[key] for key in ("value", "low", "high"))
                gid = f"told-{len(told)}"
                told[gid] = f"{row.strip()}, {name}: {value:.1f} % [{low:.1f}, {high:.1f}]"
                look = {"color": COLOURS[colour], "gid": gid}
                axes.plot([low, high], [place + offset] * 2, linewidth=1.6, **look)
                label = None if place else name
                axes.plot([value], [place + offset], mark, markersize=5, label=label, **look)
        axes.set_yticks(range(len(rows)), [clean(name) for name, _, _ in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_xlim(-1, 101)
        axes.set_xlabel("accuracy in %, 95 % interval")
        axes.legend(loc="best")
        return Plot(figure, "accuracy before and after, with 95 % intervals", told)


def bars(title: str, values: Mapping[str, float], unit: str) -> Plot:
    """Horizontal bars with their numbers."""
    with _figure(5.5, 0.7 + 0.3 * len(values)) as (figure, axes):
        places = range(len(values))
        axes.barh(places, list(values.values()), color=COLOURS[SERIES[0]], height=0.6)
        for place, value in zip(places, values.values(), strict=True):
            axes.text(value, place, f" {value:,.1f}", va="center", color=COLOURS["--ink"])
        axes.set_yticks(places, [clean(name) for name in values])
        axes.invert_yaxis()
        axes.margins(x=0.15)
        axes.set_xlabel(unit)
        axes.set_title(title, loc="left")
        return Plot(figure, title)


Panel = tuple[str, Sequence[tuple[str, float, float | None, float | None]]]


def forest(panels: Sequence[Panel], margin: float) -> Plot:
    """Draw effects with intervals, one panel an outcome.

    Of a panel: title, and name, value, low, high of each effect.

    The shaded band is what does not matter. Green and orange are effects on accuracy whose interval
    excludes 0; time has no good side.
    """
    count = max(len(lines) for _, lines in panels)
    with _figure(4.0 * len(panels), 0.9 + 0.36 * count, ncols=len(panels), sharey=True, squeeze=False) as (
        figure,
        grid,
    ):
        told: dict[str, str] = {}
        for axes, (title, lines) in zip(grid[0], panels, strict=True):
            judged = title.endswith("(points)")
            if judged:
                axes.axvspan(-margin, margin, color=COLOURS["--line"], alpha=0.4, linewidth=0)
            axes.axvline(0, color=COLOURS["--soft"], linewidth=0.8)
            for place, (name, value, low, high) in enumerate(lines):
                clear = low is not None and high is not None and (low > 0 or high < 0)
                colour = COLOURS[
                    SERIES[0]
                    if not judged
                    else "--soft"
                    if not clear
                    else SERIES[2]
                    if value > 0
                    else SERIES[1]
                ]
                gid = f"told-{len(told)}"
                told[gid] = f"{name}: {value:+.2f}"
                if low is not None and high is not None:
                    told[gid] += f" [{low:+.2f}, {high:+.2f}]"
                    axes.plot([low, high], [place, place], color=colour, linewidth=1.8, gid=gid)
                axes.plot([value], [place], "o", color=colour, markersize=5, gid=gid)
            axes.set_title(title, loc="left")
            axes.set_yticks(range(len(lines)), [clean(name) for name, *_ in lines])
            axes.set_ylim(count - 0.5, -0.5)
        return Plot(figure, "effects with 95 % intervals", told)


def trade_off(cells: Sequence[tuple[str, float, float]], front: Sequence[str]) -> Plot:
    """Task gain against the change in retention, with the Pareto front."""
    with _figure(7.0, 4.4) as (figure, axes):
        best = sorted((cell for cell in cells if cell[0] in front), key=lambda cell: cell[2])
        axes.step(
            [c[2] for c in best],
            [c[1] for c in best],
            where="pre",
            color=COLOURS[SERIES[1]],
            linewidth=1,
            label="Pareto front",
        )
        told: dict[str, str] = {}
        for number, (name, gain, kept) in enumerate(cells):
            colour, gid = COLOURS[SERIES[1] if name in front else SERIES[0]], f"told-{number}"
            told[gid] = f"{name}: task {gain:+.1f}, retention {kept:+.1f} points"
            axes.plot([kept], [gain], "o", color=colour, markersize=6, gid=gid)
        axes.legend()
        _name_gains(figure, axes, cells)
        return Plot(figure, "task gain against forgetting", told)


def grafting(points: Sequence[tuple[str, float, float]]) -> Plot:
    """Draw task gain against the change in retention, of growing parts of one change."""
    with _figure(7.0, 4.4) as (figure, axes):
        axes.plot(
            [kept for _, _, kept in points],
            [gain for _, gain, _ in points],
            "o-",
            color=COLOURS[SERIES[0]],
            linewidth=1.2,
            markersize=6,
        )
        _name_gains(figure, axes, points)
        return Plot(figure, "task gain against forgetting, of parts of the change")


def _name_gains(figure: Any, axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Name the axes of task gain against the change in retention, and each point."""
    axes.set_xlabel("change in retention, points (right: less forgotten)")
    axes.set_ylabel("gain on the task, points")
    axes.margins(0.15)
    _label(figure, axes, [(clean(name), kept, gain) for name, gain, kept in points])


def _label(figure: Any, axes: Any, points: Sequence[tuple[str, float, float]]) -> None:
    """Put names beside their points, moved until none covers another or a point.

    Up or down; a line leads back from the moved ones.
    """
    figure.draw_without_rendering()  # fixes what is where
    scale, height = 72 / figure.dpi, 10.0  # all in points (1/72 inch) from here on
    places = [tuple(scale * value for value in axes.transData.transform((x, y))) for _, x, y in points]
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    right = scale * figure.bbox.width
    steps = sorted(range(-12, 13), key=abs)
    for (name, *point), (x, y) in sorted(zip(points, places, strict=True), key=lambda item: item[1][1]):
        width = 4.6 * len(name)
        for step, side in itertools.product(steps, (6.0, -6.0 - width)):
            box = (x + side, y + step * height / 2 - 4, x + side + width, y + step * height / 2 + 6)
            inside = box[0] > 0 and box[2] < right
            if inside and not any(
                box[0] < other[2] and other[0] < box[2] and box[1] < other[3] and other[1] < box[3]
                for other in taken
            ):
                break
        taken.append(box)
        arrow = {"arrowstyle": "-", "color": COLOURS["--line"], "linewidth": 0.8, "shrinkA": 0, "shrinkB": 3}
        axes.annotate(
            name,
            point,
            xytext=(box[0] - x, box[1] - y + 1),
            textcoords="offset points",
            fontsize=8,
            color=COLOURS["--ink"],
            arrowprops=arrow if abs(step) > 2 else None,
        )


def interaction_map(names: Sequence[str], values: Mapping[tuple[str, str], tuple[float, bool]]) -> Plot:
    """Draw two-way interactions in points: discs, whose area is the size, the colour the sign.

    A ring: the interval excludes 0.
    """
    with _figure(1.6 + 0.85 * len(names), 1.0 + 0.7 * len(names)) as (figure, axes):
        largest = max((abs(value) for value, _ in values.values()), default=1.0) or 1.0
        for (one, two), (value, clear) in values.items():
            x, y = names.index(one), names.index(two)
            colour = COLOURS[SERIES[2] if value > 0 else SERIES[1]]
            edge = COLOURS["--ink"] if clear else "none"
            axes.scatter(
                [x],
                [y],
                s=900 * abs(value) / largest,
                color=colour,
                alpha=0.45,
                edgecolors=edge,
                linewidths=1.5,
            )
            axes.text(x, y, f"{value:+.1f}", ha="center", va="center", fontsize=8, color=COLOURS["--ink"])
        axes.set_xticks(range(len(names)), [clean(name) for name in names], rotation=20)
        axes.set_yticks(range(len(names)), [clean(name) for name in names])
        axes.set_xlim(-0.5, len(names) - 0.5)
        axes.set_ylim(len(names) - 0.5, -0.5)
        return Plot(figure, "two-way interactions on the task, in points")
