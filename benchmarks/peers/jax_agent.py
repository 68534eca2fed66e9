"""FiDec, DeFlow and FQL in JAX, flax and optax, written like the published agents: one jitted update.

Written for these benchmarks to behave like the published code. Like that code it computes everything it logs inside the
update: statistics of all gradients, and a second sample of the policy for the logged action error. So B·(31 + 11K) rows
go through the flow's network, where FiDec needs B·(21 + 11K). The replay buffer is NumPy's, indexed on the host.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs room on the same GPU

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from train.agents.hyperparameters import AgentConfig

Arrays = dict[str, Any]


class MLP(nn.Module):
    hidden: Sequence[int]
    outputs: int
    layer_norm: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in self.hidden:
            x = nn.gelu(nn.Dense(width)(x))
            if self.layer_norm:
                x = nn.LayerNorm()(x)
        return nn.Dense(self.outputs)(x)


class State(NamedTuple):
    params: Arrays
    optimizer: Any
    rng: jax.Array


class JaxAgent:
    """``name`` is fidec, deflow or fql; ``parameters`` are those of an `EagerAgent` as NumPy arrays."""

    def __init__(
        self, name: str, config: AgentConfig, action_dim: int, parameters: Mapping[str, np.ndarray], seed: int = 0
    ) -> None:
        self.name, self.config, self.action_dim = name, config, action_dim
        self.net = MLP(config.actor_hidden, action_dim, config.actor_layer_norm)
        ensemble = nn.vmap(
            MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=None, out_axes=0, axis_size=2
        )
        self.critic = ensemble(config.critic_hidden, 1, config.critic_layer_norm)
        self.adam = optax.adam(config.lr)
        params = jax.tree.map(jnp.asarray, from_torch(parameters))
        self.state = State(params, self.adam.init(params), jax.random.PRNGKey(seed))

    # -- one update ------------------------------------------------------------------------------------------------

    def update(self, batch: Arrays) -> Arrays:
        """Make one update: draws, losses, gradients, Adam, target network. Returns what is logged."""
        self.state, info = self._update(self.state, batch)
        return info

    def update_with(self, batch: Arrays, draws: Arrays) -> Arrays:
        """Make one update from given random numbers."""
        self.state, info = self._update_with(self.state, batch, draws)
        return info

    @partial(jax.jit, static_argnums=0)
    def _update(self, state: State, batch: Arrays) -> tuple[State, Arrays]:
        rng, key = jax.random.split(state.rng)
        return self._update_with(state._replace(rng=rng), batch, self.draw(key, len(batch["rewards"])))

    @partial(jax.jit, static_argnums=0)
    def _update_with(self, state: State, batch: Arrays, draws: Arrays) -> tuple[State, Arrays]:
        config = self.config
        (_, info), grads = jax.value_and_grad(self.total_loss, has_aux=True)(state.params, state.params, batch, draws)
        leaves = jax.tree.leaves(grads)
        info |= {
            "grad/max": jnp.stack([g.max() for g in leaves]).max(),
            "grad/min": jnp.stack([g.min() for g in leaves]).min(),
            "grad/norm": jnp.stack([jnp.linalg.norm(g.reshape(-1)) for g in leaves]).sum(),
        }
        if config.grad_clip is not None:
            scale = jnp.minimum(1.0, config.grad_clip / (optax.global_norm(grads) + 1e-6))
            grads = jax.tree.map(lambda g: g * scale, grads)
            info |= {"grad/clip_scale": scale, "grad/norm_clipped": optax.global_norm(grads)}
        updates, optimizer = self.adam.update(grads, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        params["target_critics"] = jax.tree.map(  # both as they were before the step
            lambda p, tp: config.tau * p + (1 - config.tau) * tp,
            state.params["critics"],
            state.params["target_critics"],
        )
        return State(params, optimizer, state.rng), info

    def draw(self, key: jax.Array, batch: int) -> Arrays:
        keys = iter(jax.random.split(key, 7))
        d, draws = self.action_dim, {}
        for name in ("next_noise", "flow_x0", "base_noise", "mse_noise"):
            draws[name] = jax.random.normal(next(keys), (batch, d))
        draws["flow_t"] = jax.random.uniform(next(keys), (batch, 1))
        if self.name == "fidec":
            for name in ("fisher_noise", "bridge_noise"):
                draws[name] = jax.random.normal(next(keys), (batch, self.config.num_fisher_samples, d))
        return draws

    # -- the losses: ``grad`` are the parameters to differentiate by, ``kept`` the same as constants -------------------

    def total_loss(self, grad: Arrays, kept: Arrays, batch: Arrays, draws: Arrays) -> tuple[jax.Array, Arrays]:
        critic, critic_info = self.critic_loss(grad, kept, batch, draws)
        actor, actor_info = self.actor_loss(grad, kept, batch, draws)
        return critic + actor, critic_info | actor_info

    def critic_loss(self, grad: Arrays, kept: Arrays, batch: Arrays, draws: Arrays) -> tuple[jax.Array, Arrays]:
        next_actions = self.act(kept, batch["next_observations"], draws["next_noise"])
        next_qs = self.q(kept["target_critics"], batch["next_observations"], next_actions)
        next_q = next_qs.min(0) if self.config.q_aggregation == "min" else next_qs.mean(0)
        target = batch["rewards"] + self.config.discount * batch["masks"] * next_q
        q = self.q(grad["critics"], batch["observations"], batch["actions"])
        loss = jnp.square(q - target).mean()
        return loss, {"critic_loss": loss, "q_mean": q.mean(), "q_max": q.max(), "q_min": q.min()}

    def actor_loss(self, grad: Arrays, kept: Arrays, batch: Arrays, draws: Arrays) -> tuple[jax.Array, Arrays]:
        config, obs, actions = self.config, batch["observations"], batch["actions"]
        t = draws["flow_t"]
        x_t = (1 - t) * draws["flow_x0"] + t * actions
        predicted = self.velocity(grad["flow"], obs, x_t, t)
        flow_loss = jnp.mean((predicted - (actions - draws["flow_x0"])) ** 2)

        base = jax.lax.stop_gradient(self.flow_action(kept, obs, draws["base_noise"]))
        if self.name == "fql":
            policy = self.net.apply({"params": grad["actor"]}, jnp.concatenate([obs, draws["base_noise"]], -1))
            penalty, info = jnp.mean((policy - base) ** 2), {}
        else:
            displacement = self.net.apply({"params": grad["actor"]}, jnp.concatenate([obs, base], -1))
            policy = base + displacement
            penalty, info = self.penalty(grad, kept, obs, displacement, draws)
        q = self.q(kept["critics"], obs, jnp.clip(policy, -1, 1)).mean(0)
        q_loss = -q.mean()
        if config.normalize_q:
            q_loss = q_loss * jax.lax.stop_gradient(1 / jnp.abs(q).mean())
        loss = flow_loss + q_loss
        if self.name == "fql":
            loss = loss + config.alpha * penalty
        else:
            log_alpha = grad["log_alpha"]
            gap = jax.lax.stop_gradient(penalty) - config.target_divergence
            loss = loss + jax.lax.stop_gradient(jnp.exp(log_alpha)) * penalty - log_alpha * gap
            info |= {"alpha": jnp.exp(log_alpha), "alpha_loss": -log_alpha * gap}
        sampled = self.act(kept, obs, draws["mse_noise"])
        return loss, info | {
            "actor_loss": loss,
            "flow_loss": flow_loss,
            "penalty": penalty,
            "q_loss": q_loss,
            "q": q.mean(),
            "mse": jnp.mean((sampled - actions) ** 2),
        }

    def penalty(
        self, grad: Arrays, kept: Arrays, obs: jax.Array, displacement: jax.Array, draws: Arrays
    ) -> tuple[jax.Array, Arrays]:
        if self.name == "deflow":
            return jnp.mean(displacement**2), {}
        config, (batch, num_samples, d) = self.config, draws["fisher_noise"].shape
        repeated = jnp.repeat(obs, num_samples, axis=0)
        samples = self.flow_action(kept, repeated, draws["fisher_noise"].reshape(-1, d))
        t = jnp.full((batch * num_samples, 1), config.fisher_t)
        x_t = (1 - t) * draws["bridge_noise"].reshape(-1, d) + t * jax.lax.stop_gradient(samples)
        v_t = jax.lax.stop_gradient(self.velocity(grad["flow"], repeated, x_t, t))
        numerator = v_t if config.score_convention == "velocity" else t * v_t - x_t
        score = numerator / jnp.maximum(1 - t, config.min_sigma)
        fisher = (score[:, :, None] * score[:, None, :]).reshape(batch, num_samples, d, d).mean(1)
        fisher = 0.5 * (fisher + jnp.swapaxes(fisher, -1, -2)) + config.fisher_damping * jnp.eye(d)
        trace = jax.lax.stop_gradient(jnp.maximum(jnp.trace(fisher, axis1=-2, axis2=-1) / d, config.fisher_trace_eps))
        fisher = fisher / trace[:, None, None]
        quadratic = jnp.einsum("bi,bij,bj->b", displacement, fisher, displacement)
        return jnp.mean(quadratic / d), {
            "fisher_quad_mean": jnp.mean(quadratic),
            "fisher_trace_per_dim_mean": trace.mean(),
            "fisher_diag_mean": jnp.diagonal(fisher, axis1=-2, axis2=-1).mean(),
            "refinement_mse": jnp.mean(displacement**2),
        }

    def q(self, params: Arrays, obs: jax.Array, actions: jax.Array) -> jax.Array:
        return self.critic.apply({"params": params}, jnp.concatenate([obs, actions], -1)).squeeze(-1)

    def velocity(self, params: Arrays, obs: jax.Array, x: jax.Array, t: jax.Array) -> jax.Array:
        return self.net.apply({"params": params}, jnp.concatenate([obs, x, t], -1))

    def flow_action(self, params: Arrays, obs: jax.Array, noise: jax.Array) -> jax.Array:
        actions, steps = noise, self.config.flow_steps
        for i in range(steps):
            t = jnp.full((*actions.shape[:-1], 1), i / steps)
            actions = actions + self.velocity(params["flow"], obs, actions, t) / steps
        return jnp.clip(actions, -1, 1)

    def act(self, params: Arrays, obs: jax.Array, noise: jax.Array) -> jax.Array:
        actions = noise if self.name == "fql" else self.flow_action(params, obs, noise)
        out = self.net.apply({"params": params["actor"]}, jnp.concatenate([obs, actions], -1))
        return jnp.clip(out if self.name == "fql" else actions + out, -1, 1)

    # -- for the gate ------------------------------------------------------------------------------------------------

    def outcome(self) -> dict[str, dict[str, np.ndarray]]:
        """Parameters and Adam's first moments, with `EagerAgent`'s names."""
        params = jax.device_get(self.state.params)
        moments = jax.device_get(self.state.optimizer[0].mu)
        return {"parameters": to_torch(params), "moments": to_torch(moments)}


def sample(columns: Mapping[str, np.ndarray], batch_size: int) -> dict[str, np.ndarray]:
    """Sample as the published replay buffer does: rows of NumPy arrays."""
    indices = np.random.randint(len(columns["rewards"]), size=batch_size)  # noqa: NPY002 (as it is written there)
    return {name: column[indices] for name, column in columns.items()}


def from_torch(parameters: Mapping[str, np.ndarray]) -> Arrays:
    """Convert `EagerAgent`'s parameters to flax's names and layout."""
    params: Arrays = {name: _tree(parameters, f"{name}.") for name in ("flow", "actor")}
    for name in ("critics", "target_critics"):
        both = [_tree(parameters, f"{name}.{which}.") for which in range(2)]
        params[name] = jax.tree.map(lambda *arrays: np.stack(arrays), *both)
    if "log_alpha" in parameters:
        params["log_alpha"] = parameters["log_alpha"]
    return params


def _tree(parameters: Mapping[str, np.ndarray], prefix: str) -> Arrays:
    numbers = sorted({int(name.removeprefix(prefix).split(".")[0]) for name in parameters if name.startswith(prefix)})
    tree: Arrays = {}
    for number in numbers:
        weight, bias = (parameters[f"{prefix}{number}.{kind}"] for kind in ("weight", "bias"))
        if weight.ndim == 2:
            tree[f"Dense_{sum(key.startswith('Dense') for key in tree)}"] = {"kernel": weight.T, "bias": bias}
        else:
            tree[f"LayerNorm_{sum(key.startswith('Layer') for key in tree)}"] = {"scale": weight, "bias": bias}
    return tree


def to_torch(params: Arrays) -> dict[str, np.ndarray]:
    """Convert back."""
    found: dict[str, np.ndarray] = {}
    trees = [("flow.", params["flow"]), ("actor.", params["actor"])]
    for name in ("critics", "target_critics"):
        trees += [(f"{name}.{i}.", jax.tree.map(lambda array: array[i], params[name])) for i in range(2)]  # noqa: B023
    for prefix, tree in trees:
        stride = 3 if "LayerNorm_0" in tree else 2  # linear, activation, layer norm
        for key, leaf in tree.items():
            kind, number = key.split("_")
            if kind == "Dense":
                found[f"{prefix}{stride * int(number)}.weight"] = leaf["kernel"].T
                found[f"{prefix}{stride * int(number)}.bias"] = leaf["bias"]
            else:
                found[f"{prefix}{stride * int(number) + 2}.weight"] = leaf["scale"]
                found[f"{prefix}{stride * int(number) + 2}.bias"] = leaf["bias"]
    if "log_alpha" in params:
        found["log_alpha"] = np.asarray(params["log_alpha"])
    return found
