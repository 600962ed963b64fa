"""Load and memory of this machine and its GPUs -> metrics under MLflow's own names, every few seconds.

MLflow's own monitor writes straight to the server and loses what it cannot send; this one uses the journal. A curve's
step is the time in seconds since the run first began, so that a resumed training's curve goes on where it stopped.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from typing import Any

_PERIOD_S = 10.0
_MIB = 1024 * 1024


class SystemMetrics:
    """A thread that samples until `stop`. log: called with (values, step=seconds).

    began_ms: when the run first began, in milliseconds since the epoch.
    """

    def __init__(self, log: Callable[..., Any], *, began_ms: int, period_s: float = _PERIOD_S) -> None:
        self._log = log
        self._began_ms = began_ms
        self._period_s = period_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, name="appo-system-metrics", daemon=True)
        self._thread.start()

    def _loop(self) -> None:
        try:
            import psutil
        except ImportError:  # comes with mlflow; without it there is simply no such curve
            return
        process = psutil.Process()
        gpus = _gpu_handles()
        psutil.cpu_percent(interval=None)
        while not self._stop.wait(self._period_s):
            memory = psutil.virtual_memory()
            values = {
                "system/cpu_utilization_percentage": psutil.cpu_percent(interval=None),
                "system/system_memory_usage_megabytes": memory.used / _MIB,
                "system/system_memory_usage_percentage": memory.percent,
                "system/process_memory_usage_megabytes": process.memory_info().rss / _MIB,
            }
            for index, (nvml, handle) in enumerate(gpus):
                values |= {f"system/gpu_{index}_{name}": value for name, value in _gpu(nvml, handle).items()}
            self._log(values, step=max(0, int(time.time() - self._began_ms / 1000)))

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=1)


def _gpu(nvml: Any, handle: Any) -> dict[str, float]:
    """One GPU's load and memory; without what it does not tell (a MIG slice has no utilisation)."""
    values: dict[str, float] = {}
    with contextlib.suppress(nvml.NVMLError):
        used = nvml.nvmlDeviceGetMemoryInfo(handle)
        values["memory_usage_megabytes"] = used.used / _MIB
        values["memory_usage_percentage"] = 100 * used.used / used.total
    with contextlib.suppress(nvml.NVMLError):
        values["utilization_percentage"] = nvml.nvmlDeviceGetUtilizationRates(handle).gpu
    return values


def _gpu_handles() -> list[tuple[Any, Any]]:
    """NVML handles of the visible GPUs; empty without nvidia-ml-py or a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no package, no driver, no permission: no GPU curves
        return []
