"""Derivatives of the scores in closed form, in plain torch, for the backward pass and forward mode.

With V = Σ|p − 1/C| and s_k = sign(p_k − 1/C), 0 at the kink:  ∂V/∂z_k = p_k (s_k − Σ_c s_c p_c)/T. The difference in
parentheses cancels if one class has nearly all the probability. With A = Σ_c p_c (1 − s_c) and B = Σ_c p_c (1 + s_c),
twice the probability of the classes below and above 1/C (without ties), it equals A for s_k = 1, −B for s_k = −1 and
(A − B)/2 for s_k = 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch_forward import (
    FLOOR,
    budget_of,
    converted,
    deviations,
    logits_of,
    row_norm,
    rows_at_once,
    shifted,
    usable,
    with_bias,
)
from ._torch_spread import spread_of
from .kernels.problem import Problem

BUFFERS, HEAD_BUFFERS = 4, 6  # live at once, each the size of a chunk of logits in float64; the latter for all fields


def _derivatives(p: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """V and T·∂V/∂z of rows with probabilities p, from u = t·(p − 1/C); overwrites u.  # -> (R, 1), (R, C)"""
    sign = u.sign()
    v = row_norm(u, 1.0).div_(t)
    above, below = torch.add(sign, 1.0, out=u).mul_(p), sign.neg_().add_(1.0).mul_(p)
    a, b = below.sum(1, keepdim=True), above.sum(1, keepdim=True)
    return v, above.mul_(a).sub_(below.mul_(b)).mul_(0.5)


def _derivatives_of_l2(p: Tensor, u: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """The same for V = ‖p − 1/C‖₂: ∂V/∂z_k = p_k (p_k − Σp²)/(V·T)."""
    v = row_norm(u.div_(t).clone(), 2.0)
    return v, _slope_of_squares(p, u, v).div_(torch.where(v > 0, v, 1.0))


def _slope_of_squares(p: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """p_k (p_k − Σp²), which is T/2·∂Σp²/∂z_k, from u = p − 1/C and its L2 norm v; overwrites u.  # -> (R, C)

    Since Σp² = v² + 1/C, p_k − Σp² = u_k − v². For a class with most of the probability it is ε p_k − Σ_(c ≠ k) p_c²,
    where ε is the probability of the other classes.
    """
    slope = u.sub_(v.square()).mul_(p)
    most, top = p.max(1, keepdim=True)
    others = p.scatter(1, top, 0.0)
    exact = most * (most * others.sum(1, keepdim=True) - others.square_().sum(1, keepdim=True))
    return slope.scatter_(1, top, torch.where(most > 0.5, exact, slope.gather(1, top)))


def norm_gradient(x: Tensor, norm: Tensor, p: float) -> Tensor:
    """∂‖(x, bias_norm)‖_p/∂x for p = 1 and 2, from that norm.  # (R, D), (R, 1) -> (R, D)"""
    return x.sign() if p == 1.0 else x / torch.where(norm > 0, norm, 1.0)


def backward(grad: Tensor, problem: Problem, needed: list[bool]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of features, logits, weight and bias, empty if not needed, from grad, the gradient of Scores.out.

    gradnorm = ‖(x, bias_norm)‖_p·V·scale/T for the uniform target; the rest is as in any linear layer. With N that norm
    and d = (z − max z)/T:

    ∂entropy/∂z_k = p_k (Σ_c p_c d_c − d_k)/T      ∂Σp²/∂z_k = 2p_k (p_k − Σp²)/T
    exgrad = 2N (1 − Σp²)/T                        ∂kl_uniform/∂z_k = (p_k − 1/C)/T
    """
    dtype, inv_temperature = grad.dtype, 1.0 / problem.temperature
    inputs = problem.features, problem.logits, problem.weight, problem.bias
    grad_x, grad_z, grad_w, grad_b = (
        torch.zeros_like(t, dtype=dtype, memory_format=torch.contiguous_format)
        if need and t is not None
        else problem.features.new_empty(0)
        for t, need in zip(inputs, needed, strict=True)
    )
    w = problem.weight
    if w is not None and not usable(w, dtype):
        problem = problem._replace(weight=converted(w, dtype))
    head, chunk = len(grad) > 1, budget_of(grad).chunk
    step = rows_at_once(problem, torch.float64, chunk // (HEAD_BUFFERS if head else BUFFERS))
    for i in range(0, len(problem.features), step):
        rows, z = slice(i, i + step), logits_of(problem.rows(i, i + step), dtype)
        x, g = problem.features[rows].to(dtype), grad[:, rows].unsqueeze(2)
        norm = with_bias(row_norm(x.clone(), problem.p), problem.bias_norm, problem.p)
        d = shifted(z, inv_temperature)
        if head:
            top = z.argmax(1, keepdim=True)
            spread = spread_of(d, top)
            further = spread.mean - d.clamp_min_(FLOOR)
        p, (u, t) = d.exp(), deviations(d)
        p.div_(t)
        if head:
            deviation = u / t
            further.mul_(p).mul_(g[6]).addcmul_(deviation, g[9])
            of_squares = 2.0 * g[7] - 4.0 * g[8] * norm * inv_temperature
            further.addcmul_(_slope_of_squares(p, deviation, row_norm(deviation.clone(), 2.0)), of_squares)
            del deviation
        v, dz = (_derivatives if problem.p == 1.0 else _derivatives_of_l2)(p, u, t)
        grad_norm = g[0] * v * problem.scale * inv_temperature
        grad_output = g[0] * norm
        if head:
            grad_norm = grad_norm + g[1] + 2.0 * g[8] * spread.gini * inv_temperature
            grad_output = grad_output + g[2]
        dz *= grad_output * problem.scale * inv_temperature
        dz *= inv_temperature  # in two steps: 1/T² may overflow where dz is 0
        if head:
            dz.add_(further, alpha=inv_temperature)
            grad_msp = g[4] * p.gather(1, top) * inv_temperature
            dz.addcmul_(p, g[5])
            p.scatter_(1, top, 0.0)  # 1 − msp is the sum of the others
            dz.addcmul_(p, grad_msp, value=-1.0).scatter_add_(1, top, g[3] + grad_msp * p.sum(1, keepdim=True))
        dz = dz.to(dtype)
        if needed[0]:
            if problem.weight is not None:
                torch.mm(dz, problem.weight, out=grad_x[rows])
            grad_x[rows].addcmul_(norm_gradient(x, norm, problem.p), grad_norm.to(dtype))
        if needed[1]:
            grad_z[rows] = dz
        if needed[2]:
            grad_w.addmm_(dz.t(), x)
        if needed[3]:
            grad_b += dz.sum(0)
    grads = zip((grad_x, grad_z, grad_w, grad_b), inputs, strict=True)
    return tuple(g if t is None else g.to(t.dtype) for g, t in grads)  # type: ignore[return-value]
