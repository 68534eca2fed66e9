"""The environments by the names people know; ``python train/environments.py`` lists them.

A new family needs its own file in ``train/data`` and its entry here.
"""

from __future__ import annotations

import difflib

from train.data import locomotion
from train.data.spec import EnvSpec

FAMILIES = (locomotion.ENVIRONMENTS,)
ENVIRONMENTS: dict[str, EnvSpec] = {spec.name: spec for family in FAMILIES for spec in family}


class UnknownEnvironment(ValueError):
    """No environment of that name; the message gives the nearest ones."""


def resolve(name: str) -> EnvSpec:
    """The environment of that name.

    Raises:
        UnknownEnvironment: there is none.
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
