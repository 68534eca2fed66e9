"""The end of a flow and its Jacobian with respect to the start, in one launch.

A step of a solver adds velocities to a state, so a tangent of the state takes the same steps with J_v·tangent in place
of v. The d tangents start from the unit vectors and end as the columns of the Jacobian. They are rows beside their
state and share its products (``tangents.py``). If LANES rows are too few for all, the state is integrated CHUNKS times,
each time with other tangents.
"""

import triton
import triton.language as tl

from fdkernels.kernels.flow.advance import advance, clamp
from fdkernels.kernels.flow.layers import condition_share
from fdkernels.kernels.flow.streamed import streamed


@triton.jit(do_not_specialize=["num_states", "rows_per_cond", "num_evals", "groups_per_model"])
def jacobian_kernel(
    rows, end_ptr, jacobian_ptr, weights, scratch,
    num_states, rows_per_cond, num_evals, groups_per_model, low, high,
    NET: tl.constexpr, PLAN: tl.constexpr, LANES: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, CLIP: tl.constexpr,
):  # fmt: skip
    """
    Args:
        rows, weights, scratch: records of ``arguments.py``; a state is one row of ``rows``.
        end_ptr: (models·states, d), clipped if CLIP is "end"; otherwise it is "never".
        jacobian_ptr: (models·states, d, d), of the end before it is clipped; the last dimension counts the tangents.
        groups_per_model: programs that walk over a model's blocks of rows.
    """
    D: tl.constexpr = NET.action_dim
    WIDTH: tl.constexpr = NET.widths[0]
    ROWS: tl.constexpr = PLAN.rows
    BLOCK_N: tl.constexpr = PLAN.block_n
    TOGETHER: tl.constexpr = ROWS // LANES
    program = tl.program_id(0)
    model = (program // groups_per_model).to(tl.int64)
    share_ptr = scratch.share + program.to(tl.int64) * (ROWS * WIDTH)
    hidden_ptr = scratch.hidden + program.to(tl.int64) * (2 * ROWS * NET.widest)
    wide_ptr = scratch.wide
    if wide_ptr is not None:
        wide_ptr += program.to(tl.int64) * (ROWS * NET.widest)

    j = tl.arange(0, BLOCK_D)[None, :]
    r = tl.arange(0, ROWS)
    lane = r % LANES
    blocks = tl.cdiv(num_states * CHUNKS, TOGETHER)
    for block in tl.range(program % groups_per_model, blocks, groups_per_model, num_stages=1):
        chunk = block * TOGETHER + r // LANES
        state = chunk // CHUNKS
        column = chunk % CHUNKS * (LANES - 1) + lane - 1
        inside = state < num_states
        state = model * num_states + state
        is_state, is_tangent = inside & (lane == 0), inside & (lane > 0) & (column < D)
        at, mask = state[:, None] * D + j, is_state[:, None] & (j < D)

        condition_share(
            rows.cond, state // rows_per_cond, is_state, model, weights, share_ptr, 0, WIDTH,
            NET, BLOCK_N, PRECISION, LANES,
        )  # fmt: skip
        tl.debug_barrier()

        unit = tl.where(is_tangent[:, None] & (column[:, None] == j), 1.0, 0.0)
        x = unit + tl.load(rows.start + at, mask=mask, other=0.0).to(tl.float32)
        z = x
        total = tl.zeros((ROWS, BLOCK_D), tl.float32)
        for e in tl.range(0, num_evals, num_stages=1):
            line = rows.table + 4 * e
            t = tl.where(lane == 0, tl.load(line), 0.0)
            v = streamed(z, t, share_ptr, hidden_ptr, wide_ptr, model, weights, NET, PLAN, PRECISION, LANES)
            x, total, z = advance(x, total, v, line, False, low, high, "never")

        tl.store(jacobian_ptr + at * D + column[:, None], x, mask=is_tangent[:, None] & (j < D))
        if CLIP == "end":
            x = clamp(x, low, high)
        first = mask & (chunk % CHUNKS == 0)[:, None]
        tl.store(end_ptr + at, x.to(end_ptr.dtype.element_ty), mask=first)
