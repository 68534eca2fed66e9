"""The maths of Fisher-trust-region flow refinement in plain PyTorch: slow, literal, and the judge of the fast library.

Written to be read beside "Fisher Decorator: Refining Flow Policy via a Local Transport Map" (arXiv 2604.17919). A
behaviour policy is a flow that carries noise x0 ~ N(0, I) to actions a along x_t = α_t·a + σ_t·x0 with a learned
velocity v(x, t, s); a small map a → a + δ(s, a) refines its actions, held back by the Fisher information of the
behaviour density, KL(p(·−δ) ‖ p) ≈ ½·δᵀFδ. One file per step of that sentence:

    paths       α_t and σ_t
    score       ∇ log p_t from the velocity
    flow        noise to action, one Python step after another
    penalty     F from outer products of scores, the d×d matrix written out, and the penalty δᵀF̂δ/d
    chain       the whole chain, from a state and a δ to the penalty

Each function runs in the dtype and on the device of its input, so that a float64 call is the truth and a bf16 call
shows what that precision costs. Inputs are not validated: a wrong shape fails where PyTorch notices it.
"""

from fdkernels_ref.chain import flow_fisher_penalty
from fdkernels_ref.flow import integrate_flow
from fdkernels_ref.paths import PATHS, AffinePath
from fdkernels_ref.penalty import fisher_matrix, fisher_penalty, fisher_spectrum, normalize_fisher
from fdkernels_ref.score import velocity_to_score

__all__ = [
    "PATHS",
    "AffinePath",
    "fisher_matrix",
    "fisher_penalty",
    "fisher_spectrum",
    "flow_fisher_penalty",
    "integrate_flow",
    "normalize_fisher",
    "velocity_to_score",
]
