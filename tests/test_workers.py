"""Searches on several processes: the same study as with one, whatever becomes of the workers."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import jointopt
from jointopt import JointoptError, SearchSpace, Study, Supernet
from jointopt.evaluation.workers import Processes, read_payload, write_payload
from tests.commands import heed_ctrl_c
from tests.readme import own_model
from tests.same import dump
from tests.zoo import batches, logits, make

ROOT = Path(__file__).parents[1]


def made(name: str = "vit", **options) -> Supernet:
    model = make(name)
    found = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8", "W4A16"], **options))
    found.calibrate(batches(name))
    return found


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    """The README's own model: a class that no worker could import, and that needs no library beside torch."""
    return own_model().supernet


def agreement_with(model: torch.nn.Module, pixels: torch.Tensor) -> Callable[[torch.nn.Module], float]:
    """A function that is sent by value, as those of a script are."""
    with torch.no_grad():
        target = model(pixels)
    return lambda view: -float((view(pixels) - target).square().mean())


PIXELS = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def agreement(supernet) -> Callable[[torch.nn.Module], float]:
    return agreement_with(supernet.model, PIXELS)


@pytest.fixture(scope="module")
def alone(supernet, agreement) -> list:
    return dump(jointopt.search(supernet, agreement, evaluations=24, workers=1))


@pytest.mark.parametrize("name", ["vit", "bert", "llama_tied", "timm_resnet"])
def test_what_workers_are_sent_evaluates_to_the_same_bits(name):
    found = made(name)
    data = batches(name, seed=5)[0]
    path = write_payload(found, lambda model: float(logits(model, data).square().mean()), 2, 1)
    try:
        received = read_payload(path, 1)
    finally:
        path.unlink()
    sent, quality = received.supernet, received.quality
    for genome in [found.space.largest, *found.space.sample(3, 0)]:
        with found.active(genome) as here, sent.active(genome) as there:
            assert torch.equal(logits(here, data), logits(there, data))
            assert quality(here) == quality(there)
        assert found.costs(genome) == sent.costs(genome)


def test_workers_find_what_one_finds_also_when_the_search_goes_on(supernet, agreement, alone, tmp_path):
    for evaluations, workers in ((7, 1), (17, 3), (24, 2)):
        study = jointopt.search(
            supernet, agreement, evaluations=evaluations, workers=workers, storage=tmp_path / "s.db"
        )
        study.close()
    study = Study.open(tmp_path / "s.db")
    assert dump(study) == alone
    assert study.evaluations()["number"].tolist() == list(range(1, 25))
    assert study.stopped == "evaluations: 24 done"


def children() -> list[int]:
    found = subprocess.run(["ps", "--ppid", str(os.getpid()), "-o", "pid=,args="], capture_output=True, text=True)
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "jointopt.evaluation import workers" in line]


def test_a_worker_that_is_killed_is_replaced_and_its_genome_run_again(supernet, agreement, alone, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()

    def deadly(model: torch.nn.Module) -> float:
        # The fifth and the ninth call of any worker are its last.
        (marks / f"{time.time_ns()}-{os.getpid()}").touch()
        if len(list(marks.iterdir())) in (6, 10):
            os.kill(os.getpid(), signal.SIGKILL)
        return agreement(model)

    study = jointopt.search(supernet, deadly, evaluations=24, workers=2)
    assert dump(study) == alone
    assert len({mark.name.split("-")[1] for mark in marks.iterdir()}) > 3
    assert not children()


def lose_the_device() -> None:
    raise torch.AcceleratorError("CUDA error: device-side assert triggered")


@pytest.mark.parametrize(("die", "code"), [(lambda: os._exit(7), 7), (lose_the_device, 1)], ids=["exit", "lost GPU"])
def test_a_genome_that_three_workers_die_on_has_failed(supernet, agreement, die, code):
    target, pixels = supernet.space.smallest, PIXELS
    with supernet.active(target) as view, torch.no_grad():
        deadly_output = view(pixels)

    def deadly(model: torch.nn.Module) -> float:
        if torch.equal(model(pixels), deadly_output):
            die()
        return agreement(model)

    study = jointopt.search(supernet, deadly, evaluations=10, workers=2)
    frame = study.evaluations()
    failed = frame[frame["failed"].notna()]
    assert failed["genome"].tolist() == [tuple(target)]
    assert failed["failed"].item() == f"3 workers died on it, the last with exit code {code}"


def test_a_full_disk_is_told_by_the_file_and_how_to_name_another_folder(tmp_path):
    script = """
import resource, signal, sys
import torch
from jointopt import JointoptError
from jointopt.evaluation.workers import write_payload
from tests.zoo import supernet_of
supernet = supernet_of("vit")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
try:
    write_payload(supernet, lambda model: 0.0, 2, 1)
except JointoptError as error:
    print(error)
"""
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    told = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    said = rf"workers: '{tmp_path}/jointopt-\w+\.pt' cannot be written: File too large; allowed: a folder with room, by"
    assert re.match(said, told.stdout), told.stdout
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_sent_or_loaded_is_one_line(supernet, agreement, tmp_path, monkeypatch):
    lock = __import__("threading").Lock()
    with pytest.raises(JointoptError, match="cannot be sent to another process: TypeError: cannot pickle"):
        jointopt.search(supernet, lambda model: (lock, agreement(model))[1], evaluations=5, workers=2)
    try:
        (tmp_path / "no cache yet").read_text()
    except OSError:  # which Python keeps as what all that is raised here comes of
        with pytest.raises(JointoptError, match="cannot be sent to another process: TypeError: cannot pickle"):
            write_payload(supernet, lambda model: (lock, 1.0)[1], 2, 1)
    (tmp_path / "soon_gone.py").write_text("def quality(model):\n    return 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    import soon_gone  # type: ignore[import-not-found]

    (tmp_path / "soon_gone.py").unlink()
    with pytest.raises(JointoptError, match="cannot be loaded: ModuleNotFoundError: No module named 'soon_gone'"):
        jointopt.search(supernet, soon_gone.quality, evaluations=5, workers=2)
    for given, said in (({"workers": 0}, "workers: found 0"), ({"threads": -1}, "threads: found -1")):
        with pytest.raises(JointoptError, match=said):
            jointopt.search(supernet, agreement, evaluations=5, **given)
    assert not children()


def test_workers_share_the_memory_of_weights(supernet, agreement):
    place = Processes(supernet, agreement, 2, 1)
    try:
        workers = [place.start(slot) for slot in range(2)]
        ready = []
        while len(ready) < 2:
            ready += place.events(workers, 60)
        assert {kind for _, kind, _ in ready} == {"ready"}
        for worker in workers:
            mapped = Path(f"/proc/{worker.process.pid}/maps").read_text()
            assert str(place.payload) in mapped
        assert place.payload.stat().st_size > sum(p.nbytes for p in supernet.model.parameters())
    finally:
        place.close()
    assert not place.payload.exists() and not children()


def test_a_worker_that_nobody_listens_to_ends_without_a_word_and_leaves_no_file(supernet, agreement, capfd):
    place = Processes(supernet, agreement, 1, 1)
    worker = place.start(0)
    try:
        assert [kind for _, kind, _ in place.events([worker], 60)] == ["ready"]
        worker.give(supernet.space.sample(200, 0))
        assert worker.connection.poll(60)
        worker.connection.close()
        assert worker.process.wait(60) == 1
        assert not place.payload.exists()
    finally:
        place.close()
    said = capfd.readouterr().err.splitlines()
    assert not [line for line in said if not re.match(r"W\d{4} .*\btorch/", line)]  # torch's own


def test_a_study_keeps_to_its_threads(supernet, agreement, tmp_path):
    jointopt.search(supernet, agreement, evaluations=2, threads=2, storage=tmp_path / "s.db").close()
    seen = []

    def watching(model: torch.nn.Module) -> float:
        seen.append(torch.get_num_threads())
        return agreement(model)

    jointopt.search(supernet, watching, evaluations=4, storage=tmp_path / "s.db").close()
    assert set(seen) == {2} and torch.get_num_threads() == 1
    with pytest.raises(JointoptError, match="threads: found 1; allowed: 2, with which this study was begun"):
        jointopt.search(supernet, agreement, evaluations=4, threads=1, storage=tmp_path / "s.db")


@pytest.mark.parametrize("workers", [1, 2])
def test_asynchronous_evaluates_as_many_and_goes_on(supernet, agreement, workers, tmp_path):
    for evaluations in (5, 18):
        study = jointopt.search(
            supernet, agreement, evaluations=evaluations, workers=workers, asynchronous=True, storage=tmp_path / "s.db"
        )
        assert study.evaluations()["number"].tolist() == list(range(1, evaluations + 1))
        assert study.evaluations()["genome"].nunique() == evaluations
        study.close()
    with pytest.raises(JointoptError, match="asynchronous was true, is null"):
        jointopt.search(supernet, agreement, evaluations=20, storage=tmp_path / "s.db")


SCRIPT = """
import sys, time, torch, jointopt
from tests.zoo import batches, logits, make
model = make("vit")
supernet = jointopt.Supernet(model, jointopt.SearchSpace.for_model(model, schemes=["none", "W8A8"]))
supernet.calibrate(batches("vit"))
data = batches("vit", seed=5)[0]
target = logits(make("vit"), data)
def quality(view):
    time.sleep(0.05)
    return -float((logits(view, data) - target).square().mean())
print("ready", flush=True)
study = jointopt.search(supernet, quality, evaluations=int(sys.argv[2]), workers=2, storage=sys.argv[1])
print(len(study.evaluations()), flush=True)
"""


def running(script: Path, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, str(script), *map(str, arguments)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"], "TMPDIR": str(script.parent)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        preexec_fn=heed_ctrl_c,
        process_group=0,
    )


@pytest.mark.slow
def test_a_plain_script_without_a_guard_searches_on_workers(tmp_path):
    (tmp_path / "plain.py").write_text(SCRIPT)
    said, errors = running(tmp_path / "plain.py", tmp_path / "s.db", 8).communicate(timeout=300)
    assert said == "ready\n8\n", errors


def evaluated(storage: Path) -> int:
    try:
        return len(Study.open(storage))
    except JointoptError:
        return 0  # not begun yet


@pytest.mark.slow
@pytest.mark.parametrize(
    ("send", "how"),
    [
        (os.kill, signal.SIGINT),
        (os.kill, signal.SIGTERM),
        (os.kill, signal.SIGKILL),
        (os.killpg, signal.SIGHUP),  # as of a terminal that is closed
        (os.killpg, signal.SIGKILL),
    ],
)
def test_whatever_ends_the_search_ends_its_workers_and_leaves_no_file(send, how, tmp_path):
    (tmp_path / "plain.py").write_text(SCRIPT)
    process = running(tmp_path / "plain.py", tmp_path / "s.db", 100000)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and evaluated(tmp_path / "s.db") < 3:
            time.sleep(0.2)
        found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True)
        workers = [int(each) for each in found.stdout.split()]
        assert len(workers) == 2
        send(process.pid, how)
        process.wait(timeout=60)
    finally:
        process.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}/cmdline").exists() for pid in workers)
    assert not list(tmp_path.glob("jointopt-*.pt"))
    assert process.stderr is not None
    told = process.stderr.read()
    assert "in serve" not in told and "Fatal Python error" not in told
    assert np.isfinite(Study.open(tmp_path / "s.db").evaluations()["quality"]).all()
