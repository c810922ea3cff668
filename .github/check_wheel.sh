#!/usr/bin/env bash
# Install the wheel of dist/ in a clean environment and score a batch, away from the checkout.
set -euo pipefail
wheel=$(realpath dist/*.whl)
folder=$(mktemp -d)
python -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet "$wheel"
cd "$folder"
env/bin/python - <<'PYTHON'
import torch
import gradnorm_fast, gradnorm_fast.kernels.deviation
from gradnorm_fast import fast_gradnorm
from gradnorm_fast.reference import autograd_gradnorm

x, w = torch.rand(4, 8), torch.randn(5, 8)
torch.testing.assert_close(fast_gradnorm(x, w), autograd_gradnorm(x.double(), w.double()).float())
print("installed", gradnorm_fast.__version__, "in", gradnorm_fast.__file__)
PYTHON
env/bin/gradnorm-fast env --check
