"""The seam that training, evaluation and reports log through: a parent run, a child run, numbers and files.

Nothing here may stop a training: every public method of `Tracker` catches its errors and says them once.
Nothing waits for the network: events go to a journal (`journal`), a thread sends them (`sender`, `sink`).
"""

from __future__ import annotations

import atexit
import functools
import logging
import math
import os
import re
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from appo.tracking import ending
from appo.tracking.journal import Event, Journal, JournalBusy, status_of
from appo.tracking.secrets import scrub, scrub_cell, scrub_items
from appo.tracking.sender import Sender, close_if_killed
from appo.tracking.sink import MlflowSink

log = logging.getLogger("appo.tracking")
_BAD_KEY = re.compile(r"[^A-Za-z0-9_\-. :/]")
Method = TypeVar("Method", bound=Callable[..., Any])


def _never_raises(method: Method) -> Method:
    """Logging must not end a training that has run for days: the error is said once per method and kind."""

    @functools.wraps(method)
    def wrapped(self: Tracker, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(self, *args, **kwargs)
        except Exception as error:  # the reason for catching all stands above
            self.complain(f"{method.__name__}: {type(error).__name__}: {error}")
            return None

    return wrapped  # type: ignore[return-value]


class Tracker:
    """One process's run in MLflow. Used as a context manager it ends the run, as failed when an error passes.

    make_sink: called once, at the first start. journals: folder of the event files.
    """

    def __init__(self, make_sink: Callable[[], MlflowSink], journals: Path) -> None:
        self.complaints: list[str] = []
        self._make_sink = make_sink
        self._journals = journals
        self._journal: Journal | None = None
        self._sender: Sender | None = None
        self._waiting: list[Event] = []
        self._attached = False
        self._ended = False
        self._silent = False
        self._system: Any = None

    def complain(self, message: str) -> None:
        """Say once that something could not be tracked."""
        message = scrub(message)
        if message not in self.complaints:
            self.complaints.append(message)
            log.warning("tracking: %s", message)

    # -- starting ------------------------------------------------------------------------------------

    @_never_raises
    def start_parent(
        self,
        name: str,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
    ) -> None:
        """The run that gathers the seeds. `key`: equal keys are the same run, whoever starts it first.

        Where a run was injected (MLFLOW_RUN_ID) that run's own parent does this work, and none is made.
        """
        if os.environ.get("MLFLOW_RUN_ID") or not _is_main_process():
            return
        self._waiting.append(
            self._start_event("parent", name, tags, params, key or f"{name}-{uuid.uuid4().hex[:12]}")
        )

    @_never_raises
    def start_child(
        self,
        name: str,
        tags: Mapping[str, Any] | None = None,
        params: Mapping[str, Any] | None = None,
        *,
        key: str | None = None,
        parent_id: str | None = None,
        system_metrics: bool = True,
    ) -> None:
        """The run that everything else is logged to. Opens the journal and begins to send.

        key: the same key in the same journals folder continues a run that did not finish (a retried pod) and
        counts its attempts; a finished one is left alone and a new run is made.
        """
        if not _is_main_process():
            self._ended = self._silent = True
            return
        key = key or f"{name}-{uuid.uuid4().hex[:12]}"
        injected = os.environ.get("MLFLOW_RUN_ID")
        self._journal, run_key, attempt = self._open_journal(key)
        event = self._start_event(
            "child", name, {**(tags or {}), "appo.attempt": str(attempt)}, params, run_key
        )
        if injected:
            self._attached, event["attach"] = True, injected
        elif parent_id:
            event["parent_id"] = parent_id
        elif self._waiting:
            event["parent"] = "parent"
        sink = self._make_sink()
        event["store"] = sink.describe()
        for waiting in [*self._waiting, event]:
            self._journal.append(waiting)
        self._waiting = []
        self._sender = Sender(self._journal, sink)
        self._sender.wake()
        atexit.register(self._at_exit)
        ending.leave_cleanly_on_sigterm()
        if system_metrics:
            from appo.tracking.system import SystemMetrics

            # A retried pod finds the first start in the journal.
            starts = (e for e in self._journal.events() if e["op"] == "start" and e["run"] == "child")
            began = next(starts, event)
            self._system = SystemMetrics(self.log_metrics, began_ms=began["time_ms"])

    def _start_event(
        self,
        run: str,
        name: str,
        tags: Mapping[str, Any] | None,
        params: Mapping[str, Any] | None,
        key: str,
    ) -> Event:
        return {
            "op": "start",
            "run": run,
            "name": name,
            "key": key,
            "tags": scrub_items(tags or {}),
            "params": scrub_items(params or {}),
            "time_ms": _now_ms(),
        }

    def _open_journal(self, key: str) -> tuple[Journal, str, int]:
        """The journal of an unfinished run with this key, or a new one; its run key; the attempt's number."""
        slug = re.sub(r"[^A-Za-z0-9]+", "-", key).strip("-")
        for number in range(1, 1000):
            path = self._journals / (f"{slug}.jsonl" if number == 1 else f"{slug}.{number}.jsonl")
            try:
                journal = Journal(path)
            except JournalBusy:
                continue
            close_if_killed(journal)
            events = journal.events()
            starts = [e for e in events if e["op"] == "start" and e["run"] == "child"]
            if not starts:
                # The key alone would find a finished run of an earlier use of this folder's store.
                return journal, f"{key}/{uuid.uuid4().hex[:12]}", 1
            if status_of(events) != "FINISHED":
                return journal, starts[-1]["key"], len(starts) + 1
            journal.close()
        raise JournalBusy(f"{self._journals}: holds 1000 runs of {key}; use another folder")

    # -- logging -------------------------------------------------------------------------------------

    @_never_raises
    def log_metrics(
        self, values: Mapping[str, Any], step: int | None = None, *, run: str = "child", once: bool = False
    ) -> None:
        """Numbers of one step. Values that are no numbers are left out; NaN is kept, as MLflow knows it.

        once: where the run has this step already, the first numbers stay (a training that went back to a
        checkpoint makes some steps again).
        """
        numbers: dict[str, float] = {}
        for name, value in values.items():
            try:
                number = float(value)
            except (TypeError, ValueError):  # text, None or a whole array: not a metric
                continue
            if math.isinf(number):  # databases turn it into 1.8e308, which draws no readable curve
                number = math.nan
            numbers[_BAD_KEY.sub("_", name)[:250]] = number
        if numbers:
            event = {"op": "metrics", "run": run, "values": numbers, "step": int(step or 0)}
            self._append({**event, "once": True} if once else event)

    @_never_raises
    def log_params(self, values: Mapping[str, Any], *, run: str = "child") -> None:
        """Settings; one that was logged before with another value is noted in the tag appo.changed_params."""
        self._append({"op": "params", "run": run, "values": scrub_items(values)})

    @_never_raises
    def set_tags(self, values: Mapping[str, Any], *, run: str = "child") -> None:
        self._append({"op": "tags", "run": run, "values": scrub_items(values)})

    @_never_raises
    def log_artifact(self, path: Path | str, artifact_path: str | None = None, *, run: str = "child") -> None:
        """A file or folder, copied when it is sent: keep it where it is. artifact_path: folder in the run."""
        self._append(
            {"op": "artifact", "run": run, "path": str(Path(path).absolute()), "artifact_path": artifact_path}
        )

    @_never_raises
    def log_text(self, text: str, artifact_file: str, *, run: str = "child") -> None:
        self._append({"op": "text", "run": run, "text": scrub(text), "artifact_file": artifact_file})

    @_never_raises
    def log_table(
        self,
        rows: Sequence[Mapping[str, Any]],
        artifact_file: str = "completions.json",
        *,
        run: str = "child",
    ) -> None:
        """Rows with equal keys (completions, predictions) as a table that MLflow's UI can browse."""
        columns = list(dict.fromkeys(name for row in rows for name in row))
        data = [[scrub_cell(row.get(name)) for name in columns] for row in rows]
        table = {"columns": columns, "rows": data, "artifact_file": artifact_file}
        self._append({"op": "table", "run": run, **table})

    @_never_raises
    def log_dataset(
        self, name: str, digest: str, source: str, *, context: str, profile: Mapping[str, Any] | None = None
    ) -> None:
        """The manifest a run read. context: "training" or "evaluation"; profile: counts and the like."""
        self._append(
            {
                "op": "dataset",
                "run": "child",
                "name": name,
                "digest": digest,
                "source": scrub(source),
                "context": context,
                "profile": dict(profile or {}),
            }
        )

    @_never_raises
    def log_model(
        self,
        name: str,
        uri: str,
        *,
        step: int = 0,
        metrics: Mapping[str, float] | None = None,
        tags: Mapping[str, Any] | None = None,
        run: str = "child",
    ) -> None:
        """A checkpoint as MLflow's LoggedModel, with its metrics; the weights stay at `uri`."""
        values = {_BAD_KEY.sub("_", k): float(v) for k, v in (metrics or {}).items()}
        self._append(
            {
                "op": "model",
                "run": run,
                "name": re.sub(r"[/:.%\"']", "-", name),
                "uri": scrub(uri),
                "step": step,
                "values": values,
                "tags": scrub_items(tags or {}),
            }
        )

    def _append(self, event: Event) -> None:
        if self._silent:
            return
        if self._journal is None or self._ended:
            raise RuntimeError("no run is started; call start_child first")
        self._journal.append({**event, "time_ms": _now_ms()})
        if self._sender is not None:
            self._sender.wake()

    # -- ending --------------------------------------------------------------------------------------

    @property
    def run_id(self) -> str | None:
        """MLflow's id of the child; waits for it, for a minute at most. None while the server is away."""
        try:
            return self._sender.wait_for("child", timeout_s=60.0) if self._sender else None
        except Exception:  # same promise as the methods above
            return None

    @_never_raises
    def end(self, status: str = "FINISHED", reason: str | None = None, *, timeout_s: float = 60.0) -> None:
        """Close the run: FINISHED, FAILED or KILLED, with the reason as a tag; wait for the sender.

        What cannot be sent within `timeout_s` stays in the journal; the command that sends it is printed.
        """
        if self._journal is None or self._ended:
            return
        if self._system is not None:
            self._system.stop()
        end = {"op": "end", "run": "child", "status": status, "reason": scrub(reason) if reason else None}
        self._append({**end, "attached": self._attached})
        self._ended = True
        atexit.unregister(self._at_exit)
        done = self._sender.finish(timeout_s) if self._sender else False
        left = self._journal.unsent
        self._journal.close()
        if not done and left:
            log.warning(
                "%d events have not reached MLflow; they are safe in %s. Send them: appo tracking upload %s",
                left,
                self._journal.path,
                self._journals,
            )

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.end()
        else:
            self.end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED", ending.reason(error))

    def _at_exit(self) -> None:
        """A process that ends without a word to us still leaves a reason."""
        error = getattr(sys, "last_value", None)
        reason = "the process ended before the run did" if error is None else ending.reason(error)
        # MLflow cannot be imported any more while Python shuts down: without it there is nothing to wait for.
        sends = self._sender is not None and self._sender.sink.connected
        self.end("FAILED", ending.told_to_go() or reason, timeout_s=20.0 if sends else 0.0)


def _is_main_process() -> bool:
    """Of the processes of a distributed training only the first one logs."""
    return os.environ.get("RANK", "0") == "0"


def _now_ms() -> int:
    return int(time.time() * 1000)
