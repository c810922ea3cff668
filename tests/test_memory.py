"""The torch path's promises: little memory beside the result, whatever B·C is, and few launches on a GPU."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gradnorm_fast import fast_gradnorm, gradnorm_from_logits, head_scores
from gradnorm_fast._torch_backward import backward
from gradnorm_fast._torch_forward import MEMORY, forward
from gradnorm_fast.kernels.problem import Problem

from measure import peak_extra_memory


def random(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


half, double = torch.bfloat16, torch.float64
CASES = {  # name: function, its input, made when asked for, and options
    "imagenet": (fast_gradnorm, lambda: (random(4096, 512), random(1000, 512)), {}),
    "head scores": (head_scores, lambda: (random(4096, 64), random(1000, 64), random(1000)), {}),
    "near-uniform rows": (head_scores, lambda: (random(4096, 64), random(1000, 64)), dict(temperature=1e4)),
    "halves": (fast_gradnorm, lambda: (random(2048, 1024, dtype=half), random(8000, 1024, dtype=half)), {}),
    "doubles": (fast_gradnorm, lambda: (random(3000, 64, dtype=double), random(2000, 64, dtype=double)), {}),
    "wide halves": (fast_gradnorm, lambda: (random(300, 60000, dtype=half), random(20, 60000, dtype=half)), {}),
    "strides": (fast_gradnorm, lambda: (random(512, 4096)[:, ::2], random(4000, 4096)[:, 1::2]), {}),
    "many rows of two classes": (fast_gradnorm, lambda: (random(10**6, 8), random(2, 8)), {}),
    "many rows of one class": (fast_gradnorm, lambda: (random(10**6, 8), random(1, 8)), {}),
    "few rows": (head_scores, lambda: (random(120, 64), random(20000, 64), random(20000)), dict(temperature=2.0)),
    "head scores of one class": (head_scores, lambda: (random(10**6, 8), random(1, 8)), {}),
    "few classes": (head_scores, lambda: (random(60000, 16), random(10, 16), random(10)), dict(temperature=2.0)),
    "long rows": (head_scores, lambda: (random(3, 2), random(2500000, 2)), {}),
    "long double rows": (head_scores, lambda: (random(3, 2, dtype=double), random(10**6, 2, dtype=double)), {}),
    "logits": (gradnorm_from_logits, lambda: (random(40000, 3), random(40000, 300)), {}),
    "half logits": (gradnorm_from_logits, lambda: (random(20000, 3, dtype=half), random(20000, 300, dtype=half)), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_extra_memory_is_bounded(name):
    function, make, options = CASES[name]
    inputs = make()
    assert peak_extra_memory(lambda: function(*inputs, **options)) <= MEMORY


@pytest.mark.parametrize("temperature", [1.0, 1e4])
@pytest.mark.parametrize("function", [fast_gradnorm, head_scores])
def test_extra_memory_of_the_backward_is_bounded(function, temperature):
    x, w = random(4096, 64).requires_grad_(), random(4000, 64).requires_grad_()
    scores = function(x, w, temperature=temperature)
    scores = sum(field.sum() for field in ([scores] if function is fast_gradnorm else scores))
    assert peak_extra_memory(lambda: torch.autograd.grad(scores, (x, w))) <= MEMORY


def test_more_logits_than_fit_any_memory_or_int32():
    """2^19 + 64 rows x 2^12 classes are 8 GiB of logits, more than 2^31 of them."""
    rows = 2**19 + 64
    x, w = random(1, 4).expand(rows, 4), random(2**12, 4)
    assert peak_extra_memory(lambda: fast_gradnorm(x[:4096], w)) <= MEMORY
    storage = random(rows - 1 + 2**12)  # rows that overlap, each one element further: all different
    logits = storage.as_strided((rows, 2**12), (1, 1))
    scores = gradnorm_from_logits(x, logits)
    late = [0, 2**19 - 1, 2**19, rows - 1]  # the third begins at element 2^31 of the matrix
    assert torch.equal(scores[late], gradnorm_from_logits(x[late], logits[late].clone()))


class Launches(TorchDispatchMode):
    """Counts launches: every operator except views and allocations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not (function.is_view or "empty" in function.name() or "detach" in function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head", [False, True])
def test_launches_on_a_gpu(dtype, head):
    """4096 x 4096 x 128256, on tensors without memory. The size of a GPU's budgets bounds the launches: all fields take
    three times as many for a piece of the logits, in two thirds of its size; their backward six times as many."""
    most, most_backward = (1000, 2200) if head else (400, 500)
    x, w = (torch.empty(n, 4096, dtype=dtype, device="meta") for n in (4096, 128256))
    bias = torch.empty(128256, dtype=dtype, device="meta")
    with Launches() as launches:
        scores = forward(Problem(x, w, bias, temperature=2.0), torch.float32, head)
    assert launches.count < most
    with Launches() as launches:
        backward(scores.out, Problem(x, w, bias, temperature=2.0), [True, False, True, True])
    assert launches.count < most_backward
