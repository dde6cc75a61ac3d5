"""One thread a test process, and for those it starts: two workers with two threads each would be slower than one."""

import os

os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)
