"""Replay a recorded case of the published JAX agents with ours, and list what differs.

A case holds parameters, batches, every random array, and what the published code made of them: losses, logged values,
intermediate tensors, gradients, parameters after one update and after all, acting outputs. Arrays under ``x64/`` come
from a float64 run, the others from float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

import fdkernels_ref
from train.agents import AGENTS, Agent, DecoratorAgent, Draws, FiDec
from train.config import AgentConfig
from train.data import Batch

Arrays = Mapping[str, np.ndarray]
CONVENTIONS = {"v_over_1mt": "velocity", "exact": "exact", None: "exact"}
# what only says where a case comes from, or is an input of the JAX generator
PROVENANCE = ("jax_keys", "config_json", "meta_json", "step0")
INPUTS = ("init/", "opt/", "batch/", "rand/", "eval/obs", "eval/noise", "eval/maxq_noise", "eval/iter_noise")


def agent_config(published: dict[str, Any]) -> AgentConfig:
    """Our settings for a published configuration."""
    config: dict[str, Any] = {
        "actor_hidden": tuple(published["actor_hidden_dims"]),
        "critic_hidden": tuple(published["value_hidden_dims"]),
        "actor_layer_norm": published["actor_layer_norm"],
        "critic_layer_norm": published["layer_norm"],
        "lr": published["lr"],
        "grad_clip": published.get("grad_clip"),
        "discount": published["discount"],
        "tau": published["tau"],
        "q_aggregation": published["q_agg"],
        "normalize_q": published["normalize_q_loss"],
        "flow_steps": published["flow_steps"],
        "alpha": published["alpha"],
    }
    if published["agent_name"] != "fql":
        config |= {
            "lagrange": published["use_lagrange"],
            "target_divergence": published["target_divergence"],
            "freeze_flow_after": published["offline_steps"] if published["fix_bc_flow_online"] else None,
        }
    if published["agent_name"] == "fidec":
        config |= {
            "num_fisher_samples": published["num_fisher_samples"],
            "fisher_t": published["fisher_t"],
            "fisher_t_width": published["fisher_t_width"],
            "fisher_damping": published["fisher_damping"],
            "fisher_trace_eps": published["fisher_trace_eps"],
            "min_sigma": published["fisher_score_eps"],
            "score_convention": CONVENTIONS[published["score_convention"]],
        }
    return AgentConfig(**config)


def published_parameters(agent: Agent) -> Iterator[tuple[str, Tensor, Any]]:
    """(published name, our parameter, view of a tensor shaped like it in the published layout)."""
    actor = "modules_refine_onestep_flow" if isinstance(agent, DecoratorAgent) else "modules_actor_onestep_flow"
    for module, net in (("modules_actor_bc_flow", agent.flow.net), (actor, agent.actor)):
        linears = [m for m in net if isinstance(m, torch.nn.Linear)]
        norms = [m for m in net if isinstance(m, torch.nn.LayerNorm)]
        for i, linear in enumerate(linears):
            yield f"{module}/mlp/Dense_{i}/kernel", linear.weight, lambda w: w.T
            yield f"{module}/mlp/Dense_{i}/bias", linear.bias, lambda b: b
        for i, norm in enumerate(norms):
            yield f"{module}/mlp/LayerNorm_{i}/scale", norm.weight, lambda s: s
            yield f"{module}/mlp/LayerNorm_{i}/bias", norm.bias, lambda b: b
    for module, critic in (("modules_critic", agent.critic), ("modules_target_critic", agent.target_critic)):
        groups = {"Dense_{}/kernel": critic.weights, "Dense_{}/bias": critic.biases}
        groups |= {"LayerNorm_{}/scale": critic.scales, "LayerNorm_{}/bias": critic.shifts}
        for pattern, parameters in groups.items():
            view = (lambda w: w) if pattern.endswith("kernel") else (lambda b: b.squeeze(1))
            for i, parameter in enumerate(parameters):
                yield f"{module}/value_net/{pattern.format(i)}", parameter, view
    if isinstance(agent, DecoratorAgent) and agent.config.lagrange:
        yield "modules_log_alpha/value", agent.log_alpha, lambda a: a.view(1)


class Replay:
    """Our agent on a recorded case; `results` maps the case's keys to our numbers."""

    def __init__(self, case: Arrays, dtype: torch.dtype) -> None:
        self.case, self.dtype = case, dtype
        published = json.loads(str(case["config_json"]))
        obs_dim, action_dim = case["batch/observations"].shape[-1], case["batch/actions"].shape[-1]
        self.agent = AGENTS[published["agent_name"]](agent_config(published), obs_dim, action_dim).to(dtype)
        self.optimizer = self.agent.make_optimizer()
        self._load()
        self.num_updates = len(case["batch/rewards"])
        self.results: dict[str, Tensor] = {}
        self._act()
        infos = [self._update(i) for i in range(self.num_updates)]
        for name in infos[0]:
            self.results[f"info/{name}"] = torch.stack([info[name] for info in infos])
        if self.num_updates > 1:
            self._record("afterN")

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.case[key])).to(self.dtype)

    @torch.no_grad()
    def _load(self) -> None:
        names = set()
        for name, parameter, view in published_parameters(self.agent):
            names.add(f"init/{name}")
            view(parameter).copy_(self.tensor(f"init/{name}"))
            if "opt/count" in self.case and "target" not in name:
                state = self.optimizer.state[parameter]
                state["step"] = torch.tensor(float(self.case["opt/count"]))
                for ours, theirs in (("exp_avg", "mu"), ("exp_avg_sq", "nu")):
                    state[ours] = torch.zeros_like(parameter)
                    view(state[ours]).copy_(self.tensor(f"opt/{theirs}/{name}"))
        assert names == {key for key in self.case if key.startswith("init/")}, "a recorded parameter has no counterpart"
        self.agent.updates.fill_(int(self.case["step0"]) - 1)

    def _record(self, prefix: str, *, gradients: bool = False) -> None:
        for name, parameter, view in published_parameters(self.agent):
            tensor = parameter.grad if gradients else parameter.detach()
            self.results[f"{prefix}/{name}"] = view(torch.zeros_like(parameter) if tensor is None else tensor).clone()

    def _batch(self, i: int) -> Batch:
        names = ("observations", "actions", "rewards", "next_observations", "masks")
        return Batch(*(self.tensor(f"batch/{name}")[i] for name in names))

    def _draws(self, i: int) -> Draws:
        names = {"next_noise": "critic_noise", "flow_x0": "x_0", "flow_t": "t", "base_noise": "base_noise"}
        arrays = {ours: self.tensor(f"rand/{theirs}")[i] for ours, theirs in names.items()}
        config = self.agent.config
        if isinstance(self.agent, FiDec):
            names = {"fisher_noise": "fisher_noise", "bridge_noise": "fisher_x0", "fisher_t": "t_fisher"}
            k = config.num_fisher_samples
            arrays |= {n: self.tensor(f"rand/{key}")[i].unflatten(0, (-1, k)) for n, key in names.items()}
            if config.fisher_t_width == 0 and self.dtype == torch.float64:
                del arrays["fisher_t"]  # recorded in float32; the constant itself is exact
        return Draws(**arrays)

    def _update(self, i: int) -> dict[str, Tensor]:
        agent, batch = self.agent, self._batch(i)
        mse_actions = agent.act(batch.observations, self.tensor("rand/mse_noise")[i])
        flow_is_trained = agent.config.freeze_flow_after is None or agent.updates < agent.config.freeze_flow_after
        seen = agent.backward(batch, self._draws(i))
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p, _ in published_parameters(agent)}
        info = self._info(batch, seen, mse_actions, gradients, flow_is_trained)
        if i == 0:
            self.results["total_loss"] = seen["total_loss"]
            self._record("grad", gradients=True)
            self._intermediates(seen, mse_actions)
        agent.step(self.optimizer)
        if i == 0:
            self._record("after1")
        return info

    def _info(
        self,
        batch: Batch,
        seen: dict[str, Tensor],
        mse_actions: Tensor,
        gradients: dict[str, Tensor],
        flow_is_trained: bool,
    ) -> dict[str, Tensor]:
        config = self.agent.config
        flow_loss = seen["flow_loss"] if flow_is_trained else torch.zeros((), dtype=self.dtype)
        global_norm = torch.stack([g.square().sum() for g in gradients.values()]).sum().sqrt()
        info = {
            "critic/critic_loss": seen["critic_loss"],
            "critic/q_mean": seen["critic_q"].mean(),
            "critic/q_max": seen["critic_q"].max(),
            "critic/q_min": seen["critic_q"].min(),
            "actor/actor_loss": seen["actor_loss"] + flow_loss,
            "actor/bc_flow_loss": flow_loss,
            "actor/distill_loss": seen["penalty"],
            "actor/q_loss": seen["q_loss"],
            "actor/q": seen["policy_q"].mean(),
            "actor/mse": (mse_actions - batch.actions).square().mean(),
            "grad/max": torch.stack([g.max() for g in gradients.values()]).max(),
            "grad/min": torch.stack([g.min() for g in gradients.values()]).min(),
            "grad/norm": torch.stack([g.norm() for g in gradients.values()]).sum(),
        }
        if config.grad_clip is not None:
            scale = (config.grad_clip / (global_norm + 1e-6)).clamp(max=1)
            info |= {"grad/clip_scale": scale, "grad/norm_clipped": scale * global_norm}
        if isinstance(self.agent, DecoratorAgent):
            constant = torch.tensor(config.alpha, dtype=self.dtype)
            info["actor/alpha_value"] = seen.get("alpha", constant)
            info["actor/alpha_loss"] = seen.get("multiplier_loss", torch.zeros_like(constant))
        if isinstance(self.agent, FiDec):
            fisher = fdkernels_ref.fisher_matrix(seen["score"], damping=config.fisher_damping)
            normalized = fdkernels_ref.normalize_fisher(fisher, eps=config.fisher_trace_eps)
            info["actor/fisher_diag_mean"] = normalized.diagonal(dim1=-2, dim2=-1).mean()
            info["actor/fisher_quad_mean"] = (seen["row_penalty"] * self.agent.action_dim).mean()
            info["actor/fisher_trace_per_dim_mean"] = fisher.diagonal(dim1=-2, dim2=-1).mean()
            info["actor/refinement_mse"] = seen["displacement"].square().mean()
        return info

    def _intermediates(self, seen: dict[str, Tensor], mse_actions: Tensor) -> None:
        ours = {
            "next_actions": "next_actions",
            "next_qs": "next_qs",
            "target_q": "target_q",
            "critic_q": "critic_q",
            "x_t": "x_t",
            "vel": "velocity",
            "pred": "predicted_velocity",
            "actor_actions": "policy_actions",
            "actor_qs": "policy_q",
        }
        if isinstance(self.agent, DecoratorAgent):
            ours |= {"base_actions": "base_actions", "refinement": "displacement"}
        else:
            ours |= {"target_flow_actions": "base_actions"}
        mid = {theirs: seen[name] for theirs, name in ours.items()} | {"mse_actions": mse_actions}
        if isinstance(self.agent, FiDec):
            mid |= self._fisher_intermediates(seen)
        self.results |= {f"mid/{name}": tensor for name, tensor in mid.items()}

    def _fisher_intermediates(self, seen: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the operator does not hand out, along the reference's road with the same network."""
        agent, config, draws = self.agent, self.agent.config, self._draws(0)
        obs = self._batch(0).observations.unsqueeze(1).expand(-1, config.num_fisher_samples, -1)
        assert draws.fisher_noise is not None
        assert draws.bridge_noise is not None
        t = torch.tensor(config.fisher_t) if draws.fisher_t is None else draws.fisher_t
        t = t.to(self.dtype).expand(*obs.shape[:-1], 1)
        with torch.no_grad():
            sample = fdkernels_ref.integrate_flow(agent.flow, draws.fisher_noise, obs, num_steps=config.flow_steps)
            x_t = (1 - t) * draws.bridge_noise + t * sample
            v_t = agent.flow(x_t, t, obs)
        fisher = fdkernels_ref.fisher_matrix(seen["score"], damping=config.fisher_damping)
        return {
            "sampled_actions": sample.flatten(0, 1),
            "x_t_fisher": x_t.flatten(0, 1),
            "v_t": v_t.flatten(0, 1),
            "score": seen["score"].flatten(0, 1),
            "fisher": fisher,
            "trace_per_dim": fisher.diagonal(dim1=-2, dim2=-1).mean(-1),
            "fisher_normalized": fdkernels_ref.normalize_fisher(fisher, eps=config.fisher_trace_eps),
            "quad": seen["row_penalty"] * agent.action_dim,
        }

    def _act(self) -> None:
        agent = self.agent
        obs, noise = self.tensor("eval/obs"), self.tensor("eval/noise")
        self.results["eval/flow_action"] = agent.flow_action(obs, noise)
        self.results["eval/action"] = agent.act(obs, noise)
        if isinstance(agent, DecoratorAgent):
            best = agent.act_best_of(obs[:1], self.tensor("eval/maxq_noise")[None])
            self.results["eval/maxq_action"] = best[0]
            self.results["eval/iter_action"] = agent.act_iterated(obs[:1], self.tensor("eval/iter_noise")[None])[0]


def mismatches(
    case: Arrays, results: Mapping[str, Tensor], dtype: torch.dtype, *, only: str | None = None
) -> list[str]:
    """Every recorded number of that precision that ours miss, and every recorded key that ours lack."""
    problems, compared = [], 0
    for key in case if only is None else (only,):
        recorded_in = torch.float64 if key.startswith("x64/") else torch.float32
        if key in PROVENANCE or key.startswith(INPUTS) or recorded_in != dtype:
            continue
        name = key.removeprefix("x64/")
        if name not in results:
            problems.append(f"{key}: not computed")
            continue
        ours, recorded = results[name].double(), torch.from_numpy(np.asarray(case[key])).double()
        if ours.shape != recorded.shape:
            problems.append(f"{key}: shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)}")
            continue
        error = (ours - recorded).abs()
        compared += 1
        allowed = tolerance(case, name, recorded, dtype)
        if not (error <= allowed).all():
            excess = (error / allowed).nan_to_num().max()
            problems.append(f"{key}: off by {error.max():.3g}, {excess:.3g} times the tolerance")
    return problems if compared or problems else [f"the case holds nothing recorded in {dtype}"]


def tolerance(case: Arrays, name: str, recorded: Tensor, dtype: torch.dtype) -> Tensor:
    """How far each number may be off.

    float64: 1e-9 of the number or, where cancellation leaves nothing to hold on to, of the largest in its tensor
    times 1e-3. float32: two float32 runs differ by about twice what each differs from float64, which the case
    records for its parameters; the other factors are those that its authors measured on losses and gradients.
    """
    if dtype == torch.float64:
        return 1e-9 * recorded.abs().clamp(min=1e-3 * recorded.abs().max().clamp(min=1e-6).item())
    reference = json.loads(str(case["meta_json"]))["float32_vs_float64_reference"]
    section, _, parameter = name.partition("/")
    if section in ("after1", "afterN"):
        measured = reference["after1_max_abs"]
        if section == "afterN":
            measured = reference["afterN_max_abs_per_parameter"][parameter]
        resolution = torch.finfo(torch.float32).eps * recorded.abs().max().item()
        return torch.full_like(recorded, 2 * measured + resolution)
    scale = 1.0 if section in ("info", "total_loss") else recorded.abs().max().item()
    return 3e-6 * recorded.abs().clamp(min=scale)


def spoiled(case: Arrays, key: str, *, whole: bool = False) -> dict[str, np.ndarray]:
    """The case with the largest number of one array, or the ``whole`` array, off by 0.1 %."""
    array = np.array(case[key])
    where = ... if whole else np.unravel_index(np.abs(array).argmax(), array.shape)
    array[where] *= 1.001
    return {**case, key: array}


def numeric_keys(case: Arrays, pattern: str) -> list[str]:
    """Keys that match and hold something that 0.1 % can change."""
    return [key for key in case if re.match(pattern, key) and key not in PROVENANCE and np.abs(case[key]).max() > 0]
