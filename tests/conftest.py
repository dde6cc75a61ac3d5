"""One thread a test process, and for those it starts: two workers with two threads each would be slower than one. And
where the tests of commands run."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

from pathlib import Path

import pytest
import torch

from tests.commands import finished_run, user_place

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    return user_place(tmp_path_factory.mktemp("place"))


@pytest.fixture(scope="module")
def finished(place) -> Path:
    return finished_run(place)
