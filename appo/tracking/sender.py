"""A journal -> MLflow, from a thread of its own, for as long as it takes.

Training never waits for it. When the server is away the thread tries again, at first after a second and then
ever more rarely; what it could not send stays in the journal for `upload`.
"""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

from appo.tracking.journal import Journal, JournalBusy, status_of
from appo.tracking.secrets import scrub
from appo.tracking.sink import MlflowSink

_EVENTS_A_ROUND = 500
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# Metrics of fast steps are gathered for so long, and then sent in one call.
_GATHER_S = 1.0

log = logging.getLogger("appo.tracking")


class Sender:
    """Sends one journal in the background. `wake` after appending; `finish` waits for the rest."""

    def __init__(self, journal: Journal, sink: MlflowSink) -> None:
        self.journal = journal
        self.sink = sink
        self.refused = 0
        self.last_error: str | None = None
        self._wake = threading.Event()
        self._stop = threading.Event()
        self._hurry = threading.Event()
        self._sent = threading.Condition()
        self._thread = threading.Thread(target=self._loop, name="appo-tracking", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        self._wake.set()

    def _loop(self) -> None:
        pause_s = _FIRST_PAUSE_S
        while not self._stop.is_set():
            self._wake.wait(timeout=_LONGEST_PAUSE_S)
            if self._stop.is_set():
                break
            self._wake.clear()
            try:
                while self.send_round():
                    pass
                if self.last_error:
                    log.warning("MLflow is back; everything kept so far has been sent")
                self.last_error, pause_s = None, _FIRST_PAUSE_S
                self._hurry.wait(_GATHER_S)
            except Exception as error:  # any client, network or database error: the journal keeps the events
                message = scrub(f"{type(error).__name__}: {error}").splitlines()[0][:300]
                if self.last_error is None:
                    log.warning(
                        "MLflow cannot be reached (%s); metrics are kept in %s", message, self.journal.path
                    )
                self.last_error = message
                with self._sent:
                    self._sent.notify_all()
                self._hurry.wait(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S) if not self._hurry.is_set() else _FIRST_PAUSE_S
                if self._hurry.is_set():
                    time.sleep(0.3)
                self._wake.set()

    def send_round(self) -> bool:
        """Send the next events. True when there were some. Raises what the client raises."""
        events, cursor = self.journal.pending(_EVENTS_A_ROUND)
        if not events:
            return False
        ids = dict(self.journal.ids)
        refused = self.sink.apply(events, ids)
        if refused:
            self._note(refused)
        self.journal.commit(cursor, ids)
        with self._sent:
            self._sent.notify_all()
        return True

    def _note(self, refused: list[tuple[dict, str]]) -> None:
        """What MLflow refuses for good stays readable in the journal; the reason is said once per kind."""
        if not self.refused:
            event, reason = refused[0]
            log.warning(
                "MLflow refused %s (%s); it stays in %s", event["op"], scrub(reason)[:300], self.journal.path
            )
        self.refused += len(refused)

    def wait_for(self, run: str, timeout_s: float) -> str | None:
        """The MLflow id of a run of this journal, once it has one; None after `timeout_s`, or when the server
        cannot be reached.
        """
        self.wake()
        with self._sent:
            self._sent.wait_for(
                lambda: run in self.journal.ids or self.last_error is not None, timeout=timeout_s
            )
        return self.journal.ids.get(run)

    def finish(self, timeout_s: float) -> bool:
        """Send the rest, for at most `timeout_s`; stop the thread. True when nothing is left."""
        self._hurry.set()
        self.wake()
        with self._sent:
            done = self._sent.wait_for(lambda: self.journal.unsent == 0, timeout=timeout_s)
        self._stop.set()
        self.wake()
        self._thread.join(timeout=5)
        return done


def upload(folder: Path, sink: MlflowSink | None = None, *, uri: str | None = None) -> dict[str, str]:
    """Send what is left of every journal under `folder`; the command behind `appo tracking upload`.

    Each goes to `sink`, else to the store it was meant for, at `uri` where that address is given (a password is
    not written down).

    A journal whose process is gone without an end is closed as FAILED first. Returns journal name -> outcome.
    Raises what the client raises when the server cannot be reached.
    """
    outcomes: dict[str, str] = {}
    for path in sorted(folder.rglob("*.jsonl")):
        if not path.with_suffix(".lock").is_file():  # some other JSONL file
            continue
        try:
            journal = Journal(path)
        except JournalBusy:
            outcomes[path.stem] = "still running"
            continue
        try:
            close_if_killed(journal)
            before = journal.unsent
            store = next((e["store"] for e in journal.events() if "store" in e), None)
            if store is None:
                outcomes[path.stem] = "holds no start and cannot be sent"
                continue
            sender = _Once(journal, sink or MlflowSink.at(uri or store["uri"], store["experiment"]))
            while sender.send_round():
                pass
            outcomes[path.stem] = f"{before} events sent" + (
                f", {sender.refused} refused" if sender.refused else ""
            )
        finally:
            journal.close()
    return outcomes


class _Once(Sender):
    """A sender without a thread: one pass, errors go to the caller."""

    def __init__(self, journal: Journal, sink: MlflowSink) -> None:
        self.journal, self.sink, self.refused = journal, sink, 0
        self._sent = threading.Condition()


def close_if_killed(journal: Journal) -> bool:
    """End a run whose process left no last word; this process must hold the journal. True when it did."""
    events = journal.events()
    if status_of(events) != "running":
        return False
    journal.append(
        {
            "op": "end",
            "run": "child",
            "status": "FAILED",
            "reason": "the process was killed without a last word (out of memory, or the node went away)",
            "time_ms": int(time.time() * 1000),
        }
    )
    return True
