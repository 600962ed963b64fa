"""Python runs this at the start of each process that has this folder in its path: the processes of a test's training.

It does nothing but wait for the trainer to be imported; `tests.recipes.watching` does the rest.
"""

import importlib.util
import os
import sys

TRAINER = "appo.training.trainer"


class AfterTrainer:
    """A finder that finds nothing itself: it has the trainer's module watched once it is there."""

    def find_spec(self, name, path=None, target=None):
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            from tests.recipes.watching import watch

            watch(module)

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("APPO_TEST_WATCH"):
    sys.meta_path.insert(0, AfterTrainer())
