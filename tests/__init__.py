"""The tests. Without a GPU, kernels run in Triton's interpreter: it must know before anything imports it."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
