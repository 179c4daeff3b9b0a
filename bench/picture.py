#!/usr/bin/env python3
"""Draw docs/bench.svg from the records in build/ (see record.py).

A part that was not run leaves an empty panel that says so. Nothing is drawn that was
not measured.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import matplotlib

matplotlib.use("svg")

import record
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

Rows = dict[str, dict[str, Any]]
Points = list[tuple[float, float]]

TARGET = record.BUILD.parent / "docs" / "bench.svg"

# Okabe and Ito's colours: told apart by everyone, and by their grey, too.
BLUE, SKY, ORANGE, GREEN, PINK, GREY, INK = (
    "#0072B2",
    "#56B4E9",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#8A8A8A",
    "#333333",
)
REST = (GREEN, PINK, SKY, "#E69F00")

STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E6E6E6",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "figure.facecolor": "white",
    "svg.hashsalt": "afork",  # the same numbers give the same file
}

#: Of a label, what has a place beside a panel.
SHORT = {
    "multiprocessing forkserver": "forkserver",
    "without huge pages": "afork, no huge pages",
    "os.fork, the same objects": "os.fork, same objects",
    "billiard forkserver": "billiard",
    "pebble, forkserver": "pebble",
    "pebble asynchronous.process": "pebble",
    "loky, a pool of one": "loky",
}

PSS, PRIVATE = ", PSS", ", private"

#: The rows of the panel of calls: key in calls.json, name.
CALLS = (
    ("limit", "C ping-pong, no Python"),
    ("rpc", "afork rpc"),
    ("pool", "afork Pool"),
    ("execnet", "execnet"),
    ("anyio", "anyio.to_process"),
    ("mp-pool", "multiprocessing.Pool"),
    ("billiard", "billiard"),
    ("pebble", "pebble"),
    ("trio", "trio-parallel"),
    ("ppe", "ProcessPoolExecutor"),
    ("loky", "loky"),
)


def look(label: str, others: Iterator[str]) -> dict[str, Any]:
    """Ours in blue and thick, the limit in grey, os.fork in orange."""
    small = label.lower()
    if "afork" in small:
        plain = "without" not in small and "no huge" not in small
        return {
            "color": BLUE if plain else SKY,
            "lw": 2.2 if plain else 1.6,
            "zorder": 3,
            "marker": "o" if plain else "s",
        }
    if small.startswith(("c ", "c:")):
        return {"color": GREY, "lw": 1.4, "ls": "--", "marker": "^"}
    if "os.fork" in small:
        return {"color": ORANGE, "lw": 1.6, "marker": "D"}
    return {"color": next(others), "lw": 1.6, "marker": "v"}


def number(value: float, _: object = None) -> str:
    """Of an axis: 20, 1k, 4k, 1M."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def lines(rows: Rows, x: str, y: str) -> dict[str, Points]:
    """The rows that have both columns, as points by label."""
    found: dict[str, Points] = {}
    for row in rows.values():
        if row.get(x) is not None and row.get(y) is not None:
            label = str(SHORT.get(row["label"], row["label"]))
            found.setdefault(label, []).append((row[x], row[y]))
    return {label: sorted(points) for label, points in found.items()}


def spread(wanted: list[float], gap: float) -> list[float]:
    """Places for labels near those that are wanted, none closer than the gap."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = sorted(wanted)
    for _ in range(200):
        placed[0] = max(placed[0], gap / 3)  # below that are the names of the axis
        for i in range(1, len(placed)):
            lack = gap - (placed[i] - placed[i - 1])
            if lack > 0:
                placed[i - 1] -= lack / 2
                placed[i] += lack / 2
    found = [0.0] * len(wanted)
    for at, i in enumerate(order):
        found[i] = placed[at]
    return found


def draw(axes: Any, found: dict[str, Points], size: Callable[[float], str]) -> None:
    """Each line, with its name and last value to the right of its end."""
    others, looks = iter(REST * 3), dict[str, dict[str, Any]]()
    ends = []
    for label, points in found.items():
        name = label.removesuffix(PRIVATE).removesuffix(PSS)
        style = dict(looks.setdefault(name, look(label, others)))
        if label.endswith(PRIVATE):
            style.update(ls=":", mfc="white")
        axes.plot(*zip(*points, strict=True), ms=4.5, clip_on=False, **style)
        ends.append((label, points[-1], style["color"]))
    axes.figure.canvas.draw()  # the limits of the axes are known from here
    to_pixels, height = axes.transData.transform, axes.bbox.height
    wanted = [(to_pixels(end)[1] - axes.bbox.y0) / height for _, end, _ in ends]
    places = spread(wanted, min(0.145, 1.05 / len(ends)))
    for (label, (_, y), color), place in zip(ends, places, strict=True):
        axes.text(
            1.04,
            place,
            f"{label}\n{size(y)}",
            transform=axes.transAxes,
            color=color if color not in (SKY, GREY) else INK,
            va="center",
            fontsize=8.5,
            linespacing=1.15,
        )


def scale(axes: Any, marks: list[float], name: Callable[[float], str]) -> None:
    """Both axes logarithmic; on the horizontal one the marks, with their names."""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(marks, [name(mark) for mark in marks])
    axes.xaxis.set_minor_locator(NullLocator())
    decades(axes.yaxis)


def decades(axis: Any) -> None:
    """1, 2, 5, 10, 20, ..."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(number))
    axis.set_minor_locator(NullLocator())


def marks_of(found: dict[str, Points]) -> list[float]:
    """What was measured, rounded to two digits; of neighbours only one."""
    marks: list[float] = []
    for x in sorted(
        {float(f"{x:.2g}") for points in found.values() for x, _ in points}
    ):
        if not marks or x > marks[-1] * 1.4:
            marks.append(x)
    return marks


def bytes_of(mb: float) -> str:
    return f"{mb / 1000:.0f} GB" if mb >= 1000 else f"{mb:.0f} MB"


def per_second(value: float) -> str:
    return f"{value:,.0f} /s"


def rates(axes: Any, found: dict[str, Points], xlabel: str) -> None:
    scale(axes, marks_of(found), bytes_of)
    axes.set_xlabel(xlabel)
    axes.set_ylabel("starts per second (log)")
    draw(axes, found, per_second)


def template_size(axes: Any, rows: Rows) -> bool:
    found = lines(rows, "template_mb", "rate")
    sizes = [x for points in found.values() for x, _ in points if x > 0]
    if found:
        # A process without any objects stands where the empty template does.
        for points in found.values():
            points[:] = [(max(x, min(sizes)), y) for x, y in points]
        rates(axes, found, "Python objects in the template (log)")
    return bool(found)


def memory(axes: Any, rows: Rows) -> bool:
    lean = {k: row for k, row in rows.items() if "pandas" not in row["label"]}
    found = {}
    for column, name in (("pss_mb", PSS), ("private_mb", PRIVATE)):
        for label, points in lines(lean, "workers", column).items():
            if name == PSS or label == "afork":  # of all there is no room for both
                found[label + name] = points
    if not found:
        return False
    scale(axes, marks_of(found), number)
    axes.set_xlabel("workers that live at once (log)")
    axes.set_ylabel("MB per worker (log)")
    draw(axes, found, lambda value: f"{value:.2f} MB")
    return True


def application_size(axes: Any, rows: Rows) -> bool:
    workers = {key: row for key, row in rows.items() if key.startswith("app-")}
    found = lines(workers, "app_mb", "rate")
    if found:
        rates(axes, found, "memory of the application (log)")
    return bool(found)


def calls(axes: Any, rows: Rows) -> bool:
    """A dot for one call at a time, another for 64 in flight."""
    names: list[str] = []
    for key, name in reversed(CALLS):
        # The kernel places the peers, so it places ours here, too.
        free = f"{key}-free" if name.startswith("afork") else key
        found = [rows.get(name, {}) for name in (f"one/{free}", f"many/{key}")]
        values = [row.get("rate") for row in found]
        if not any(values):
            continue
        color = GREY if key == "limit" else BLUE if name.startswith("afork") else INK
        at = len(names)
        names.append(name)
        if all(values):
            axes.plot(values, [at, at], color=color, lw=1, alpha=0.4)
        for value, face in zip(values, (color, "white"), strict=True):
            if value:
                axes.plot(value, at, "o", ms=6, mfc=face, mec=color, mew=1.4)
    if not names:
        return False
    axes.set_xscale("log")
    axes.set_yticks(range(len(names)), names)
    for text in axes.get_yticklabels():
        text.set_color(BLUE if text.get_text().startswith("afork") else INK)
    decades(axes.xaxis)
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("calls per second (log)")
    handles = [
        axes.plot([], [], "o", ms=6, mfc=face, mec=INK, mew=1.4, label=text)[0]
        for face, text in ((INK, "one at a time"), ("white", "64 in flight"))
    ]
    axes.legend(handles=handles, loc="lower right", frameon=False, fontsize=8.5)
    return True


#: Where it stands, the title, the part that measures it, how it is drawn.
Place = tuple[float, float, float, float]
PANELS: tuple[tuple[Place, str, str, Callable[[Any, Rows], bool]], ...] = (
    (
        (0.08, 0.6, 0.265, 0.345),
        "Start rate against template size",
        "memory",
        template_size,
    ),
    (
        (0.6, 0.6, 0.245, 0.345),
        "Start rate against application size",
        "scale",
        application_size,
    ),
    ((0.08, 0.11, 0.265, 0.345), "Memory per idle worker", "memory", memory),
    ((0.7, 0.11, 0.275, 0.345), "Calls", "calls", calls),
)


def footer(documents: dict[str, dict[str, Any]]) -> str:
    """Machine and date; each Python if the parts were not run with the same one."""
    every = [found["about"] for found in documents.values()]
    pythons = " and ".join(sorted({one["python"] for one in every}))
    dates = sorted({one["date"][:10] for one in every})
    first = every[0]
    text = (
        f"CPython {pythons}, Linux {first['kernel'].partition('-')[0]}, "
        f"{first['cpus']} x {first['cpu']}, {' to '.join({dates[0]: 0, dates[-1]: 0})}."
    )
    quick = " A trial run (--quick)." if any(x.get("quick") for x in every) else ""
    return f"{text} Medians of alternating rounds: make bench.{quick}"


def main() -> int:
    output, documents = record.to_show("Draw what was measured.", TARGET)
    pyplot.rcParams.update(STYLE)
    figure = pyplot.figure(figsize=(8.6, 7.6))
    missing = 0
    for place, title, part, panel in PANELS:
        axes = figure.add_axes(place)
        axes.set_title(title)
        if not panel(axes, documents.get(part, {}).get("summary", {})):
            missing += 1
            how = f'not measured:\nmake bench BENCH="{part}"'
            print(f"picture.py: {title}: {' '.join(how.split())}", file=sys.stderr)
            axes.set_axis_off()
            axes.text(0.5, 0.5, how, transform=axes.transAxes, ha="center")
    figure.text(0.012, 0.012, footer(documents), fontsize=8, color="#555555")
    output.parent.mkdir(parents=True, exist_ok=True)
    kind = {"metadata": {"Date": None}} if output.suffix == ".svg" else {"dpi": 100}
    figure.savefig(output, **kind)
    print(output)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
