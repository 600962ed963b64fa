"""Results of `training_step --grow` -> a table and a figure: `python -m benchmarks.growth_figure FILES`.

Points are measured, lines are the arithmetic counts, scaled to the first arm's first point: where points
leave their line, something other than arithmetic decides.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"plain_dapo": "#b2182b", "plain_appo": "#ef8a62", "dapo": "#67a9cf", "appo": "#2166ac"}
AXES = {
    "frames": "raw frames",
    "completion": "longest completion, tokens",
    "generations": "completions per group",
}


def table(growth: Sequence[dict[str, Any]]) -> str:
    """Markdown: seconds by arm, and the measured and counted speed-up of the last arm over the first."""
    arms = list(growth[0]["seconds"])
    first, last = arms[0], arms[-1]
    lines = [
        f"| {growth[0]['what']} | {' | '.join(f'{arm}, s' for arm in arms)} | speed-up | counted |",
        "|---" * (len(arms) + 3) + "|",
    ]
    for entry in growth:
        seconds, counted = entry["seconds"], entry["counted"]
        lines.append(
            f"| {entry['size']} | {' | '.join(f'{seconds[arm]:.2f}' for arm in arms)} | "
            f"{seconds[first] / seconds[last]:.2f} | {counted[first] / counted[last]:.2f} |"
        )
    return "\n".join(lines)


def figure(results: Sequence[list[dict[str, Any]]], out: Path) -> None:
    """One panel for each thing that grows."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "appo"  # equal input, equal file
    from matplotlib import pyplot as plt

    drawing, axes = plt.subplots(1, len(results), figsize=(4 * len(results), 3.4), squeeze=False)
    for growth, panel in zip(results, axes[0], strict=True):
        arms = list(growth[0]["seconds"])
        sizes = [entry["size"] for entry in growth]
        scale = growth[0]["seconds"][arms[0]] / growth[0]["counted"][arms[0]]
        for arm in arms:
            colour = COLOURS.get(arm, "#555555")
            panel.plot(sizes, [entry["seconds"][arm] for entry in growth], "o", color=colour, label=arm)
            panel.plot(
                sizes, [entry["counted"][arm] * scale for entry in growth], "-", color=colour, alpha=0.5
            )
        panel.set(xlabel=AXES[growth[0]["what"]], xscale="log", yscale="log", xticks=sizes)
        panel.set_xticklabels(map(str, sizes))
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("scoring + update, s")
    axes[0][0].legend(title="points measured, lines counted", fontsize=8, title_fontsize=8)
    drawing.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(out, metadata={"Date": None})


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.growth_figure", description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", help="files that --grow wrote")
    parser.add_argument("--out", type=Path, default=Path("docs/figures/training_step.svg"))
    args = parser.parse_args(argv)
    results = [json.loads(path.read_text())["growth"] for path in args.results]
    for growth in results:
        print(table(growth), end="\n\n")
    figure(results, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
