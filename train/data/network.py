"""Whether a server can be reached, found out in seconds."""

from __future__ import annotations

import threading
from collections.abc import Callable

from train.data.minari_cache import brief

PROBE_SECONDS = 3.0


def problem_with(server: str, ask: Callable[[], int]) -> str | None:
    """Why the server cannot be reached; None if it answers.

    Args:
        server: its address, for the message.
        ask: sends one request and returns the HTTP status. It runs in a thread, because a request's own time limit
            covers neither the name look-up nor trying several addresses.
    """
    answers: list[str | None] = []

    def probe() -> None:
        try:
            status = ask()
            refused = status >= 500 or status in (403, 407)  # by a proxy, or the server is down
            answers.append(f"{server} cannot be reached (HTTP status {status})" if refused else None)
        except Exception as error:  # from whichever HTTP library is used
            answers.append(f"{server} cannot be reached ({brief(error)})")

    thread = threading.Thread(target=probe, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answers[0] if answers else f"{server} did not answer within {PROBE_SECONDS:g} s"
