"""vLLM and transformers on the same prompts: the same responses, positions and weights, real engines throughout."""

from __future__ import annotations

import dataclasses

import pytest

from appo.evaluation.checkpoints import same_architecture
from appo.evaluation.engine import EngineError, TransformersEngine, VLLMEngine
from appo.evaluation.prefetch import Prefetch
from appo.evaluation.prompts import PromptMaker, PromptStream, jobs, positions_model
from appo.evaluation.sets import open_sets
from appo.modeling.loading import load_processor

pytestmark = pytest.mark.slow


class Lab:
    """Two engines, holding model 0, and the small set's prompts."""

    def __init__(self, small_set):
        self.recipe = small_set.recipe()
        self.first, self.second = map(str, small_set.models)
        (self.opened,) = open_sets(self.recipe, small_set.manifest)
        processor = load_processor(self.first)
        self.maker = PromptMaker(processor, positions_model(self.first))
        self.vllm = VLLMEngine(self.recipe, self.first, processor)
        self.transformers = TransformersEngine(self.recipe, self.first, processor)

    def prompts(self):
        items = self.opened.benchmark.items
        return [self.maker.make(item, self.opened.frames, self.opened.template) for item in items]

    def responses(self, engine):
        work = jobs(self.maker, self.opened.benchmark.items, self.opened.frames, self.opened.template)
        with Prefetch(work, workers=2, ahead=4) as prefetch:
            found = dict(engine.generate(PromptStream(prefetch), seed=0))
        assert found.keys() == {item.id for item in self.opened.benchmark.items}
        return found


@pytest.fixture(scope="module")
def lab(small_set):
    lab = Lab(small_set)
    yield lab
    lab.vllm.close()


def test_one_engine_serves_several_checkpoints_as_transformers_does(lab):
    """First, second, and the first again: pixels, vision tower, head and caches all follow. Greedy in float32 on
    random weights, where ties do not happen: equality is exact."""
    lab.vllm.load(lab.first)
    lab.transformers.load(lab.first)
    first = lab.responses(lab.vllm)
    assert first == lab.responses(lab.transformers)
    lab.vllm.load(lab.second)
    lab.transformers.load(lab.second)
    second = lab.responses(lab.vllm)
    assert second == lab.responses(lab.transformers)
    assert second != first
    lab.vllm.load(lab.first)
    assert lab.responses(lab.vllm) == first
    # The videos are seen: other frames, other words.
    assert len({said.text for said in first.values()}) > 1


def test_merged_adapters_go_into_the_running_engine(lab, adapters):
    """What training with LoRA leaves, in place of other weights of the same architecture."""
    from appo.modeling.adapters import whole_checkpoint

    merged = whole_checkpoint(str(adapters[0]))
    assert same_architecture(lab.first, merged)
    lab.vllm.load(lab.first)
    before = lab.responses(lab.vllm)
    for engine in (lab.vllm, lab.transformers):
        engine.load(merged)
    after = lab.responses(lab.vllm)
    assert after == lab.responses(lab.transformers)
    assert after != before


def test_prompts_with_an_image_beside_or_without_a_video(lab):
    """As in SEED-Bench-R1: the observation always, the video only where there is progress to show."""
    import numpy as np
    from PIL import Image

    first = lab.opened.benchmark.items[0]
    both = dataclasses.replace(first, id="both", image="o.png")
    alone = dataclasses.replace(first, id="alone", image="o.png", video=None)

    class Frames:
        def load(self, sample):
            return lab.opened.frames.load(first)

        def image(self, sample):
            pixels = np.random.default_rng(len(sample.id)).integers(0, 255, (56, 56, 3), dtype=np.uint8)
            return Image.fromarray(pixels)

    found = []
    for engine in (lab.vllm, lab.transformers):
        engine.load(lab.second)
        with Prefetch(jobs(lab.maker, [both, alone], Frames(), "bare"), workers=2, ahead=2) as prefetch:
            found.append(dict(engine.generate(PromptStream(prefetch), seed=0)))
    assert found[0] == found[1]
    assert found[0]["both"].prompt_tokens > found[0]["alone"].prompt_tokens


@pytest.mark.parametrize("seconds", [2.0, 0.533, 3.7])
def test_positions_equal_transformers_for_any_sampled_rate(lab, seconds):
    import torch

    from appo.modeling.features import base_model

    prompt = lab.prompts()[0]
    prompt = dataclasses.replace(prompt, seconds_per_grid=torch.tensor([seconds]))
    lab.vllm.llm.collective_rpc("watch_positions")
    stream = iter([("one", prompt)])

    class One:
        def take(self, *, wait):
            return next(stream, None)

    list(lab.vllm.generate(One(), seed=0))
    (watched,) = lab.vllm.llm.collective_rpc("watched_positions")
    ours, _ = base_model(lab.transformers.model).get_rope_index(
        prompt.ids[None],
        mm_token_type_ids=prompt.token_types[None],
        video_grid_thw=prompt.video.grid_thw,
        second_per_grid_ts=prompt.seconds_per_grid,
    )
    assert watched["positions"] == [ours[:, 0].tolist()]
    if seconds == 2.0:
        assert torch.equal(ours[:, 0], prompt.positions)


def test_a_prompt_without_room_for_its_response_is_refused_by_name(lab):
    short = lab.recipe.model_copy(
        update={"evaluation": lab.recipe.evaluation.model_copy(update={"max_model_len": 50})}
    )
    lab.vllm._settings, kept = short.evaluation, lab.vllm._settings
    try:
        with pytest.raises(EngineError, match=r"max_model_len=50: sample key_moment/test/.* prompt tokens"):
            lab.responses(lab.vllm)
    finally:
        lab.vllm._settings = kept
    assert lab.responses(lab.vllm)  # the engine goes on


def test_architectures_are_told_apart(lab, tmp_path):
    import json
    import shutil

    assert same_architecture(lab.first, lab.second)
    other = tmp_path / "other"
    shutil.copytree(lab.first, other)
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["intermediate_size"] = 512
    (other / "config.json").write_text(json.dumps(config))
    assert not same_architecture(lab.first, str(other))


class Borrowed:
    """The shared engine for a whole evaluation: starting another would cost ten seconds and show nothing new."""

    def __init__(self, lab):
        self._engine = lab.vllm
        self.load, self.generate = lab.vllm.load, lab.vllm.generate

    def close(self):
        pass


def dead(kind):
    from vllm.v1.engine.exceptions import EngineDeadError

    return {"out of memory": RuntimeError("CUDA error: out of memory"), "dead": EngineDeadError()}[kind]


@pytest.mark.parametrize("kind", ["out of memory", "dead"])
def test_a_dead_engine_keeps_what_is_done_and_says_how_to_continue(
    lab, small_set, tmp_path, monkeypatch, kind
):
    """A real engine whose step fails after some responses, as it does when the device runs out of memory."""
    import appo.evaluation.run as run

    lab.vllm.load(lab.first)
    monkeypatch.setattr(run, "start_engine", lambda *_: Borrowed(lab))
    arguments = {
        "checkpoints": {"a": lab.first},
        "manifest_path": small_set.manifest,
        "progress": False,
    }
    whole = run.evaluate(lab.recipe, out=tmp_path / "whole", **arguments)
    inner = lab.vllm.llm.llm_engine
    real, seen = inner.step, [0]

    def step():
        if seen[0] > 4:
            raise dead(kind)
        found = real()
        seen[0] += sum(output.finished for output in found)
        return found

    monkeypatch.setattr(inner, "step", step)
    with pytest.raises(
        EngineError, match=r"(?s)vLLM stopped: .*\n[1-9] finished responses are kept.*continue"
    ):
        run.evaluate(lab.recipe, out=tmp_path / "cut", **arguments)
    kept = (tmp_path / "cut/a/key_moment.jsonl").read_text().splitlines()
    assert 1 < len(kept) < 13  # a header and some of the twelve
    monkeypatch.setattr(inner, "step", real)
    assert not inner.has_unfinished_requests()  # nothing that a next evaluation would answer
    assert run.evaluate(lab.recipe, out=tmp_path / "cut", **arguments) == whole
    same = [tmp_path / folder / "a" / "key_moment.jsonl" for folder in ("cut", "whole")]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_transformers_without_memory_says_so(lab, monkeypatch):
    import torch

    def full(**_):
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    lab.transformers.load(lab.first)
    monkeypatch.setattr(lab.transformers.model, "generate", full)
    with pytest.raises(EngineError, match=r"out of memory with 12 prompts: .*20 GiB"):
        lab.responses(lab.transformers)
