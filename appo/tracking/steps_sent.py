"""Steps that a resumed training makes again -> left out, where MLflow has them."""

from __future__ import annotations

from collections.abc import Callable


class StepsSent:
    """Which steps of which metric a run has, so that a training that went back to a checkpoint adds only new ones.

    read: (run id, metric) -> time stamp of each step in MLflow; asked once for each metric of a run that another
    process began.
    """

    def __init__(self, read: Callable[[str, str], dict[int, int]]) -> None:
        self._read = read
        self._fresh: set[str] = set()
        self._sent: dict[tuple[str, str], dict[int, int]] = {}

    def nothing_sent(self, run_id: str) -> None:
        """The run was made just now."""
        self._fresh.add(run_id)

    def is_new(self, run_id: str, name: str, step: int, time_ms: int) -> bool:
        """Whether this step is to be sent: it is not there, or it is this very one, sent again after an error."""
        key = run_id, name
        if key not in self._sent:
            self._sent[key] = {} if run_id in self._fresh else self._read(run_id, name)
        return self._sent[key].setdefault(step, time_ms) == time_ms
