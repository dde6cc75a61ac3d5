"""The study's file: what it holds, who may write to it, and what is said of one that is damaged or foreign."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch

import jointopt
from jointopt import Gene, JointoptError, Objective, SearchSpace, Study, Supernet
from jointopt.loop.stopping import Budget, expected_gain
from tests.test_search import agreement
from tests.zoo import supernet_of


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    return supernet_of("vit", ["none", "W8A8", "W4A16"])


def test_a_damaged_study_says_so_in_one_line(supernet, tmp_path):
    path = tmp_path / "study.db"
    jointopt.search(supernet, agreement, evaluations=20, storage=path).close()
    whole = path.read_bytes()
    for at in range(0, len(whole), 4096):
        path.write_bytes(whole[:at] + b"\xff" * 4000 + whole[at + 4000 :])
        with pytest.raises(JointoptError, match=r"study '.*study.db'"), contextlib.closing(Study.open(path)) as study:
            study.front()
            study.results(supernet.space.sample(3, seed=0))
            raise JointoptError(f"study {str(path)!r}: this page is none that is read")
    (tmp_path / "study.db.lock").write_bytes(b"no lock" * 1000)
    with pytest.raises(JointoptError, match="file is not a database"):
        jointopt.search(supernet, agreement, evaluations=20, storage=path)


def test_a_study_of_another_version_is_refused(supernet, tmp_path):
    path = tmp_path / "study.db"
    jointopt.search(supernet, agreement, evaluations=3, storage=path).close()
    with contextlib.closing(sqlite3.connect(path)) as file, file:
        file.execute("UPDATE facts SET value = '1' WHERE key = 'version'")
    with pytest.raises(JointoptError, match="study.db': found version 1; allowed: 3"):
        Study.open(path)
    with pytest.raises(JointoptError, match="version was 1, is 3"):
        jointopt.search(supernet, agreement, evaluations=3, storage=path)


@pytest.mark.parametrize("wrong", ["UPDATE facts SET value = '1' WHERE key = 'version'", "DROP TABLE facts"])
def test_a_study_that_is_refused_is_closed(wrong, tmp_path):
    path = tmp_path / "study.db"
    Study.create(path, SearchSpace([Gene("a", (1, 2))]), [Objective("x", "min")], {}).close()
    with contextlib.closing(sqlite3.connect(path)) as database, database:
        database.execute(wrong)
    before = os.listdir("/proc/self/fd")
    with pytest.raises(JointoptError) as kept:
        Study.open(path)
    assert len(os.listdir("/proc/self/fd")) == len(before), kept


def test_another_program_s_database_and_an_empty_one_are_left_as_they_are(supernet, tmp_path):
    path = tmp_path / "notes.db"
    with contextlib.closing(sqlite3.connect(path)) as other, other:
        other.execute("CREATE TABLE notes (text)")
    before = path.read_bytes()
    with pytest.raises(JointoptError, match="notes.db' is no study; found tables notes; allowed: facts"):
        Study.open(path)
    with pytest.raises(JointoptError, match="is no study"):
        jointopt.search(supernet, agreement, evaluations=3, storage=path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    (tmp_path / "empty.db").touch()
    with pytest.raises(JointoptError, match="found tables none"):
        Study.open(tmp_path / "empty.db")
    assert len(jointopt.search(supernet, agreement, evaluations=3, storage=tmp_path / "empty.db")) == 3


def test_what_is_done_with_every_batch_reads_no_genome_twice(tmp_path):
    space = SearchSpace([Gene(name, (1, 2, 3)) for name in "abc"])
    objectives = [Objective("error", "min"), Objective("size", "min")]
    study, counted, read = Study.create(tmp_path / "s.db", space, objectives, {}), [], []
    for at, genomes in enumerate(np.split(space.sample(20, seed=0), 10)):
        study.add_generation(genomes, np.full((2, 2), 0.5), {})
        for genome in genomes:
            study.add_evaluation(at, genome, {"error": 20.0 - at, "size": 1.0 * genome.sum()}, None, 0.0)
    study._connection.create_function("json_array_length", 1, lambda text: counted.append(text) or 2)
    assert [study.first_number(at) for at in range(10)] == list(range(1, 21, 2)) and len(counted) == 9
    assert study.first_number(3) == 7
    study._connection.set_trace_callback(read.append)
    assert Budget(patience=30).spent(study, 0.0) is None and expected_gain(study, np.full((5, 2), 0.5)) > 0
    assert any("metrics" in each for each in read) and not any("genome" in each for each in read)


def test_a_second_writer_is_refused_while_readers_are_not(supernet, tmp_path):
    path = tmp_path / "study.db"
    jointopt.search(supernet, agreement, evaluations=5, storage=path).close()

    def quality(model: torch.nn.Module) -> float:
        with pytest.raises(JointoptError, match="another process is writing"):
            jointopt.search(supernet, agreement, evaluations=9, storage=path)
        assert len(Study.open(path)) >= 5
        return agreement(model)

    study = jointopt.search(supernet, quality, evaluations=9, storage=path)
    assert len(study) == 9 and not study.evaluations()["failed"].any()


def test_a_study_that_is_still_open_is_gone_on_with_by_the_same_call_and_a_larger_budget(supernet, tmp_path):
    before = jointopt.search(supernet, agreement, evaluations=5, storage=tmp_path / "study.db")
    assert len(jointopt.search(supernet, agreement, evaluations=9, storage=tmp_path / "study.db")) == 9
    before.note("mine", 1)
    assert len(before) == 9


def test_a_link_to_a_study_is_that_study(tmp_path):
    space = SearchSpace([Gene("a", (1, 2, 3))])
    (tmp_path / "kept").mkdir()
    (tmp_path / "link.db").symlink_to(tmp_path / "kept" / "study.db")
    with contextlib.closing(
        Study.create(tmp_path / "kept" / "study.db", space, [Objective("error", "min")], {})
    ) as one:
        one.note("b", 1)
        assert Study.open(tmp_path / "link.db").fact("b") == 1


READ_BY_ANOTHER = """
import os, sys
import jointopt.report.page, jointopt

if not os.getuid():
    os.setgid(65534)
    os.setuid(65534)
study = jointopt.Study.open(sys.argv[1])
print(len(study.evaluations()), len(study.front()) > 0)
"""


def test_a_study_that_cannot_be_written_to_can_be_read():
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        space = SearchSpace([Gene("a", (1, 2, 3)), Gene("b", (1, 2))])
        study = Study.create(folder / "s?%20.db", space, [Objective("error", "min")], {})
        genomes = space.sample(4, seed=0)
        study.add_generation(genomes, np.full((4, 1), np.nan), {})
        for error, genome in enumerate(genomes):
            study.add_evaluation(0, genome, {"error": float(error)}, None, 0.1)
        study.close()
        (folder / "s?%20.db.lock").unlink()
        for path, mode in ((folder / "s?%20.db", 0o444), (folder, 0o555)):
            path.chmod(mode)
        command = [sys.executable, "-c", READ_BY_ANOTHER, str(folder / "s?%20.db")]
        done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=100)
        folder.chmod(0o755)
        assert done.stdout.split() == ["4", "True"], done.stderr


def test_paths_and_arrays_of_a_config_are_recorded_as_json_has_them(supernet):
    prior = {"quality": [np.zeros(size) for size in supernet.space.sizes]}
    config = {"data": Path("a.csv"), "limits": (np.float32(0.5), np.arange(2))}
    study = jointopt.search(supernet, agreement, evaluations=3, config=config, strategy_options={"prior": prior})
    assert study.config["data"] == "a.csv" and study.config["limits"] == [0.5, [0, 1]]
    assert study.config["strategy_options"]["prior"]["quality"][0] == [0.0] * int(supernet.space.sizes[0])


def test_what_json_cannot_hold_is_refused_by_its_key(supernet):
    for config, said in (
        ({"data": {"rows": {1, 2}}}, r"config.data.rows: found \{1, 2\}; allowed: text, numbers"),
        ({"data": {(1, 2): 3}}, r"config.data: found the key \(1, 2\); allowed: text or whole numbers"),
    ):
        with pytest.raises(JointoptError, match=said):
            jointopt.search(supernet, agreement, evaluations=3, config=config)
