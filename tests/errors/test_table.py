"""What people get wrong, one row each: the command's words -> words of the answer. Status 2, at most six lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.errors.conftest import answer, is_a_mistake

TRAIN = "train -r demo -m manifest.jsonl -o out"
ASSEMBLE = "data assemble -r demo -o out"
EVALUATE = "evaluate -r demo -m manifest.jsonl -o out --engine transformers"
SUBMIT = "pipeline submit -r demo --endpoint http://127.0.0.1:9"
RUN = "pipeline run -r demo -f run"
SEVEN = "-s model.path=Qwen/Qwen2.5-VL-7B-Instruct -s cluster.gpus_per_node=8 -s cluster.gpu_memory_gib=24"

ROWS = [
    # The command line itself.
    ("frobnicate", "No such command", "appo -h"),
    ("train", "Missing option '--recipe'", "appo train -h"),
    ("train --recipe", "--recipe"),
    ("score", "Missing argument"),
    (f"{TRAIN} --model model --seed x", "--seed", "integer"),
    (f"{TRAIN} --model model --seed -1", "--seed", "0"),
    ("ui --port 99999", "--port", "65535"),
    ("evaluate a=b a=c -r demo", "a=c", "is taken"),
    # Recipes and settings.
    ("recipe show dmeo", "'dmeo': unknown", "demo"),
    ("recipe show missing.yaml", "missing.yaml: no such recipe file"),
    ("recipe show folder", "'folder': unknown"),
    ("recipe show cut.yaml", "cut.yaml: is not valid YAML", "line 1"),
    ("validate bytes.bin", "bytes.bin: is not UTF-8 text"),
    ("recipe show demo -s a=[", "--set a=[: the value is not valid YAML"),
    ("recipe show demo -s description={{workflow.name}}", "description", "not valid YAML"),
    ("recipe show demo -s training.lr=1", "training.lr=1: unknown key", "learning_rate"),
    ("recipe show demo -s training.seeds=[1,1]", "training.seeds: 1 is given twice"),
    ("recipe show demo -s training.seeds=[-1]", "training.seeds: -1", "4294967295"),
    ("recipe show demo -s algorithms=[grpo,grpo]", "algorithms: grpo is given twice"),
    ("recipe show demo -s evaluation.benchmarks=[mvbnech]", "'mvbnech': unknown", "mvbench"),
    ("recipe show demo -s policy.overlong_buffer=99", "policy.overlong_buffer=99", "max_completion_length=20"),
    ("recipe show demo -s data.source=nowhere", "data.source='nowhere': unknown", "video_r1"),
    (f"{TRAIN} --model model --algorithm ppo", "'ppo' is no algorithm", "pa_grpo"),
    (f"{TRAIN} --model model -s training.seeds=[]", "training.seeds=[]", "at least one"),
    (f"{TRAIN} --model model -s training.prompts_per_step=3 -s policy.num_generations=3 "
     "-s training.gradient_accumulation_steps=2", "training.prompts_per_step=3", "2 accumulation steps", "change one"),
    ("data features -r demo -m manifest.jsonl --model model", "training.feature_cache_dir", "to a folder"),
    # Models.
    (TRAIN, "model.path=null", "--model"),
    (f"{TRAIN} --model nowhere", "nowhere: no such folder, and no hub name", "OWNER/NAME"),
    (f"{TRAIN} --model ~/model", "~/model: no such folder", "not expanded"),
    (f"{TRAIN} --model folder/model", "folder/model: no such folder"),
    (f"{TRAIN} --model manifest.jsonl", "manifest.jsonl: is a file"),
    (f"{TRAIN} --model folder", "folder: holds no config.json"),
    (f"{EVALUATE} folder", "folder: holds no config.json"),
    ("explain folder one -r demo -m manifest.jsonl", "folder: holds no config.json"),
    ("data features -r demo -m manifest.jsonl --model folder -s training.feature_cache_dir=f", "holds no config.json"),
    (f"{TRAIN} --model s3://bucket/model", "s3://bucket/model", "AWS_ACCESS_KEY_ID"),
    # Files.
    (f"{TRAIN} --model model -m missing.jsonl", "missing.jsonl: no such manifest", "appo data assemble"),
    (f"{TRAIN} --model model -m folder", "folder/manifest.jsonl: no such manifest"),
    (f"{TRAIN} --model model -m bytes.bin", "bytes.bin: is not UTF-8 text"),
    (f"{TRAIN} --model model -m cut.json", "cut.json, line 1"),
    ("explain model two -r demo -m manifest.jsonl", "'two': is not in manifest.jsonl", "one"),
    (f"{ASSEMBLE} -o manifest.jsonl/out", "--out", "is a file; name a folder"),
    (f"{ASSEMBLE} -o /proc/out", "--out", "/proc/out: cannot be written to"),
    (f"{ASSEMBLE} -s data.source=jsonl", "data.annotations=null", "--data"),
    (f"{ASSEMBLE} -s data.source=jsonl -s data.annotations=no.jsonl", "data.annotations=no.jsonl: no such file"),
    (f"{ASSEMBLE} -s data.source=jsonl -s data.annotations=bytes.bin", "bytes.bin: is not UTF-8 text"),
    (f"{ASSEMBLE} -s data.leakage={{'mvbench':'gone'}}", "data.leakage, mvbench=gone: no such file"),
    ("score nextgqa --annotations gone --predictions cut.json", "--annotations", "gone: no such file or folder"),
    ("score nextgqa --annotations folder --predictions gone", "--predictions", "gone: no such file"),
    ("score nextgqa --annotations folder --predictions folder", "--predictions", "folder: is a folder"),
    ("score nextgqa --annotations folder --predictions cut.json", "folder: holds none of test.csv"),
    ("score key_moment --annotations manifest.jsonl --predictions bytes.bin", "bytes.bin, line 1", "UTF-8"),
    (f"{EVALUATE} model -b nope", "'nope': unknown", "mvbench"),
    ("evaluate -r demo -o out model", "--manifest"),
    ("evaluate -r demo -o out model -b mvbench", "evaluation.annotations=null"),
    ("compare folder -r demo -o out -e folder", "folder/summary.json: is missing"),
    ("compare bytes.bin -r demo -o out -e folder", "bytes.bin/summary.json: is missing"),
    ("ui -f folder", "folder/mlflow.db: not there", "pipeline run"),
    # Pipelines.
    (f"{RUN} -p nope", "'nope': unknown", "compare_policies"),
    (f"{RUN} --data gone.json", "--data", "gone.json: no such file"),
    (f"{RUN} --data records.jsonl", "data.source=key_moment", "smoke"),
    (f"{RUN} -P x", "--parameter x: write it as NAME=VALUE"),
    (f"{RUN} -P x=1", "--parameter x", "has none of this name", "quotas"),
    (f"{RUN} -P quotas=[", "--parameter quotas=[: the value is not YAML"),
    (f"{RUN} -P quotas=", "--parameter quotas=None: must be an object"),
    (f"{RUN} -P overrides=policy.beta=0.1", "overrides='policy.beta=0.1': must be a list of texts", "-P"),
    (f"{RUN} -P data_seed=0.5", "--parameter data_seed=0.5: must be a whole number"),
    (f"{RUN} -p retrain -P margin=-1", "--parameter margin=-1.0: must be 0 or more"),
    (f"{RUN} -p train_and_evaluate -P algorithm=ppo", "'ppo' is no algorithm"),
    (f"{RUN} -p ablation -P variants=[x]", "variant 'x': write it as"),
    ("plan demo --gpus 1 --gpu-memory 8 -s algorithms=[]", "algorithms=[]: none is given"),
    ("plan demo --gpus 1 --gpu-memory 8 -s data.source=nope", "data.source='nope': unknown"),
    ("plan qwen2.5_vl_3b_video_r1_34k --gpus 24 --gpu-memory 80 -s policy.num_generations=6", "cuts groups of 6"),
    ("plan qwen2.5_vl_3b_video_r1_34k --gpus 2 --gpu-memory 80 -s perception.layers=[0,99]", "99 is none of the", "36"),
    ("rehearse demo -s algorithms=[]", "algorithms=[]: none is given"),
    ("recipe show demo -s model.lora.target_modules=[]", "model.lora.target_modules"),
    ("recipe show demo -s video.max_pixels=1", "min_pixels=784 is above max_pixels=1; set one of them"),
    ("pipeline compile nothing", "'nothing': unknown", "ablation"),
    ("pipeline compile -r demo -o folder", "--out", "folder: is a folder"),
    (f"{SUBMIT}", "http://127.0.0.1:9: Kubeflow Pipelines does not answer", "--endpoint"),
    (f"{SUBMIT} {SEVEN}", "training.distributed=ddp on 8 GPUs of 24 GiB", "GiB are needed", "; set model.dtype"),
    (f"{RUN} {SEVEN}", "training.distributed=ddp on 8 GPUs of 24 GiB", "GiB are needed", "; set model.dtype"),
    (f"validate demo {SEVEN}", "1 of", "fits the cluster"),
    (f"pipeline compile -r demo {SEVEN}", "training.distributed=ddp on 8 GPUs of 24 GiB"),
    (f"{SUBMIT} -s model.path=/nowhere", "model.path=/nowhere: no such folder", "s3://"),
    ("schedule apply n --cron 5 -r demo", "cron '5': give six fields"),
    ("schedule list --endpoint nonsense", "nonsense: Kubeflow Pipelines does not answer"),
    # MLflow.
    ("champion show -r demo -f folder", "folder/mlflow.db: no MLflow store is there", "--folder"),
    ("champion rollback -r demo -s tracking.uri=http://127.0.0.1:9", "http://127.0.0.1:9: MLflow does not answer"),
    ("compare experiment -r demo -o out -f folder", "no MLflow store is there"),
    ("tracking upload gone", "gone: no such folder"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_a_mistake_is_answered_with_its_remedy(row: tuple[str, ...], files: Path) -> None:
    words, *said = row
    before = sorted(files.rglob("*"))
    is_a_mistake(answer(*words.split()), *said)
    after = [path for path in files.rglob("*") if path.is_file() and path not in before]
    assert not [path for path in after if path.suffix != ".json" or "kfp" not in path.parts]


def test_there_are_enough_rows() -> None:
    assert len({row[0] for row in ROWS}) == len(ROWS) >= 30


def test_many_problems_are_counted(files: Path) -> None:
    """All that are found are told together: the first five, and how many there are beside."""
    wrong = ["seeds=[1,1,2,2]", "prompts=1", "lr=1", "step=2", "epoch=3", "size=4"]
    sets = [word for one in wrong for word in ("-s", f"training.{one}")]
    found = answer("recipe", "show", "demo", *sets)
    is_a_mistake(found, "training.prompts=1: unknown key")
    found = answer("recipe", "show", "demo", *sets, "-s", "model.x=1", "-s", "video.y=1", "-s", "policy.z=1")
    is_a_mistake(found, "and 3 more")
    assert len(found.lines) == 6


def test_problems_of_checks_are_told_together(files: Path) -> None:
    found = answer(
        "pipeline", "run", "-r", "demo", "-f", "run",
        *("-s", "training.seeds=[1,1]"), *("-s", "evaluation.benchmarks=[mvbnech]"), *("-s", "model.path=/nowhere"),
    )  # fmt: skip
    is_a_mistake(found, "training.seeds", "mvbnech", "model.path=/nowhere")
    assert not (files / "run").exists()
