"""policy.safetensors: the weights of a policy, and the settings needed to act with them.

A file may be a stranger's. Nothing in it is executed, and nothing is larger than the file.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fdkernels.policy.acting import Acting, RuleName
from fdkernels.policy.config import PolicyConfig
from fdkernels.policy.encoder import FEATURES
from fdkernels.policy.network import KINDS, FlowPolicy
from fdkernels.policy.player import Policy, rule_with_settings
from fdkernels.policy.reading import check_safetensors, parse_json, require_alike
from fdkernels.validation import brief

LONGEST_NAME = 200
_OLD_SETTINGS = "hyper"
"""Where files of older layouts have the settings of the networks, among those of training."""
_OLD_KINDS = {"fidec": "displacement", "deflow": "displacement", "fql": "one-step"}
"""The oldest files name the agent, not what its actor does."""
_OLD_WEIGHTS = ("target_critic.", "encoders.target_critic.", "log_alpha")
"""How the names of weights in them begin that only training needs."""
Settings = TypeVar("Settings", PolicyConfig, Acting)


class PolicyError(RuntimeError):
    """The policy is missing or cannot be read."""


def load_policy(
    path: str | os.PathLike[str],
    device: str | torch.device = "cpu",
    acting: Acting | RuleName | None = None,
    seed: int = 0,
) -> Policy:
    """Read the policy.safetensors of a run, or what `save_policy` wrote.

    Args:
        path: the file.
        device: where the policy computes.
        acting: how it acts: an `Acting`, or the name of a rule, which gets the file's settings. None: as the file
            says, which is how the run was judged.
        seed: of the policy's noise.

    Returns:
        The policy: call it with an observation.

    Raises:
        PolicyError: the file is missing, is no policy, or has settings that this version does not know.
        TypeError, ValueError: an argument has the wrong type or value, or the policy cannot act in this way.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors("load_policy")
    path = Path(path)
    if not path.exists():
        raise PolicyError(f"{path} is not there: a run writes it when it has finished")
    # raised by what makes a policy of a file that is none
    errors = (safetensors.SafetensorError, KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError)
    try:
        check_safetensors(path)
        with safetensors.safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.startswith(_OLD_WEIGHTS)]  # noqa: SIM118
            header, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in names}
        if len(header["env"]) > LONGEST_NAME:
            raise ValueError(f"its environment has a name of {len(header['env']):,} letters")
        judged_by = _settings(Acting, "acting", header)
        policy = Policy(_network(header, weights), judged_by, env=header["env"])
    except errors as error:
        raise PolicyError(f"{path} is no policy of this version ({type(error).__name__}: {error})") from error
    return Policy(policy.network.to(device), rule_with_settings(acting, judged_by), seed=seed, env=policy.env)


def save_policy(policy: Policy, path: str | os.PathLike[str], notes: Mapping[str, str] | None = None) -> None:
    """Write a policy with its acting rule and environment, for `load_policy`. The seed is not written.

    Args:
        policy: the policy.
        path: the file; one that is there is overwritten.
        notes: further entries of the file's header.

    Raises:
        ValueError: the networks are not float32.
        ImportError: safetensors is not installed.
    """
    if policy.network.obs_mean.dtype != torch.float32:
        raise ValueError(f"save_policy: policy must be in float32, got {policy.network.obs_mean.dtype}")
    Path(path).write_bytes(policy_bytes(policy.network, policy.acting, policy.env, notes or {}))


def policy_bytes(network: FlowPolicy, acting: Acting, env: str, notes: Mapping[str, str]) -> bytes:
    """The content of a policy's file."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.acting_weights().items()}
    header = {"env": env, "actor": network.actor_kind}
    header |= {"networks": _json(PolicyConfig, network.config), "acting": _json(Acting, acting)}
    content: bytes = _safetensors("save_policy").torch.save(weights, metadata={**notes, **header})
    return content


def sizes_in(weights: Mapping[str, Tensor], config: PolicyConfig) -> tuple[tuple[int, ...], int]:
    """The shape of the observations, and the width of the actions, of the policy that has these weights.

    The weights may lie, so make its networks without memory, and compare (`require_alike`).

    Raises:
        KeyError, IndexError, ValueError: the weights do not fit the settings.
    """
    observation = tuple(weights["obs_mean"].shape)
    if len(config.actor_hidden) + len(config.critic_hidden) > len(weights):
        raise ValueError("its networks have more layers than there are weights")
    if (observation[-1] % config.frame_stack) if config.encoder != "none" else config.frame_stack > 1:
        raise ValueError(f"it stacks {config.frame_stack} frames in observations of shape {observation}")
    obs_dim = observation[0] if config.encoder == "none" else FEATURES
    return observation, weights["critic.weights.0"].shape[1] - obs_dim


def _network(header: Mapping[str, str], weights: Mapping[str, Tensor]) -> FlowPolicy:
    kind = KINDS[header["actor"] if "actor" in header else _OLD_KINDS[header["agent"]]]
    name = "networks" if "networks" in header else _OLD_SETTINGS
    config = _settings(PolicyConfig, name, header)
    observation, action_dim = sizes_in(weights, config)
    with torch.device("meta"):
        network = kind(config, observation, action_dim)
    require_alike(weights, network.state_dict())
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} has NaN or infinity")
    # copied, because they may lie in the file itself, which somebody may write to
    network.load_state_dict({name: tensor.clone() for name, tensor in weights.items()}, assign=True)
    return network.requires_grad_(False)


def _json(kind: type[PolicyConfig] | type[Acting], settings: PolicyConfig | Acting) -> str:
    """The settings of that kind; an agent's configuration has others besides, which acting does not take."""
    chosen = {field.name: getattr(settings, field.name) for field in dataclasses.fields(kind)}
    return json.dumps(chosen, default=operator.methodcaller("item"))  # of NumPy's numbers


def _settings(kind: type[Settings], name: str, header: Mapping[str, str]) -> Settings:
    """The settings in an entry of the header. What is not in the file has its default.

    Raises:
        TypeError, ValueError: the entry is no settings, or has some that this version does not know, which may change
            what the policy computes. Older layouts have those of training, which do not.
    """
    found = parse_json(header[name])
    if not isinstance(found, dict):
        raise TypeError(f"{name} is a {type(found).__name__}")
    known = {field.name for field in dataclasses.fields(kind)}
    if name != _OLD_SETTINGS and (unknown := sorted(found.keys() - known)):
        raise ValueError(f"{name} has settings that this version does not know: {brief(unknown)}")
    chosen = {key: tuple(value) if isinstance(value, list) else value for key, value in found.items() if key in known}
    return kind(**chosen)


def _safetensors(op: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{op} needs safetensors: pip install safetensors, or fdkernels[policy]") from error
    return safetensors
