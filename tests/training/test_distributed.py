"""Real processes under accelerate: the same training on one process and on two; `test_matrix` has the other layouts."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from appo.training.checkpoints import newest_checkpoint
from tests.tiers import long
from tests.training.conftest import Bench, largest_difference, said

# Two processes (of one thread each) sum in another order than one, and Adam divides by the gradient's own size, so that
# rounding of a gradient near zero moves a weight by up to a part of a step; two steps of SLOW add up to 2e-4.
CLOSE = 2e-5
SLOW = "training.learning_rate=1e-4"
START = """
from appo.startup import UNUSED_BY_TRAINING, heavy_imports
with heavy_imports(without=UNUSED_BY_TRAINING):
    import appo.training.trainer
"""
REWARD = """
import sys
import appo.training.rewarding
from tests.training.conftest import pseudo_accuracy
appo.training.rewarding.reward_functions = lambda _: {"accuracy": pseudo_accuracy}
from appo.training.launch import main
sys.exit(main(sys.argv[1]))
"""

# One process of the two is told to go, as if the other had not heard of it yet.
ONE_IS_TOLD = """
import os, signal
from appo.training.records import StepRecorder
ended = StepRecorder.on_step_end
def on_step_end(self, args, state, control, **kwargs):
    ended(self, args, state, control, **kwargs)
    if os.environ["RANK"] == "1" and state.global_step == 1:
        os.kill(os.getpid(), signal.SIGTERM)
StepRecorder.on_step_end = on_step_end
"""


def launched(
    bench: Bench,
    name: str,
    *overrides: str,
    algorithm: str = "appo",
    before: str = "",
    fails: bool | None = False,
) -> str:
    """Train on two processes; the reward of the other tests is installed in each of them.

    before: Python that they run first. fails: None where either end will do. Returns what they printed.
    """
    from appo.training.launch import launch_command, write_job

    recipe = bench.recipe(*overrides)
    job = write_job(
        bench.folder / f"{name}.json",
        recipe,
        algorithm=algorithm,
        seed=0,
        manifest_path=bench.manifest,
        model_path=str(bench.model),
        out=bench.folder / name,
        progress=False,
    )
    script = bench.folder / "train_process.py"
    script.write_text(START + before + REWARD, encoding="utf-8")
    command = launch_command(recipe, job, processes=2)
    command[command.index("-m", 3) :] = [str(script), str(job)]
    root = Path(__file__).parents[2]
    import os

    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=root, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert fails is None or (done.returncode != 0) == fails, said(done)
    if done.returncode != 0:
        return done.stdout + done.stderr
    assert json.loads((bench.folder / name / "summary.json").read_text())["processes"] == 2
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("one", "two"),
    [
        pytest.param(("training.gradient_accumulation_steps=2",), (), id="whole groups", marks=long),
        pytest.param(
            ("training.prompts_per_step=1", "training.gradient_accumulation_steps=2"),
            ("training.prompts_per_step=1",),
            id="one group over both processes",
        ),
    ],
)
def test_two_processes_equal_one_with_accumulation(bench: Bench, one: tuple[str, ...], two: tuple[str, ...]):
    bench.train("appo", SLOW, *one, name="one")
    launched(bench, "two", SLOW, *two)
    assert largest_difference(bench.weights("one"), bench.weights("two")) < CLOSE
    for a, b in zip(bench.metrics("one"), bench.metrics("two"), strict=True):
        assert a["reward"] == b["reward"]
        assert abs(a["grad_norm"] - b["grad_norm"]) < 1e-3 * a["grad_norm"] + 1e-6


@long
def test_two_processes_refill_each_for_itself(bench: Bench):
    """Processes that need other numbers of prompts draw in step, or the gathering of rewards would hang."""
    launched(bench, "two", SLOW, "policy.dynamic_sampling=true", "policy.dynamic_sampling_max_rounds=6")
    lines = bench.metrics("two")
    assert any(line["dynamic_sampling/prompts_drawn"] > 0 for line in lines)
    assert all(line["dynamic_sampling/groups_left"] == 0 for line in lines)


@long
def test_processes_stop_together_when_one_of_them_is_told_to(bench: Bench):
    launched(bench, "two", "training.max_steps=4", before=ONE_IS_TOLD, fails=True)
    assert (bench.folder / "two" / "INTERRUPTED").exists()
    assert newest_checkpoint(bench.folder / "two" / "checkpoints").name == "checkpoint-1"
    launched(bench, "two", "training.max_steps=4")
    assert [line["step"] for line in bench.metrics("two")] == [1, 2, 3, 4]


@long
def test_two_processes_with_an_engine_each_equal_one_with_accumulation(bench: Bench):
    """Colocated vLLM engines in both processes, weights handed over after each step."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    vllm = ("training.rollout=vllm_colocate", "training.vllm_max_model_len=256")
    launched(bench, "two", SLOW, *vllm)
    bench.train("appo", SLOW, "training.gradient_accumulation_steps=2", *vllm, name="one")
    assert largest_difference(bench.weights("one"), bench.weights("two")) < CLOSE
    for a, b in zip(bench.metrics("one"), bench.metrics("two"), strict=True):
        assert a["reward"] == b["reward"]
        assert a["completions/mean_length"] == b["completions/mean_length"]


@pytest.mark.parametrize("layout", ["fsdp2", "zero2", "zero3"])
def test_a_layout_that_cannot_run_here_is_refused_and_never_replaced(bench: Bench, layout: str):
    from appo.training.launch import LayoutError, launch_command

    recipe, job = bench.recipe(f"training.distributed={layout}"), bench.folder / "job.json"
    with pytest.raises(LayoutError, match=f"training.distributed={layout}: needs GPUs.*distributed=ddp"):
        launch_command(recipe, job, processes=2)
    with pytest.raises(LayoutError, match=f"training.distributed={layout}: shards over processes"):
        launch_command(recipe, job, processes=1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", ["ddp", "fsdp2", "zero2", "zero3"])
def test_configurations_are_accelerates(bench: Bench, layout: str, dtype: str):
    from accelerate.commands.config.config_args import load_config_from_file

    from appo.training.launch import launch_command
    from tests.cpu_layouts import lifted

    recipe = bench.recipe(f"training.distributed={layout}", f"model.dtype={dtype}")
    with lifted():
        command = launch_command(recipe, bench.folder / "job.json", processes=2)
    config = load_config_from_file(command[command.index("--config_file") + 1])
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert str(config.distributed_type.value) == kinds[layout]
    assert config.use_cpu  # this machine; false where there is a GPU
    if layout == "fsdp2":
        from accelerate.utils import FullyShardedDataParallelPlugin

        settings = {k.removeprefix("fsdp_"): v for k, v in config.fsdp_config.items()}
        known = FullyShardedDataParallelPlugin.__dataclass_fields__
        assert settings.pop("version") == 2
        assert set(settings) - {"offload_params"} <= set(known)  # the launcher's own name for cpu_offload
    if layout.startswith("zero"):
        own = json.loads(Path(config.deepspeed_config["deepspeed_config_file"]).read_text())
        assert own["zero_optimization"]["stage"] == int(layout[-1])
        assert own["bf16"] == {"enabled": "auto"}
    else:
        assert config.mixed_precision == ("bf16" if dtype == "bfloat16" else "no")


def test_a_job_file_holds_the_whole_training(bench: Bench):
    from appo.training.launch import write_job

    job = write_job(bench.folder / "job.json", bench.recipe(), algorithm="appo", seed=3, out=bench.folder)
    values = json.loads(job.read_text())
    assert values["seed"] == 3
    assert json.loads(values["recipe"])["name"] == "demo"
