"""A recipe's `policy` section -> the settings of one algorithm, every null filled in.

The registry: an algorithm is one file of this folder with one decorated class (docs/new_algorithm.md). Free
of torch, so that recipes can be shown and pipelines compiled without it; `advantages` holds the tensor code.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, TypeVar

from appo.errors import SettingError

if TYPE_CHECKING:
    from appo.config import Policy

LossKind = Literal["grpo", "dapo"]
# The reward under which the soft overlong punishment is added; it alone makes no completion rewarded.
OVERLONG = "overlong"


@dataclass(frozen=True, slots=True)
class RewardStream:
    """Rewards that are summed up, normalised within the group, and credited to some of the tokens.

    rewards: reward function -> weight. tags: the spans that take this stream's advantage, e.g.
    ("observation",); empty: every token that no other stream names.
    """

    name: str
    rewards: Mapping[str, float]
    tags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PolicySettings:
    """What the trainer needs to know of an algorithm; nothing is left to a default.

    loss: "grpo" averages over a completion's tokens, then over completions; "dapo" over all tokens of the
    batch (TRL's `loss_type` has both under these names). epsilon_low, epsilon_high: the ratio is clipped to
    [1 - low, 1 + high]. overlong_buffer: tokens over which the soft punishment grows, 0 for none.
    """

    algorithm: str
    beta: float
    epsilon_low: float
    epsilon_high: float
    loss: LossKind
    uses_perception_weights: bool
    streams: tuple[RewardStream, ...]
    dynamic_sampling: bool
    dynamic_sampling_max_rounds: int
    mask_truncated: bool
    overlong_buffer: int

    @property
    def reward_names(self) -> tuple[str, ...]:
        """Every reward function that some stream reads, each once, in the order of the streams."""
        return tuple(dict.fromkeys(name for stream in self.streams for name in stream.rewards))

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags whose token spans the advantages depend on; empty where all tokens share one."""
        return tuple(dict.fromkeys(tag for stream in self.streams for tag in stream.tags))


class Algorithm:
    """An algorithm's own values. A subclass changes what differs; a value in the recipe overrides it."""

    name: ClassVar[str]
    beta: ClassVar[float] = 0.0
    epsilon_low: ClassVar[float] = 0.2
    epsilon_high: ClassVar[float] = 0.2
    loss: ClassVar[LossKind] = "dapo"
    uses_perception_weights: ClassVar[bool] = False

    def streams(self, reward_weights: Mapping[str, float]) -> tuple[RewardStream, ...]:
        """How the recipe's `policy.reward_weights` become streams: one sum for all tokens by default."""
        return (RewardStream("reward", dict(reward_weights)),)


_REGISTRY: dict[str, type[Algorithm]] = {}
_A = TypeVar("_A", bound=type[Algorithm])


def register(name: str) -> Callable[[_A], _A]:
    """Class decorator: make an algorithm known under the name that recipes use. A name is taken once."""

    def enter(algorithm: _A) -> _A:
        if name in _REGISTRY:
            raise ValueError(f"algorithm {name!r}: already registered by {_REGISTRY[name].__module__}")
        algorithm.name = name
        _REGISTRY[name] = algorithm
        return algorithm

    return enter


def algorithms() -> tuple[str, ...]:
    """Names of all algorithms, sorted. The first call imports every file that registers one."""
    _import_all()
    return tuple(sorted(_REGISTRY))


# These need torch, or talk to servers; no algorithm is defined in them.
_NOT_ALGORITHMS = frozenset({"base", "advantages", "overlong", "spans", "judge"})


@cache
def _import_all() -> None:
    folder = Path(__file__).parent
    for file in sorted(folder.glob("*.py")):
        if file.stem != "__init__" and file.stem not in _NOT_ALGORITHMS:
            importlib.import_module(f"appo.policy.{file.stem}")


def settings_for(policy: Policy) -> PolicySettings:
    """The settings of `policy.algorithm`, with the recipe's own values where it gives any.

    Raises SettingError naming `policy.algorithm`, its value and the known names; or `policy.reward_weights`
    when a stream is left without a reward.
    """
    if policy.algorithm not in algorithms():
        raise SettingError(
            f"policy.algorithm={policy.algorithm!r}: unknown; known are {', '.join(algorithms())}"
        )
    algorithm = _REGISTRY[policy.algorithm]()
    streams = algorithm.streams(policy.reward_weights)
    for stream in streams:
        if not any(weight != 0 for weight in stream.rewards.values()):
            raise SettingError(
                f"policy.reward_weights={dict(policy.reward_weights)}: leaves the {stream.name} advantage of "
                f"{policy.algorithm} without any reward; give at least one a weight other than 0"
            )

    if policy.overlong_buffer:
        # Length is the whole completion's: whoever takes the rest of its tokens takes the punishment.
        streams = tuple(
            stream if stream.tags else replace(stream, rewards={**stream.rewards, OVERLONG: 1.0})
            for stream in streams
        )

    def own(value: float | None, default: float) -> float:
        return default if value is None else value

    return PolicySettings(
        algorithm=policy.algorithm,
        beta=own(policy.beta, algorithm.beta),
        epsilon_low=own(policy.epsilon_low, algorithm.epsilon_low),
        epsilon_high=own(policy.epsilon_high, algorithm.epsilon_high),
        loss=policy.loss or algorithm.loss,
        uses_perception_weights=(
            algorithm.uses_perception_weights
            if policy.perception_weights is None
            else policy.perception_weights
        ),
        streams=streams,
        dynamic_sampling=policy.dynamic_sampling,
        dynamic_sampling_max_rounds=policy.dynamic_sampling_max_rounds,
        mask_truncated=policy.mask_truncated,
        overlong_buffer=policy.overlong_buffer,
    )
