"""Algorithms: rewards of a group -> advantages of its tokens, and the settings of the loss.

`base` (registry and settings), one file per algorithm (`grpo`, `dapo`, `appo`, `pa_grpo`), then the tensor
code they share: `advantages`, `overlong`, `spans`; `judge` scores PA-GRPO's observations. Importing this
package does not import torch.
"""

from appo.policy.base import (
    Algorithm,
    PolicySettings,
    RewardStream,
    algorithms,
    register,
    settings_for,
)

__all__ = ["Algorithm", "PolicySettings", "RewardStream", "algorithms", "register", "settings_for"]
