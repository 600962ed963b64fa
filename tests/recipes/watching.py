"""In each process of a training that a test starts: lifts accelerate's refusal, and writes down what really ran.

Told by APPO_TEST_WATCH: JSON with the layout and the folder for what is seen. Reaches launched processes by way of
`tests/recipes/site/sitecustomize.py`; a training in the test's own process is watched by `watched` directly.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

SITE = Path(__file__).parent / "site"
REPOSITORY = Path(__file__).parents[2]
VARIABLE = "APPO_TEST_WATCH"
SHARDED = ("fsdp2", "zero2", "zero3")


def watch(trainer_module: Any, put: Callable[[Any, str, Any], None] = setattr) -> None:
    """Have every trainer's first step checked and noted. put: `setattr`, or one that is undone."""
    about = json.loads(os.environ[VARIABLE])
    if about["layout"] in SHARDED:
        from tests.cpu_layouts import install

        install()
    trainer = trainer_module.VideoGRPOTrainer
    step = trainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 0:
            _note(self, about["layout"], Path(about["folder"]))
        return step(self, *args, **kwargs)

    put(trainer, "training_step", training_step)


def _note(trainer: Any, layout: str, folder: Path) -> None:
    policy = trainer._policy()
    if layout in SHARDED:
        from tests.cpu_layouts import assert_ran

        assert_ran(trainer, layout)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    seen = {
        "layout": layout,
        "processes": trainer.accelerator.num_processes,
        "distributed": str(trainer.accelerator.distributed_type.value),
        "wrapped": [kind.__name__ for kind in type(trainer.model_wrapped).__mro__],
        "policy": [kind.__name__ for kind in type(policy).__mro__],
        "trained": sorted({str(parameter.dtype) for parameter in trained}),
        "checkpointing": bool(policy.is_gradient_checkpointing),
        "adapters": hasattr(policy, "peft_config"),
        "rows": trainer.args.per_device_train_batch_size,
        "learning_rate": trainer.args.learning_rate,
        "completion_tokens": trainer.args.max_completion_length,
        "completions": trainer.args.num_generations,
    }
    (folder / f"{trainer.settings.algorithm}-{trainer.accelerator.process_index}.json").write_text(
        json.dumps(seen)
    )


@contextmanager
def watched(layout: str, processes: int, folder: Path) -> Iterator[Callable[[], dict[str, list[dict]]]]:
    """Trainings inside run on `processes` processes and are watched; yields what was seen, by algorithm.

    Told to them as torchrun's variables tell a pod of a TrainJob.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        patch.setenv(VARIABLE, json.dumps({"layout": layout, "folder": str(folder)}))
        patch.setenv("PYTHONPATH", f"{SITE}{os.pathsep}{REPOSITORY}")
        patch.setenv("PET_NPROC_PER_NODE", str(processes))
        patch.setenv("OMP_NUM_THREADS", "1")
        if layout in SHARDED:
            from tests.cpu_layouts import lifted

            stack.enter_context(lifted())  # on the launching side
        if processes == 1:
            import appo.training.trainer

            watch(appo.training.trainer, patch.setattr)

        def seen() -> dict[str, list[dict]]:
            found: dict[str, list[dict]] = {}
            for path in sorted(folder.glob("*.json")):
                found.setdefault(path.stem.rpartition("-")[0], []).append(json.loads(path.read_text()))
            return found

        yield seen
