"""Time the kernels' tile sizes on the GPU at hand, and write the best into the table that ships with the library.

python benchmarks/tune.py            # a few minutes; prints each candidate, then writes fdkernels/kernels/configs.json
python benchmarks/tune.py --dry-run  # only prints
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
from collections.abc import Callable
from unittest import mock

import torch
import triton

from fdkernels.kernels import configs, launch

TILE_BYTES = (1024, 2048, 4096, 8192, 16384)
NUM_WARPS = (1, 2, 4, 8)
SIZES = [(4, 6), (4, 17), (16, 60), (64, 256), (256, 1024)]  # (K, d); rows fill half a gigabyte
ELEMENTS = 2**27


def workloads() -> list[tuple[str, int, str, Callable[[], object]]]:
    """(kernel, bytes of a padded row, label, launch) for float32 tensors that no cache holds."""
    made: list[tuple[str, int, str, Callable[[], object]]] = []
    for num_samples, d in SIZES:
        rows = ELEMENTS // (num_samples * d)
        score = torch.randn(rows, num_samples, d, device="cuda")
        displacement, row = torch.randn(rows, d, device="cuda"), torch.rand(rows, device="cuda")
        padded = 4 * configs.next_power_of_two(num_samples) * configs.next_power_of_two(d)
        label = f"K={num_samples} d={d}"

        def penalty(score: torch.Tensor = score, displacement: torch.Tensor = displacement) -> object:
            return launch.penalty(displacement, score, 1e-3, True, 1e-6, True, False)

        def gradient(
            score: torch.Tensor = score, displacement: torch.Tensor = displacement, row: torch.Tensor = row
        ) -> object:
            return launch.penalty_score_gradient(row, displacement, score, row, row, True, 1e-6)

        made += [("penalty", padded, label, penalty), ("penalty_score_gradient", padded, label, gradient)]
    flat = torch.randn(ELEMENTS, 1, device="cuda")
    return [*made, ("score", 1, "flat", lambda: launch.score(flat, flat, None, 2.0, 1.0, True))]


def measure(kernel: str, row_bytes: int, run: Callable[[], object], tile_bytes: int, num_warps: int) -> float:
    """Median milliseconds with this candidate; infinite where it does not compile."""
    entry = {"row_bytes": row_bytes, "tile_bytes": tile_bytes, "num_warps": num_warps}
    family = configs.gpu_family(torch.device("cuda", torch.cuda.current_device()))
    configs.penalty_tile.cache_clear()
    configs.score_block.cache_clear()
    with mock.patch.dict(configs.TABLE, {family: {kernel: [entry]}}):
        try:
            return triton.testing.do_bench(run, return_mode="median")
        except triton.runtime.errors.OutOfResources:
            return float("inf")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="print the timings and write nothing")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.exit(2, "tune.py: no GPU here; the shipped table stays as it is\n")
    device = torch.device("cuda", torch.cuda.current_device())
    source = f"timed on {torch.cuda.get_device_name()}, {datetime.date.today()}, torch {torch.__version__}"
    found: dict[str, list[dict[str, int | str]]] = {}
    for kernel, row_bytes, label, run in workloads():
        timings = {
            candidate: measure(kernel, row_bytes, run, *candidate)
            for candidate in itertools.product(TILE_BYTES, NUM_WARPS)
        }
        for (tile_bytes, num_warps), milliseconds in sorted(timings.items(), key=lambda item: item[1]):
            print(
                f"{kernel:24}{label:16}tile_bytes={tile_bytes:<6} num_warps={num_warps}  {milliseconds:.4f} ms",
                flush=True,
            )
        tile_bytes, num_warps = min(timings, key=timings.__getitem__)
        found.setdefault(kernel, []).append(
            {"row_bytes": row_bytes, "tile_bytes": tile_bytes, "num_warps": num_warps, "source": source}
        )
    if not args.dry_run:
        table = configs.TABLE | {configs.gpu_family(device): found}
        configs.TABLE_FILE.write_text(json.dumps(table, indent=2) + "\n")
        print(f"wrote {configs.TABLE_FILE}; `python benchmarks/static_report.py` checks the new entries for spills")


if __name__ == "__main__":
    main()
