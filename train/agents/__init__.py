"""The agents, under the names that ``--agent`` takes. A new agent needs its own file and an entry here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, TypeAlias

from train.agents.base import Agent
from train.agents.deflow import DeFlow
from train.agents.fidec import FiDec
from train.agents.fql import FQL

AGENTS: dict[str, type[Agent]] = {"fidec": FiDec, "deflow": DeFlow, "fql": FQL}

if TYPE_CHECKING:
    AgentName: TypeAlias = str
else:
    AgentName = Literal[tuple(AGENTS)]  # the command line lists these choices
