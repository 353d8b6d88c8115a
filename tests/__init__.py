"""The tests. Without a GPU, kernels run in Triton's interpreter: it must know before anything imports it."""

import os

import torch

# on a GPU, whatever test multiplies first (decoder.let_products_repeat)
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
