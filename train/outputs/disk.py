"""What to say about an error of the operating system, such as a full disk, and what to do about it."""

from __future__ import annotations

import errno

_PROBLEMS = {
    errno.ENOSPC: "the disk is full. Free some space",
    errno.EDQUOT: "your quota on the disk is used up. Free some space",
    errno.EFBIG: "it would be larger than files may be (ulimit -f). Raise the limit",
    errno.EROFS: "the disk is read-only. Make it writable, or write elsewhere",
    errno.EACCES: "access is not permitted. Permit it, or write elsewhere",
    errno.ENOENT: "it is not there, or its folder was deleted or moved. Put it back",
    errno.ESTALE: "it is not there, or its folder was deleted or moved. Put it back",
    errno.EMFILE: "more files are open than may be (ulimit -n). Raise the limit",
    errno.EIO: "the disk failed to read or write it. Repair the disk, or write elsewhere",
}


def explain(error: Exception, again: str) -> str:
    """The file, the problem and its remedy, if this is an error of the operating system about a file; else its text.

    Args:
        error: the error.
        again: what happens when the command is given again.
    """
    problem = _PROBLEMS.get(error.errno or 0) if isinstance(error, OSError) and error.filename is not None else None
    return str(error) if problem is None else f"{error.filename}: {problem}; {again}"  # type: ignore[attr-defined]
