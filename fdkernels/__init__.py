"""Operators for refining flow policies inside a Fisher trust region.

The maths in plain form is in the sister package ``fdkernels_ref``.
"""

from fdkernels.chain import flow_fisher_penalty
from fdkernels.flow import integrate_flow, integrate_flow_groups
from fdkernels.networks import PackedMLP, VelocityMLP, build_mlp, pack_mlp
from fdkernels.paths import AffinePath
from fdkernels.penalty import fisher_penalty, fisher_spectrum, velocity_fisher_penalty
from fdkernels.score import velocity_to_score

__all__ = [
    "AffinePath",
    "PackedMLP",
    "VelocityMLP",
    "build_mlp",
    "fisher_penalty",
    "fisher_spectrum",
    "flow_fisher_penalty",
    "integrate_flow",
    "integrate_flow_groups",
    "pack_mlp",
    "velocity_fisher_penalty",
    "velocity_to_score",
]
__version__ = "0.1.0"
