"""Shared by all tests: tiny models are fastest, and timings steadiest, on one thread."""

import torch

torch.set_num_threads(1)
