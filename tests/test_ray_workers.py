"""A search on a Ray cluster: the same study as in one process, also when a node dies under it."""

from __future__ import annotations

import shutil
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch

import jointopt
from jointopt import JointoptError, SearchSpace, Supernet
from tests.same import dump
from tests.zoo import batches, logits, make

ray = pytest.importorskip("ray")

DATA = batches("vit", seed=5)[0]


@pytest.mark.slow
def test_a_cluster_finds_what_one_process_finds_while_a_node_is_killed(tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    place = Path(tempfile.mkdtemp())  # a socket's path has 107 characters at most, and pytest's is long
    monkeypatch.setenv("TMPDIR", str(place))
    monkeypatch.setattr(tempfile, "tempdir", None)
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, schemes=["none", "W8A8", "W4A16"]))
    supernet.calibrate(batches("vit"))
    target = logits(model, DATA)
    nodes = tmp_path / "nodes"
    nodes.mkdir()

    def quality(view: torch.nn.Module) -> float:
        import ray

        if ray.is_initialized():
            (nodes / ray.get_runtime_context().get_node_id()).touch()
            time.sleep(0.2)
        return -float((logits(view, DATA) - target).square().mean())

    alone = dump(jointopt.search(supernet, quality, evaluations=30, workers=1))
    given = {"num_cpus": 1, "object_store_memory": 100 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=given)
    second = cluster.add_node(**given)

    def kill_when_both_work() -> None:
        deadline = time.monotonic() + 240
        while len(list(nodes.iterdir())) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill_when_both_work)
    try:
        killer.start()
        study = jointopt.search(supernet, quality, evaluations=30, ray=cluster.address)
        assert dump(study) == alone
        killer.join()
        assert len(list(nodes.iterdir())) == 2 and not ray.is_initialized()
    finally:
        killer.join()
        cluster.shutdown()
        left = list(place.glob("jointopt-*"))
        shutil.rmtree(place, ignore_errors=True)
    assert not left


@pytest.mark.slow
@pytest.mark.parametrize("address", ["auto", "127.0.0.1:1"])
def test_no_cluster_is_one_line_at_once(address):
    model = make("vit")
    supernet = Supernet(model, SearchSpace.for_model(model, preset="fixed", schemes=["none", "W8A8"]))
    supernet.calibrate(batches("vit"))
    with pytest.raises(JointoptError, match=f"ray: no cluster at '{address}'"):
        jointopt.search(supernet, lambda view: 1.0, evaluations=2, ray=address)
