"""Real processes under accelerate: the same training on one process and on two, by DDP and by FSDP."""

from __future__ import annotations

import json
import subprocess
from importlib import resources
from pathlib import Path

import pytest
import yaml

from appo.training.checkpoints import newest_checkpoint
from tests.training.conftest import Bench, largest_difference, long

# Two processes (of one thread each) sum in another order than one, and Adam divides by the gradient's own size, so that
# rounding of a gradient near zero moves a weight by up to a part of a step; two steps of SLOW add up to 2e-4.
CLOSE = 2e-5
SLOW = "training.learning_rate=1e-4"
REWARD = """
import sys
import appo.training.rewarding
from tests.training.conftest import pseudo_accuracy
appo.training.rewarding.reward_functions = lambda _: {"accuracy": pseudo_accuracy}
from appo.training.launch import main
sys.exit(main(sys.argv[1]))
"""

# accelerate makes FSDP of GPUs only. The sharding itself (torch's fully_shard) runs on CPUs; this lets it.
FSDP_ON_CPU = """
from accelerate import state
make = state.AcceleratorState.__init__
def init(self, *args, fsdp_plugin=None, **kwargs):
    make(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == state.DistributedType.MULTI_CPU:
        self.distributed_type = state.DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin
        state.PartialState._shared_state["distributed_type"] = self.distributed_type
state.AcceleratorState.__init__ = init
from torch.distributed.fsdp import FSDPModule
from appo.training.trainer import VideoGRPOTrainer
step = VideoGRPOTrainer.training_step
def training_step(self, *args, **kwargs):
    assert isinstance(self._policy(), FSDPModule), "the model is not sharded"
    return step(self, *args, **kwargs)
VideoGRPOTrainer.training_step = training_step
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
    config: Path | None = None,
    before: str = "",
    fails: bool = False,
) -> str:
    """Train APPO on two processes; the reward of the other tests is installed in each of them.

    before: Python that they run first. Returns what they printed.
    """
    from appo.training.launch import launch_command, write_job

    recipe = bench.recipe(*overrides)
    job = write_job(
        bench.folder / f"{name}.json",
        recipe,
        algorithm="appo",
        seed=0,
        manifest_path=bench.manifest,
        model_path=str(bench.model),
        out=bench.folder / name,
        progress=False,
    )
    script = bench.folder / "train_process.py"
    script.write_text(before + REWARD, encoding="utf-8")
    command = launch_command(recipe, job, processes=2)
    command[command.index("-m", 3) :] = [str(script), str(job)]
    if config is not None:
        command[command.index("--config_file") + 1] = str(config)
    root = Path(__file__).parents[2]
    import os

    env = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=root, env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert (done.returncode != 0) == fails, done.stdout[-3000:] + done.stderr[-60000:]
    if fails:
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


@pytest.mark.slow
def test_fsdp_on_two_processes_equals_one(bench: Bench):
    shipped = yaml.safe_load((resources.files("appo.recipes") / "accelerate" / "fsdp2.yaml").read_text())
    config = bench.folder / "fsdp_on_cpu.yaml"
    config.write_text(yaml.safe_dump({**shipped, "use_cpu": True, "mixed_precision": "no"}))
    bench.train("appo", SLOW, name="one")
    launched(bench, "two", SLOW, config=config, before=FSDP_ON_CPU)
    assert largest_difference(bench.weights("one"), bench.weights("two")) < CLOSE


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2", "zero3"])
def test_shipped_configurations_are_accelerates(name: str):
    from accelerate.commands.config.config_args import load_config_from_file

    path = resources.files("appo.recipes") / "accelerate" / f"{name}.yaml"
    config = load_config_from_file(str(path))
    kinds = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}
    assert str(config.distributed_type.value) == kinds[name]
    if name == "fsdp2":
        from accelerate.utils import FullyShardedDataParallelPlugin

        settings = {k.removeprefix("fsdp_"): v for k, v in config.fsdp_config.items()}
        known = FullyShardedDataParallelPlugin.__dataclass_fields__
        assert settings.pop("version") == 2
        assert set(settings) - {"offload_params"} <= set(known)  # the launcher's own name for cpu_offload
    if name.startswith("zero"):
        from accelerate.utils import DeepSpeedPlugin

        assert set(config.deepspeed_config) <= set(DeepSpeedPlugin.__dataclass_fields__) | {"zero3_init_flag"}
        assert config.deepspeed_config["zero_stage"] == int(name[-1])


def test_a_job_file_holds_the_whole_training(bench: Bench):
    from appo.training.launch import write_job

    job = write_job(bench.folder / "job.json", bench.recipe(), algorithm="appo", seed=3, out=bench.folder)
    values = json.loads(job.read_text())
    assert values["seed"] == 3
    assert json.loads(values["recipe"])["name"] == "demo"
