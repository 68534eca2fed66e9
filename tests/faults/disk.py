"""A small disk of its own, which can be filled: a tmpfs in a mount namespace, for which one needs no privilege."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from pathlib import Path


class SmallDisk:
    """A file system of ``size`` bytes in memory.

    It is mounted in the namespace of a shell; other processes see it through /proc.

    Raises:
        OSError: this machine does not allow it.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self._shell = subprocess.Popen(
            ["unshare", "--user", "--map-root-user", "--mount", "sh"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._at = folder
        self.folder = Path(f"/proc/{self._shell.pid}/root{folder}")
        self._tell(f"mount -t tmpfs -o size={size} tmpfs {folder}")

    def fill(self, leave: int = 0) -> None:
        """Fill it up, apart from this many bytes."""
        free = os.statvfs(self.folder)
        try:
            (self.folder / "ballast").write_bytes(bytes(max(0, free.f_bavail * free.f_frsize - leave)))
        except OSError as error:
            if error.errno != errno.ENOSPC:  # a process that writes there at the same time may take the rest
                raise

    def free(self) -> None:
        (self.folder / "ballast").unlink()

    def make_read_only(self) -> None:
        self._tell(f"mount -o remount,ro {self._at}")

    def make_writable(self) -> None:
        self._tell(f"mount -o remount,rw {self._at}")

    def close(self) -> None:
        self._shell.communicate()

    def _tell(self, command: str) -> None:
        assert self._shell.stdin is not None
        assert self._shell.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.write(f"{command} && echo done || echo failed\n")
            self._shell.stdin.flush()
        if (answer := self._shell.stdout.readline()) != "done\n":
            self.close()
            raise OSError(f"{command}: {answer.strip()}")
