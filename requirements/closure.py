"""Part of a lock that some of appo's extras need: `python requirements/closure.py EXTRA... > requirements/data.lock`.

Reads the requirements of installed packages, so it runs in the environment of requirements/cpu.lock.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCK = Path(__file__).with_name("cpu.lock")


def main(extras: list[str]) -> None:
    locked = {canonicalize_name(line.split("==")[0]): line for line in LOCK.read_text().splitlines() if line}
    wanted: set[str] = {"setuptools"}
    waiting: list[tuple[str, tuple[str, ...]]] = [("appo", tuple(extras))]
    seen = set(waiting)
    while waiting:
        name, options = waiting.pop()
        try:
            needs = [Requirement(text) for text in requires(name) or ()]
        except PackageNotFoundError:  # left out of the lock on purpose
            continue
        for need in needs:
            if need.marker and not any(need.marker.evaluate({"extra": extra}) for extra in (*options, "")):
                continue
            found = (canonicalize_name(need.name), tuple(sorted(need.extras)))
            if found[0] in locked and found not in seen:
                seen.add(found)
                waiting.append(found)
                wanted.add(found[0])
    sys.stdout.write("".join(f"{locked[name]}\n" for name in sorted(wanted)))


if __name__ == "__main__":
    main(sys.argv[1:])
