"""Bad input: refused before any kernel, naming the argument, what was expected and what came."""

import pytest
import torch

from gradnorm_fast import fast_gradnorm, gradnorm_from_logits, head_scores
from gradnorm_fast.reference import autograd_gradnorm

X, W, B = torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
CASES = [
    (dict(features=[[1.0]]), TypeError, "features: expected a torch.Tensor, got list"),
    (dict(weight=None), TypeError, "weight: expected a torch.Tensor, got NoneType"),
    (dict(features=X.int()), TypeError, "features: expected dtype .* got torch.int32"),
    (dict(features=X.to_sparse()), TypeError, "features: expected a dense"),
    (dict(features=torch.nested.nested_tensor([X, X])), TypeError, "features: expected a dense .* got a nested tensor"),
    (dict(features=torch.tensor(1.0)), ValueError, "features: expected shape"),
    (dict(features=torch.ones(2, 5)), ValueError, r"features: expected shape \(..., 3\)"),
    (dict(weight=torch.ones(3)), ValueError, r"weight: expected shape \(C, D\)"),
    (dict(weight=torch.ones(4, 3, 3, 3)), ValueError, "not an outer product"),
    (dict(weight=torch.ones(0, 3), bias=None), ValueError, "at least one class"),
    (dict(weight=W.double()), TypeError, "weight: expected the dtype of features"),
    (dict(bias=torch.ones(5)), ValueError, r"bias: expected shape \(4,\)"),
    (dict(bias=B.half()), TypeError, "bias: expected the dtype of features"),
    (dict(weight=W.to("meta")), ValueError, "weight: expected the device of features, cpu, got meta"),
    (dict(temperature=0.0), ValueError, "temperature: expected a finite positive number"),
    (dict(temperature=-1), ValueError, "temperature"),
    (dict(temperature=float("nan")), ValueError, "temperature"),
    (dict(temperature=float("inf")), ValueError, "temperature"),
    (dict(temperature=1e-40), ValueError, "reciprocal"),
    (dict(temperature="1"), TypeError, "temperature: expected a number, got str"),
    (dict(temperature=True), TypeError, "temperature: expected a number, got bool"),
    (dict(reduction="avg"), ValueError, "reduction: expected"),
    (dict(backend="cuda"), ValueError, "backend: expected"),
    (dict(bias=None, include_bias=True), ValueError, "include_bias: expected a bias"),
    (dict(include_bias="no"), TypeError, "include_bias: expected a bool, got str"),
]


@pytest.mark.parametrize("function", [fast_gradnorm, head_scores])
@pytest.mark.parametrize(("change", "error", "message"), CASES, ids=lambda v: str(v)[:40])
def test_refusals(function, change, error, message):
    arguments = dict(features=X, weight=W, bias=B) | change
    with pytest.raises(error, match=message):
        function(**arguments)
    if "backend" not in change:
        with pytest.raises(error, match=message):
            autograd_gradnorm(**arguments)


def test_refusals_of_logits():
    with pytest.raises(ValueError, match=r"logits: expected shape \(2, C\)"):
        gradnorm_from_logits(X, torch.ones(3, 4))
    with pytest.raises(ValueError, match="C >= 1"):
        gradnorm_from_logits(X, torch.ones(2, 0))
    with pytest.raises(TypeError, match="logits: expected the dtype of features"):
        gradnorm_from_logits(X, torch.ones(2, 4).half())

    for wrong in (dict(temperature=10**400), dict(reduction=["mean", "sum"]), dict(backend=None), dict(temperature=0)):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected"):
            gradnorm_from_logits(X, torch.ones(2, 4), **wrong)
    with pytest.raises(TypeError, match="include_bias: expected a bool"):
        gradnorm_from_logits(X, torch.ones(2, 4), include_bias="no")
    with pytest.raises(TypeError, match="logits: expected dtype"):
        gradnorm_from_logits(X, torch.ones(2, 4, dtype=torch.complex64))


def test_triton_without_interpreter_says_what_to_do():
    import subprocess
    import sys

    code = (
        "import torch, gradnorm_fast as g\n"
        "try: g.fast_gradnorm(torch.ones(2, 3), torch.ones(4, 3), backend='triton')\n"
        "except ValueError as e: print(e)"
    )
    import os

    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.stdout.startswith("backend: 'triton' cannot run here: Triton does not run on cpu tensors")
    assert "TRITON_INTERPRET=1" in done.stdout and "backend='torch'" in done.stdout
