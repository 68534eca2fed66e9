"""Velocity networks as people write them: d = 2 actions, c = 3 observations, times (..., 1) unless stated otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fdkernels

D, C = 2, 3


class ByHand(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1, self.l2, self.out = nn.Linear(C + D + 1, 16), nn.Linear(16, 12), nn.Linear(12, D)

    def forward(self, obs: Tensor, action: Tensor, time: Tensor) -> Tensor:
        h = torch.cat([obs, action, time], -1)
        assert obs.shape[-1] == C
        h = F.relu(self.l1(h))
        h = F.silu(self.l2(h))
        return self.out(h)


class Loop(nn.Module):
    """A ModuleList with norms, dropout, functions and methods; another order of inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(C + D + 1, 16), nn.Linear(16, 16), nn.Linear(16, 16)])
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16, eps=1e-3), nn.LayerNorm(16)])
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, D, bias=False)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        h = torch.concat((t, x.contiguous(), cond.reshape(cond.shape[0], -1)), dim=1)
        for i, (layer, norm) in enumerate(zip(self.layers, self.norms)):
            h = layer(h)
            if i == 0:
                h = F.gelu(norm(h), approximate="tanh")
            elif i == 1:
                h = F.layer_norm(h.tanh_(), (16,), norm.weight, norm.bias, norm.eps)
            else:
                h = F.layer_norm(F.gelu(h), [16])
            h = F.dropout(self.drop(h), 0.1, self.training)
        return self.head(h)


class FlatTimes(nn.Module):
    """Times are (B,)."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(C + D + 1, 16), nn.ReLU(inplace=True))
        self.heads = nn.ModuleDict({"velocity": nn.Linear(16, D)})

    def forward(self, actions: Tensor, timesteps: Tensor, state: Tensor) -> Tensor:
        if timesteps.ndim == 1:
            timesteps = timesteps[:, None]
        inputs = torch.cat([torch.cat([actions, timesteps.to(actions.dtype)], -1), state], -1)
        return self.heads["velocity"](self.trunk(inputs))


class StrictlyFlatTimes(FlatTimes):
    def forward(self, actions: Tensor, timesteps: Tensor, state: Tensor) -> Tensor:
        return self.heads["velocity"](self.trunk(torch.cat([actions, timesteps.unsqueeze(-1), state], -1)))


class Concat(nn.Sequential):
    """The way of TorchRL's MLP: any number of inputs are concatenated in the order given."""

    def forward(self, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat(inputs, -1) if len(inputs) > 1 else inputs[0])


class Ours(nn.Module):
    """Around a stack of this library, with a weight norm."""

    def __init__(self) -> None:
        super().__init__()
        self.net = fdkernels.build_mlp(D + C + 1, (16, 16), D, layer_norm=True)
        nn.utils.parametrizations.weight_norm(self.net[3])

    def forward(self, observation: Tensor, x: Tensor, t: Tensor) -> Tensor:
        lead = torch.broadcast_shapes(x.shape[:-1], observation.shape[:-1])
        return self.net(torch.cat([x, t.expand(*lead, 1), observation], dim=-1))


class Chunks(nn.Module):
    """Actions are chunks (B, 2, 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D + C + 1, 16), nn.GELU(), nn.Linear(16, D))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.net(torch.cat([x.flatten(1), cond, t.reshape(-1, 1)], -1)).view_as(x)


class Unconditional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D + 1, 16), nn.Tanh(), nn.Linear(16, D))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return self.net(torch.cat([x, t] if cond is None else [x, t, cond], -1))


class Swish(nn.Module):
    def forward(self, h: Tensor) -> Tensor:
        return torch.sigmoid(h) * h


class Reshaped(nn.Module):
    """The way of the examples of Meta's flow_matching library."""

    def __init__(self) -> None:
        super().__init__()
        self.main = nn.Sequential(nn.Linear(D + 1, 16), Swish(), nn.Linear(16, 16), Swish(), nn.Linear(16, D))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        size = x.size()
        x, t = x.reshape(-1, D), t.reshape(-1, 1).to(x.dtype)
        t = t.reshape(-1, 1).expand(x.shape[0], 1)
        return self.main(torch.cat([x, t], dim=1)).reshape(*size)


def _concat() -> Concat:
    return Concat(nn.Linear(C + D + 1, 16), nn.SiLU(), nn.Linear(16, D))


class Readable(NamedTuple):
    make: Callable[[], nn.Module]
    order: tuple[str, ...] | None
    """To be given to ``pack_mlp``."""
    call: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor]
    """Calls the module with x, t and cond."""
    read: tuple[str, ...]
    """The order of concatenation that must be found."""


READABLE = {
    "by hand": Readable(ByHand, None, lambda net, x, t, cond: net(cond, x, t), ("cond", "x", "t")),
    "loop": Readable(Loop, None, lambda net, x, t, cond: net(x, t, cond), ("t", "x", "cond")),
    "flat times": Readable(FlatTimes, None, lambda net, x, t, cond: net(x, t, cond), ("x", "t", "cond")),
    "strictly flat times": Readable(
        StrictlyFlatTimes, ("x", "t", "cond"), lambda net, x, t, cond: net(x, t.squeeze(-1), cond), ("x", "t", "cond")
    ),
    "any number": Readable(_concat, ("x", "cond", "t"), lambda net, x, t, cond: net(x, cond, t), ("x", "cond", "t")),
    "ours": Readable(Ours, None, lambda net, x, t, cond: net(cond, x, t), ("x", "t", "cond")),
    "reshaped": Readable(Reshaped, None, lambda net, x, t, cond: net(x, t), ("x", "t")),
    "chunks": Readable(
        Chunks, None, lambda net, x, t, cond: net(x.unflatten(-1, (2, 1)), t, cond).flatten(-2), ("x", "cond", "t")
    ),
    "unconditional": Readable(Unconditional, ("x", "t"), lambda net, x, t, cond: net(x, t), ("x", "t")),
}


# -- what is not an MLP. All are called as v(x, t, cond) ---------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + F.silu(self.inner(self.norm(h)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.head = (
            nn.Linear(D + 1 + C, 16),
            nn.Sequential(Block(16), Block(16)),
            nn.Linear(16, D),
        )

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(torch.cat([x, t, cond], -1))))


class SinusoidalTime(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.width = width

    def forward(self, t: Tensor) -> Tensor:
        frequencies = torch.exp(-math.log(1e4) * torch.arange(self.width // 2, device=t.device, dtype=t.dtype) / 4)
        return torch.cat([torch.sin(t * frequencies), torch.cos(t * frequencies)], -1)


class Sinusoidal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.time = SinusoidalTime()
        self.net = nn.Sequential(nn.Linear(D + 8 + C, 16), nn.SiLU(), nn.Linear(16, D))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.net(torch.cat([x, self.time(t), cond], -1))


class TimeLayers(nn.Module):
    """The time's own layers are added to the first layer's result."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(nn.Linear(1, 16), nn.SiLU(), nn.Linear(16, 16))
        self.stem, self.head = nn.Linear(D + C, 16), nn.Linear(16, D)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.head(torch.tanh(self.stem(torch.cat([x, cond], -1)) + self.time(t)))


class LearnedTime(nn.Module):
    """A table of embeddings, of which the time picks a row."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 8)
        self.net = nn.Sequential(nn.Linear(D + 8 + C, 16), nn.GELU(), nn.Linear(16, D))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        embedded = self.table((t.squeeze(-1) * 10).long().clamp(0, 9))
        return self.net(torch.cat([x, embedded, cond], -1))


class FiLM(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(C + 1, 2 * 16)
        self.stem, self.head = nn.Linear(D, 16), nn.Linear(16, D)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        scale, shift = self.modulation(torch.cat([cond, t], -1)).chunk(2, -1)
        return self.head(F.silu(self.stem(x) * (1 + scale) + shift))


class Transformer(nn.Module):
    """Each number of the action is a token, and so are the time and the condition."""

    def __init__(self) -> None:
        super().__init__()
        self.number, self.time, self.cond = nn.Linear(1, 8), nn.Linear(1, 8), nn.Linear(C, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        tokens = torch.cat(
            [self.number(x.unsqueeze(-1)), self.time(t).unsqueeze(-2), self.cond(cond).unsqueeze(-2)], -2
        )
        tokens = self.layer(tokens.flatten(0, -3)).unflatten(0, tokens.shape[:-2])
        return self.head(tokens[..., : x.shape[-1], :]).squeeze(-1)


class BatchNormed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(D + 1 + C, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, D))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.net(torch.cat([x, t, cond], -1))


class Squashed(Unconditional):
    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        return 1.5 * torch.tanh(super().forward(x, t))


class Gated(Unconditional):
    """Decides by the values of the time."""

    def forward(self, x: Tensor, t: Tensor, cond: Tensor | None = None) -> Tensor:
        out = super().forward(x, t)
        return out / 2 if t.max() > 0.5 else out


class Standardised(nn.Module):
    """Standardises the observation by buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.ones(C))
        self.net = nn.Sequential(nn.Linear(D + 1 + C, 16), nn.ReLU(), nn.Linear(16, D))

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.net(torch.cat([x, t, (cond - self.mean) / 2], -1))


class Dense(nn.Module):
    """Sees its inputs again in every layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(D + 1 + C, 16), nn.Linear(16 + C, D)

    def forward(self, x: Tensor, t: Tensor, cond: Tensor) -> Tensor:
        return self.second(torch.cat([F.relu(self.first(torch.cat([x, t, cond], -1))), cond], -1))


UNREADABLE: dict[str, tuple[type[nn.Module], str]] = {
    "residual": (Residual, r"a residual connection \(add in blocks.1, Block, at `return h \+ F.silu\("),
    "sinusoidal": (Sinusoidal, r"a sinusoidal embedding of t \(sin in time, SinusoidalTime, at `return torch.cat"),
    "time layers": (TimeLayers, r"layers of t alone \(linear in time"),
    "learned time": (LearnedTime, r"a learned embedding of t \(embedding in table, Embedding, at `embedded ="),
    "FiLM": (FiLM, r"a product of computed values, as in FiLM or gating, \(mul, at `return self.head\("),
    "transformer": (Transformer, r"nn.TransformerEncoderLayer in layer, at `tokens ="),
    "batch norm": (BatchNormed, r"batch normalisation \(batch_norm in net.1, BatchNorm1d"),
    "squashed": (Squashed, r"arithmetic with a constant \(mul, at `return 1.5 \* torch.tanh"),
    "gated": (Gated, r"a step that depends on the values of its inputs, at `return out / 2 if"),
    "standardised": (Standardised, r"arithmetic with a constant \(truediv, at `return self.net\("),
    "dense": (Dense, r"a concatenation with a hidden layer"),
}
"""By name: the module, and what the message must say."""
