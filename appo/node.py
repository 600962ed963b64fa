"""One pod of a TrainJob -> its share of one training: `python -m appo.node`, told by the variable APPO_STEP.

The same step as in a pipeline's own pod; torchrun's variables say which machine this is. Ends with status 75
when it was stopped and has saved, so that whoever watches can tell that from a failure.
"""

from __future__ import annotations

import json
import os
import sys

from appo import plan, steps
from appo.errors import status_of
from appo.plan import Training


def main() -> int:
    step = json.loads(os.environ["APPO_STEP"])
    from appo.training.launch import EXIT_INTERRUPTED
    from appo.training.run import Interrupted

    try:
        steps.train(
            plan.resolve(step["recipe"]),
            step["storage"],
            Training(step["algorithm"], int(step["seed"]), step.get("variant", "")),
            manifest=step["manifest"],
            model=step["model"],
        )
    except Interrupted as stopped:
        print(stopped, flush=True)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(status_of(main))
