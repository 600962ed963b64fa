"""The sections of a recipe: every setting of a run with its type, its bounds and its default.

Free of torch. `appo.config` reads recipes into these; what one section alone cannot know (do the settings fit
together?) is checked here too, in `Recipe`.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator


def _registered(name: str) -> str:
    # A file in appo/policy adds an algorithm; asked late, and free of torch.
    from appo.policy import algorithms

    if name not in algorithms():
        raise ValueError(f"{name!r} is no algorithm; known are {', '.join(algorithms())}")
    return name


def _without_password(address: str) -> str:
    # Reports, MLflow and Kubeflow show the recipe; for the same reason the value is not repeated here.
    if re.search(r"://[^/\s@:]*:[^/\s@]+@", address):
        raise ValueError(
            "holds a password, and whoever sees a report sees the recipe; leave it out and set it in the environment "
            "(MLflow: MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, for a database MLFLOW_TRACKING_URI)"
        )
    return address


Algorithm = Annotated[str, AfterValidator(_registered)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Address = Annotated[str, AfterValidator(_without_password)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class KeyMoment(Section):
    """The synthetic set of the demo: the answer shows in one key frame among distractors."""

    train: Positive = 960
    validation: Positive = 64
    test: Positive = 160
    num_frames: Annotated[int, Field(ge=4, multiple_of=2)] = 16
    size: Annotated[int, Field(multiple_of=28, ge=28)] = 28
    faint: Share = Field(0.6, description="strength of the distractors' markers; the key frame's is 1")
    easy_faint: Share = Field(0.3, description="the same, in the part that the warm start trains on")
    easy_train: Annotated[int, Field(ge=0)] = 1216
    distractors: Annotated[int, Field(ge=0, description="temporal patches with a fainter marker")] = 4
    noise: Annotated[float, Field(ge=0, description="standard deviation in every pixel; white is 1")] = 0.5


class Data(Section):
    """Which questions and videos, from where, and what to do with bad ones."""

    source: str = "key_moment"
    annotations: str | None = Field(None, description="file or s3:// URI of the publisher's records")
    fingerprint: str | None = Field(None, description="of the records; a pipeline's first step fills it in")
    root: str | None = Field(
        None, description="folder, s3:// URI or archive that the records' paths start from"
    )
    template: Literal["reasoning", "grounding", "observation", "bare"] = "reasoning"
    quotas: dict[str, Annotated[int, Field(ge=0)] | Literal["all"]] = Field(
        default_factory=dict,
        description="source -> how many samples, or all; without quotas everything is taken",
    )
    problem_types: dict[str, tuple[str, ...]] = Field(
        default_factory=dict, description="source -> the only types of question taken from it"
    )
    quota_shortfall: Literal["stop", "take_all"] = "stop"
    limit: Positive | None = None
    validation_share: Share = 0.0
    test_share: Share = 0.0
    seed: int = 0
    leakage: dict[str, str] = Field(
        default_factory=dict,
        description="benchmark -> its manifest, folder of videos or list of names to compare with",
    )
    max_reject_rate: Share = 0.01
    workers: Positive = 2
    decode_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    worker_memory_gib: Annotated[float, Field(gt=0.5)] = Field(
        4.0, description="address space of one decoder"
    )
    cache: Literal["shards", "none"] = "shards"
    cache_dir: str | None = Field(
        None, description="folder or s3:// URI of shards; null: beside the manifest or the benchmark's videos"
    )
    encoding: Literal["png", "jpeg"] = Field("jpeg", description="png is lossless")
    jpeg_quality: Annotated[int, Field(ge=1, le=100)] = 95
    key_moment: KeyMoment = KeyMoment()


class Video(Section):
    """How frames are sampled; the same in training and evaluation (paper: 30 frames for 3B, 16 for 7B)."""

    num_frames: Positive | None = Field(16, description="frames spread evenly over the video; or give fps")
    fps: Annotated[float, Field(gt=0)] | None = None
    max_frames: Positive = 768
    max_pixels: Positive = Field(
        224 * 224, description="pixels a frame; aspect ratio kept, sides multiples of 28"
    )
    min_pixels: Positive = 28 * 28

    @model_validator(mode="after")
    def _one_rule(self) -> Video:
        if (self.num_frames is None) == (self.fps is None):
            raise ValueError("give exactly one of num_frames and fps; set the other to null")
        if self.min_pixels > self.max_pixels:
            raise ValueError(
                f"min_pixels={self.min_pixels} is above max_pixels={self.max_pixels}; set one of them"
            )
        return self


class Lora(Section):
    rank: Positive = 16
    alpha: Positive = 32
    target_modules: Annotated[tuple[str, ...], Field(min_length=1)] = ("q_proj", "k_proj", "v_proj", "o_proj")


class WarmStart(Section):
    """Makes a tiny Qwen2.5-VL and trains it by supervision: the demo's stand-in for a pretrained model."""

    steps: Positive = 200
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    seed: int = 0


class Model(Section):
    path: str | None = Field(
        None, description="checkpoint folder, s3:// URI or hub name; null: the warm start's"
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    freeze_vision: bool = True
    lora: Lora | None = None
    warm_start: WarmStart | None = None


class Judge(Section):
    """Who scores PA-GRPO's observations: fixed rules, or a text model behind an OpenAI-compatible server."""

    kind: Literal["rules", "server"] = "rules"
    url: Address | None = Field(None, description="base of the server, e.g. http://127.0.0.1:8000")
    model: str | None = Field(None, description="name the server knows the model by")
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    workers: Positive = 16
    cache: str | None = Field(None, description="SQLite file of verdicts; null: kept in memory")

    @model_validator(mode="after")
    def _reachable(self) -> Judge:
        if self.kind == "server" and not (self.url and self.model):
            raise ValueError("kind=server: needs url and model")
        return self


class Policy(Section):
    """Rollouts, rewards and loss. A null takes the algorithm's own value (see appo/policy/)."""

    algorithm: Algorithm = "appo"
    num_generations: Annotated[int, Field(ge=2)] = 8
    max_completion_length: Positive = 512
    temperature: Annotated[float, Field(gt=0)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    beta: Annotated[float, Field(ge=0)] | None = Field(None, description="KL coefficient")
    kl: Literal["k3", "bias_corrected"] = Field(
        "k3",
        description="form of the KL term: GRPO's, or that times the policy's ratio (see docs/algorithm.md)",
    )
    epsilon_low: Annotated[float, Field(gt=0)] | None = None
    epsilon_high: Annotated[float, Field(gt=0)] | None = None
    loss: Literal["grpo", "dapo"] | None = None
    reward_weights: dict[str, float] = Field(default_factory=lambda: {"accuracy": 0.9, "format": 0.1})
    perception_weights: bool | None = Field(None, description="multiply advantages by APPO's token weights")
    judge: Judge = Judge()
    dynamic_sampling: bool = False
    dynamic_sampling_max_rounds: Positive = 3
    mask_truncated: bool = False
    overlong_buffer: Annotated[int, Field(ge=0)] = Field(
        0, description="tokens over which the soft punishment grows"
    )


class Perception(Section):
    """APPO's own settings; the paper's names K1, K2, K3, tau, alpha."""

    k1: Positive = 15
    k2: Positive = 3
    k3: Positive = 64
    tau: float = 0.5
    max_weight: Annotated[float, Field(ge=1)] = 1.7
    strategy: Literal["hard", "soft", "all"] = "soft"
    fallback: Literal["none", "all"] = "none"
    divergence: Literal["kl", "released"] = "kl"
    layers: tuple[int, ...] | Literal["last3"] = "last3"
    probe_chunk_mib: Positive = 64


class Training(Section):
    prompts_per_step: Positive = 16
    gradient_accumulation_steps: Positive = 1
    max_steps: Annotated[int, Field(ge=-1)] = Field(-1, description="-1: as many as `epochs` needs")
    epochs: Annotated[float, Field(gt=0)] = 1.0
    updates_per_rollout: Positive = Field(
        1, description="optimizer steps on the same completions; of two on, clipping has something to clip"
    )
    learning_rate: Annotated[float, Field(gt=0)] = 1e-6
    lr_schedule: Literal["linear", "constant", "cosine"] = Field(
        "linear", description="of the learning rate over all steps; linear and cosine fall to 0"
    )
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    gradient_checkpointing: bool = True
    seeds: tuple[int, ...] = (0,)
    save_every: Positive = 50
    rollout: Literal["transformers", "vllm_colocate", "vllm_server"] = "transformers"
    rollout_memory_gib: Annotated[float, Field(gt=0)] = Field(
        20.0, description="keys and values that rollouts with transformers hold at once, on each process"
    )
    vllm_server_url: Address | None = None
    vllm_gpu_memory_utilization: Share = 0.3
    vllm_server_memory_utilization: Share = Field(0.9, description="of a rollout server's own GPU")
    vllm_max_model_len: Positive = Field(
        8192, description="tokens of a prompt and its completion in rollouts"
    )
    vllm_importance_sampling_mode: Literal[
        "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = Field(
        "sequence_mask",
        description="ratio of the policy's to vLLM's probability: of a token or a whole completion; beyond the bounds "
        "it is cut to them (truncate) or its tokens leave the loss (mask)",
    )
    vllm_importance_sampling_clip_max: Annotated[float, Field(gt=0)] | None = 3.0
    vllm_importance_sampling_clip_min: Annotated[float, Field(ge=0)] | None = None
    shared_prefix: bool = True
    feature_cache: bool = True
    feature_cache_dir: str | None = Field(
        None, description="folder or s3:// URI shared by runs; null: memory only"
    )
    feature_cache_gib: Annotated[float, Field(gt=0)] = Field(8.0, description="bound of feature_cache_dir")
    feature_cache_memory_gib: Annotated[float, Field(gt=0)] = Field(4.0, description="bound of each process")
    distributed: Literal["ddp", "fsdp2", "zero2", "zero3"] = "ddp"

    @model_validator(mode="after")
    def _fits(self) -> Training:
        updates = self.updates_per_rollout
        # A checkpoint in between would hold weights without the completions that they are to be updated on again.
        for name, value in (("save_every", self.save_every), ("max_steps", self.max_steps)):
            if value > 0 and value % updates:
                raise ValueError(
                    f"{name}={value}: must be a multiple of training.updates_per_rollout={updates}, or a rollout's "
                    f"updates would be cut in two; give {value // updates * updates or updates}"
                )
        low, high = self.vllm_importance_sampling_clip_min, self.vllm_importance_sampling_clip_max
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"vllm_importance_sampling_clip_min={low:g}: must be below vllm_importance_sampling_clip_max={high:g}"
            )
        if self.vllm_importance_sampling_mode.endswith("truncate") and low is None and high is None:
            raise ValueError(
                f"vllm_importance_sampling_mode={self.vllm_importance_sampling_mode}: needs a bound to cut to; give "
                "training.vllm_importance_sampling_clip_max or _min"
            )
        return self


class Evaluation(Section):
    """Decoding as in the paper's Table B."""

    benchmarks: tuple[str, ...] = ("key_moment",)
    annotations: str | None = Field(
        None, description="folder of the publishers' files, one sub-folder a benchmark"
    )
    videos: str | None = Field(None, description="the same for their videos; null: beside the annotations")
    engine: Literal["vllm", "transformers"] = "vllm"
    temperature: Annotated[float, Field(ge=0)] = 0.1
    top_p: Annotated[float, Field(gt=0, le=1)] = 0.001
    top_k: int = 1
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.05
    max_tokens: Positive = 512
    limit: Positive | None = None
    max_model_len: Positive = 16384
    max_num_seqs: Positive = Field(64, description="items that are generated at once")
    gpu_memory_utilization: Share = 0.9
    seeds: Positive = Field(1, description="times that every item is generated, each with a seed of its own")
    data_parallel: Positive = Field(1, description="processes, one a GPU; items are dealt out among them")
    warm_start_too: bool = Field(True, description="also score the weights that training started from")


class Tracking(Section):
    uri: Address | None = Field(
        None, description="MLflow server or sqlite:/// URI; null: mlflow.db of the run folder"
    )
    experiment: str = "appo"


class Cluster(Section):
    """What a training pod asks Kubernetes for."""

    gpus_per_node: Annotated[int, Field(ge=0)] = 8
    gpu_memory_gib: Annotated[float, Field(gt=0)] | None = Field(
        None, description="of each GPU, as sold: what does not fit it is refused; null: not known here"
    )
    nodes: Positive = 1
    cpus: Positive = 16
    memory_gib: Positive = 128
    shared_memory_gib: Positive = 32
    accelerator: str = "nvidia.com/gpu"
    node_selector: dict[str, str] = Field(default_factory=dict)
    tolerations: tuple[dict[str, Any], ...] = ()
    queue: str | None = Field(None, description="Kueue queue")
    image_pull_secrets: tuple[str, ...] = ()
    deadline_hours: Annotated[float, Field(gt=0)] = 72.0
    parallel_trainings: Positive = 2
    local: bool = Field(
        False, description="one machine: no retries, no exit handler; finished trainings are kept"
    )
    retries: Annotated[int, Field(ge=0)] = Field(2, description="of a training or evaluation pod that failed")


class Recipe(Section):
    name: str
    description: str = ""
    algorithms: tuple[Algorithm, ...] = ("grpo", "dapo", "appo")
    data: Data = Data()
    video: Video = Video()
    model: Model = Model()
    policy: Policy = Policy()
    perception: Perception = Perception()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()
    cluster: Cluster = Cluster()

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        frames = self.video.num_frames
        # Two raw frames make one temporal patch, and psi(i) picks k2 of those.
        if frames is not None and self.perception.k2 > max(1, frames // 2):
            raise ValueError(
                f"perception.k2={self.perception.k2}: must be at most the number of temporal patches "
                f"({max(1, frames // 2)} for video.num_frames={frames})"
            )
        if self.model.path is None and self.model.warm_start is None:
            raise ValueError("model.path=null: name a checkpoint, or give model.warm_start")
        if self.training.rollout == "vllm_server" and not self.training.vllm_server_url:
            raise ValueError("training.vllm_server_url=null: needed for training.rollout=vllm_server")
        return self

    def to_json(self) -> str:
        """Canonical JSON: what pipeline steps hand to one another, and what `digest` is taken over."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)

    @property
    def digest(self) -> str:
        """First 16 hex digits of the SHA-256 of `to_json`."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]
