"""How it is measured: side by side in one run, in alternating order, of each the fastest round; and the report."""

from __future__ import annotations

import gc
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field

import sqlalchemy
from rich.console import Console
from rich.table import Table

Work = Callable[[], object]
Clock = Callable[[], float]


def seconds(work: Work, clock: Clock = time.perf_counter) -> float:
    gc.disable()
    try:
        start = clock()
        work()
        return clock() - start
    finally:
        gc.enable()


def fastest(works: Sequence[Work], rounds: int, clock: Clock = time.perf_counter) -> list[float]:
    """The fastest round of each, in seconds.

    They take turns, in an order that changes, so that whatever else the machine does falls on none alone.
    """
    times = [[seconds(work, clock)] for work in works]
    for number in range(rounds):
        gc.collect()
        order = range(len(works)) if number % 2 else reversed(range(len(works)))
        for which in order:
            times[which].append(seconds(works[which], clock))
    return [min(each) for each in times]


def repeat(work: Work, times: int) -> Work:
    def run() -> None:
        for _ in range(times):
            work()

    return run


@dataclass(frozen=True)
class Figure:
    """One line of the report.

    :ivar budget: what it may be at most, or at least; None where it is shown only.
    """

    what: str
    measured: float
    unit: str
    encrypted: str = ""
    plain: str = ""
    budget: float | None = None
    at_least: bool = False

    @property
    def over(self) -> bool:
        if self.budget is None:
            return False
        return self.measured < self.budget if self.at_least else self.measured > self.budget

    @property
    def row(self) -> tuple[str, ...]:
        shown = f"{self.measured:.2f}" if self.measured < 100 else f"{self.measured:,.0f}"
        colour = "" if self.budget is None else "red" if self.over else "green"
        measured = f"[{colour}]{shown} {self.unit}[/]" if colour else f"{shown} {self.unit}"
        sign = "≥" if self.at_least else "≤"
        budget = "" if self.budget is None else f"{sign} {self.budget:g} {self.unit}"
        return self.what, self.encrypted, self.plain, measured, budget


@dataclass
class Report:
    """Gathers the figures."""

    figures: list[Figure] = field(default_factory=list)
    load_before: float = field(default_factory=lambda: os.getloadavg()[0])

    def add(self, figure: Figure) -> None:
        self.figures.append(figure)

    def ratio(self, what: str, mine: float, theirs: float, budget: float | None, per: str) -> None:
        """A ratio of two times, each in seconds for one of what ``per`` names."""
        self.add(Figure(what, mine / theirs, "×", f"{_micro(mine)}/{per}", f"{_micro(theirs)}/{per}", budget))

    def difference(self, what: str, mine: float, theirs: float, budget: float | None, per: str) -> None:
        """How much longer one of them takes."""
        figures = f"{_micro(mine)}/{per}", f"{_micro(theirs)}/{per}"
        self.add(Figure(what, (mine - theirs) * 1e6, "µs", *figures, budget))

    def machine(self) -> dict[str, object]:
        return {
            "python": platform.python_version(),
            "sqlalchemy": sqlalchemy.__version__,
            "cores": os.cpu_count(),
            "load average before": self.load_before,
            "load average after": os.getloadavg()[0],
        }

    def as_json(self) -> str:
        figures = [{**asdict(figure), "over": figure.over} for figure in self.figures]
        return json.dumps({"machine": self.machine(), "figures": figures}, indent=2)

    def show(self) -> None:
        console = Console(width=140)
        table = Table("what", "encrypted", "plain", "measured", "budget", title="sqla_byok beside plaintext")
        for figure in self.figures:
            table.add_row(*figure.row)
        console.print(table)
        console.print(", ".join(f"{name} {said}" for name, said in self.machine().items()))
        over = [figure.what for figure in self.figures if figure.over]
        if over:
            console.print(f"[red]over budget ({len(over)}):[/] {'; '.join(over)}")


def _micro(seconds_: float) -> str:
    return f"{seconds_ * 1e6:.2f} µs"
