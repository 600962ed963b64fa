"""A sample and its frames -> the tensors of one prompt, the same for warm start, rollouts, scoring and loss.

Everything a forward pass needs of one prompt stands in one `PromptInputs`: tokens, pixels or features, grids, rotary
positions, and which token belongs to which frame. The seconds per temporal patch come from the frames' real times.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from appo.data.messages import prompt_messages
from appo.data.schema import VideoSample
from appo.errors import SettingError
from appo.modeling import features as vision_features
from appo.modeling.positions import VIDEO

if TYPE_CHECKING:
    from PIL.Image import Image

    from appo.data.video import VideoFrames


@dataclass(frozen=True, slots=True)
class Vision:
    """The pixels of a prompt's videos or images; `features` replace them once the frozen tower has run.

    pixels: (patches, channels * time * height * width). grid_thw: (n, 3) before merging. key: what a feature cache
    knows the features by.
    """

    pixels: Tensor
    grid_thw: Tensor
    features: Tensor | None = None
    key: str | None = None

    @property
    def tower_input(self) -> Tensor:
        return self.pixels if self.features is None else self.features


@dataclass(frozen=True, slots=True)
class PromptInputs:
    """One prompt, unpadded.

    ids, token_types, frame_of_token: (P,) long; types are 0 text, 1 image, 2 video; frame_of_token is the temporal
    patch of a video token, -1 elsewhere (an image beside the video is not a frame). positions: (3, P).
    seconds_per_grid: float32, of each video; empty for a model that takes none. timestamps_s: of each raw frame.
    """

    sample: VideoSample
    text: str
    ids: Tensor
    token_types: Tensor
    frame_of_token: Tensor
    positions: Tensor
    num_frames: int
    video: Vision | None
    image: Vision | None
    seconds_per_grid: Tensor
    timestamps_s: tuple[float, ...]

    @property
    def key_frames(self) -> tuple[int, ...]:
        """Temporal patches with a raw frame inside one of the sample's key times; empty where none are known."""
        per_patch = 2
        inside = [
            any(start <= time <= end for start, end in self.sample.key_times) for time in self.timestamps_s
        ]
        return tuple(t for t in range(self.num_frames) if any(inside[t * per_patch : (t + 1) * per_patch]))


def build_inputs(
    processor: Any,
    model: Any,
    sample: VideoSample,
    frames: VideoFrames | None,
    image: Image | None,
    *,
    template: str,
    grids: Mapping[str, Tensor] | None = None,
) -> PromptInputs:
    """Tokenize one prompt with its frames as they were sampled (the processor neither samples nor scales them).

    model: supplies the rotary positions; see `appo.modeling.positions.install`. grids: "video" and "image" -> (1, 3),
    where their features are at hand: of `frames` and `image` only the number and times are then read, and the prompt
    has no pixels. Raises ValueError when the processor makes another number of temporal patches than the frames have.
    """
    if grids is not None:
        processor = _without_pixels(processor, grids)
    messages = prompt_messages(
        sample,
        template,
        duration_s=None if frames is None else frames.duration_s,
        num_frames=None if frames is None else len(frames.frames),
    )
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    encoded = processor(
        text=[text],
        videos=None if frames is None else [torch.from_numpy(frames.frames.copy()).permute(0, 3, 1, 2)],
        images=None if image is None else [image],
        return_tensors="pt",
        **({} if frames is None else {"videos_kwargs": _video_settings(frames)}),
    )
    ids, types = encoded["input_ids"][0], encoded["mm_token_type_ids"][0]
    video = image_inputs = None
    frame_of_token, num_frames = torch.full_like(ids, -1), 0
    if frames is not None:
        video = Vision(encoded["pixel_values_videos"], encoded["video_grid_thw"])
        num_frames = int(video.grid_thw[0, 0])
        if num_frames * 2 != len(frames.frames):
            raise SettingError(
                f"sample {sample.id}: the processor made {num_frames} temporal patches of {len(frames.frames)} frames;"
                " it must neither sample nor drop frames"
            )
        video_tokens = types == VIDEO
        per_frame = int(video_tokens.sum()) // num_frames
        frame_of_token[video_tokens] = torch.arange(int(video_tokens.sum())) // per_frame
    if image is not None:
        image_inputs = Vision(encoded["pixel_values"], encoded["image_grid_thw"])
    known = [] if frames is None or not takes_seconds(model) else [frames.second_per_grid]
    seconds = torch.tensor(known, dtype=torch.float32)
    positions, _ = vision_features.base_model(model).get_rope_index(
        ids.unsqueeze(0),
        mm_token_type_ids=types.unsqueeze(0),
        image_grid_thw=None if image_inputs is None else image_inputs.grid_thw,
        video_grid_thw=None if video is None else video.grid_thw,
        **({"second_per_grid_ts": seconds} if takes_seconds(model) else {}),
    )
    return PromptInputs(
        sample=sample,
        text=text,
        ids=ids,
        token_types=types,
        frame_of_token=frame_of_token,
        positions=positions[:, 0],
        num_frames=num_frames,
        video=video,
        image=image_inputs,
        seconds_per_grid=seconds,
        timestamps_s=() if frames is None else tuple(float(t) for t in frames.timestamps_s),
    )


def pixel_settings(processor: Any) -> str:
    """Digest of what makes pixels of frames beside the frames: equal digests, equal pixels."""
    import transformers

    parts = [transformers.__version__]
    for part in (processor.video_processor, processor.image_processor):
        parts.append(json.dumps(part.to_dict(), sort_keys=True, default=str))
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _without_pixels(processor: Any, grids: Mapping[str, Tensor]) -> Any:
    """The processor with known grids in place of the parts that make them from pixels."""
    made = copy.copy(processor)
    for kind, pixels in (("video", "pixel_values_videos"), ("image", "pixel_values")):
        if kind in grids:
            part = getattr(processor, f"{kind}_processor")
            setattr(made, f"{kind}_processor", _KnownGrid(part, pixels, f"{kind}_grid_thw", grids[kind]))
    return made


class _KnownGrid:
    """Answers a processor's call as its video or image processor does, without looking at a pixel."""

    def __init__(self, part: Any, pixels: str, grid_name: str, grid_thw: Tensor):
        self._part = part
        self._found = {pixels: torch.empty(0, 0), grid_name: grid_thw}

    def __call__(self, _: Any, *, video_metadata: Any = None, **__: Any) -> dict[str, Any]:
        return (
            dict(self._found) if video_metadata is None else {**self._found, "video_metadata": video_metadata}
        )

    def __getattr__(self, name: str) -> Any:
        return getattr(self._part, name)  # merge_size, temporal_patch_size


def stripped(inputs: PromptInputs) -> PromptInputs:
    """The same prompt without the numbers of its pixels and features: small enough to keep by the thousand."""

    def bare(vision: Vision | None) -> Vision | None:
        return None if vision is None else replace(vision, pixels=vision.pixels[:0].clone(), features=None)

    return replace(inputs, video=bare(inputs.video), image=bare(inputs.image))


def with_features(inputs: PromptInputs, model: Any) -> PromptInputs:
    """The same prompt with its frozen features computed; pixels are dropped."""

    def encoded(vision: Vision | None, kind: str) -> Vision | None:
        if vision is None or vision.features is not None:
            return vision
        found = torch.cat(vision_features.encode(model, vision.pixels, vision.grid_thw))
        # A slice would keep all pixels alive.
        return Vision(vision.pixels[:0].clone(), vision.grid_thw, found)

    return replace(inputs, video=encoded(inputs.video, "video"), image=encoded(inputs.image, "image"))


def vision_kwargs(prompts: Sequence[PromptInputs], model: Any, device: torch.device) -> dict[str, Any]:
    """The visual keyword arguments of one forward pass over `prompts`, each standing once, in this order."""
    found: dict[str, Any] = {}
    for name, grid, visions in (
        ("pixel_values_videos", "video_grid_thw", [p.video for p in prompts if p.video is not None]),
        ("pixel_values", "image_grid_thw", [p.image for p in prompts if p.image is not None]),
    ):
        if visions:
            found[name] = torch.cat([v.tower_input for v in visions]).to(device)
            found[grid] = torch.cat([v.grid_thw for v in visions]).to(device)
            if all(v.features is not None for v in visions):
                found["vision_is_encoded"] = True
    if takes_seconds(model) and "video_grid_thw" in found:
        found["second_per_grid_ts"] = torch.cat([p.seconds_per_grid for p in prompts]).to(device)
    return found


def takes_seconds(model: Any) -> bool:
    """Qwen2.5-VL alone scales temporal positions by real seconds; Qwen3-VL writes times into the text."""
    return vision_features.base_model(model).config.model_type == "qwen2_5_vl"


def _video_settings(frames: VideoFrames) -> dict[str, Any]:
    from transformers.video_utils import VideoMetadata

    # The file's own rate, so that indices over rate give the true times (Qwen3-VL writes those into the prompt).
    metadata = VideoMetadata(
        total_num_frames=frames.total_frames,
        fps=frames.total_frames / frames.duration_s if frames.duration_s else None,
        duration=frames.duration_s,
        frames_indices=list(frames.frame_indices),
        video_backend="decord",
    )
    return {"do_sample_frames": False, "do_resize": False, "video_metadata": [metadata]}
