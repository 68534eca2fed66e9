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
from fdkernels.policy.network import KINDS, FlowPolicy, check_float32
from fdkernels.policy.player import Policy, rule_with_settings
from fdkernels.policy.untrusted import check_header, check_safetensors, parse_json, require_alike
from fdkernels.policy.whole import write_whole
from fdkernels.validation import brief

LONGEST_NAME = 200
_OLD_SETTINGS = "hyper"
"""Where files of older layouts have the settings of the networks, among those of training."""
_OLD_KINDS = {"fidec": "displacement", "deflow": "displacement", "fql": "one-step"}
"""The oldest files name the agent, not what its actor does."""
_OLD_WEIGHTS = ("target_critic.", "encoders.target_critic.", "log_alpha")
"""How the names of weights in them begin that only training needs."""
_REFUSALS = (KeyError, IndexError, TypeError, ValueError, OverflowError, RuntimeError)
"""Raised in making a policy of a header and weights that are no policy's."""
Settings = TypeVar("Settings", PolicyConfig, Acting)


class PolicyError(RuntimeError):
    """The policy's file is missing, cannot be read, or is no policy."""


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
        PolicyError: the file is missing, cannot be read, is no policy, or has settings that this version does not know.
        TypeError, ValueError: an argument has the wrong type or value, or the policy cannot act in this way.
        ImportError: safetensors is not installed.
    """
    safetensors = _safetensors("load_policy")
    path = Path(path)
    try:
        check_safetensors(path)
        with safetensors.safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if not name.startswith(_OLD_WEIGHTS)]  # noqa: SIM118
            header, weights = file.metadata() or {}, {name: file.get_tensor(name) for name in names}
        policy = _policy(header, weights)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PolicyError(f"{path} is not there (a run writes its policy when it has finished)") from error
    except OSError as error:
        raise PolicyError(f"{path} cannot be read: {error.strerror or error}") from error
    except (safetensors.SafetensorError, *_REFUSALS) as error:
        raise PolicyError(f"{path} is no policy of this version ({type(error).__name__}: {error})") from error
    return Policy(policy.network.to(device), rule_with_settings(acting, policy.acting), seed=seed, env=policy.env)


def save_policy(policy: Policy, path: str | os.PathLike[str], notes: Mapping[str, str] | None = None) -> None:
    """Write a policy with its acting rule and environment, for `load_policy`. The seed is not written.

    The file is written whole or not at all; one that `load_policy` would refuse is not. A process that is killed may
    leave ``.policy-*.partial`` in the folder.

    Args:
        policy: the policy.
        path: the file; one that is there is replaced.
        notes: further entries of the file's header.

    Raises:
        TypeError: a note, or the environment's name, is not a string.
        ValueError: the networks are not float32, `load_policy` would refuse them for another reason, a note has the
            name of one of the file's own entries, or the path is no regular file.
        OSError: the file cannot be written.
        ImportError: safetensors is not installed.
    """
    write_whole(Path(path), policy_bytes(policy.network, policy.acting, policy.env, notes or {}))


def policy_bytes(network: FlowPolicy, acting: Acting, env: str, notes: Mapping[str, str]) -> bytes:
    """The content of a policy's file. Raises what `save_policy` does, except for the path."""
    check_float32("save_policy", network)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in network.acting_weights().items()}
    header = {"env": env, "actor": network.actor_kind}
    header |= {"networks": _json(PolicyConfig, network.config), "acting": _json(Acting, acting)}
    if taken := sorted(header.keys() & notes.keys()):
        raise ValueError(f"save_policy: notes must not have {taken[0]!r}, which is an entry of the file's own")
    header = {**notes, **header}
    for name, text in header.items():
        if not (isinstance(name, str) and isinstance(text, str)):
            raise TypeError(f"save_policy: env and notes must be strings, got {brief({name: text})}")
    content: bytes = _safetensors("save_policy").torch.save(weights, metadata=header)
    try:
        check_header(content[:8], len(content))
        _policy(header, weights)
    except _REFUSALS as error:
        raise ValueError(
            f"save_policy: load_policy would refuse this policy ({type(error).__name__}: {error})"
        ) from error
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
    obs_dim = observation[0] if config.encoder == "none" else FEATURES
    return observation, weights["critic.weights.0"].shape[1] - obs_dim


def _policy(header: Mapping[str, str], weights: Mapping[str, Tensor]) -> Policy:
    """The policy of which a file has this header and these weights, on the CPU.

    Raises:
        One of `_REFUSALS`: there is none.
    """
    if len(header["env"]) > LONGEST_NAME:
        raise ValueError(f"its environment has a name of {len(header['env']):,} letters, more than {LONGEST_NAME}")
    acting = _settings(Acting, "acting", header)
    return Policy(_network(header, weights), acting, env=header["env"])


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
    chosen: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in found.items() if key in known
    }
    return kind(**chosen)


def _safetensors(op: str) -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(f"{op} needs safetensors: pip install safetensors") from error
    return safetensors
