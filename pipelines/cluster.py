"""A compiled pipeline -> a run, or a recurring run, of any Kubeflow Pipelines server.

Authentication, in this order: a token (KFP_TOKEN), a browser session's cookies (KFP_COOKIES), the pod's own
service account, else none. Recurring runs cannot be changed on the server: `apply_schedule` compares and
replaces them.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from appo.errors import UserError, one_line
from pipelines import catalog
from pipelines.compile import compile_pipeline
from pipelines.parameters import fitting, overrides_of

POD_TOKEN = Path("/var/run/secrets/kubeflow/pipelines/token")
DIGEST = "appo-digest: "
TIMEOUT_S = (5, 10)  # to connect, and to wait for an answer; urllib3 tries either four times
ATTEMPTS = 3


class ClusterError(UserError, RuntimeError):
    """The server refused, or could not be reached; the message says what was asked."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be run: a pipeline, its parameters, and how it shows on the server."""

    pipeline: str
    recipe: str
    overrides: Sequence[str] = ()
    storage: str = "s3://appo/runs"
    experiment: str = "appo"
    service_account: str = "appo-launcher"
    images: str = ""
    tag: str = ""
    # What Kubeflow's own MLflow plugin is told: {"experiment_name": ...} or {"disabled": True}; None: its
    # default.
    mlflow: Mapping[str, Any] | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Refuse what the first step would, as far as can be seen from here; asks no server but a store.

        Raises RecipeError, SettingError for a parameter, UnknownPipeline, CheckFailed with all that checks find.
        """
        from appo import checks
        from appo.config import load_recipe

        given = fitting(
            catalog.build(self.pipeline, load_recipe(self.recipe, self.overrides)), self.parameters
        )
        resolved = load_recipe(self.recipe, [*self.overrides, *overrides_of(given)])
        checks.refuse(checks.submitted(resolved, given.get("variants", ())), checks.FROM_AFAR)

    def arguments(self) -> dict[str, Any]:
        """Values of the pipeline's parameters; the recipe goes as text when the images cannot know it.

        Raises RecipeError for a recipe or parameters of the data that the first step would refuse.
        """
        from appo.config import load_recipe, recipe_names

        load_recipe(self.recipe, [*self.overrides, *overrides_of(self.parameters)])
        shipped = self.recipe in recipe_names() and not self.overrides
        recipe = self.recipe if shipped else load_recipe(self.recipe, self.overrides).to_json()
        return {"recipe": recipe, "storage": self.storage, **self.parameters}

    def spec(self) -> dict[str, Any]:
        """The compiled pipeline, as the server takes it."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "pipeline.yaml"
            compile_pipeline(
                self.pipeline,
                path,
                recipe=self.recipe,
                overrides=self.overrides,
                images=self.images,
                tag=self.tag,
            )
            pipeline, *platform = yaml.safe_load_all(path.read_text(encoding="utf-8"))
        return {"pipeline_spec": pipeline, "platform_spec": platform[0]} if platform else pipeline


def connect(endpoint: str | None, namespace: str) -> Any:
    """A client of the server at `endpoint` (default: KF_PIPELINES_ENDPOINT, else the pod's own cluster).

    Raises ClusterError when the server does not answer within a minute.
    """
    import warnings

    import kfp
    import kfp_server_api
    from kfp.client import ServiceAccountTokenVolumeCredentials

    class Client(kfp.Client):
        """The SDK's own asks five times, waits for ever each time, and writes a traceback of each."""

        def get_kfp_healthz(self, sleep_duration: int = 1) -> Any:
            left = ATTEMPTS
            while True:
                left -= 1
                try:
                    return self._healthz_api.healthz_service_get_healthz(_request_timeout=TIMEOUT_S)
                except kfp_server_api.ApiException:
                    if not left:
                        raise
                time.sleep(sleep_duration)

    credentials = ServiceAccountTokenVolumeCredentials(str(POD_TOKEN)) if POD_TOKEN.exists() else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            client = Client(
                host=endpoint,
                namespace=namespace,
                existing_token=os.environ.get("KFP_TOKEN"),
                cookies=os.environ.get("KFP_COOKIES"),
                credentials=credentials,
            )
            client.get_kfp_healthz()
        except Exception as error:  # the client raises whatever its transport does
            place = endpoint or os.environ.get("KF_PIPELINES_ENDPOINT") or "this cluster"
            raise ClusterError(
                f"{place}: Kubeflow Pipelines does not answer: {one_line(error)}; "
                "give its address with --endpoint, and KFP_TOKEN or KFP_COOKIES where it asks who you are"
            ) from error
    _limit_waiting(client._run_api.api_client)
    return client


def _limit_waiting(api: Any) -> None:
    """Give every request of the generated API a time limit; by itself it has none."""
    call = api.call_api

    def limited(*arguments: Any, **named: Any) -> Any:
        return call(*arguments, **{**named, "_request_timeout": named.get("_request_timeout") or TIMEOUT_S})

    api.call_api = limited


def submit(client: Any, order: Order, *, name: str, namespace: str) -> str:
    """Start a run; returns its id. Uses the generated API: the client's own method knows no plugin
    settings.
    """
    import kfp_server_api

    spec, arguments = (
        order.spec(),
        order.arguments(),
    )  # what is wrong with these is said before anything is made
    run = kfp_server_api.V2beta1Run(
        display_name=name,
        experiment_id=_experiment(client, order.experiment, namespace),
        pipeline_spec=spec,
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=arguments),
        service_account=order.service_account,
        plugins_input=None if order.mlflow is None else {"mlflow": dict(order.mlflow)},
    )
    return _asked(f"run {name}", client._run_api.run_service_create_run, run=run).run_id


def apply_schedule(client: Any, order: Order, *, name: str, cron: str, namespace: str) -> str:
    """Make the server hold exactly one recurring run `name` that does what `order` says.

    cron: six fields, seconds first. Returns "unchanged", "created" or "replaced". The new one is made before
    the old ones go, so that a failure leaves a schedule; at most one run at a time, and missed ones are not
    caught up.
    """
    import kfp_server_api

    check_cron(cron)
    spec, arguments = order.spec(), order.arguments()
    experiment = _experiment(client, order.experiment, namespace)
    digest = hashlib.sha256(
        json.dumps([spec, arguments, cron, order.service_account, experiment], sort_keys=True).encode()
    ).hexdigest()[:16]
    found = list_schedules(client, namespace, name=name)
    if len(found) == 1 and found[0].description == DIGEST + digest and found[0].status != "DISABLED":
        return "unchanged"
    made = kfp_server_api.V2beta1RecurringRun(
        display_name=name,
        description=DIGEST + digest,
        experiment_id=experiment,
        mode=kfp_server_api.RecurringRunMode.ENABLE,
        max_concurrency="1",
        no_catchup=True,
        pipeline_spec=spec,
        runtime_config=kfp_server_api.V2beta1RuntimeConfig(parameters=arguments),
        service_account=order.service_account,
        trigger=kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=cron)),
    )
    api = client._recurring_run_api
    _asked(f"schedule {name}", api.recurring_run_service_create_recurring_run, recurring_run=made)
    for old in found:
        _asked(f"schedule {name}", client.delete_recurring_run, old.recurring_run_id)
    return "replaced" if found else "created"


def check_cron(cron: str) -> None:
    """Raise ClusterError for what Kubeflow would refuse or, worse, read otherwise."""
    if len(cron.split()) != 6:
        raise ClusterError(f"cron {cron!r}: give six fields, seconds first, such as '0 0 3 * * 1'")


def list_schedules(client: Any, namespace: str, *, name: str | None = None) -> list[Any]:
    """All recurring runs of the namespace, or those called `name`."""
    found: list[Any] = []
    token = ""
    while True:
        page = _asked(
            "list of schedules",
            client.list_recurring_runs,
            page_token=token,
            page_size=100,
            namespace=namespace,
        )
        found += [run for run in page.recurring_runs or () if name is None or run.display_name == name]
        token = page.next_page_token
        if not token:
            return found


def delete_schedule(client: Any, name: str, *, namespace: str) -> int:
    """Delete every recurring run called `name`; returns how many there were."""
    found = list_schedules(client, namespace, name=name)
    for run in found:
        _asked(f"schedule {name}", client.delete_recurring_run, run.recurring_run_id)
    return len(found)


def _experiment(client: Any, name: str, namespace: str) -> str:
    return _asked(f"experiment {name}", client.create_experiment, name, namespace=namespace).experiment_id


def _asked(what: str, call: Any, *arguments: Any, **named: Any) -> Any:
    import kfp_server_api
    from urllib3.exceptions import HTTPError

    try:
        return call(*arguments, **named)
    except kfp_server_api.ApiException as error:
        raise ClusterError(
            f"{what}: the server answered {error.status} {error.reason}: {one_line(error.body)}"
        ) from error
    except HTTPError as error:
        raise ClusterError(
            f"{what}: the server does not answer any more: {one_line(error)}; try again"
        ) from error
