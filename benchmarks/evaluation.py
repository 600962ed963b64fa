"""How fast evaluation is against bare `LLM.generate`, as a ratio within one run.

    python -m benchmarks.evaluation MODEL MANIFEST [--items 128] [--tokens 200] [--rounds 5] [--larger]

Both sides get the same prompts of the manifest's test split and decode alike. The bare side has them prepared
beforehand, all at once in memory; `prepared` is our loop on those very prompts; `decoded` is the whole evaluation's
path: frames read, processed and handed over while others are generated, responses written line by line. Rounds
alternate, so that a busy machine slows all sides; the ratio is of each side's fastest round. Every response has
`--tokens` tokens: a model that stops after ten, as the demo's, measures prompts alone (`--tokens 0` leaves it).
`--larger` puts random weights of some 25 million parameters in the model's place, with its tokenizer and processor:
beside the demo's 0.9 million, whatever Python does for a prompt is as long as its generation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.shapes import SHAPES


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--items", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--larger", action="store_true")
    arguments = vars(parser.parse_args())
    with tempfile.TemporaryDirectory() as folder:
        if arguments.pop("larger"):
            arguments["model"] = larger_model(arguments["model"], Path(folder) / "model")
        print(json.dumps(measure(**arguments), indent=2))


def larger_model(model: str, folder: Path) -> str:
    """A checkpoint with random weights, as wide as `benchmarks.shapes.SHAPES["cpu"]`, that reads what `model` reads."""
    from appo.modeling.loading import load_processor
    from appo.training import tiny

    shape = SHAPES["cpu"]
    processor = load_processor(model)
    made = tiny.make_model(
        processor.tokenizer,
        seed=0,
        shape=tiny.TinyShape(
            hidden=shape.hidden,
            layers=shape.layers,
            heads=shape.heads,
            key_value_heads=shape.key_value_heads,
            feed_forward=shape.intermediate,
            vision_hidden=shape.vision_hidden,
            vision_layers=shape.vision_layers,
            vision_heads=shape.vision_heads,
            vision_feed_forward=shape.vision_intermediate,
        ),
    )
    tiny.save(made, processor, folder)
    return str(folder)


def measure(
    model: str, manifest: Path, *, recipe: str, items: int, tokens: int, rounds: int
) -> dict[str, Any]:
    """Seconds of each side by round, and the ratios bare / ours (1: as fast, above: faster)."""
    from vllm import RequestOutput

    from appo.config import load_recipe
    from appo.data.progress import Silent
    from appo.evaluation.checkpoints import weights_bytes
    from appo.evaluation.engine import VLLMEngine
    from appo.evaluation.predictions import PredictionLog
    from appo.evaluation.prompts import PromptMaker, positions_model
    from appo.evaluation.run import Task, fill, load_processor
    from appo.evaluation.sets import open_sets
    from appo.modeling.vllm_inputs import engine_input

    longer = (
        [f"evaluation.max_tokens={tokens}", f"evaluation.max_model_len={tokens + 1024}"] if tokens else []
    )
    settings = load_recipe(recipe, [f"evaluation.limit={items}", *longer])
    (opened,) = open_sets(settings, manifest)
    processor = load_processor(model)
    positions = positions_model(model)
    maker = PromptMaker(processor, positions)
    engine = VLLMEngine(settings, model, processor)
    if tokens:
        stopping = engine.sampling

        def to_the_end(seed: int) -> Any:
            sampling = stopping(seed)
            sampling.ignore_eos = True
            return sampling

        engine.sampling = to_the_end  # type: ignore[method-assign]
    samples = opened.benchmark.items
    prompts = [maker.make(sample, opened.frames, opened.template) for sample in samples]
    inputs = [engine_input(prompt) for prompt in prompts]

    def bare() -> None:
        # The body of `LLM.generate` behind its own processing of prompts: given prepared ones, `generate` itself
        # takes their tokens and leaves out their videos, silently.
        parameters = [engine.sampling(0) for _ in inputs]
        engine.llm._render_and_add_requests(inputs, parameters)
        assert len(engine.llm._run_engine(RequestOutput, use_tqdm=False)) == len(inputs)

    class Prepared:
        def __init__(self) -> None:
            self._left = iter(zip((sample.id for sample in samples), prompts, strict=True))

        def take(self, *, wait: bool) -> Any:
            return next(self._left, None)

    def prepared() -> None:
        assert sum(1 for _ in engine.generate(Prepared(), seed=0)) == len(samples)

    def decoded() -> None:
        fresh = PromptMaker(processor, positions)
        with tempfile.TemporaryDirectory() as folder:
            log = PredictionLog(Path(folder) / "p.jsonl", {})
            task = Task("model", model, opened, 0, log)
            fill(settings, replace(task), engine, fresh, Silent())
            log.close()
            assert len(log.records) == len(samples)

    sides = {"bare": bare, "prepared": prepared, "decoded": decoded}
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):  # the first warms up
        for name, side in sides.items():
            engine.llm.reset_prefix_cache()
            engine.llm.llm_engine.reset_encoder_cache()
            began = time.perf_counter()
            side()
            if number:
                seconds[name].append(time.perf_counter() - began)
    best = {name: min(values) for name, values in seconds.items()}
    engine.close()
    return {
        "parameters": weights_bytes(model) // 4,  # float32
        "items": len(samples),
        "seconds": {name: [round(value, 3) for value in values] for name, values in seconds.items()},
        "items_per_second": {name: round(len(samples) / value, 1) for name, value in best.items()},
        "ratio_prepared": round(best["bare"] / best["prepared"], 3),
        "ratio_decoded": round(best["bare"] / best["decoded"], 3),
    }


if __name__ == "__main__":
    main()
