"""The record of a search: one SQLite file in WAL mode, from which it goes on as if it had never stopped.

A batch of genomes is recorded together with the strategy's state before any of it is evaluated, each evaluation as it
ends, so that whatever moment the process dies at, the next one finds what is left to do.
"""

from __future__ import annotations

import json
import platform
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
import pandas as pd

from jointopt.files import check_path, locked, reading
from jointopt.objectives import COSTS, Constraint, Objective, constraint, hypervolume, minimized
from jointopt.study.choice import best_of, costs_of, front_of, keeping_to, with_finished
from jointopt.study.differences import as_json, check_config
from jointopt.study.reference_point import reference_point
from jointopt.study.study_file import closed_if_refused, connect, explained
from quant.errors import JointoptError, check_kind
from search_spaces.space import SearchSpace

_OF_GENOMES = ("generations", "evaluations")
VERSION = 3
_SOFTWARE = ("jointopt", "torch", "transformers", "timm", "compressed-tensors", "deap", "numpy")
P = ParamSpec("P")
T = TypeVar("T")


def _reading(method: Callable[Concatenate[Study, P], T]) -> Callable[Concatenate[Study, P], T]:
    """Decorator: what a damaged file raises as one line."""

    @wraps(method)
    def read(self: Study, *args: P.args, **kwargs: P.kwargs) -> T:
        with reading(f"study {str(self.path)!r}", "", sqlite3.Error):
            return method(self, *args, **kwargs)

    return read


class Study:
    """One search and all its evaluations. Made by `jointopt.search`, opened again by `Study.open`.

        study = Study.open("study.db")
        study.front()                  # a data frame, one row a point
        study.best(size_mb=20)         # a genome

    Attributes:
        path: the file, None for a study in memory.
        space, objectives: what is searched, for what.
    """

    def __init__(self, connection: sqlite3.Connection, path: Path | None, lock: sqlite3.Connection | None = None):
        self.path = path
        self._connection, self._lock = connection, lock
        self._counted = (0, 1)
        space, objectives = self.fact("space"), self.fact("objectives")
        if space is None or not objectives:
            raise JointoptError(f"study {str(path)!r}: is damaged, it lacks its space or its objectives")
        with reading(f"study {str(path)!r}"):
            self.space = SearchSpace.from_dict(space)
            self.objectives = tuple(Objective(name, direction) for name, direction in objectives)

    @classmethod
    def create(
        cls, path: str | Path | None, space: SearchSpace, objectives: Sequence[Objective], config: Mapping[str, Any]
    ) -> Study:
        """A new study, or the one at `path` to go on with, locked against other writers.

        Args:
            config: what the results depend on; a study that was made with another is refused, unless it has asked for
                nothing yet: then it is begun anew.

        Raises:
            JointoptError: another config (the differences are named), another writer, a file that is no study.
        """
        if not isinstance(path, str | Path | None):
            raise JointoptError(f"storage: found {path!r}; allowed: a path, or None for memory")
        path = None if path is None else Path(path)
        if path is not None:
            check_path(path, "storage")
        if path is not None and path.is_dir():
            raise JointoptError(f"storage: {str(path)!r} is a folder; allowed: a file, new or a study")
        if path is not None and not path.parent.is_dir():
            raise JointoptError(f"storage: the folder {str(path.parent)!r} does not exist")
        connection, lock = connect(path, new=True), None  # first, as nothing is left beside what is no study
        try:
            if path is not None:
                lock = locked(Path(f"{path}.lock"), f"study {str(path)!r}")
            wanted = {
                "version": VERSION,
                "space": space.to_dict(),
                "objectives": [[o.name, o.direction] for o in objectives],
                "config": as_json("config", config),
            }
            with explained(path):
                stored = dict(connection.execute("SELECT key, value FROM facts").fetchall())
                found = {key: json.loads(stored.get(key, "null")) for key in wanted}
                asked = any(connection.execute(f"SELECT 1 FROM {each} LIMIT 1").fetchone() for each in _OF_GENOMES)
                if stored and (asked or found["version"] != VERSION):
                    check_config(path, found, wanted)
                elif found != json.loads(json.dumps(wanted)):  # of what is there, if anything, no genome was asked
                    with connection:
                        connection.execute("DELETE FROM facts")
                        computed = [o.name for o in objectives if o.compute is not None]
                        facts = {**wanted, "computed": computed, "software": _software()}
                        rows = [(key, json.dumps(value)) for key, value in facts.items()]
                        connection.executemany("INSERT INTO facts VALUES (?, ?)", rows)
            return cls(connection, path, lock)
        except BaseException:
            connection.close()
            if lock is not None:
                lock.close()
            raise

    @classmethod
    def open(cls, path: str | Path) -> Study:
        """A finished or a running study, to be read. Raises JointoptError for none, or another version's."""
        check_kind("study", path, (str, Path), "a path")
        check_path(path, "study")
        path = Path(path)
        if not path.is_file():
            raise JointoptError(f"study: {str(path)!r} {'is a folder' if path.is_dir() else 'does not exist'}")
        connection = connect(path, new=False)
        with closed_if_refused(connection), explained(path):
            facts = dict(connection.execute("SELECT key, value FROM facts").fetchall())
            if not facts:
                raise JointoptError(f"study: {str(path)!r} is empty")
            found = json.loads(facts.get("version", "null"))
            if found != VERSION:
                raise JointoptError(f"study {str(path)!r}: found version {found}; allowed: {VERSION}")
            return cls(connection, path)

    def close(self) -> None:
        """Closes the file and lets other writers in."""
        self._connection.close()
        self.unlock()

    def remove(self) -> None:
        """Closes the file and removes it, as where a search fails that has asked for nothing yet."""
        self._connection.close()
        if self.path is not None:
            for ending in ("", "-wal", "-shm"):  # the latter two where a reader has it open
                Path(f"{self.path.resolve()}{ending}").unlink(missing_ok=True)
        self.unlock()

    def unlock(self) -> None:
        """Lets other writers in, as where a search has ended; the file stays open."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    @_reading
    def fact(self, key: str, default: Any = None) -> Any:
        """A recorded fact: "config", "software", "baselines", or what was noted."""
        row = self._connection.execute("SELECT value FROM facts WHERE key = ?", (key,)).fetchone()
        return default if row is None else json.loads(row[0])

    def note(self, key: str, value: Any) -> None:
        """Records a fact, JSON, in place of an older one."""
        with explained(self.path), self._connection:
            self._put(key, value)

    def _put(self, key: str, value: Any) -> None:
        """`note` within a transaction."""
        self._connection.execute("INSERT OR REPLACE INTO facts VALUES (?, ?)", (key, json.dumps(value)))

    @property
    def stopped(self) -> str | None:
        """Why the search ended; None while it runs, or where it was killed."""
        return self.fact("stopped")

    @property
    def config(self) -> dict[str, Any]:
        return self.fact("config")

    @property
    def original(self) -> dict[str, float]:
        """Metrics and costs of the original model; {} before it was scored."""
        return self.fact("baselines", {}).get("original", {})

    def add_generation(self, genomes: np.ndarray, predicted: np.ndarray, state: Mapping[str, Any]) -> int:
        """Records a batch before it is evaluated, with the strategy's state after it was asked."""
        with explained(self.path), self._connection:
            number = self._connection.execute("SELECT count(*) FROM generations").fetchone()[0]
            row = (number, json.dumps(genomes.tolist()), json.dumps(predicted.tolist()))
            self._connection.execute("INSERT INTO generations VALUES (?, ?, ?)", row)
            self._put("state", state)
        return number

    def add_evaluation(
        self,
        generation: int,
        genome: np.ndarray,
        metrics: Mapping[str, float] | None,
        failed: str | None,
        seconds: float,
        number: int | None = None,
        elapsed: float | None = None,
    ) -> None:
        """Records one evaluation, or why it failed.

        Args:
            seconds: that it took.
            number: its place in the order of asking, which need not be that of ending (default: the next).
            elapsed: seconds that the search has gone on for, all its runs together.
        """
        values = None if metrics is None else json.dumps({k: float(v) for k, v in metrics.items()})
        with explained(self.path), self._connection:
            self._connection.execute(
                "INSERT INTO evaluations VALUES (?, ?, ?, ?, ?, ?)",
                (number, generation, json.dumps(genome.tolist()), values, failed, seconds),
            )
            if elapsed is not None:
                self._put("elapsed", elapsed)

    @_reading
    def first_number(self, generation: int) -> int:
        """The number of a generation's first evaluation: 1, and one more for each genome asked before. They are counted
        on from the generation that was asked about last, so that each is read once where these are in order."""
        counted, first = self._counted if self._counted[0] <= generation else (0, 1)
        row = self._connection.execute(
            "SELECT sum(json_array_length(genomes)) FROM generations WHERE ? <= number AND number < ?",
            (counted, generation),
        ).fetchone()
        self._counted = (generation, first + (row[0] or 0))
        return self._counted[1]

    @_reading
    def last_generation(self) -> tuple[int, np.ndarray] | None:
        """Number and genomes of the batch asked last, None before the first."""
        row = self._connection.execute(
            "SELECT number, genomes FROM generations ORDER BY number DESC LIMIT 1"
        ).fetchone()
        return None if row is None else (row[0], self._genomes(row[1]))

    @_reading
    def generations(self) -> list[tuple[int, np.ndarray]]:
        """Number and genomes of every batch asked."""
        rows = self._connection.execute("SELECT number, genomes FROM generations ORDER BY number").fetchall()
        return [(number, self._genomes(each)) for number, each in rows]

    def _genomes(self, text: str) -> np.ndarray:
        return self.space.validate(np.array(json.loads(text), dtype=np.int64).reshape(-1, len(self.space)))

    @_reading
    def results(self, genomes: np.ndarray) -> list[dict[str, float] | None]:
        """Metrics of each genome: {} where it failed, None where it was not evaluated."""
        found = []
        for genome in genomes:
            row = self._connection.execute(
                "SELECT metrics FROM evaluations WHERE genome = ?", (json.dumps(genome.tolist()),)
            ).fetchone()
            found.append(None if row is None else json.loads(row[0]) if row[0] else {})
        return found

    @_reading
    def scores(self) -> dict[bytes, dict[str, float]]:
        """Genome (its bytes) -> metrics and costs, of all that did not fail."""
        rows = self._connection.execute("SELECT genome, metrics FROM evaluations WHERE metrics IS NOT NULL")
        return {np.array(json.loads(genome), dtype=np.int64).tobytes(): json.loads(found) for genome, found in rows}

    @_reading
    def all_failed(self) -> bool:
        """Whether no evaluation has succeeded so far."""
        return self._connection.execute("SELECT 1 FROM evaluations WHERE failed IS NULL LIMIT 1").fetchone() is None

    def begin_anew(self) -> None:
        """Forgets every batch, its evaluations and their time, so that the same ones are asked again."""
        self._counted = (0, 1)
        with explained(self.path), self._connection:
            self._connection.execute("DELETE FROM evaluations")
            self._connection.execute("DELETE FROM generations")
            self._connection.execute("DELETE FROM facts WHERE key IN ('state', 'elapsed')")

    @_reading
    def __len__(self) -> int:
        return self._connection.execute("SELECT count(*) FROM evaluations").fetchone()[0]

    @_reading
    def evaluations(self) -> pd.DataFrame:
        """One row an evaluation, in order: number, generation, genome (tuple), one column a metric, predicted_NAME for
        what was foreseen of an objective, failed (the reason, or None), seconds."""
        rows = self._connection.execute(
            "SELECT number, generation, genome, metrics, failed, seconds FROM evaluations ORDER BY number"
        ).fetchall()
        predicted = self._predictions()
        records = []
        for number, generation, genome, metrics, failed, seconds in rows:
            record = {"number": number, "generation": generation, "genome": tuple(json.loads(genome))}
            record.update(json.loads(metrics) if metrics else {})
            foreseen = predicted.get(genome, [np.nan] * len(self.objectives))
            record.update({f"predicted_{o.name}": v for o, v in zip(self.objectives, foreseen, strict=True)})
            records.append({**record, "failed": failed, "seconds": seconds})
        columns = ["number", "generation", "genome", *(o.name for o in self.objectives), "failed", "seconds"]
        return pd.DataFrame(records) if records else pd.DataFrame(columns=columns)

    def succeeded(self) -> pd.DataFrame:
        """The evaluations that did not fail, in order."""
        frame = self.evaluations()
        return frame[frame["failed"].isna()]

    def failed(self) -> pd.DataFrame:
        """The evaluations that failed, in order, each with its reason."""
        frame = self.evaluations()
        return frame[frame["failed"].notna()]

    @_reading
    def _measurements(self) -> pd.DataFrame:
        """Number and metrics of the evaluations, in order. Genomes take most of the time that reading all takes, and a
        search asks for these with every batch."""
        rows = self._connection.execute("SELECT number, metrics FROM evaluations ORDER BY number").fetchall()
        records = [{**(json.loads(metrics) if metrics else {}), "number": number} for number, metrics in rows]
        return pd.DataFrame(records, columns=["number", *(o.name for o in self.objectives)])

    @_reading
    def _predictions(self) -> dict[str, list[float]]:
        found = {}
        for genomes, predicted in self._connection.execute("SELECT genomes, predicted FROM generations"):
            for genome, values in zip(json.loads(genomes), json.loads(predicted), strict=True):
                found[json.dumps(genome)] = values
        return found

    def costs(self) -> np.ndarray:
        """The objectives of all evaluations, [evaluations, objectives], signs turned so that less is better."""
        return costs_of(self._measurements(), self.objectives)

    @property
    def constraints(self) -> tuple[Constraint, ...]:
        """The limits that were searched under."""
        found = self.config.get("constraints") or {}
        return tuple(constraint(name, text) for name, text in found.items())

    def front(self) -> pd.DataFrame:
        """The non-dominated evaluations, in the order of the last objective, best first."""
        return front_of(self.evaluations(), self.objectives)

    def reference_point(self) -> list[float] | None:
        """The point that hypervolume is measured from, in the objectives' units: see `reference_point`."""
        return reference_point(self._measurements(), self.objectives, self.measured, self.original)

    def hypervolume_history(self) -> np.ndarray:
        """Hypervolume after each evaluation, [evaluations], from `reference_point`."""
        reference, costs = self.reference_point(), self.costs()
        if reference is None:
            return np.zeros(len(costs))
        turned = minimized(np.array([reference]), self.objectives)[0]
        history = np.zeros(len(costs) + 1)
        for at, each in enumerate(costs):
            gains = (each < turned).all() and not (costs[:at] <= each).all(axis=1).any()
            history[at + 1] = hypervolume(costs[: at + 1], turned) if gains else history[at]
        return history[1:]

    @property
    def measured(self) -> tuple[Objective, ...]:
        """The objectives that the quality function gives: those that are no costs, nor computed by a function."""
        computed = self.fact("computed")
        return tuple(o for o in self.objectives if o.name not in COSTS and o.name not in computed)

    @property
    def quality(self) -> Objective:
        """The first objective that is measured, or else the first."""
        return (self.measured or self.objectives)[0]

    def finished(self) -> list[dict[str, Any]]:
        """What finishing made of genomes: "genome", "rounding", "metrics" (costs among them), "seconds"."""
        return self.fact("finished", [])

    def finished_metrics(self, genome: Sequence[int] | np.ndarray, rounding: str | None) -> dict[str, float] | None:
        """What a genome has as it was finished by this rounding; None where it was not."""
        key = (list(map(int, genome)), rounding)
        return next((each["metrics"] for each in self.finished() if (each["genome"], each["rounding"]) == key), None)

    def add_finished(self, genome: np.ndarray, rounding: str, metrics: Mapping[str, float], seconds: float) -> None:
        """Records a finished sub-network, beside the evaluation of its genome."""
        record = {"genome": genome.tolist(), "rounding": rounding, "metrics": dict(metrics), "seconds": seconds}
        with explained(self.path), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._put("finished", [*self.finished(), record])

    def best(
        self,
        size_mb: float | None = None,
        drop: float | None = None,
        knee: bool = False,
        finished: str | None = None,
    ) -> np.ndarray:
        """The genome that fits, of those that keep to the study's constraints. None of these that fits dominates it.
        Quality is the first objective that is measured.

        Args:
            size_mb: the best quality at or under this many 10^6 bytes.
            drop: the smallest whose quality is at most this much worse than the original's, in quality's own unit;
                where size is no objective, the one of the least first cost that is, or best in the first other that is.
            knee: the point of the front with the least sum of objectives, each scaled from 0, its best on the front,
                to 1, its worst: of two the farthest from the line between the ends. With no argument: the best quality.
            finished: a rounding; genomes finished by it count with their finished quality, where it is better.

        Raises:
            JointoptError: more than one argument, a rounding that nothing was finished by, no evaluation, or none that
                fits; the nearest value is named.
        """
        if sum((size_mb is not None, drop is not None, knee)) > 1:
            raise JointoptError("best: found more than one of size_mb, drop, knee; allowed: one")
        for name, value in (("size_mb", size_mb), ("drop", drop)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value)):
                raise JointoptError(f"best: found {name}={value!r}; allowed: a number")
        made = {each["rounding"] for each in self.finished()}
        if finished is not None and finished not in made:
            allowed = ", ".join(sorted(made)) or "none, since nothing was finished"
            raise JointoptError(f"best: found finished={finished!r}; allowed: {allowed}")
        frame = self.succeeded()
        if frame.empty:
            raise JointoptError("study: no evaluation to choose from")
        if finished is not None:
            frame = with_finished(frame, self.finished(), finished, self.measured or self.objectives[:1])
        original = self.original.get(self.quality.name)
        exact = [each.name for each in self.objectives if each not in self.measured]
        kept = keeping_to(frame, self.constraints)
        return best_of(kept, self.objectives, self.quality, original, exact, size_mb, drop, knee)


def _software() -> dict[str, str]:
    """The versions of what results depend on."""
    found = {"python": platform.python_version()}
    for name in _SOFTWARE:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
