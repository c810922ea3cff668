"""The Triton kernels run on the GPU where there is one, else in Triton's interpreter on the CPU."""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

pytest_plugins = ["command_line"]  # the fixtures of the command line's tests
