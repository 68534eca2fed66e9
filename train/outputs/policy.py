"""policy.safetensors: the weights of a finished run, and the settings needed to act with them.

`fdkernels.policy.load_policy` reads it.
"""

from __future__ import annotations

from pathlib import Path

from fdkernels.policy.file import policy_bytes
from train.agents.base import Agent
from train.outputs.files import write_whole
from train.settings import RunConfig

FILE = "policy.safetensors"


def save_policy(config: RunConfig, agent: Agent, path: Path | None = None) -> None:
    """Write the agent with its environment and acting rule, by default into the folder of its run."""
    write_whole(path or config.folder / FILE, policy_bytes(agent, config.acts, config.env, {"agent": config.agent}))
