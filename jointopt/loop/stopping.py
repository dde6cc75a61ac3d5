"""When a search ends, how far it is, and what going on promises."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType

import numpy as np
from rich.progress import BarColumn, Progress, TextColumn

from jointopt.names import MOST
from jointopt.objectives import EVALUATIONS, hypervolume, minimized
from jointopt.study.study import Study
from quant.errors import check_above_0, check_count


@dataclass(frozen=True)
class Budget:
    """What a study may have in the end, earlier runs counted; the first to be reached ends the search.

    Attributes:
        evaluations: how many there are (default: `EVALUATIONS` where the others are not given either, or no limit).
        minutes: of wall clock in which the search runs. Evaluations that run when they are over are dropped, and run
            again should the search go on.
        patience: evaluations in a row, up to the end of a batch, without any hypervolume gained.
    """

    evaluations: int | None = None
    minutes: float | None = None
    patience: int | None = None

    def __post_init__(self) -> None:
        check_count("evaluations", self.evaluations, MOST["evaluations"])
        check_count("patience", self.patience)
        if self.minutes is not None:
            check_above_0("minutes", self.minutes, MOST["minutes"])
        if self.evaluations is None and self.minutes is None and self.patience is None:
            object.__setattr__(self, "evaluations", EVALUATIONS)

    def spent(self, study: Study, elapsed: float) -> str | None:
        """Why there is to be no further batch; None where there is."""
        if self.evaluations is not None and len(study) >= self.evaluations:
            return f"evaluations: {len(study)} done"
        if self.minutes is not None and elapsed >= self.minutes * 60:
            return f"minutes: {self.minutes:g} are over"
        if self.patience is not None and (idle := _without_gain(study)) >= self.patience:
            return f"patience: no hypervolume gained in the last {idle} evaluations"
        return None


@contextmanager
def heeding_ctrl_c() -> Iterator[Callable[[], None]]:
    """Within, Ctrl-C raises KeyboardInterrupt as ever, and once more from the function that is given.

    Python drops what a signal raises while an object is being deleted, so that the first can be lost. Where Ctrl-C is
    not Python's own to handle, or this is not the main thread, nothing is changed.
    """
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield lambda: None
        return
    came = threading.Event()

    def interrupted(number: int, frame: FrameType | None) -> None:
        came.set()
        signal.default_int_handler(number, frame)

    def check() -> None:
        if came.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupted)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _without_gain(study: Study) -> int:
    """Evaluations since the last that gained hypervolume. One gains if it is within the reference point, and no earlier
    one equals or dominates it; the volumes themselves are not compared, as rounding would hide a small gain."""
    costs, reference = study.costs(), study.reference_point()
    if reference is None:
        return len(costs)
    within = (costs < minimized(np.array([reference]), study.objectives)).all(axis=1)
    for at in np.flatnonzero(within)[::-1]:
        if not (costs[:at] <= costs[at]).all(axis=1).any():
            return len(costs) - 1 - int(at)
    return len(costs)


def expected_gain(study: Study, predicted: np.ndarray) -> float | None:
    """Share by which the hypervolume grows should a batch turn out as `predicted` [n, objectives]; None before there
    is a prediction."""
    predicted = predicted[np.isfinite(predicted).all(axis=1)]
    reference = study.reference_point()
    if reference is None or not len(predicted):
        return None
    turned = minimized(np.array([reference]), study.objectives)[0]
    known = study.costs()
    before = hypervolume(known, turned)
    after = hypervolume(np.vstack([known, minimized(predicted, study.objectives)]), turned)
    return after / before - 1 if before else None


class Watch:
    """Seconds that a search has gone on for, and the line that shows it."""

    def __init__(self, study: Study, budget: Budget, shown: bool):
        self.study, self.budget = study, budget
        self._before = study.fact("elapsed", 0.0)
        self._done_before = len(study)
        self._begun = time.monotonic()
        self._expected = ""
        columns = (BarColumn(bar_width=16), TextColumn("{task.fields[told]}"))  # 80 characters with what is told
        self._bar = Progress(*columns, disable=not shown)
        self._task = self._bar.add_task("search", total=budget.evaluations, completed=len(study), told="")

    def __enter__(self) -> Watch:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def elapsed(self) -> float:
        """All runs of the study together."""
        return self._before + time.monotonic() - self._begun

    def seconds_left(self) -> float | None:
        """Of the minutes allowed; None where they are not limited."""
        return None if self.budget.minutes is None else max(0.0, self.budget.minutes * 60 - self.elapsed())

    def asked(self, predicted: np.ndarray) -> None:
        """A batch is about to be evaluated."""
        gain = None if self._bar.disable else expected_gain(self.study, predicted)
        self._expected = "" if gain is None else f", +{100 * gain:.2g}% hypervolume expected"
        self.advanced()

    def advanced(self) -> None:
        """An evaluation has ended."""
        if not self._bar.disable:
            self._bar.update(self._task, completed=len(self.study), told=self.told())

    def told(self) -> str:
        """How many evaluations, the time gone and probably left, and what the current batch is expected to gain."""
        done, budget = len(self.study), self.budget
        parts = [
            f"{done}/{budget.evaluations}" if budget.evaluations else f"{done} evaluations",
            _clock(self.elapsed()),
        ]
        left = [] if budget.minutes is None else [budget.minutes * 60 - self.elapsed()]
        fresh = done - self._done_before
        if budget.evaluations and fresh:
            left.append((time.monotonic() - self._begun) / fresh * (budget.evaluations - done))
        if left:
            parts.append(f"{_clock(max(0.0, min(left)))} left")
        return ", ".join(parts) + self._expected

    def ended(self, reason: str) -> None:
        # What the last evaluation left of the time is gone too: the same call again must not find it there.
        self.study.note("elapsed", self.elapsed())
        self.study.note("stopped", reason)
        if not self._bar.disable:
            self._bar.print(f"search ended: {reason}", highlight=False)


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
