"""TensorBoard's events of a run: one file, which a resumed run replaces by one without what it will do again.

TensorBoard's own writer hands events to a thread. A kill loses those that wait there, and an error of the disk is
printed as the thread's traceback. Here an event is written when it is added.
"""

from __future__ import annotations

import io
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from train.outputs.files import GrowingFile, create_folder


class Events:
    """The scalars of one run.

    Args:
        folder: the folder of the event files. What is kept of those already there moves to a new file.
        keep: whether to keep the scalar of a tag at a step.
    """

    def __init__(self, folder: Path, keep: Callable[[str, int], bool]) -> None:
        create_folder(folder, parents=False)
        earlier = sorted(folder.glob("*tfevents*"))
        # A step comes twice if a process was killed between the two lines that end this function, or if an older
        # version of this file resumed the run; then the last one counts.
        kept = {
            (value.tag, event.step): event
            for event in itertools.chain.from_iterable(map(read_events, earlier))
            for value in event.summary.value
            if keep(value.tag, event.step)
        }
        # "Start" makes a TensorBoard that is open forget what it has read from the earlier files.
        now = time.time()
        beginning = [
            Event(wall_time=now, file_version="brain.Event:2"),
            Event(wall_time=now, session_log=SessionLog(status=SessionLog.START)),
        ]
        content = _packed([*beginning, *sorted(kept.values(), key=lambda event: event.step)])
        self._file = GrowingFile(_new_path(folder), content)
        for path in earlier:
            path.unlink()

    def add(self, step: int, scalars: Mapping[str, float]) -> None:
        now = time.time()
        self._file.add(_packed(_scalar(now, step, tag, value) for tag, value in scalars.items()))

    def sync(self) -> None:
        self._file.sync()

    def close(self) -> None:
        self._file.close()


def read_events(path: Path) -> Iterator[Event]:
    """The events of a file, up to one that a killed process left incomplete."""
    yield from map(Event.FromString, RawEventFileLoader(str(path)).Load())


def _scalar(wall_time: float, step: int, tag: str, value: float) -> Event:
    return Event(wall_time=wall_time, step=step, summary=Summary(value=[Summary.Value(tag=tag, simple_value=value)]))


def _packed(events: Iterable[Event]) -> bytes:
    content = io.BytesIO()
    writer = RecordWriter(content)
    for event in events:
        writer.write(event.SerializeToString())
    return content.getvalue()


def _new_path(folder: Path) -> Path:
    """A name that TensorBoard reads after those that are there."""
    names = (
        f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{i}" for i in itertools.count()
    )
    return next(path for path in map(folder.joinpath, names) if not path.exists())
