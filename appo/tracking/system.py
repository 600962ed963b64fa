"""Load and memory of this machine and its GPUs -> metrics under MLflow's own names, every few seconds.

MLflow's own monitor writes straight to the server and loses what it cannot send; this one uses the journal.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

_PERIOD_S = 10.0
_MIB = 1024 * 1024


class SystemMetrics:
    """A thread that samples until `stop`. log: called with (values, step=sample number)."""

    def __init__(self, log: Callable[..., Any], *, period_s: float = _PERIOD_S) -> None:
        self._log = log
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
        sample = 0
        while not self._stop.wait(self._period_s):
            memory = psutil.virtual_memory()
            values = {
                "system/cpu_utilization_percentage": psutil.cpu_percent(interval=None),
                "system/system_memory_usage_megabytes": memory.used / _MIB,
                "system/system_memory_usage_percentage": memory.percent,
                "system/process_memory_usage_megabytes": process.memory_info().rss / _MIB,
            }
            for index, (nvml, handle) in enumerate(gpus):
                used = nvml.nvmlDeviceGetMemoryInfo(handle)
                rates = nvml.nvmlDeviceGetUtilizationRates(handle)
                values[f"system/gpu_{index}_utilization_percentage"] = rates.gpu
                values[f"system/gpu_{index}_memory_usage_megabytes"] = used.used / _MIB
                values[f"system/gpu_{index}_memory_usage_percentage"] = 100 * used.used / used.total
            self._log(values, step=sample)
            sample += 1

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(timeout=1)


def _gpu_handles() -> list[tuple[Any, Any]]:
    """NVML handles of the visible GPUs; empty without nvidia-ml-py or a driver."""
    try:
        import pynvml

        pynvml.nvmlInit()
        return [(pynvml, pynvml.nvmlDeviceGetHandleByIndex(i)) for i in range(pynvml.nvmlDeviceGetCount())]
    except Exception:  # no package, no driver, no permission: no GPU curves
        return []
