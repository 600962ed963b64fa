"""How a process ends -> the reason that its run is closed with."""

from __future__ import annotations

import signal
import threading
from types import FrameType

from appo.tracking.secrets import scrub

_told: list[str] = []


def leave_cleanly_on_sigterm() -> None:
    """Make SIGTERM an ordinary exit, so that runs are closed; leaves a handler alone that somebody else has set."""
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    ):
        signal.signal(signal.SIGTERM, _exit)


def _exit(number: int, frame: FrameType | None) -> None:
    _told.append("terminated (SIGTERM)")
    raise SystemExit(128 + number)


def told_to_go() -> str | None:
    """Why this process was told to go; None when nobody did."""
    return _told[0] if _told else None


def reason(error: BaseException) -> str:
    """An error in a line, without secrets."""
    if isinstance(error, SystemExit) and _told:
        return _told[0]
    return scrub(f"{type(error).__name__}: {error}")
