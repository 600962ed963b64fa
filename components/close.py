"""Whatever happened: what a killed pod left open in MLflow is closed, with the reason."""

from kfp import dsl

from components.images import image


@dsl.component(base_image=image("data"), install_kfp_package=False)
def close(storage: str, status: dsl.PipelineTaskFinalStatus):
    """The exit handler. The state it is given can be "Running" inside loops, so it looks at the runs
    instead.
    """
    from appo.closing import close_runs

    print(f"pipeline: {status.state} {status.error_message or ''}")
    for name, outcome in close_runs(storage).items():
        print(f"{name}: {outcome}")
