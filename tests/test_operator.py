"""Gradients, torch.library, torch.compile, torch.export, torch.func, autocast."""

import mpmath
import numpy as np
import pytest
import torch
import torch._dynamo.testing

from gradnorm_fast import HeadScores, fast_gradnorm, gradnorm_from_logits, head_scores

from conftest import DEVICE


def problem(dtype=torch.float64, requires_grad=True):
    g = torch.Generator().manual_seed(3)
    return [
        torch.randn(*s, generator=g, dtype=dtype).to(DEVICE).requires_grad_(requires_grad)
        for s in ((4, 5), (6, 5), (6,))
    ]


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("include_bias", [False, True])
def test_gradcheck(reduction, include_bias):
    options = dict(temperature=1.3, reduction=reduction, include_bias=include_bias)
    x, w, b = problem()
    assert torch.autograd.gradcheck(lambda *a: fast_gradnorm(*a, **options), (x, w, b))
    assert torch.autograd.gradcheck(lambda x, w: fast_gradnorm(x, w, temperature=1.3), (x, w))
    logits = torch.nn.functional.linear(x, w, b).detach().requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: gradnorm_from_logits(*a, **options), (x, logits))


def test_gradcheck_of_every_head_score():
    differentiable = [f for f in HeadScores._fields if f != "prediction"]
    assert torch.autograd.gradcheck(
        lambda *a: tuple(getattr(head_scores(*a, temperature=1.3), f) for f in differentiable), tuple(problem())
    )


def test_kinks_have_gradient_zero():
    x = torch.zeros(2, 3, requires_grad=True)
    w = torch.zeros(4, 3, requires_grad=True)
    fast_gradnorm(x, w).sum().backward()
    assert not x.grad.any() and not w.grad.any()


@pytest.mark.parametrize("gap", [5.0, 20.0, 85.0])
@pytest.mark.parametrize("classes", [2, 10])
def test_gradients_of_saturated_rows(classes, gap):
    """To 1e-5 in every element, down to where float32 ends; a sum that takes 1 from 1 has none of its digits right."""
    z = torch.randn(1, classes, generator=torch.Generator().manual_seed(classes))
    z[0, 1] = z.max() + gap
    z = z.to(DEVICE).requires_grad_()
    (gradient,) = torch.autograd.grad(gradnorm_from_logits(torch.full((1, 3), 0.5, device=DEVICE), z).sum(), z)
    with mpmath.workdps(60):
        terms = [mpmath.exp(value) for value in z[0].tolist()]
        p = [term / sum(terms) for term in terms]
        signs = [mpmath.sign(value - mpmath.mpf(1) / classes) for value in p]
        mean = sum(sign * value for sign, value in zip(signs, p, strict=True))
        expected = [float(1.5 * value * (sign - mean)) for sign, value in zip(signs, p, strict=True)]
    np.testing.assert_allclose(gradient[0].cpu(), expected, rtol=1e-5, atol=1e-37)


def test_only_needed_gradients_and_once():
    x, w, b = problem()
    w.requires_grad_(False)
    (grad,) = torch.autograd.grad(fast_gradnorm(x, w, b).sum(), x, create_graph=True)
    assert grad.shape == x.shape and w.grad is None
    with pytest.raises(RuntimeError, match="once, not twice"):
        grad.sum().backward()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_opcheck(backend):
    for dtype in (torch.float32, torch.float64):
        x, w, b = problem(dtype)
        logits = (x @ w.T).detach().requires_grad_()
        for head in (False, True):
            options = (None, "uniform", 1.0, 1.5, "mean", False, backend, head)
            torch.library.opcheck(torch.ops.gradnorm_fast.scores.default, (x, None, w, b, *options))
            torch.library.opcheck(torch.ops.gradnorm_fast.scores.default, (x, logits, None, None, *options))


@pytest.mark.parametrize(
    "needed", [[True] * 2 + [False] * 2, [True, False, True, True], [True, False, False, False]], ids=str
)
def test_opcheck_of_the_backward(needed):
    x, w, b = (t.detach() for t in problem(torch.float32))
    given = (x, x @ w.T, None, None) if needed[1] else (x, None, w, b)
    grad = torch.ones(1, 4, device=DEVICE)
    for target, p in (("uniform", 1.0), ("predicted", 2.0), ("labels", 1.0)):
        labels = torch.tensor([1, 0, 5, -100], device=DEVICE) if target == "labels" else None
        options = (labels, target, p, 1.5, "mean", False, needed)
        torch.library.opcheck(torch.ops.gradnorm_fast.scores_backward.default, (grad, *given, *options))


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_what_a_kernel_must_not_read_as_it_lies(backend):
    """Lazily negated and lazily zero tensors, forward-mode duals and batched tensors go through the operator."""
    x, w, b = problem(torch.float32, requires_grad=False)
    negated = torch.complex(torch.zeros_like(x), x).conj().imag
    assert negated.is_neg()
    assert torch.equal(fast_gradnorm(negated, w, b, backend=backend), fast_gradnorm(-x, w, b, backend=backend))
    assert not fast_gradnorm(torch._efficientzerotensor(x.shape, device=DEVICE), w, b, backend=backend).any()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        slope = torch.autograd.forward_ad.unpack_dual(fast_gradnorm(dual, w, b, backend=backend)).tangent
    x.requires_grad_()
    scores = fast_gradnorm(x, w, b, backend=backend)
    (gradient,) = torch.autograd.grad(scores.sum(), x, retain_graph=True)
    torch.testing.assert_close(slope, gradient.sum(1), rtol=1e-4, atol=1e-4)
    eye = torch.eye(4, device=DEVICE)
    (batched,) = torch.autograd.grad(scores, x, eye, is_grads_batched=True, retain_graph=True)
    each = torch.stack([torch.autograd.grad(scores, x, row, retain_graph=True)[0] for row in eye])
    torch.testing.assert_close(batched, each)


def test_compile_does_not_recompile_per_batch_size():
    x, w, b = problem(torch.float32, requires_grad=False)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: head_scores(x, w, b, temperature=2.0), fullgraph=True, dynamic=True, backend=counter
    )
    compiled(x)
    graphs = counter.frame_count
    for size in (4, 7, 30):
        batch = torch.randn(size, 5, device=DEVICE)
        for got, expected in zip(compiled(batch), head_scores(batch, w, b, temperature=2.0), strict=True):
            assert torch.equal(got, expected)
    assert counter.frame_count == graphs > 0


def test_compile_with_gradients():
    x, w, b = problem()
    expected = torch.autograd.grad(fast_gradnorm(x, w, b).sum(), (x, w, b))
    compiled = torch.compile(fast_gradnorm, fullgraph=True, backend="aot_eager")
    for got, want in zip(torch.autograd.grad(compiled(x, w, b).sum(), (x, w, b)), expected, strict=True):
        torch.testing.assert_close(got, want)


def test_export(tmp_path):
    class Head(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = torch.nn.Linear(5, 6)

        def forward(self, x):
            return head_scores(x, self.fc.weight, self.fc.bias)

    module = Head().to(DEVICE).eval()
    dynamic = ({0: torch.export.Dim("batch", min=2)},)
    program = torch.export.export(module, (torch.randn(4, 5, device=DEVICE),), dynamic_shapes=dynamic)
    torch.export.save(program, tmp_path / "head.pt2")
    loaded = torch.export.load(tmp_path / "head.pt2").module()
    x = torch.randn(9, 5, device=DEVICE)
    assert torch.equal(loaded(x).gradnorm, module(x).gradnorm)


def test_torch_func():
    x, w, b = problem(requires_grad=False)
    (expected,) = torch.autograd.grad(fast_gradnorm(x, w.requires_grad_(), b).sum(), w)
    w = w.detach()
    total = lambda w: fast_gradnorm(x, w, b).sum()  # noqa: E731
    torch.testing.assert_close(torch.func.grad(total)(w), expected)
    per_row = torch.func.vmap(torch.func.grad(lambda x: fast_gradnorm(x, w, b)))(x)
    torch.testing.assert_close(torch.func.jacrev(lambda x: fast_gradnorm(x, w, b))(x).sum(0), per_row)
    torch.testing.assert_close(torch.func.vmap(lambda x: fast_gradnorm(x, w, b))(x), fast_gradnorm(x, w, b))
    assert torch.func.vmap(lambda x: fast_gradnorm(x, w, b))(x[:0]).shape == (0,)
    several = torch.stack([x, 2 * x], 1)  # (4, 2, 5): batched in the middle
    got = torch.func.vmap(lambda x: head_scores(x, w, b), in_dims=1)(several)
    for field in HeadScores._fields:
        expected = torch.stack([getattr(head_scores(several[:, i], w, b), field) for i in range(2)])
        torch.testing.assert_close(getattr(got, field), expected)
    heads = torch.stack([w, -w, 2 * w])
    got = torch.func.vmap(lambda w: fast_gradnorm(x, w, b))(heads)
    torch.testing.assert_close(got, torch.stack([fast_gradnorm(x, w, b) for w in heads]))
    assert torch.func.vmap(lambda w: fast_gradnorm(x, w, b))(heads[:0]).shape == (0, 4)


def test_autocast_casts_as_linear_does():
    x, w, b = problem(torch.float32, requires_grad=False)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        got = fast_gradnorm(x, w.bfloat16(), b)
        mixed = gradnorm_from_logits(x, torch.nn.functional.linear(x, w, b))
        double = fast_gradnorm(x.double(), w.double(), b.double())
    assert torch.equal(got, fast_gradnorm(x.bfloat16(), w.bfloat16(), b.bfloat16()))
    assert mixed.dtype == torch.float32 and double.dtype == torch.float64


def test_meta_and_fake_tensors():
    x, w, b = (t.detach().to("meta") for t in problem())
    assert fast_gradnorm(x, w, b).shape == (4,) and fast_gradnorm(x, w, b).device.type == "meta"
    with torch._subclasses.FakeTensorMode() as mode:
        x, w = mode.from_tensor(torch.ones(4, 5)), mode.from_tensor(torch.ones(6, 5))
        assert head_scores(x, w).prediction.dtype == torch.int64


gpu = pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")


@gpu
@pytest.mark.parametrize("classes", [10, 1000])
def test_cuda_graph(classes):
    """Captured at a batch size that no kernel has seen: nothing may be compiled or waited for."""
    w = torch.randn(classes, 32, device=DEVICE)
    fast_gradnorm(torch.randn(128, 32, device=DEVICE), w)
    x = torch.randn(96, 32, device=DEVICE)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = fast_gradnorm(x, w)
    graph.replay()
    assert torch.equal(captured, fast_gradnorm(x, w))


@gpu
@pytest.mark.parametrize("classes", [10, 1000])
def test_streams(classes):
    x, w = torch.randn(2000, 64, device=DEVICE), torch.randn(classes, 64, device=DEVICE)
    expected = fast_gradnorm(x, w)
    streams = [torch.cuda.Stream() for _ in range(4)]
    results = []
    for i in range(200):
        with torch.cuda.stream(streams[i % 4]):
            torch.cuda.current_stream().wait_stream(torch.cuda.default_stream())
            results.append(fast_gradnorm(x, w))
    torch.cuda.synchronize()
    assert all(torch.equal(got, expected) for got in results)


@gpu
def test_no_synchronisation():
    x, w, b = problem(torch.float32, requires_grad=False)
    head_scores(x, w, b)
    torch.cuda.set_sync_debug_mode("error")
    try:
        head_scores(x, w, b)
        fast_gradnorm(x, w, b, backend="torch")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    x, w = torch.randn(8, 16), torch.randn(300, 16)
    expected = fast_gradnorm(x.to("cuda:0"), w.to("cuda:0"))
    assert torch.equal(fast_gradnorm(x.to("cuda:1"), w.to("cuda:1")).cpu(), expected.cpu())


@pytest.mark.parametrize("call", ["fast_gradnorm", "head_scores", "gradnorm_from_logits"])
def test_forward_mode(call):
    g = torch.Generator().manual_seed(0)
    x, w, b, z = (torch.randn(s, dtype=torch.float64, generator=g) for s in ((3, 5), (4, 5), (4,), (3, 4)))
    inputs = (x, z) if call == "gradnorm_from_logits" else (x, w, b)

    def scores(*tensors):
        if call == "gradnorm_from_logits":
            return gradnorm_from_logits(*tensors, target="predicted", p=2.0)
        if call == "fast_gradnorm":
            return fast_gradnorm(*tensors, temperature=1.7, reduction="sum")
        found = head_scores(*tensors, temperature=1.7)
        return torch.stack([s for name, s in zip(found._fields, found, strict=True) if name != "prediction"])

    watched = tuple(t.clone().requires_grad_() for t in inputs)
    assert torch.autograd.gradcheck(scores, watched, check_forward_ad=True)
    every = tuple(range(len(inputs)))
    forward, backward = (jac(scores, argnums=every)(*inputs) for jac in (torch.func.jacfwd, torch.func.jacrev))
    for a, c in zip(forward, backward, strict=True):
        torch.testing.assert_close(a, c)
