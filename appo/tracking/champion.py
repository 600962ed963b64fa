"""Evaluated checkpoints -> the champion: which model is in use, and the decision that made it so.

MLflow's registry holds every promoted model as a version; the alias `champion` points at the one in use,
`previous` at the one before. A challenger takes over only when it is better by a stated margin beyond what
the seeds' noise explains. Nothing is ever deleted, so `roll_back` always has somewhere to go.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from appo.errors import SettingError, UserError

if TYPE_CHECKING:
    from appo.config import Recipe

CHAMPION, PREVIOUS = "champion", "previous"
LEFT = "appo.rolled_back"  # tag of a version that somebody went back from; its value says why
# A difference of two means over few seeds, in standard errors; 2 is the usual 95 %.
NOISE_ERRORS = 2.0


class ChampionError(UserError, RuntimeError):
    """The registry cannot do what was asked; says why and what to do."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One model over its seeds, scored on one manifest. uri: the checkpoint that would be used."""

    uri: str
    scores: tuple[float, ...]
    manifest_digest: str

    @property
    def mean(self) -> float:
        return fmean(self.scores)


@dataclass(frozen=True, slots=True)
class Decision:
    """promote: whether the challenger takes over. reason: in words, with the numbers it rests on."""

    promote: bool
    reason: str
    challenger_mean: float | None
    champion_mean: float | None
    difference: float | None
    needed: float | None
    noise: float | None
    margin: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


@dataclass(frozen=True, slots=True)
class ModelVersion:
    """A version of the registered model. uri: where its weights lie."""

    version: str
    uri: str
    tags: Mapping[str, str]


def unchanged(champion: ModelVersion | None, manifest_digest: str) -> bool:
    """Whether the champion was trained on this very data: a retraining then has nothing to learn."""
    return champion is not None and champion.tags.get("appo.manifest_digest") == manifest_digest


def decide(
    challenger: Contender, champion: Contender | None, *, margin: float, noise_errors: float = NOISE_ERRORS
) -> Decision:
    """Whether the challenger is better by `margin` beyond the noise of the seeds.

    scores in [0, 1], one a seed, of both on the same manifest. The difference must exceed margin +
    noise_errors standard errors of the difference of means. With one seed on both sides the noise cannot be
    known, and nothing but the margin is asked, which the reason says. No champion yet: promoted. Raises
    SettingError when the two were scored on different manifests, without scores, or for a negative margin.
    """
    if margin < 0:
        raise SettingError(f"margin={margin}: must be 0 or more")
    if not challenger.scores or (champion is not None and not champion.scores):
        raise SettingError("scores: are empty; evaluate champion and challenger first")
    if champion is None:
        reason = f"promoted: there was no champion; the challenger scores {challenger.mean:.4f}"
        return Decision(True, reason, challenger.mean, None, None, None, None, margin)
    if champion.manifest_digest != challenger.manifest_digest:
        raise SettingError(
            f"manifest: the champion was scored on {champion.manifest_digest[:12]}, the challenger on "
            f"{challenger.manifest_digest[:12]}; evaluate both on the same one"
        )
    difference = challenger.mean - champion.mean
    noise = _noise(challenger.scores, champion.scores)
    needed = margin + noise_errors * (noise or 0.0)
    promote = difference > needed
    seeds = f"{len(challenger.scores)} and {len(champion.scores)} seeds"
    said = (
        f"challenger {challenger.mean:.4f}, champion {champion.mean:.4f}: difference "
        f"{difference:+.4f}, needed more "
        f"than {needed:.4f} (margin {margin:.4f} + {noise_errors:g} x standard error "
        f"{'unknown' if noise is None else f'{noise:.4f}'}; {seeds})"
    )
    if noise is None:
        said += "; one seed on each side says nothing about noise, so only the margin was asked"
    reason = f"{'promoted' if promote else 'kept the champion'}: {said}"
    return Decision(promote, reason, challenger.mean, champion.mean, difference, needed, noise, margin)


def _noise(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Standard error of the difference of two means; a side with one seed borrows the other's deviation."""
    deviations = [stdev(scores) if len(scores) > 1 else None for scores in (first, second)]
    known = [d for d in deviations if d is not None]
    if not known:
        return None
    spreads = [d if d is not None else max(known) for d in deviations]
    return math.sqrt(spreads[0] ** 2 / len(first) + spreads[1] ** 2 / len(second))


class Registry:
    """The registered model `name` of one MLflow store."""

    def __init__(self, client: Any, name: str) -> None:
        self._client = client
        self.name = name

    def champion(self) -> ModelVersion | None:
        return self._by_alias(CHAMPION)

    def previous(self) -> ModelVersion | None:
        return self._by_alias(PREVIOUS)

    def _by_alias(self, alias: str) -> ModelVersion | None:
        from mlflow.exceptions import MlflowException

        try:
            found = self._client.get_model_version_by_alias(self.name, alias)
        except MlflowException as error:
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise
        return _version(found)

    def versions(self) -> list[ModelVersion]:
        """All versions, the newest first."""
        found = self._client.search_model_versions(f"name = '{self.name}'")
        return sorted((_version(v) for v in found), key=lambda v: -int(v.version))

    def left(self, manifest_digest: str) -> ModelVersion | None:
        """The version trained on this data that somebody rolled back from; a schedule must not undo that."""
        return next(
            (
                v
                for v in self.versions()
                if LEFT in v.tags and v.tags.get("appo.manifest_digest") == manifest_digest
            ),
            None,
        )

    def record(
        self,
        decision: Decision,
        challenger: Contender,
        *,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> ModelVersion:
        """Register the challenger with the decision as tags; move the aliases when it was promoted.

        A challenger that was refused is registered too, without an alias: its numbers are worth keeping.
        Doing this twice for the same weights and data makes one version.
        """
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        described = {
            "appo.manifest_digest": challenger.manifest_digest,
            "appo.score_mean": f"{challenger.mean:.6f}",
            "appo.scores": json.dumps(list(challenger.scores)),
            "appo.decision": decision.reason,
            **(tags or {}),
        }
        made = next(
            (
                v
                for v in self.versions()
                if v.uri == challenger.uri
                and v.tags.get("appo.manifest_digest") == challenger.manifest_digest
            ),
            None,
        )
        if made is None:
            made = _version(
                self._client.create_model_version(
                    self.name, challenger.uri, run_id=run_id, tags=described, description=decision.reason
                )
            )
        else:
            for name, value in described.items():
                self._client.set_model_version_tag(self.name, made.version, name, value)
        if decision.promote:
            self._promote(made)
        return made

    def _promote(self, version: ModelVersion) -> None:
        current = self.champion()
        if current is not None and current.version == version.version:
            return
        # The old champion is named first: a crash between the two leaves a champion and a way back.
        if current is not None:
            self._client.set_registered_model_alias(self.name, PREVIOUS, current.version)
        self._client.set_registered_model_alias(self.name, CHAMPION, version.version)

    def roll_back(self, reason: str = "") -> ModelVersion:
        """Swap champion and previous; the version left is marked, so that no retraining on its data brings it back.

        Raises ChampionError when there is no previous one.
        """
        current, previous = self.champion(), self.previous()
        if current is None or previous is None:
            raise ChampionError(f"{self.name}: has no previous champion to go back to")
        said = f"rolled back from version {current.version}" + (f": {reason}" if reason else "")
        self._client.set_model_version_tag(self.name, previous.version, "appo.rollback", said)
        if LEFT in previous.tags:
            self._client.delete_model_version_tag(self.name, previous.version, LEFT)
        went = f"left for version {previous.version}" + (f": {reason}" if reason else "")
        self._client.set_model_version_tag(self.name, current.version, LEFT, went)
        self._client.set_registered_model_alias(self.name, PREVIOUS, current.version)
        self._client.set_registered_model_alias(self.name, CHAMPION, previous.version)
        return previous

    def describe(self) -> str:
        """The champion, the one before and the last decisions, for a terminal."""
        champion, previous = self.champion(), self.previous()
        if champion is None:
            return f"{self.name}: no champion yet; the retrain pipeline makes the first"
        lines = [f"{self.name}"]
        for role, model in (("champion", champion), ("previous", previous)):
            if model is None:
                lines.append(f"  {role:<9} none")
                continue
            lines.append(
                f"  {role:<9} version {model.version}  score {model.tags.get('appo.score_mean', 'unknown')}"
            )
            lines.append(f"            weights  {model.uri}")
            lines.append(f"            manifest {model.tags.get('appo.manifest_digest', 'unknown')[:12]}")
            moved = model.tags.get("appo.rollback" if role == CHAMPION else LEFT)
            lines.append(f"            {moved or model.tags.get('appo.decision', '')}")
        refused = [
            v
            for v in self.versions()
            if v.version not in {champion.version, getattr(previous, "version", None)}
        ]
        lines += [f"  version {v.version}: {v.tags.get('appo.decision', '')}" for v in refused[:5]]
        return "\n".join(lines)


def _version(found: Any) -> ModelVersion:
    return ModelVersion(str(found.version), str(found.source), dict(found.tags or {}))


def open_registry(recipe: Recipe, run_dir: Path, *, kept: bool = False) -> Registry:
    """The registry of the recipe's MLflow store; the registered model is called like the experiment.

    run_dir: folder of mlflow.db, where neither the recipe nor MLFLOW_TRACKING_URI names a server. kept: refuse a
    local store that is not there, in place of making it. Raises MlflowAway.
    """
    from appo.tracking.tracker import open_kept, open_sink

    sink = (open_kept if kept else open_sink)(recipe, Path(run_dir))
    return Registry(sink.client, f"{recipe.tracking.experiment}-champion")
