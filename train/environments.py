"""All environments by name; ``python train/environments.py`` lists them.

A new family needs its own file in ``train/data`` and an entry here.
"""

from __future__ import annotations

import difflib

from train.data import d4rl, locomotion, mixed, ogbench
from train.data.spec import EnvSpec

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


if __name__ == "__main__":
    print("\n".join(ENVIRONMENTS))
