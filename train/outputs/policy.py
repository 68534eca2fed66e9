"""policy.safetensors: the weights of a finished run, and the settings needed to act with them."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from train.acting import Acting
from train.agents import AGENTS
from train.agents.base import Agent
from train.agents.encoder import FEATURES
from train.outputs.files import write_safetensors
from train.settings import RunConfig

FILE = "policy.safetensors"


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
        with safe_open(path, framework="pt") as file:
            header, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        hyper = json.loads(header["hyper"])
        hyper |= {name: tuple(value) for name, value in hyper.items() if isinstance(value, list)}
        kind, observation = AGENTS[header["agent"]], tuple(weights["obs_mean"].shape)
        config = kind.hyperparameters(**hyper)
        obs_dim = observation[0] if config.encoder == "none" else FEATURES
        agent = kind(config, observation, weights["critic.weights.0"].shape[1] - obs_dim)
        agent.load_state_dict(weights)
        return Policy(agent, header["env"], Acting(**json.loads(header["acting"])))
    except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        raise PolicyError(f"{path} is no policy of this version ({type(error).__name__}: {error})") from error
