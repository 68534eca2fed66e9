"""Fill a page's tables from all files of results: ``python benchmarks/summary.py docs/performance.md``.

What stands between ``<!-- results: OPERATION, ... -->`` and ``<!-- end of results -->`` is replaced.
``<!-- results: files -->`` stands for the list of the files.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import Row, duration, groups, spread
from benchmarks.results import Results, load

FOLDER = Path(__file__).with_name("results")
_BLOCK = re.compile(r"(?<=<!-- results: )(?P<what>.+?)(?P<start> -->\n).*?(?=^<!-- end of results -->$)", re.M | re.S)


def filled(page: str, files: Mapping[str, Results]) -> str:
    """The page with its tables as the files give them.

    Args:
        page: Markdown.
        files: results by the name that tables give them.

    Raises:
        KeyError: the page asks for an operation that no file has.
    """

    def block(found: re.Match[str]) -> str:
        what = found["what"]
        lines = sources(files) if what == "files" else tables(files, what.split(", "))
        return what + found["start"] + "\n" + "\n".join(lines) + "\n\n"

    return _BLOCK.sub(block, page)


def sources(files: Mapping[str, Results]) -> list[str]:
    """A table of the runs that each file's rows come from."""
    lines = ["| results | device | measured | commit | PyTorch | rows |", "|---|---|---|---|---|---|"]
    for name, results in files.items():
        for key, run in results["runs"].items():
            count = sum(row["run"] == key for row in results["rows"])
            commit = f"{run['commit'][:7]}{' with changes' if run['dirty'] else ''}"
            cells = (f"`{name}`", run["device"], run["date"][:10], commit, run["versions"]["torch"], str(count))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def tables(files: Mapping[str, Results], operations: Sequence[str]) -> list[str]:
    """A table for each measured size of these operations, with a line for each file that has it."""
    lines: list[str] = []
    for operation in operations:
        sizes: dict[str, dict[str, dict[str, Row]]] = {}
        for name, results in files.items():
            for group, rows in groups(results).items():
                if rows[0]["op"] == operation:
                    sizes.setdefault(group, {})[name] = {row["label"]: row for row in rows}
        if not sizes:
            raise KeyError(f"no file of results has {operation!r}")
        for group, by_file in sizes.items():
            lines += ["", *_table(group, by_file)] if lines else _table(group, by_file)
    return lines


def _table(group: str, by_file: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """The baseline's time, and everyone else's speed-up over it; empty where a file lacks the row."""
    baseline = next(row["baseline"] for rows in by_file.values() for row in rows.values())
    others = [
        label for label in dict.fromkeys(label for rows in by_file.values() for label in rows) if label != baseline
    ]
    lines = [f"**{group}**", "", f"| results | {baseline} | {' | '.join(others)} |", "|---" * (len(others) + 2) + "|"]
    for name, rows in by_file.items():
        time = duration(rows[baseline]["seconds"]["median"]) if baseline in rows else ""
        speedups = [spread(rows[label]["speedup"], "{:.2f}".format) if label in rows else "" for label in others]
        lines.append(f"| {' | '.join([f'`{name}`', time, *speedups])} |")
    return lines


def committed() -> dict[str, Results]:
    """The results in this folder, by their files' names."""
    return {path.stem: load(path) for path in sorted(FOLDER.glob("*.json"))}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", type=Path, nargs="+", help="Markdown files to rewrite")
    args = parser.parse_args(argv)
    for page in args.pages:
        page.write_text(filled(page.read_text(), committed()))
        print(f"filled {page}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
