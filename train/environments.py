"""All environments by name. ``python train/environments.py`` lists them, with ``--json`` more of each.

A new family needs its own file in ``train/data`` and an entry here.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence

from train import options
from train.data import d4rl, locomotion, mixed, ogbench
from train.data.spec import EnvSpec
from train.outputs import console
from train.outputs.console import Ending, Output

PROGRAM = "python train/environments.py"
EXAMPLES = (
    (f"{PROGRAM} | grep cube", "some of the names"),
    (f"{PROGRAM} --json | jq '.environments[].env_id'", "for a script"),
)
FAMILIES = (locomotion.ENVIRONMENTS, mixed.ENVIRONMENTS, d4rl.ENVIRONMENTS, ogbench.ENVIRONMENTS)
ENVIRONMENTS: dict[str, EnvSpec] = {spec.name: spec for family in FAMILIES for spec in family}


class UnknownEnvironment(ValueError):
    """There is no environment of that name; the message suggests the nearest ones."""


def resolve(name: str) -> EnvSpec:
    """The environment of that name.

    Raises:
        UnknownEnvironment: no environment has that name.
    """
    if name in ENVIRONMENTS:
        return ENVIRONMENTS[name]
    nearest = difflib.get_close_matches(name.lower(), ENVIRONMENTS, n=3)
    hint = f" Nearest: {', '.join(nearest)}." if nearest else ""
    raise UnknownEnvironment(
        f"unknown environment {name!r}.{hint} `python train/environments.py` lists all {len(ENVIRONMENTS)}."
    )


@dataclasses.dataclass(frozen=True)
class EnvironmentsConfig(Output):
    """List the environments that --env takes, a name a line."""


def parse(argv: Sequence[str] | None) -> EnvironmentsConfig:
    return options.parse(EnvironmentsConfig, argv, program=PROGRAM, ending=lambda: options.examples(*EXAMPLES))


def main(argv: Sequence[str] | None = None) -> int:
    return console.conclude(listed, parse(argv), ())


def listed() -> Ending:
    found = [
        {
            "name": spec.name,
            "env_id": spec.env_id,
            "score": spec.scoring.name,
            "sources": [str(source) for source in spec.sources],
            "needs_extra": spec.needs[1] if spec.needs else None,
        }
        for spec in ENVIRONMENTS.values()
    ]
    return Ending("\n".join(ENVIRONMENTS), {"environments": found})


if __name__ == "__main__":
    console.start(main)
