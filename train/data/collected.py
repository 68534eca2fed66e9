"""Episodes of OGBench's scripted controllers on this machine: generated in parts, which a later call goes on from.

The parts are in ``~/.ogbench/fdkernels``, or in the folder that the environment variable ``FDKERNELS_DATA`` names:
``cube-single-play-v0/part-00007.npz`` has episodes 70 to 79. Parts have the columns of OGBench's own files, whose
functions read them too. An episode depends on its name and number alone, not on the order or the number of processes.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import multiprocessing
import multiprocessing.spawn
import os
import sys
import zlib
from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from train.behaviour import scripted
from train.behaviour.scripted import DTYPES, Episode
from train.data import npz
from train.data.damage import require_damage
from train.progress import bar

PART_EPISODES = 10
VERSION = "v0"  # raise it when the controllers or the way they are played change


class Unreadable(Exception):
    """A part is missing or damaged; the message names its file."""


def default_folder() -> Path:
    """The folder of all collected data: ``FDKERNELS_DATA``, or ``~/.ogbench/fdkernels``."""
    return Path(os.environ.get("FDKERNELS_DATA") or "~/.ogbench/fdkernels").expanduser()


def can_collect(name: str) -> bool:
    """Whether there are scripted controllers for that name; ``collect`` also needs OGBench itself."""
    return name in scripted.RECIPES


def parts(name: str, episodes: int, folder: Path | None = None) -> list[Path]:
    """The files of the first ``episodes`` episodes, rounded up to whole parts, whether they exist or not.

    Raises:
        CannotPlay: nothing can be generated under that name; no path is made of it.
    """
    scripted.recipe_of(name)
    if episodes < 1:
        raise ValueError(f"episodes must be at least 1, got {episodes}")
    place = (folder or default_folder()) / f"{name}-{VERSION}"
    return [place / f"part-{i:05d}.npz" for i in range(-(-episodes // PART_EPISODES))]


def is_collected(name: str, episodes: int, folder: Path | None = None) -> bool:
    """Whether the files of the first ``episodes`` episodes are there. Only ``collect`` finds out about damage."""
    return all(part.exists() for part in parts(name, episodes, folder))


def collect(name: str, episodes: int, *, workers: int | None = None, folder: Path | None = None) -> list[Path]:
    """Generate what is missing of the first ``episodes`` episodes, rounded up to whole parts, and return their files.

    A part appears under its name when it is complete, so an interruption costs unfinished parts only. A damaged part
    is reported on stderr and generated again. Of several processes one generates; the others wait and find the result.

    Args:
        name: a key of ``scripted.RECIPES``, such as ``cube-single-play``.
        episodes: number of episodes, at least one.
        workers: processes to play in; None: one per core. With 1 it is this process; others are started afresh, so
            that a script that calls this must guard its main part with ``if __name__ == "__main__"``.
        folder: folder of all collected data; None: ``default_folder()``.

    Raises:
        CannotPlay: nothing can be generated under that name, or OGBench is not installed.
        ChildProcessError: a worker process ended early.
        OSError: a part could not be read, which says nothing about it, or not be written.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    wanted = parts(name, episodes, folder)
    rows = scripted.recipe_of(name).rows
    missing = {i: part for i, part in enumerate(wanted) if _problem(part, rows)}
    if not missing:
        return wanted
    scripted.check_installed()
    # A worker first imports its parent's script. If that calls this function unguarded, it must not wait for the lock.
    multiprocessing.spawn._check_not_importing_main()  # type: ignore[attr-defined]
    place = wanted[0].parent
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):  # a killed process releases it
        for i, part in list(missing.items()):
            if not (problem := _problem(part, rows)):
                del missing[i]  # another process has generated it meanwhile
            elif part.exists():
                print(f"{problem}; it is generated again", file=sys.stderr)
        try:
            _generate(name, missing, workers or os.cpu_count() or 1)
        finally:
            for partial in place.glob("*.partial"):  # also those of a run that was killed while it wrote
                partial.unlink()
    return wanted


def read(name: str, episodes: int, folder: Path | None = None) -> Episode:
    """The columns of the first ``episodes`` episodes, one after the other. ``terminals`` marks their last rows.

    Raises:
        Unreadable: a part is missing or damaged; ``collect`` generates it again.
        OSError: a part could not be read, or there is no memory for it, which says nothing about it.
    """
    rows = scripted.recipe_of(name).rows
    files = parts(name, episodes, folder)
    read = [_read(part, rows) for part in files]
    for file, part in zip(files, read):
        if {c: part[c].shape for c in part} != {c: read[0][c].shape for c in read[0]}:
            raise Unreadable(f"{file} has columns of other shapes than {files[0].name}")
    return {column: np.concatenate([part[column] for part in read])[: episodes * rows] for column in read[0]}


def seed_of(name: str, index: int) -> int:
    """The seed of an episode: no two episodes of any two names share theirs."""
    return zlib.crc32(f"{name}-{VERSION}".encode()) << 32 | index


def _read(part: Path, rows: int) -> Episode:
    try:
        columns = npz.read(part, DTYPES)
        if not {"observations", "actions", "terminals", "qpos"} <= set(columns):
            raise ValueError(f"its columns are {', '.join(columns)}")
        for column, values in columns.items():
            if values.dtype != DTYPES[column] or len(values) != PART_EPISODES * rows:
                raise ValueError(f"{column} has {len(values)} rows of {values.dtype}")
        if np.flatnonzero(columns["terminals"]).tolist() != list(range(rows - 1, PART_EPISODES * rows, rows)):
            raise ValueError("its episodes do not end where they should")
    except FileNotFoundError:
        raise Unreadable(f"{part} does not exist") from None
    except Exception as error:  # on a damaged file NumPy may raise anything
        require_damage(error, part)
        raise Unreadable(f"{part} is damaged ({type(error).__name__}: {error})") from error
    return columns


def _problem(part: Path, rows: int) -> str:
    """What is wrong with a part, or nothing."""
    try:
        _read(part, rows)
    except Unreadable as error:
        return str(error)
    return ""


def _generate(name: str, missing: dict[int, Path], workers: int) -> None:
    indices = [PART_EPISODES * i + k for i in missing for k in range(PART_EPISODES)]
    unfinished: dict[int, dict[int, Episode]] = defaultdict(dict)
    with contextlib.closing(_played(name, indices, min(workers, len(indices)))) as played:
        for index, episode in bar(played, desc=f"generating {name}", total=len(indices), unit="episode"):
            i = index // PART_EPISODES
            unfinished[i][index] = episode
            if len(unfinished[i]) == PART_EPISODES:
                _write(missing[i], [episode for _, episode in sorted(unfinished.pop(i).items())])


def _write(part: Path, episodes: Sequence[Episode]) -> None:
    from train.outputs.files import write_whole  # imports torch, which worker processes can do without

    content = io.BytesIO()
    columns: dict[str, Any] = {column: np.concatenate([e[column] for e in episodes]) for column in episodes[0]}
    np.savez_compressed(content, **columns)
    write_whole(part, content.getvalue())


def _played(name: str, indices: Sequence[int], workers: int) -> Generator[tuple[int, Episode], None, None]:
    """Episodes with their numbers, in the order in which they are finished.

    Workers are sent seeds and send episodes; all files are written here. If this process is killed, its ends of their
    pipes close, and they end after the episode they are at. (An executor's workers would wait for ever.)
    """
    if workers <= 1:
        yield from ((index, scripted.play(name, seed_of(name, index))) for index in indices)
        return
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of torch's and MuJoCo's threads
    rows = scripted.recipe_of(name).rows
    upcoming = iter(indices)
    playing: dict[Any, int] = {}
    processes = []
    try:
        with _one_thread_each():
            for index in itertools.islice(upcoming, workers):
                ours, theirs = context.Pipe()
                process = context.Process(target=scripted.serve, args=(name, rows, theirs), daemon=True)
                process.start()
                processes.append(process)
                theirs.close()
                ours.send(seed_of(name, index))
                playing[ours] = index
        while playing:
            ready: list[Any] = wait(list(playing))
            for connection in ready:
                index, episode = playing.pop(connection), connection.recv()
                if (following := next(upcoming, None)) is not None:
                    connection.send(seed_of(name, following))
                    playing[connection] = following
                yield index, episode
    except (EOFError, ConnectionError) as error:
        raise ChildProcessError(f"a process that generated {name} ended early: it was killed, or failed") from error
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Processes that are started inside have one BLAS thread, which NumPy takes from its environment when imported."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
