"""How tokens are drawn is the recipe's affair: a checkpoint's generation_config changes nothing anywhere."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiers import long
from tests.training.conftest import Bench, largest_difference

pytestmark = pytest.mark.slow

# Each would change what is sampled, or stop it, if it were taken over. Tokens 1 and 2 are letters.
HARMFUL: dict[str, Any] = {
    "max_length": 3,
    "max_new_tokens": 1,
    "min_length": 500,
    "min_new_tokens": 500,
    "early_stopping": True,
    "max_time": 1e-6,
    "stop_strings": ["e"],
    "do_sample": True,
    "num_beams": 3,
    "use_mtp": True,
    "use_cache": False,
    "cache_implementation": "static",
    "cache_config": {"backend": "quanto"},
    "max_cache_len": 4,
    "temperature": 0.01,
    "top_k": 1,
    "top_p": 0.01,
    "min_p": 0.9,
    "top_h": 0.1,
    "typical_p": 0.1,
    "epsilon_cutoff": 0.5,
    "eta_cutoff": 0.5,
    "repetition_penalty": 3.0,
    "encoder_repetition_penalty": 3.0,
    "length_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "bad_words_ids": [[3], [4], [5]],
    "renormalize_logits": True,
    "forced_bos_token_id": 1,
    "forced_eos_token_id": 2,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [1, 5.0],
    "suppress_tokens": [5, 6, 7, 8],
    "begin_suppress_tokens": [9, 10, 11],
    "sequence_bias": [[[12], 50.0]],
    "token_healing": True,
    "guidance_scale": 2.0,
    "watermarking_config": {
        "greenlist_ratio": 0.5,
        "bias": 20.0,
        "hashing_key": 15485863,
        "seeding_scheme": "lefthash",
        "context_width": 1,
    },
    "num_return_sequences": 2,
    "output_attentions": True,
    "output_hidden_states": True,
    "output_scores": True,
    "output_logits": True,
    "return_dict_in_generate": True,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": [1, 2, 13, 14, 15, 16, 17, 18, 19, 20],
    "encoder_no_repeat_ngram_size": 1,
    "decoder_start_token_id": 3,
    "is_assistant": True,
    "num_assistant_tokens": 3,
    "num_assistant_tokens_schedule": "constant",
    "assistant_confidence_threshold": 0.9,
    "prompt_lookup_num_tokens": 2,
    "max_matching_ngram_size": 2,
    "assistant_early_exit": 1,
    "assistant_lookbehind": 3,
    "target_lookbehind": 3,
    "assistant_ensemble_weight": 0.5,
    "speculation_type": "prompt_lookup",
    "disable_compile": False,
    "low_memory": True,
    "penalty_alpha": 0.6,
    "dola_layers": "low",
    "diversity_penalty": 1.0,
    "num_beam_groups": 3,
    "constraints": [1],
    "force_words_ids": [[1]],
    "prefill_chunk_size": 2,
    # An entry of the checkpoint's own is carried over too.
    "an_entry_of_its_own": 1,
}
# Not settings, or objects that a file cannot hold.
NO_SETTINGS = {"compile_config", "continuous_batching_config", "transformers_version"}
SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


@pytest.fixture(scope="module")
def models(small_set: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights with every setting of a generation_config, and with none."""
    from transformers import GenerationConfig

    known = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert known - NO_SETTINGS <= set(HARMFUL), "transformers has settings that this test does not know"
    folder = tmp_path_factory.mktemp("generation_config")
    for name, settings in {"harmful": HARMFUL, "empty": {}}.items():
        shutil.copytree(small_set[1], folder / name)
        (folder / name / "generation_config.json").write_text(json.dumps(settings))
    return {name: folder / name for name in ("harmful", "empty")}


@pytest.fixture
def checks(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Completions and log-probabilities of every agreement check."""
    from appo.training import agreement

    seen: list[Any] = []
    check = agreement.check_logps

    def watching(trainer, model, prompt, completions, logps, where):
        seen.append((completions, logps))
        check(trainer, model, prompt, completions, logps, where)

    monkeypatch.setattr(agreement, "check_logps", watching)
    return seen


@pytest.mark.parametrize(
    "kind", [pytest.param((), id="whole"), pytest.param(("model.lora={rank: 4}",), id="lora")]
)
def test_rollouts_check_and_look_are_the_same(bench: Bench, models: dict[str, Path], checks: list, kind):
    # Length, truncation and temperature of the recipe's own, so that they too are seen to come from there.
    settings = ("policy.max_completion_length=6", "policy.top_p=0.9", "policy.temperature=0.8", *kind)
    for name, model in models.items():
        replace(bench, model=model).train("appo", *settings, name=name)
    assert len(checks) == 2
    assert checks[0] == checks[1]
    assert len(checks[0][0]) == 4
    groups = [(bench.folder / name / "groups.jsonl").read_text() for name in models]
    assert groups[0] == groups[1]
    lengths = {len(tokens) for line in groups[0].splitlines() for tokens in json.loads(line)["tokens"]}
    assert max(lengths) == 6
    assert largest_difference(bench.weights("harmful"), bench.weights("empty")) == 0.0
    for harmful, empty in zip(bench.metrics("harmful"), bench.metrics("empty"), strict=True):
        for measure in ("reward", "completions/mean_length", "completions/clipped_ratio", "entropy"):
            assert harmful[measure] == empty[measure]


def test_what_is_published_keeps_the_checkpoints_generation_config(bench: Bench, models: dict[str, Path]):
    """People decode with it; that training does not is no reason to take it away."""
    replace(bench, model=models["harmful"]).train("dapo", "training.max_steps=1")
    published = json.loads((bench.folder / "run" / "checkpoint" / "generation_config.json").read_text())
    # transformers' trainer gives it the tokenizer's special tokens.
    kept = {name: published.get(name) for name in HARMFUL if name not in SPECIAL_TOKENS}
    assert kept == {name: value for name, value in HARMFUL.items() if name in kept}


def test_responses_of_an_evaluation_are_the_same(bench: Bench, models: dict[str, Path]):
    from appo.data.frames import open_frames
    from appo.data.manifest import read_manifest
    from appo.evaluation.engine import TransformersEngine
    from appo.modeling.loading import load_processor
    from appo.training.store import PromptStore

    recipe = bench.recipe("evaluation.engine=transformers", "evaluation.max_tokens=6")
    manifest = read_manifest(bench.manifest)
    found = {}
    for name, model in models.items():
        processor = load_processor(str(model))
        engine = TransformersEngine(recipe, str(model), processor)
        store = PromptStore(manifest.samples, open_frames(manifest, recipe), processor, recipe)
        prompts = iter([(s.id, store.get(s.id, engine.model)) for s in manifest.split("test")])

        class Stream:
            def __init__(self, rest):
                self.rest = rest

            def take(self, *, wait: bool) -> Any:
                return next(self.rest, None)

        found[name] = list(engine.generate(Stream(prompts), seed=0))
    assert found["harmful"] == found["empty"]
    assert len(found["empty"]) == 2


def test_both_engines_are_told_the_same(bench: Bench, models: dict[str, Path]):
    """Every setting is said outright: vLLM too would fill what is left open from the checkpoint."""
    from appo.modeling.generation import Sampling, rollout_sampling
    from appo.modeling.loading import load_policy, load_processor
    from appo.training.vllm_server import serve_command

    recipe = bench.recipe(
        "policy.top_p=0.9",
        "policy.temperature=0.8",
        "training.rollout=vllm_server",
        "training.vllm_server_url=http://127.0.0.1:9",
    )
    processor = load_processor(str(models["harmful"]))
    model = load_policy(str(models["harmful"]), recipe.model)
    found = rollout_sampling(recipe, model, processor.tokenizer)
    tokenizer = processor.tokenizer
    ends = (tokenizer.eos_token_id, tokenizer.pad_token_id)
    visual = (model.config.image_token_id, model.config.video_token_id)
    assert found == Sampling(
        max_tokens=8,
        end_tokens=tuple(sorted(ends)),
        pad_token=tokenizer.pad_token_id,
        temperature=0.8,
        top_p=0.9,
        suppressed=visual,
    )
    assert found.for_vllm(seed=3, n=4) == {
        "n": 4,
        "seed": 3,
        "max_tokens": 8,
        "min_tokens": 0,
        "temperature": 0.8,
        "top_p": 0.9,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop_token_ids": sorted(ends),
        "ignore_eos": True,
        "logit_bias": {visual[0]: -100.0, visual[1]: -100.0},
        "detokenize": False,
    }
    command, _ = serve_command(recipe, "somewhere", host="127.0.0.1", port=9)
    assert command[command.index("--generation-config") + 1] == "vllm"


ONE_STEP_WITH_VLLM = """
import sys
import torch
import appo.training.rewarding
from pathlib import Path
from appo.config import load_recipe
from tests.training.conftest import pseudo_accuracy, OVERRIDES
appo.training.rewarding.reward_functions = lambda _: {"accuracy": pseudo_accuracy}
from appo.training.run import train
from appo.training.trainer import VideoGRPOTrainer
manifest, model, out = sys.argv[1:4]
recipe = load_recipe("demo", [*OVERRIDES, "training.rollout=vllm_colocate", "training.vllm_max_model_len=256",
                              "training.max_steps=1"])
drawn = VideoGRPOTrainer._generate_single_turn
def keeping(self, *args, **kwargs):
    found = drawn(self, *args, **kwargs)
    torch.save(found[0], Path(out) / "tokens.pt")
    return found
VideoGRPOTrainer._generate_single_turn = keeping
train(recipe, algorithm="dapo", seed=0, manifest_path=Path(manifest), model_path=model, out=Path(out), progress=False)
"""


@long
def test_rollouts_of_vllm_are_the_same(bench: Bench, models: dict[str, Path]):
    """An engine for each checkpoint, in a process of its own."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    found = []
    for name, model in models.items():
        out = bench.folder / name
        arguments = [str(bench.manifest), str(model), str(out)]
        command = [sys.executable, "-c", ONE_STEP_WITH_VLLM, *arguments]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-5000:]
        found.append(torch.load(out / "tokens.pt"))
    assert found[0] == found[1]
    assert max(len(tokens) for tokens in found[0]) == 8
