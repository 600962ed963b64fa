"""A recipe -> the same run once, small in everything but the model: does it fit, how long does each part take?

The recipe's architecture at full width and depth from its published configuration, random weights in bfloat16, adapters,
one video of the recipe's frames and pixels, a handful of tokens and completions, on this machine's CPU. What runs is the
run's own code. In reading order: `smaller` (what stays of the recipe), `stages` (each a process of its own), `meter`
(seconds and memory of a process), `run` (one stage after another, beside the plan's figures).
"""

from appo.rehearsal.run import Phase, Rehearsal, RehearsalError, rehearse, table

__all__ = ["Phase", "Rehearsal", "RehearsalError", "rehearse", "table"]
