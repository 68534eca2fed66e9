"""policy.safetensors: the weights of a finished run, and the settings needed to act with them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from train.acting import Acting
from train.agents import AGENTS
from train.agents.base import Agent
from train.agents.encoder import FEATURES
from train.outputs.checkpoint import require_alike
from train.outputs.files import write_safetensors
from train.reading import check_safetensors, parse_json, record_from_json
from train.settings import RunConfig

FILE = "policy.safetensors"
LONGEST_NAME = 200
ERRORS = (SafetensorError, KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError)
"""Raised by what makes an agent of a file that is no policy."""


class PolicyError(RuntimeError):
    """The policy is missing or cannot be read."""


class Policy(NamedTuple):
    agent: Agent
    env: str
    acting: Acting


def save_policy(config: RunConfig, agent: Agent, path: Path | None = None) -> None:
    """Write the agent with its environment and acting rule, by default into the folder of its run."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in agent.state_dict().items()}
    hyper = json.dumps(config.as_json()["hyper"])
    header = {"env": config.env, "agent": config.agent, "hyper": hyper}
    header |= {"acting": json.dumps(dataclasses.asdict(config.acts))}
    write_safetensors(path or config.folder / FILE, weights, header)


def load_policy(folder: Path, path: Path | None = None) -> Policy:
    """Read what `save_policy` wrote, by default into the folder of its run.

    Raises:
        PolicyError: the policy is missing or cannot be read.
    """
    path = path or folder / FILE
    if not path.exists():
        raise PolicyError(f"{path} is not there: a run writes it when it has finished")
    try:
        check_safetensors(path)
        with safe_open(path, framework="pt") as file:
            header, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _policy(header, weights)
    except ERRORS as error:
        raise PolicyError(f"{path} is no policy of this version ({type(error).__name__}: {error})") from error


def _policy(header: Mapping[str, str], weights: Mapping[str, Tensor]) -> Policy:
    agent = agent_without_memory(header["agent"], parse_json(header["hyper"]), weights)
    acting = record_from_json(Acting, parse_json(header["acting"]))
    if len(header["env"]) > LONGEST_NAME:
        raise ValueError(f"its environment has a name of {len(header['env']):,} letters")
    require_alike(weights, agent.state_dict())
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinity")
    agent.load_state_dict(weights, assign=True)
    return Policy(agent, header["env"], acting)


def agent_without_memory(name: str, hyper: Any, weights: Mapping[str, Tensor]) -> Agent:
    """The agent that a file claims to have the weights of, on the meta device.

    The file decides how large the agent is, and may lie: compare its tensors (`require_alike`) before assigning them.

    Args:
        name: the agent's, as for ``--agent``.
        hyper: its hyper-parameters, from JSON.
        weights: the tensors in the file; no more layers are made than there are of them.

    Raises:
        KeyError, IndexError, TypeError, ValueError, RuntimeError: they do not fit each other.
    """
    kind, observation = AGENTS[name], tuple(weights["obs_mean"].shape)
    config = record_from_json(kind.hyperparameters, hyper)
    if len(config.actor_hidden) + len(config.critic_hidden) > len(weights):
        raise ValueError("its networks have more layers than there are weights")
    if (observation[-1] % config.frame_stack) if config.encoder != "none" else config.frame_stack > 1:
        raise ValueError(f"it stacks {config.frame_stack} frames in observations of shape {observation}")
    obs_dim = observation[0] if config.encoder == "none" else FEATURES
    with torch.device("meta"):
        return kind(config, observation, weights["critic.weights.0"].shape[1] - obs_dim)
