"""Version, changelog and citation agree."""

from __future__ import annotations

import re
from pathlib import Path

from packaging.version import Version

import fdkernels

ROOT = Path(__file__).parents[1]
RELEASES = re.findall(r"^## (\S+) - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
"""Of the changelog: version and date, newest first."""


def test_the_changelog_goes_from_new_to_old() -> None:
    versions, dates = zip(*[(Version(version), date) for version, date in RELEASES])
    assert list(versions) == sorted(set(versions), reverse=True)
    assert list(dates) == sorted(dates, reverse=True)


def test_the_version_is_the_newest_release_or_on_the_way_to_the_next() -> None:
    version, newest = Version(fdkernels.__version__), Version(RELEASES[0][0])
    assert version == newest or (version.is_devrelease and version > newest)


def test_the_citation_is_of_the_newest_release() -> None:
    citation = (ROOT / "CITATION.cff").read_text()
    version, date = RELEASES[0]
    assert f"\nversion: {version}\n" in citation
    assert f'\ndate-released: "{date}"\n' in citation
