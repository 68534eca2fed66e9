"""δᵀF̂δ/d and its gradients, F = (1/K) Σ_k s_k s_kᵀ + λI, without forming the matrix.

    projection_k = s_k·δ
    numerator    = (1/K) Σ_k projection_k² + λ‖δ‖²
    trace        = (1/K) Σ_k ‖s_k‖² + λd
    denominator  = max(trace, εd), or d if F is not normalised
    penalty      = numerator / denominator

    ∂penalty/∂δ   = 2·[(1/K) Σ_k projection_k·s_k + λδ] / denominator
    ∂penalty/∂s_k = (2/K)·[projection_k·δ − penalty·s_k·1{trace ≥ εd}] / denominator

A program owns ROWS rows (states) and walks over K in blocks of BLOCK_K; d stays in registers. The forward pass
reads the scores once: the same tile gives the penalty and the gradient to δ, which is saved for the backward pass.
"""

import triton
import triton.language as tl

from fdkernels.kernels.rows import load_rows, store_rows


@triton.jit
def load_scores(
    scores, first, num_rows, row, keep,
    RUN: tl.constexpr, STEP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SCORE: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    """s if SCORE is "given", p·v + q·x if "velocity", p·v if "scaled". COEFFICIENTS says where p and q come from."""
    s = load_rows(scores.given, first, num_rows, row, keep, RUN, STEP, D, BLOCK_D)
    if SCORE != "given":
        p, q = scores.p, scores.q
        if COEFFICIENTS != "scalar":
            at = first + row if COEFFICIENTS == "rows" else row * 0
            mask = keep & (first + row < num_rows)
            p = tl.load(scores.pairs + 2 * at, mask=mask, other=0.0).to(tl.float32)[:, None]
            q = tl.load(scores.pairs + 2 * at + 1, mask=mask, other=0.0).to(tl.float32)[:, None]
        s = p * s
        if SCORE == "velocity":
            s += q * load_rows(scores.x, first, num_rows, row, keep, RUN, STEP, D, BLOCK_D)
    return s


@triton.jit
def close_penalty(
    squares, size, pull, delta, damping, eps, K: tl.constexpr, D: tl.constexpr, NORMALIZE: tl.constexpr
):  # fmt: skip
    """Penalty, its gradient to δ, and the trace, from sums over the samples.

    Args:
        squares, size: Σ_k projection_k² and Σ_k ‖s_k‖², (rows,).
        pull: Σ_k projection_k·s_k, like ``delta`` (rows, padded d).
    """
    trace = size / K + damping * D
    denominator = tl.zeros(squares.shape, tl.float32) + D
    if NORMALIZE:
        denominator = tl.where(trace < eps * D, eps * D, trace)  # a maximum that keeps NaN
    penalty = (squares / K + damping * tl.sum(delta * delta, 1)) / denominator
    return penalty, 2 * (pull / K + damping * delta) / denominator[:, None], trace


@triton.jit
def penalty_kernel(
    displacement_ptr, scores, penalty_ptr, gradient_ptr, trace_ptr, num_rows, damping, eps,
    K: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr,
    NORMALIZE: tl.constexpr, SCORE: tl.constexpr, COEFFICIENTS: tl.constexpr,
):  # fmt: skip
    """Write the penalty, its gradient to δ (float32) and the trace; those whose pointer is None are not wanted."""
    ROWS: tl.constexpr = TILE.rows
    BLOCK_K: tl.constexpr = TILE.block_k
    BLOCK_D: tl.constexpr = TILE.block_d
    RUN: tl.constexpr = ROWS * (K if K < BLOCK_K else BLOCK_K)  # not min, which is tl.minimum before Triton 3.6
    STEP: tl.constexpr = ROWS * K if K <= BLOCK_K else (K | BLOCK_K) & -(K | BLOCK_K)  # gcd of K and BLOCK_K
    first = tl.program_id(0).to(tl.int64) * ROWS
    num_rows = tl.cast(num_rows, tl.int64)  # num_rows · K · d may pass 2³¹
    r = tl.arange(0, ROWS)
    delta = load_rows(displacement_ptr, first, num_rows, r, r < ROWS, ROWS, ROWS, D, BLOCK_D)

    rk = tl.arange(0, ROWS * BLOCK_K)  # (row, k) pairs; one row if K is read in blocks
    squares = tl.zeros((ROWS,), tl.float32)
    size = tl.zeros((ROWS,), tl.float32)
    pull = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        s = load_scores(
            scores, first * K + k0, num_rows * K,
            rk // BLOCK_K * K + rk % BLOCK_K, rk % BLOCK_K < K - k0, RUN, STEP, D, BLOCK_D, SCORE, COEFFICIENTS,
        )  # fmt: skip
        s = tl.reshape(s, (ROWS, BLOCK_K, BLOCK_D))
        projection = tl.sum(s * delta[:, None, :], 2)
        squares += tl.sum(projection * projection, 1)
        if NORMALIZE:
            size += tl.sum(tl.sum(s * s, 2), 1)
        if gradient_ptr is not None:
            pull += tl.sum(projection[:, :, None] * s, 1)

    penalty, gradient, trace = close_penalty(squares, size, pull, delta, damping, eps, K, D, NORMALIZE)
    tl.store(penalty_ptr + first + r, penalty, mask=first + r < num_rows)
    if trace_ptr is not None:
        tl.store(trace_ptr + first + r, trace, mask=first + r < num_rows)
    if gradient_ptr is not None:
        store_rows(gradient_ptr, gradient, first, num_rows, r, r < ROWS, D)


@triton.jit
def score_gradient_kernel(
    upstream_ptr, displacement_ptr, score_ptr, penalty_ptr, trace_ptr, gradient_ptr,
    num_rows, eps, K: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, NORMALIZE: tl.constexpr,
):  # fmt: skip
    """Write upstream · ∂penalty/∂s_k."""
    ROWS: tl.constexpr = TILE.rows
    BLOCK_K: tl.constexpr = TILE.block_k
    BLOCK_D: tl.constexpr = TILE.block_d
    RUN: tl.constexpr = ROWS * (K if K < BLOCK_K else BLOCK_K)  # not min, which is tl.minimum before Triton 3.6
    STEP: tl.constexpr = ROWS * K if K <= BLOCK_K else (K | BLOCK_K) & -(K | BLOCK_K)  # gcd of K and BLOCK_K
    first = tl.program_id(0).to(tl.int64) * ROWS
    num_rows = tl.cast(num_rows, tl.int64)  # num_rows · K · d may pass 2³¹
    r = tl.arange(0, ROWS)
    inside = first + r < num_rows
    delta = load_rows(displacement_ptr, first, num_rows, r, r < ROWS, ROWS, ROWS, D, BLOCK_D)
    scale = 2 * tl.load(upstream_ptr + first + r, mask=inside, other=0.0).to(tl.float32) / K
    shrink = tl.zeros((ROWS,), tl.float32)
    if NORMALIZE:
        trace = tl.load(trace_ptr + first + r, mask=inside, other=1.0)
        penalty = tl.load(penalty_ptr + first + r, mask=inside, other=0.0)
        shrink = tl.where(trace < eps * D, 0.0, penalty)
        scale = scale / tl.where(trace < eps * D, eps * D, trace)
    else:
        scale = scale / D

    rk = tl.arange(0, ROWS * BLOCK_K)
    row = rk // BLOCK_K * K + rk % BLOCK_K
    for k0 in range(0, K, BLOCK_K):
        keep = rk % BLOCK_K < K - k0
        s = load_rows(score_ptr, first * K + k0, num_rows * K, row, keep, RUN, STEP, D, BLOCK_D)
        s = tl.reshape(s, (ROWS, BLOCK_K, BLOCK_D))
        projection = tl.sum(s * delta[:, None, :], 2)
        gradient = scale[:, None, None] * (projection[:, :, None] * delta[:, None, :] - shrink[:, None, None] * s)
        gradient = tl.reshape(gradient, (ROWS * BLOCK_K, BLOCK_D))
        store_rows(gradient_ptr, gradient, first * K + k0, num_rows * K, row, keep, D)
