"""Checkpoints and benchmarks -> predictions and metrics on disk, through one engine.

    out/{checkpoint}/{benchmark}.jsonl           header, then one line an item with response and score
    out/{checkpoint}/{benchmark}.metrics.json    the averages
    out/{checkpoint}/seeds/{seed}/...            the same for each seed, where there are several

A run that is stopped continues at the first item that has no line; finished files are not generated again.
The metrics always come from the whole file, so that stopping changes none of them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from appo.config import Recipe
from appo.data.schema import VideoSample
from appo.data.video import VideoError
from appo.evaluation.benchmarks import Benchmark
from appo.evaluation.checkpoints import same_architecture
from appo.evaluation.engine import Engine, EngineError, start_engine
from appo.evaluation.predictions import PredictionLog, parse_prediction
from appo.evaluation.prefetch import Prefetch
from appo.evaluation.prompts import PromptMaker, PromptStream, jobs, positions_model, prompt_digest
from appo.evaluation.scoring import Metrics, flat, metrics_of
from appo.evaluation.sets import OpenSet, check_files_named, open_sets
from appo.handover import checkpoint_of
from appo.modeling.adapters import whole_checkpoint
from appo.modeling.checkpoints import check_model
from appo.startup import heavy_imports
from appo.storage import sha256_file, write_atomic

if TYPE_CHECKING:
    from appo.modeling.inputs import PromptInputs

AHEAD = 128  # prompts that may wait for the engine
# Decoding settings that decide a response; the rest of a recipe does not.
DECODING = ("engine", "temperature", "top_p", "top_k", "repetition_penalty", "max_tokens")


@dataclass(frozen=True, slots=True)
class Task:
    """One checkpoint on one benchmark with one seed, and the file that it fills."""

    checkpoint: str
    path: str
    opened: OpenSet
    seed: int
    log: PredictionLog
    # Ids of the items that are this process's share; None for all.
    only: frozenset[str] | None = None

    @property
    def benchmark(self) -> Benchmark:
        return self.opened.benchmark

    @property
    def left(self) -> list[VideoSample]:
        wanted = [i for i in self.benchmark.items if self.only is None or i.id in self.only]
        return [item for item in wanted if item.id not in self.log.records]


def evaluate(
    recipe: Recipe,
    *,
    checkpoints: Mapping[str, str],
    manifest_path: Path | None,
    out: Path,
    progress: bool = True,
    base: Callable[[], str | None] | None = None,
) -> dict[str, dict[str, Metrics]]:
    """Evaluate every checkpoint (name -> folder) on every benchmark of the recipe; see the module.

    checkpoints: name -> folder, s3:// prefix or hub name. A folder of adapters is merged first. manifest_path: for the
    benchmark `key_moment`, the manifest's own test split. base: what adapters belong to where the checkpoint that they
    name is not here; default: the recipe's `model.path`.
    Returns name -> benchmark -> flat metrics in [0, 1], `accuracy` among them. Raises AdapterError for adapters that
    cannot be merged, PredictionError for files generated with other settings, EngineError when the engine dies (what
    is done stays: give the same command again), VideoError when more videos fail than `data.max_reject_rate` allows.
    """
    named = recipe.model.path
    origin = base or (lambda: None if named is None else checkpoint_of(named))
    check_files_named(recipe, manifest_path)
    checkpoints = {name: checkpoint_of(path) for name, path in checkpoints.items()}
    for path in checkpoints.values():
        check_model(path, adapters=True)
    checkpoints = {name: whole_checkpoint(path, origin) for name, path in checkpoints.items()}
    tasks = plan_tasks(recipe, checkpoints, manifest_path, out)
    todo = [task for task in tasks if task.left]
    try:
        if recipe.evaluation.data_parallel > 1:
            from appo.evaluation.parallel import generate_in_parallel

            generate_in_parallel(
                recipe,
                tasks,
                checkpoints=checkpoints,
                manifest_path=manifest_path,
                out=out,
                progress=progress,
            )
        else:
            generate(recipe, todo, progress)
    except EngineError as error:
        done = sum(len(task.log.records) for task in tasks)
        raise EngineError(
            f"{error}\n{done} finished responses are kept in {out}; give the same command again to continue"
        ) from error
    finally:
        for task in tasks:
            task.log.close()
    results: dict[str, dict[str, Metrics]] = {name: {} for name in checkpoints}
    for task in tasks:
        metrics = finish(task)
        if recipe.evaluation.seeds == 1:
            results[task.checkpoint][task.benchmark.name] = metrics
    if recipe.evaluation.seeds > 1:
        from appo.evaluation.seeds import gather_seeds, table

        for task in tasks:
            if task.seed == 0:
                results[task.checkpoint][task.benchmark.name] = gather_seeds(
                    out / task.checkpoint, task.benchmark, recipe.evaluation.seeds
                )
        write_atomic(out / "seeds.md", table(results))
    return results


def plan_tasks(
    recipe: Recipe, checkpoints: Mapping[str, str], manifest_path: Path | None, out: Path
) -> list[Task]:
    """Every checkpoint on every benchmark with every seed, checkpoint by checkpoint."""
    sets = open_sets(recipe, manifest_path)
    digests = {name: weights_digest(path) for name, path in checkpoints.items()}
    seeds = recipe.evaluation.seeds
    return [
        Task(name, path, opened, seed, PredictionLog(file, _header(recipe, opened, digests[name], seed)))
        for name, path in checkpoints.items()
        for opened in sets
        for seed in range(seeds)
        for file in [_folder(out, name, seed, seeds) / f"{opened.benchmark.name}.jsonl"]
    ]


def finish(task: Task) -> Metrics:
    """Score a filled file: rewrite it in the items' order with their scores, and write its metrics."""
    predictions = {name: parse_prediction(record) for name, record in task.log.records.items()}
    scores = [task.benchmark.score(item, predictions.get(item.id)) for item in task.benchmark.items]
    records = []
    for item, score in zip(task.benchmark.items, scores, strict=True):
        record = task.log.records.get(item.id, {"id": item.id, "response": None})
        told = {
            "question": item.question,
            "options": list(item.options),
            "answer": score.answer,
            "parsed": score.parsed,
            "status": score.status,
            "truncated": score.status == "truncated",
            "score": score.score,
            "scores": {name: dict(values) for name, values in score.values.items()},
            "groups": dict(score.groups),
        }
        records.append({**record, **told})
    task.log.rewrite(records)
    metrics = flat(metrics_of(task.benchmark, scores))
    write_metrics(task.log.path.with_name(f"{task.benchmark.name}.metrics.json"), metrics)
    return metrics


def write_metrics(path: Path, metrics: Metrics) -> None:
    write_atomic(path, json.dumps(metrics, indent=2) + "\n")


def generate(recipe: Recipe, tasks: Sequence[Task], progress: bool) -> None:
    """Fill the files of the tasks, in order: weights are loaded once for a checkpoint's tasks in a row."""
    if not tasks:
        return
    from appo.data.progress import progress_line

    with heavy_imports():  # all that processors, positions and engines will ask for
        from transformers import AutoModelForImageTextToText, AutoProcessor  # noqa: F401

    engine: Engine | None = None
    maker: PromptMaker | None = None
    holds: str | None = None
    with progress_line(progress) as line:
        try:
            for task in tasks:
                if (
                    engine is None
                    or maker is None
                    or holds is None
                    or not same_architecture(holds, task.path)
                ):
                    if engine is not None:
                        engine.close()
                    processor = load_processor(task.path)
                    maker = PromptMaker(processor, positions_model(task.path))
                    engine = start_engine(recipe, task.path, processor)
                elif holds != task.path:
                    engine.load(task.path)
                holds = task.path
                line.start(f"{task.checkpoint} {task.benchmark.name}", len(task.left))
                fill(recipe, task, engine, maker, line)
        finally:
            if engine is not None:
                engine.close()


def fill(recipe: Recipe, task: Task, engine: Engine, maker: PromptMaker, line: Any) -> None:
    """Generate what one task's file still lacks. Raises VideoError above the recipe's rate of failing
    videos.
    """
    # Questions about one video follow one another: it is looked at once. The file's order is restored at the end.
    left = sorted(task.left, key=lambda sample: sample.video or "")
    about: dict[str, tuple[str, tuple[float, ...]]] = {}

    def note(name: str, prompt: PromptInputs) -> None:
        about[name] = prompt_digest(prompt), prompt.timestamps_s

    work = jobs(maker, left, task.opened.frames, task.opened.template)
    with Prefetch(work, workers=recipe.data.workers, ahead=AHEAD) as prefetch, task.opened.filling(left):
        prompts = PromptStream(prefetch, note)
        for name, said in engine.generate(prompts, seed=task.seed):
            prompt, times = about.pop(name)
            task.log.add(
                {
                    "id": name,
                    "prompt": prompt,
                    "response": said.text,
                    "finish_reason": said.finish_reason,
                    "tokens": said.tokens,
                    "prompt_tokens": said.prompt_tokens,
                    "timestamps_s": [round(time, 3) for time in times],
                }
            )
            line.step()
    for name, error in prompts.failed.items():
        task.log.add({"id": name, "response": None, "finish_reason": None, "error": str(error)})
        line.step(rejected=True)
    allowed = recipe.data.max_reject_rate * len(task.benchmark.items)
    if len(prompts.failed) > allowed:
        first = next(iter(prompts.failed.values()))
        raise VideoError(
            first.path,
            f"{first.reason}; {len(prompts.failed)} of {len(task.benchmark.items)} items of "
            f"{task.benchmark.name} have no video, "
            f"data.max_reject_rate={recipe.data.max_reject_rate:g} allows "
            f"{allowed:.0f}; see {task.log.path}",
        )


def load_processor(path: str) -> Any:
    from appo.modeling.loading import load_processor as load

    return load(path)


def weights_digest(path: str) -> str:
    """16 hex digits over a checkpoint's weight files and tokenizer; of a hub name, the name itself."""
    folder = Path(path)
    if not folder.is_dir():
        return path
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("tokenizer*.json")]):
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()[:16]


def _header(recipe: Recipe, opened: OpenSet, weights: str, seed: int) -> dict[str, Any]:
    settings = recipe.evaluation.model_dump(mode="json")
    return {
        "benchmark": opened.benchmark.name,
        "split": opened.benchmark.split,
        "items": opened.digest,
        "weights": weights,
        "dtype": recipe.model.dtype,
        "template": opened.template,
        "video": recipe.video.model_dump(mode="json"),
        "frames": opened.encoding,
        "decoding": {name: settings[name] for name in DECODING},
        "seed": seed,
    }


def _folder(out: Path, name: str, seed: int, seeds: int) -> Path:
    return out / name if seeds == 1 else out / name / "seeds" / str(seed)
