"""The paper's published numbers, to stand beside one's own and marked as the paper's.

APPO, CVPR 2026 (arXiv 2602.23823): main results, supplement Tables A, C, D, E, F. Nothing here was measured
by us.
"""

from __future__ import annotations

SOURCE = "Du, Zhou, Chen, Hu: APPO, CVPR 2026, arXiv 2602.23823"

# average of SEED-Bench-R1 L1-L3, NExT-GQA mIoU, VSI-Bench, NExT-QA; percent
MAIN_COLUMNS = ("SEED-Bench-R1", "NExT-GQA mIoU", "VSI-Bench", "NExT-QA")
MAIN = {
    "3B": {
        "grpo": (34.0, 10.3, 34.8, 74.2),
        "dapo": (35.3, 10.6, 36.7, 76.1),
        "appo": (37.2, 11.1, 38.2, 76.4),
    },
    "7B": {
        "grpo": (48.9, 32.0, 35.9, 78.4),
        "dapo": (50.0, 32.4, 36.6, 79.9),
        "appo": (50.5, 32.9, 36.9, 79.6),
    },
}

# share of samples by distance in seconds between the frames that right and wrong completions look at
TABLE_A_BINS = ("0 s", "0-3 s", "3-6 s", "6-9 s", "9-12 s", "12-15 s", "> 15 s")
TABLE_A = (20.1, 23.5, 17.0, 12.6, 7.8, 6.2, 12.8)
TABLE_A_WHERE = "NExT-GQA test"

# thousands of samples of the training subset
TABLE_C = {"LLaVA-Video": 5, "STAR": 11, "Perception Test": 6, "NExT-QA": 5, "CLEVRER": 6}

# selection strategies on SEED-Bench-R1 L1, L2, L3; percent
TABLE_D = {"hard": (49.1, 50.7, 48.4), "soft": (50.5, 51.3, 49.3), "all": (50.2, 50.9, 47.3)}

# standard deviation over five seeds; points
TABLE_E_COLUMNS = ("L1", "L2", "L3", "Perception Test", "MVBench")
TABLE_E = {"3B": (0.238, 0.319, 0.279, 0.301, 0.257), "7B": (0.103, 0.183, 0.201, 0.163, 0.095)}

# samples per second: DAPO, APPO, ratio
TABLE_F = {"3B, 30 frames": (0.325, 0.264, 0.81), "7B, 16 frames": (0.462, 0.429, 0.93)}
