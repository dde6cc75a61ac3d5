"""One thread a test process: two workers with two threads each would be slower than one."""

import torch

torch.set_num_threads(1)
