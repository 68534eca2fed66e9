"""Act with a trained policy: `load_policy` reads a run's policy.safetensors; its result maps observations to actions.

Needs PyTorch, NumPy and safetensors (the extra ``policy``), nothing of what training needs.
"""

from fdkernels.policy.acting import Acting, RuleName
from fdkernels.policy.config import PolicyConfig
from fdkernels.policy.export import export_policy
from fdkernels.policy.file import PolicyError, load_policy, save_policy
from fdkernels.policy.finite import NotFinite
from fdkernels.policy.network import DisplacementPolicy, FlowPolicy, OneStepPolicy
from fdkernels.policy.player import Policy

__all__ = [
    "Acting",
    "DisplacementPolicy",
    "FlowPolicy",
    "NotFinite",
    "OneStepPolicy",
    "Policy",
    "PolicyConfig",
    "PolicyError",
    "RuleName",
    "export_policy",
    "load_policy",
    "save_policy",
]
