"""Replay a recorded case of the published JAX agents with ours, and list the differences.

A case holds parameters, batches, all random arrays, and the published code's results: losses, logged values,
intermediate tensors, gradients, parameters after one update and after all, and actions. Arrays under ``x64/`` come from
a float64 run, the others from float32.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

import fdkernels_ref
from fdkernels.policy import acting
from train.agents import AGENTS
from train.agents.base import Agent, Draws, Parts
from train.agents.decorator import DecoratorAgent
from train.agents.fidec import FiDec
from train.agents.hyperparameters import AgentConfig
from train.capture import PLAIN_UPDATES, CapturedUpdate
from train.data.transitions import Batch

Arrays = Mapping[str, np.ndarray]
Made: TypeAlias = tuple[dict[str, Tensor], dict[str, Tensor]]  # intermediate tensors and gradients of an update
CONVENTIONS = {"v_over_1mt": "velocity", "exact": "exact", None: "exact"}
# keys that only tell where a case comes from, or are inputs of the JAX generator
PROVENANCE = ("jax_keys", "config_json", "meta_json", "step0")
INPUTS = ("init/", "opt/", "batch/", "rand/", "eval/obs", "eval/noise", "eval/maxq_noise", "eval/iter_noise")


def agent_config(published: dict[str, Any]) -> AgentConfig:
    """Our hyper-parameters for a published configuration."""
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
    return AGENTS[published["agent_name"]].hyperparameters(**config)


def published_parameters(agent: Agent) -> Iterator[tuple[str, Tensor, Any]]:
    """Yields (published name, our parameter, function that views a tensor of its shape in the published layout)."""
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


Path = Literal["plain", "compiled", "captured"]


class Replay:
    """Our agent on a recorded case. `results` maps the case's keys to our numbers.

    ``path`` says how updates are made: plainly, with the losses traced whole by torch.compile, or replayed as CUDA
    graphs.
    """

    def __init__(
        self, case: Arrays, dtype: torch.dtype, path: Path = "plain", device: torch.device | str = "cpu"
    ) -> None:
        self.case, self.dtype, self.device = case, dtype, device
        published = json.loads(str(case["config_json"]))
        obs_dim, action_dim = case["batch/observations"].shape[-1], case["batch/actions"].shape[-1]
        self.agent = AGENTS[published["agent_name"]](agent_config(published), obs_dim, action_dim).to(device, dtype)
        self.optimizer = self.agent.make_optimizer()
        self._load()
        self.num_updates = len(case["batch/rewards"])
        # the tensors that every update reads; copies, because they are overwritten
        self.batch = Batch(*(column if column is None else column.clone() for column in self._batch(0)))
        self.draws = Draws(*(array if array is None else array.clone() for array in self._draws(0)))
        self.update: Callable[[Parts, bool], Made] = self._make_update
        if path == "compiled":
            torch.compiler.reset()
            self.agent.compile(fullgraph=True, backend="aot_eager")  # inductor would take a minute more per case
        if path == "captured":
            self.update = CapturedUpdate(self._make_update, ())
            self._record_graphs()
        self.results: dict[str, Tensor] = {}
        self._act()
        infos = [self._update(i) for i in range(self.num_updates)]
        for name in infos[0]:
            self.results[f"info/{name}"] = torch.stack([info[name] for info in infos])
        if self.num_updates > 1:
            self._record("afterN")

    def tensor(self, key: str) -> Tensor:
        return torch.from_numpy(np.asarray(self.case[key])).to(self.device, self.dtype)

    @torch.no_grad()
    def _load(self) -> None:
        names = set()
        for name, parameter, view in published_parameters(self.agent):
            names.add(f"init/{name}")
            view(parameter).copy_(self.tensor(f"init/{name}"))
            if "opt/count" in self.case and "target" not in name:
                state = self.optimizer.state[parameter]
                state["step"].fill_(float(self.case["opt/count"]))
                for ours, theirs in (("exp_avg", "mu"), ("exp_avg_sq", "nu")):
                    view(state[ours]).copy_(self.tensor(f"opt/{theirs}/{name}"))
        assert names == {key for key in self.case if key.startswith("init/")}, "a recorded parameter has no counterpart"

    def _make_update(self, parts: Parts, log: bool) -> Made:
        """Make one update; returns its intermediate tensors and gradients."""
        agent = self.agent
        seen = agent.backward(self.batch, self.draws, parts, log=log)
        gradients = {
            name: view(torch.zeros_like(p) if p.grad is None else p.grad).clone()
            for name, p, view in published_parameters(agent)
        }
        agent.step(self.optimizer)
        return seen, gradients

    def _parts(self, i: int) -> Parts:
        return self.agent.agent_parts(int(self.case["step0"]) - 1 + i)

    @torch.no_grad()
    def _record_graphs(self) -> None:
        """Make enough updates to record every graph, then restore the initial state."""
        for parts in {self._parts(i) for i in range(self.num_updates)}:
            for _ in range(PLAIN_UPDATES + 1):
                with torch.enable_grad():
                    self.update(parts, True)
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        self._load()

    def _record(self, prefix: str) -> None:
        for name, parameter, view in published_parameters(self.agent):
            self.results[f"{prefix}/{name}"] = view(parameter.detach()).clone()

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
                del arrays["fisher_t"]  # the record is float32; the constant itself is exact
        return Draws(**arrays)

    def _update(self, i: int) -> dict[str, Tensor]:
        agent = self.agent
        for ours, recorded in zip((*self.batch, *self.draws), (*self._batch(i), *self._draws(i))):
            if ours is not None and recorded is not None:
                ours.copy_(recorded)
        mse_actions = agent.act(self.batch.observations, self.tensor("rand/mse_noise")[i])
        samples = self._fisher_samples() if i == 0 and isinstance(agent, FiDec) else {}
        seen, gradients = self.update(self._parts(i), True)
        if i == 0:
            self.results["total_loss"] = seen["total_loss"].clone()
            self.results |= {f"grad/{name}": gradient.clone() for name, gradient in gradients.items()}
            intermediates = self._intermediates(seen, mse_actions) | samples
            self.results |= {f"mid/{name}": tensor.clone() for name, tensor in intermediates.items()}
            self._record("after1")
        return {name: figure.clone() for name, figure in self._info(self.batch, seen, mse_actions, gradients).items()}

    def _info(
        self,
        batch: Batch,
        seen: dict[str, Tensor],
        mse_actions: Tensor,
        gradients: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        config = self.agent.config
        flow_loss = seen.get("flow_loss", torch.zeros_like(seen["total_loss"]))  # absent once the flow is frozen
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
            constant = torch.full_like(seen["total_loss"], config.alpha)
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

    def _intermediates(self, seen: dict[str, Tensor], mse_actions: Tensor) -> dict[str, Tensor]:
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
            config = self.agent.config
            fisher = fdkernels_ref.fisher_matrix(seen["score"], damping=config.fisher_damping)
            mid |= {
                "score": seen["score"].flatten(0, 1),
                "fisher": fisher,
                "trace_per_dim": fisher.diagonal(dim1=-2, dim2=-1).mean(-1),
                "fisher_normalized": fdkernels_ref.normalize_fisher(fisher, eps=config.fisher_trace_eps),
                "quad": seen["row_penalty"] * self.agent.action_dim,
            }
        return mid

    def _fisher_samples(self) -> dict[str, Tensor]:
        """Tensors that the operator does not return, computed by the reference with the same network."""
        agent, config, draws = self.agent, self.agent.config, self.draws
        obs = self.batch.observations.unsqueeze(1).expand(-1, config.num_fisher_samples, -1)
        assert draws.fisher_noise is not None
        assert draws.bridge_noise is not None
        t = torch.tensor(config.fisher_t) if draws.fisher_t is None else draws.fisher_t
        t = t.to(obs).expand(*obs.shape[:-1], 1)
        with torch.no_grad():
            sample = fdkernels_ref.integrate_flow(agent.flow, draws.fisher_noise, obs, num_steps=config.flow_steps)
            x_t = (1 - t) * draws.bridge_noise + t * sample
            v_t = agent.flow(x_t, t, obs)
        return {"sampled_actions": sample.flatten(0, 1), "x_t_fisher": x_t.flatten(0, 1), "v_t": v_t.flatten(0, 1)}

    def _act(self) -> None:
        agent = self.agent
        obs, noise = self.tensor("eval/obs"), self.tensor("eval/noise")
        self.results["eval/flow_action"] = agent.flow_action(obs, noise)
        self.results["eval/action"] = agent.act(obs, noise)
        if isinstance(agent, DecoratorAgent):
            for rule, name in ((acting.best_of_n, "maxq"), (acting.iterated, "iter")):
                noise = self.tensor(f"eval/{name}_noise").view(1, -1, agent.action_dim)
                self.results[f"eval/{name}_action"] = rule(agent, obs[:1], noise, 0.0)[0]


def mismatches(
    case: Arrays,
    results: Mapping[str, Tensor],
    dtype: torch.dtype,
    *,
    exact: Mapping[str, Tensor] | None = None,
    only: str | None = None,
    slack: float = 1.0,
) -> list[str]:
    """All recorded numbers of that precision that ours fail to match, and all recorded keys that ours lack.

    float64: to 1e-9 of the number or, where terms cancel, of 1e-3 times the largest number in its tensor. float32: see
    :func:`float32_problem`; ``exact`` are our results in float64, and ``slack`` multiplies the allowed error.
    """
    problems, compared = [], 0
    for key in case if only is None else (only,):
        recorded_in = torch.float64 if key.startswith("x64/") else torch.float32
        if key in PROVENANCE or key.startswith(INPUTS) or recorded_in != dtype:
            continue
        name = key.removeprefix("x64/")
        if name not in results:
            problems.append(f"{key}: not computed")
            continue
        ours, recorded = results[name].double().cpu(), torch.from_numpy(np.asarray(case[key])).double()
        if ours.shape != recorded.shape:
            problems.append(f"{key}: shape {tuple(ours.shape)}, recorded {tuple(recorded.shape)}")
            continue
        compared += 1
        if dtype == torch.float64:
            allowed = 1e-9 * recorded.abs().clamp(min=1e-3 * recorded.abs().max().clamp(min=1e-6).item())
            excess = ((ours - recorded).abs() / allowed).max().item()
            problem = "" if excess <= 1 else f"{excess:.3g} times the tolerance"
        elif name.startswith("after"):
            problem = weights_problem(case, name, ours, recorded, slack)
        else:
            assert exact is not None, "what float32 may be off is measured against float64"
            problem = float32_problem(name, ours, recorded, exact[name].double().cpu(), slack)
        if problem:
            problems.append(f"{key}: off by {(ours - recorded).abs().max():.3g}, {problem}")
    return problems if compared or problems else [f"the case holds nothing recorded in {dtype}"]


def float32_problem(name: str, ours: Tensor, recorded: Tensor, exact: Tensor, slack: float) -> str:
    """The problem if the recorded number is off by more than float32's error, or ours by more than twice that; else "".

    Means near zero are judged by the size of the numbers that they average, which is about 1.
    """
    numbers = recorded.numel() if name.startswith("info") or name == "total_loss" else 0
    if not (recorded - exact).abs().max() <= 1e-5 * max(exact.abs().max().item(), 1.0 if numbers else 0.0):
        return "the recorded number is another"
    size = max(exact.norm().item(), numbers**0.5)
    off, theirs = (ours - exact).norm().item(), (recorded - exact).norm().item()
    # theirs may be exact by chance, so a few roundings are allowed: an update is some twenty layers deep
    allowed = slack * max(2 * theirs, 16 * torch.finfo(torch.float32).eps * size)
    return "" if off <= allowed else f"{off:.3g} from float64, where the recorded one is {theirs:.3g} from it"


def weights_problem(case: Arrays, name: str, ours: Tensor, recorded: Tensor, slack: float) -> str:
    """The problem if weights differ by more than twice their float32 error, which the case records; else ""."""
    reference = json.loads(str(case["meta_json"]))["float32_vs_float64_reference"]
    section, _, parameter = name.partition("/")
    measured = reference["after1_max_abs"]
    if section == "afterN":
        measured = reference["afterN_max_abs_per_parameter"][parameter]
    allowed = slack * (2 * measured + torch.finfo(torch.float32).eps * recorded.abs().max().item())
    off = (ours - recorded).abs().max().item()
    return "" if off <= allowed else f"{off / allowed:.3g} times the tolerance"


def spoiled(case: Arrays, key: str, *, whole: bool = False) -> dict[str, np.ndarray]:
    """The case with the largest number in one array, or the ``whole`` array, changed by 0.1 %."""
    array = np.array(case[key])
    where = ... if whole else np.unravel_index(np.abs(array).argmax(), array.shape)
    array[where] *= 1.001
    return {**case, key: array}


def numeric_keys(case: Arrays, pattern: str) -> list[str]:
    """Matching keys whose arrays are not all zero, so that 0.1 % changes them."""
    return [key for key in case if re.match(pattern, key) and key not in PROVENANCE and np.abs(case[key]).max() > 0]
