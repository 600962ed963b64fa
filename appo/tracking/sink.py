"""Events of a journal -> calls of MLflow's client, each of them safe to repeat.

A start looks for its run key before it creates a run; metrics carry the time stamp they were measured at, and
the tracking store drops exact repetitions; files and tables are overwritten. Sending twice leaves one copy.
Steps that a resumed training makes again are left out where their numbers are there already (`steps_sent`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from appo.errors import UserError, one_line
from appo.tracking.journal import Event
from appo.tracking.locks import file_lock
from appo.tracking.secrets import scrub
from appo.tracking.steps_sent import StepsSent

# What MLflow's REST API takes in one log_batch call
_METRICS_A_CALL, _PARAMS_A_CALL, _TAGS_A_CALL = 900, 90, 90
_PARAM_CHARS, _TAG_CHARS = 6000, 5000
_REFUSALS = ("INVALID_PARAMETER_VALUE", "RESOURCE_DOES_NOT_EXIST", "BAD_REQUEST", "RESOURCE_ALREADY_EXISTS")
DELETED = "deleted"
# Without a kind MLflow's pages open on traces and prompts; this one opens on runs and curves.
_EXPERIMENT_TAGS = {
    "mlflow.experimentKind": "custom_model_development",
    "mlflow.note.content": "One run per algorithm, with a child per seed. Means over seeds stand on the parent runs "
    "(_mean, _std with n-1, _n); the report is an artifact of the run called comparison.",
}


class MlflowAway(UserError, RuntimeError):
    """MLflow does not answer, or has no store where one was named: the address and the remedy."""


class MlflowSink:
    """One MLflow address and experiment.

    uri: tracking URI. artifact_root: where a new experiment keeps its files (local stores only; a server
    decides for itself). lock_path: a file lock for local stores that several processes share.
    """

    def __init__(self, uri: str, experiment: str, artifact_root: Path | None, lock_path: Path | None) -> None:
        self.uri = uri
        self.experiment = experiment
        self._artifact_root = artifact_root
        self._lock_path = lock_path
        self._client: Any = None
        self._experiment_id: str | None = None
        self._steps = StepsSent(self._steps_of)

    @classmethod
    def at(cls, uri: str, experiment: str) -> MlflowSink:
        """The sink of an address; a SQLite file keeps its artifacts and its lock beside it."""
        if not uri.startswith("sqlite:///"):
            return cls(uri, experiment, None, None)
        folder = Path(uri.removeprefix("sqlite:///")).parent
        return cls(uri, experiment, folder / "mlartifacts", folder / ".mlflow.lock")

    def describe(self) -> dict[str, str]:
        """What a journal keeps of it, so that an upload finds the same store; passwords are not kept."""
        return {"uri": scrub(self.uri), "experiment": self.experiment}

    @property
    def connected(self) -> bool:
        """Whether MLflow's client was made, and its store answered."""
        return self._client is not None

    @property
    def client(self) -> Any:
        """MLflow's client, made at the first use. Raises MlflowAway when its store does not answer then."""
        if self._client is None:
            # One short attempt: waiting and trying again is the sender's work, and it does not block anyone.
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
            os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
            os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
            import logging

            logging.getLogger("alembic").setLevel(logging.WARNING)
            logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
            # The sender says once that the server is away; urllib3 would say it at every attempt.
            logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
            from mlflow import MlflowClient

            with self._locked():  # the first one on a new SQLite file also makes its tables
                try:
                    client = MlflowClient(tracking_uri=self.uri)
                    client.search_experiments(max_results=1)
                except ImportError:
                    raise
                except Exception as error:  # of the client, the network or the database
                    raise MlflowAway(
                        f"{scrub(self.uri)}: MLflow does not answer: {scrub(one_line(error))}; see that it runs, "
                        "or name another with tracking.uri or MLFLOW_TRACKING_URI"
                    ) from error
                self._client = client
        return self._client

    def apply(self, events: Sequence[Event], ids: dict[str, str]) -> list[tuple[Event, str]]:
        """Send `events` in order; `ids` maps run names to MLflow run ids and is completed on the way.

        Returns the events that MLflow refused for good, each with its reason. Raises whatever the client
        raises when the server cannot be reached; then everything may be sent again.
        """
        refused: list[tuple[Event, str]] = []
        batch: list[Event] = []
        for event in [*events, None]:
            full = sum(len(e["values"]) for e in batch) >= _METRICS_A_CALL
            if batch and (
                event is None or event["op"] != "metrics" or event["run"] != batch[0]["run"] or full
            ):
                self._attempt(batch, ids, refused)
                batch = []
            if event is None:
                break
            if event["op"] == "metrics":
                batch.append(event)
            else:
                self._attempt([event], ids, refused)
        return refused

    def _attempt(self, batch: list[Event], ids: dict[str, str], refused: list[tuple[Event, str]]) -> None:
        from mlflow.exceptions import MlflowException

        run = batch[0]["run"]
        if ids.get(run) == DELETED:
            refused += [(event, "the run was deleted in MLflow") for event in batch]
            return
        try:
            getattr(self, f"_{batch[0]['op']}")(batch if batch[0]["op"] == "metrics" else batch[0], ids)
        except MlflowException as error:
            if error.error_code not in _REFUSALS:
                raise
            if self._is_gone(ids.get(run)):
                ids[run] = DELETED
                refused += [(event, "the run was deleted in MLflow") for event in batch]
            else:
                refused += [(event, str(error)) for event in batch]
        except FileNotFoundError as error:  # an artifact that was removed before it could be sent
            refused += [(event, str(error)) for event in batch]

    def _is_gone(self, run_id: str | None) -> bool:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return False
        try:
            return bool(self.client.get_run(run_id).info.lifecycle_stage == "deleted")
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return True
            raise

    def _locked(self) -> AbstractContextManager[None]:
        return file_lock(self._lock_path) if self._lock_path else nullcontext()

    def experiment_id(self) -> str:
        """The experiment's id; made when there is none, brought back when it was deleted."""
        if self._experiment_id is None:
            injected = os.environ.get("MLFLOW_EXPERIMENT_ID")
            self._experiment_id = injected or self._find_or_make_experiment()
        return self._experiment_id

    def _find_or_make_experiment(self) -> str:
        from mlflow.exceptions import MlflowException

        client = self.client  # made before the lock is taken: making it takes the same lock
        with self._locked():
            found = client.get_experiment_by_name(self.experiment)
            if found is None:
                root = self._artifact_root
                location = (root / self.experiment).absolute().as_uri() if root else None
                try:
                    return str(
                        client.create_experiment(
                            self.experiment, artifact_location=location, tags=_EXPERIMENT_TAGS
                        )
                    )
                except MlflowException as error:
                    if error.error_code != "RESOURCE_ALREADY_EXISTS":
                        raise
                    found = client.get_experiment_by_name(self.experiment)  # another process was faster
            elif found.lifecycle_stage == "deleted":
                client.restore_experiment(found.experiment_id)
            return str(found.experiment_id)

    def find(self, tag: str, value: str) -> list[Any]:
        """Active runs of the experiment that carry this tag, the oldest first."""
        return list(
            self.client.search_runs(
                [self.experiment_id()], f"tags.`{tag}` = '{value}'", order_by=["attributes.start_time ASC"]
            )
        )

    # -- one method per kind of event ------------------------------------------------------------------

    def _start(self, event: Event, ids: dict[str, str]) -> None:
        tags = {name: value[:_TAG_CHARS] for name, value in event["tags"].items()}
        if event.get("attach"):
            ids[event["run"]] = event["attach"]
            self._set_tags(event["attach"], tags)
        else:
            ids[event["run"]] = self._find_or_make_run(event, tags, ids)
        self._params({"run": event["run"], "values": event["params"]}, ids)

    def _find_or_make_run(self, event: Event, tags: dict[str, str], ids: dict[str, str]) -> str:
        from mlflow.entities import RunStatus

        tags = {**tags, "appo.run_key": event["key"]}
        parent = event.get("parent_id") or ids.get(event.get("parent") or "")
        if parent and parent != DELETED:
            tags["mlflow.parentRunId"] = parent
        experiment_id = self.experiment_id()
        with self._locked():
            found = self.find("appo.run_key", event["key"])
            if not found:
                made = self.client.create_run(
                    experiment_id, start_time=event["time_ms"], tags=tags, run_name=event["name"]
                )
                # Two machines may do this at once without a common lock: both see both, and agree.
                found = sorted(
                    self.find("appo.run_key", event["key"]), key=lambda r: (r.info.start_time, r.info.run_id)
                ) or [made]
                if found[0].info.run_id != made.info.run_id:
                    self.client.delete_run(made.info.run_id)
                else:
                    self._steps.nothing_sent(made.info.run_id)
        run_id = str(found[0].info.run_id)
        if found[0].info.status != RunStatus.to_string(RunStatus.RUNNING):
            self.client.update_run(run_id, status="RUNNING")
        self._set_tags(run_id, tags)
        return run_id

    def _set_tags(self, run_id: str, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        items = [RunTag(name, value) for name, value in tags.items()]
        for start in range(0, len(items), _TAGS_A_CALL):
            self.client.log_batch(run_id, tags=items[start : start + _TAGS_A_CALL])

    def _tags(self, event: Event, ids: dict[str, str]) -> None:
        self._set_tags(ids[event["run"]], {k: v[:_TAG_CHARS] for k, v in event["values"].items()})

    def _params(self, event: Event, ids: dict[str, str]) -> None:
        """Parameters cannot be changed in MLflow: a retried pod's different values are noted in a tag."""
        from mlflow.entities import Param

        run_id = ids[event["run"]]
        wanted = {name: value[:_PARAM_CHARS] for name, value in event["values"].items()}
        if not wanted:
            return
        known = self.client.get_run(run_id).data.params
        changed = {n: v for n, v in wanted.items() if n in known and known[n] != v}
        items = [Param(name, value) for name, value in wanted.items() if name not in known]
        for start in range(0, len(items), _PARAMS_A_CALL):
            self.client.log_batch(run_id, params=items[start : start + _PARAMS_A_CALL])
        if changed:
            self._set_tags(run_id, {"appo.changed_params": json.dumps(changed, sort_keys=True)[:_TAG_CHARS]})

    def _metrics(self, batch: list[Event], ids: dict[str, str]) -> None:
        from mlflow.entities import Metric

        run_id = ids[batch[0]["run"]]
        metrics = [
            Metric(name, value, event["time_ms"], event["step"])
            for event in batch
            for name, value in event["values"].items()
            if not event.get("once") or self._steps.is_new(run_id, name, event["step"], event["time_ms"])
        ]
        for start in range(0, len(metrics), _METRICS_A_CALL):
            self.client.log_batch(run_id, metrics=metrics[start : start + _METRICS_A_CALL])

    def _steps_of(self, run_id: str, name: str) -> dict[int, int]:
        """Time stamps of the steps at which this metric stands in MLflow."""
        return {m.step: m.timestamp for m in self.client.get_metric_history(run_id, name)}

    def _artifact(self, event: Event, ids: dict[str, str]) -> None:
        path = Path(event["path"])
        if not path.exists():
            raise FileNotFoundError(f"{path}: is no longer there")
        send = self.client.log_artifacts if path.is_dir() else self.client.log_artifact
        send(ids[event["run"]], str(path), event.get("artifact_path"))

    def _text(self, event: Event, ids: dict[str, str]) -> None:
        self.client.log_text(ids[event["run"]], event["text"], event["artifact_file"])

    def _table(self, event: Event, ids: dict[str, str]) -> None:
        """A table as MLflow's UI browses it: a JSON file of columns and rows, named in a tag of the run."""
        run_id, name = ids[event["run"]], event["artifact_file"]
        self.client.log_dict(run_id, {"columns": event["columns"], "data": event["rows"]}, name)
        listed = json.loads(self.client.get_run(run_id).data.tags.get("mlflow.loggedArtifacts", "[]"))
        entry = {"path": name, "type": "table"}
        if entry not in listed:
            self._set_tags(run_id, {"mlflow.loggedArtifacts": json.dumps([*listed, entry])})

    def _dataset(self, event: Event, ids: dict[str, str]) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(
            name=event["name"],
            digest=event["digest"][:36],
            source_type="local",
            source=json.dumps({"uri": event["source"]}),
            profile=json.dumps(event.get("profile", {})),
        )
        tags = [InputTag("mlflow.data.context", event["context"])]
        self.client.log_inputs(ids[event["run"]], [DatasetInput(dataset, tags)])

    def _model(self, event: Event, ids: dict[str, str]) -> None:
        """A checkpoint as LoggedModel: the weights stay where they are, it knows address and metrics."""
        run_id = ids[event["run"]]
        known = self.client.search_logged_models(
            [self.client.get_run(run_id).info.experiment_id],
            f"name = '{event['name']}' AND source_run_id = '{run_id}'",
        )
        if known:
            model_id = known[0].model_id
        else:
            model = self.client.create_logged_model(
                self.client.get_run(run_id).info.experiment_id,
                name=event["name"],
                source_run_id=run_id,
                tags={"appo.uri": event["uri"], **event["tags"]},
                model_type="checkpoint",
            )
            model_id = model.model_id
            self.client.finalize_logged_model(model_id, "READY")
            from mlflow.entities import LoggedModelOutput

            self.client.log_outputs(run_id, [LoggedModelOutput(model_id, step=event["step"])])
        for name, value in event["values"].items():
            self.client.log_metric(
                run_id, name, value, timestamp=event["time_ms"], step=event["step"], model_id=model_id
            )

    def _end(self, event: Event, ids: dict[str, str]) -> None:
        run_id = ids[event["run"]]
        if event.get("reason"):
            self._set_tags(run_id, {"appo.reason": event["reason"][:_TAG_CHARS]})
        if event.get("attached"):  # who injected the run also ends it
            return
        self.client.set_terminated(run_id, event["status"], event["time_ms"])
        if ids.get("parent", DELETED) != DELETED and event["run"] == "child":
            self._settle_parent(ids["parent"], event["time_ms"])

    def _settle_parent(self, parent_id: str, time_ms: int) -> None:
        """A parent is over when no child runs any more; it failed when one of them did."""
        children = self.client.search_runs(
            [self.client.get_run(parent_id).info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent_id}'"
        )
        states = {child.info.status for child in children}
        if states & {"RUNNING", "SCHEDULED"}:
            return
        self.client.set_terminated(parent_id, "FAILED" if "FAILED" in states else "FINISHED", time_ms)
