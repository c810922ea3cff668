"""Random features with a head, and how far a score of theirs may be from the truth."""

import torch

from conftest import DEVICE
from families import deviation, deviation_norm
from spread import spread


def relative(actual, expected):
    """Largest relative difference; absolute where the truth is 0."""
    expected = expected.double()
    error = (actual.double().cpu() - expected.cpu()).abs() / expected.cpu().abs().where(expected.cpu() != 0, 1.0)
    return error.max().item() if error.numel() else 0.0


def problem(b, d, c, dtype, seed=0):
    g = torch.Generator().manual_seed(seed)
    x, w, bias = (torch.randn(*s, generator=g).to(dtype) for s in ((b, d), (c, d), (c,)))
    return x.to(DEVICE), w.to(DEVICE), bias.to(DEVICE)


def end_to_end_tolerance(x, w, bias, temperature, dtype):
    """2e-6 for the score of given logits and, from the float32 matmul, what its rounding can move Σ|p − 1/C|.

    A sum of n = D + 1 terms errs by at most γ·Σ|terms|, γ = n·2⁻²⁴ always and 4√n·2⁻²⁴ in 999 sums of 1000
    (Higham & Mary, 2019), before the blocking that makes both generous. An error ε in every logit moves p_c by at most
    p_c·(exp(2ε/T) − 1), for it moves z_c by ε and the logsumexp by no more, and so Σ|p − 1/C| by exp(2ε/T) − 1.
    """
    if dtype == torch.float64:
        return 1e-12
    x, w, bias = x.double(), w.double(), bias.double()
    n = x.shape[1] + 1
    size = (x.abs() @ w.abs().T + bias.abs()).amax(1)
    epsilon = min(n, 4 * n**0.5) * 2.0**-24 * size
    score = deviation(x @ w.T + bias, temperature) * temperature
    return 2e-6 + (torch.expm1(2 * epsilon / temperature) / score).max().item()


def exact_problem(b, d, c, dtype):
    """Features, weight, bias and labels whose logits float32 holds exactly; one label ignored, two of no class."""
    g = torch.Generator().manual_seed(b + d + c)
    x, w, bias = (torch.randint(-8, 9, shape, generator=g).to(dtype) / 4 for shape in ((b, d), (c, d), (c,)))
    x[:, 12:] = 0.0
    labels = torch.randint(0, c, (b,), generator=g)
    labels[1::5] = -100
    return x.to(DEVICE), w.to(DEVICE), bias.to(DEVICE), labels.to(DEVICE)


def expected_fields(x, z, t, p, rounding, base):
    """By field of the kernels' output: value, relative and absolute tolerance, each (B,), from float64 features and
    logits; `rounding` (B,) is the absolute error of a logit, `base` the relative error without it."""
    tiny = 2.0**-126  # below, float32 loses digits
    norm, output_norm = torch.linalg.vector_norm(x, p, 1), deviation_norm(z, t, p) / t
    m, zero, (entropy, squares, gini, kl) = z.amax(1), torch.zeros_like(rounding), spread(z, t)
    # The rounding of the logits changes each p_c by this relative amount.
    noise = torch.expm1(2 * rounding / t)
    relative = base + noise * torch.linalg.vector_norm(torch.softmax(z / t, 1), p, 1) / (output_norm * t)
    return {  # field: value, relative and absolute tolerance, of the last four to first order in the noise
        "gradnorm": (norm * output_norm, relative, zero),
        "feature_norm": (norm, base + zero, zero),
        "output_norm": (output_norm, relative, zero),
        "max_logit": (m, base + zero, rounding),
        "msp": (torch.softmax((z - m[:, None]) / t, 1).amax(1), base + noise, zero),
        "energy": (m + t * torch.logsumexp((z - m[:, None]) / t, 1), base + zero, rounding + base * t),
        "entropy": (entropy, 2 * base + 2 * noise, zero + tiny),
        "sum_squares": (squares, 2 * base + 4 * noise, zero),
        "exgrad": (2 * norm * gini / t, 2 * base + 4 * noise, 2 * norm / t * tiny),
        "kl_uniform": (kl, 2 * base + zero, output_norm * t * noise),
    }
