#!/usr/bin/env python3
"""The second part of the benchmark: calls, beside the peers and a limit in C.

As in start.py, every contender runs once per round in a process of its own, and rounds
alternate. See ``--help``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from statistics import median
from typing import Any

import call_targets
import part
import table
from call_contenders import (
    BULK,
    COLD,
    LOST,
    MANY,
    ONE,
    QUEUE,
    SHARED,
    TOGETHER,
    contenders,
)
from contenders import Contender
from meter import Sample
from targets import Results, Row, rate, ratios

Cell = tuple[str, Callable[[list[Sample]], str]]


def _middle(samples: list[Sample], value: Callable[[Sample], float | None]) -> Any:
    values = [x for x in map(value, samples) if x is not None]
    return median(values) if values else None


def _cell(value: Callable[[Sample], float | None], form: str) -> Any:
    return lambda samples: table.number(_middle(samples, value), form)


def _per_call(scale: float) -> Callable[[Sample], float | None]:
    def value(sample: Sample) -> float | None:
        found = rate(sample)
        return scale / found if found else None

    return value


def _get(name: str, scale: float = 1.0) -> Callable[[Sample], float | None]:
    return lambda sample: sample[name] * scale if name in sample else None


_RATE: Cell = ("calls/s", _cell(rate, ",.0f"))
_CPU: Cell = ("app CPU us", _cell(_get("cpu_us"), ".1f"))

CELLS: dict[str, list[Cell]] = {
    ONE: [("us", _cell(_per_call(1e6), ".1f")), _RATE, _CPU],
    TOGETHER: [("us", _cell(_per_call(1e6), ".1f")), _RATE, _CPU],
    MANY: [("us", _cell(_per_call(1e6), ".1f")), _RATE, _CPU],
    BULK: [("ms", _cell(_per_call(1e3), ".1f"))],
    SHARED: [("us", _cell(_per_call(1e6), ".0f"))],
    COLD: [
        ("from nothing, ms", _cell(_per_call(1e3), ".0f")),
        ("server up, ms", _cell(call_targets.middle("warm_ms"), ".1f")),
    ],
    LOST: [
        ("caller knows, ms", _cell(call_targets.middle("knows_ms"), ".2f")),
        ("next answer, ms", _cell(call_targets.middle("next_ms"), ".2f")),
    ],
    QUEUE: [
        ("bytes each", _cell(call_targets.memory, ",.0f")),
        ("submit us", _cell(_get("submit_us"), ".1f")),
        ("drain us", _cell(_per_call(1e6), ".1f")),
        ("longest stall, ms", _cell(call_targets.stall, ".1f")),
    ],
}

#: What a ratio column divides by, as time: a key, and its heading.
BASES = {
    ONE: ("one/limit", "of limit"),
    TOGETHER: ("together/limit", "of limit"),
    MANY: ("many/ppe", "of PPE"),
}


def _lines(scenario: str, chosen: list[Contender], results: Results) -> list[list[str]]:
    """The header, then a row for each contender; of two cells if it has no numbers."""
    base, heading = BASES.get(scenario, ("", ""))
    cells = CELLS[scenario]
    lines = [["", *(name for name, _ in cells), *([heading] if base else [])]]
    for one in chosen:
        samples = [x for x in results[one.key] if x.get("n")]
        if not samples:
            last = results[one.key][-1] if results[one.key] else {}
            remark = last.get("skip") or f"failed: {last.get('failed')}"
            lines.append([one.label, str(remark)])
            continue
        row = [one.label, *(render(samples) for _, render in cells)]
        if base:
            found = ratios(results, one.key, base)
            shown = [1 / x for x in found] if scenario != MANY else found
            row.append(f"{median(shown):.2f}x" if shown else "-")
        lines.append(row)
        missing = len(results[one.key]) - len(samples)
        if missing:
            failed = next(x for x in results[one.key] if not x.get("n"))
            remark = f"{missing} rounds failed: {failed.get('failed')}"
            lines.append([f"  {one.label}", remark])
    return lines


def summary(chosen: list[Contender], results: Results) -> dict[str, Row]:
    """The medians of those that ran; a remark for the others."""
    rows: dict[str, Row] = {}
    for one in chosen:
        samples = results[one.key]
        row: Row = {"label": one.label, "scenario": one.scenario}
        rates = [x for x in map(rate, samples) if x]
        if rates:
            row.update(
                rate=median(rates),
                low=min(rates),
                high=max(rates),
                us=1e6 / median(rates),
                cpu_us=_middle(samples, _get("cpu_us")),
            )
        for name in ("warm_ms", "knows_ms", "next_ms"):
            value = _middle(samples, call_targets.middle(name))
            row.update({} if value is None else {name: value})
        for why in ("failed", "skip"):
            reasons = [sample[why] for sample in samples if why in sample]
            row.update({why: reasons[0]} if reasons else {})
        rows[one.key] = row
    return rows


def render(_: dict[str, Row], results: Results) -> list[str]:
    known = [one for one in contenders() if one.key in results]
    blocks = []
    for scenario in CELLS:
        chosen = [one for one in known if one.scenario == scenario]
        if chosen:
            header, *rows = _lines(scenario, chosen, results)
            blocks.append("\n".join([scenario, *table.columns(header, rows)]))
    return blocks


if __name__ == "__main__":
    sys.exit(
        part.main(
            "calls",
            __doc__,
            contenders(),
            summary,
            render,
            call_targets.targets,
        )
    )
