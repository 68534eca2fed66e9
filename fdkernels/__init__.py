"""Operators for refining flow policies inside a Fisher trust region.

The maths in plain form is in the sister package ``fdkernels_ref``.
"""

from fdkernels.chain import flow_fisher_penalty
from fdkernels.flow import integrate_flow, integrate_flow_groups
from fdkernels.jacobian import flow_jacobian
from fdkernels.networks import PackedMLP, VelocityMLP, build_mlp
from fdkernels.packing import pack_mlp
from fdkernels.paths import AffinePath
from fdkernels.penalty import fisher_penalty, fisher_spectrum, velocity_fisher_penalty
from fdkernels.pullback import flow_pullback_penalty, pullback_penalty
from fdkernels.score import velocity_to_score

__all__ = [
    "AffinePath",
    "PackedMLP",
    "VelocityMLP",
    "build_mlp",
    "fisher_penalty",
    "fisher_spectrum",
    "flow_fisher_penalty",
    "flow_jacobian",
    "flow_pullback_penalty",
    "integrate_flow",
    "integrate_flow_groups",
    "pack_mlp",
    "pullback_penalty",
    "velocity_fisher_penalty",
    "velocity_to_score",
]
__version__ = "0.2.0.dev0"
