"""Laws of the attention function: packed equals padded, the probe equals eager attention, in every supported family."""

from __future__ import annotations

import pytest
import torch

from appo.config import Model
from appo.modeling import attention, packing
from appo.modeling.loading import load_policy
from appo.perception.probe import FrameProbe, PlainRows
from appo.training.scoring import score
from tests.modeling import models

# Float32 sums of a few hundred terms in another order.
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def batch(family: str, image: bool = True):
    """Two groups of three ragged completions; prompts of different length and a different number of frames."""
    prompts = [
        models.prompt(family, frames=5, text=4, image=image, seed=1),
        models.prompt(family, frames=3, text=6, image=image, seed=2),
    ]
    generator = torch.Generator().manual_seed(3)
    completions = [
        [torch.randint(1, 50, (n,), generator=generator) for n in lengths]
        for lengths in ((7, 1, 4), (5, 7, 2))
    ]
    return prompts, completions


def packed_batch(model, prompts, completions):
    groups, row = [], 0
    for p, group in zip(prompts, completions, strict=True):
        rows = tuple(range(row, row + len(group)))
        row += len(group)
        groups.append(packing.PackedGroup(p.ids, models.rope(model, p), p.frames, tuple(group), rows))
    found = packing.pack(groups)
    inputs = {
        **found.model_inputs(),
        "pixel_values_videos": torch.cat([p.pixels_video for p in prompts]),
        "video_grid_thw": torch.cat([p.grid_video for p in prompts]),
    }
    if prompts[0].pixels_image is not None:
        inputs["pixel_values"] = torch.cat([p.pixels_image for p in prompts])
        inputs["image_grid_thw"] = torch.cat([p.grid_image for p in prompts])
    return found, inputs


def plain_logits(model, prompts, completions, **kwargs):
    made = models.padded_inputs(model, prompts, completions)
    logits = model(**made["inputs"], **kwargs).logits
    return logits[:, made["width"] - 1 : -1], made


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_packed_equals_padded(family, window):
    if window and family == "qwen3_vl":
        pytest.skip("Qwen3-VL has no sliding-window layers")
    model = models.build(family, sliding_window=window)
    prompts, completions = batch(family)
    reference, made = plain_logits(model, prompts, completions)
    found, inputs = packed_batch(model, prompts, completions)
    logits = found.unpack(model(**inputs).logits[:, found.scored], 6, made["tail"])
    for row, completion in enumerate(c for group in completions for c in group):
        torch.testing.assert_close(logits[row, : len(completion)], reference[row, : len(completion)], **CLOSE)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_gradients_equal_padded(checkpointing):
    model = models.build("qwen2_5_vl")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    prompts, completions = batch("qwen2_5_vl")
    labels = [c for group in completions for c in group]

    def gradients(logits):
        model.zero_grad()
        sum(
            torch.nn.functional.cross_entropy(logits[i, : len(c)], c) for i, c in enumerate(labels)
        ).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    reference = gradients(plain_logits(model, prompts, completions)[0])
    found, inputs = packed_batch(model, prompts, completions)
    ours = gradients(found.unpack(model(**inputs).logits[:, found.scored], 6, 7))
    assert reference.keys() == ours.keys()
    for name, gradient in reference.items():
        error = (ours[name] - gradient).norm() / gradient.norm().clamp(min=1e-6)
        assert error < 1e-4, f"{name}: relative gradient error {error:.1e}"


@pytest.mark.parametrize("heads", [2, 6])
def test_a_gpus_way_takes_what_autocast_gives_it(heads):
    """Full fine-tuning under autocast: rotary positions make float32 of queries and keys, values stay bfloat16.

    Only the kernel behind the bias is another on a GPU; what it is called with is looked at before one is chosen.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(3, h, n, 16, generator=generator) for h, n in ((heads, 4), (2, 9), (2, 9))
    )
    expected = attention._attend(query, key, value, 0.3, None)
    with torch.autocast("cpu", torch.bfloat16):
        found = attention.attend_lower_right(query, key, value.bfloat16(), 0.3)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)  # eight bits
    exact = attention.attend_lower_right(query, key, value, 0.3)
    torch.testing.assert_close(exact, expected, **CLOSE)


def eager_frame_attention(family, prompts, completions, layers, window=None, dtype=torch.float32):
    """The slow reference: whole attention matrices, then an explicit loop over frames."""
    model = models.build(family, implementation="eager", sliding_window=window).to(dtype)
    made = models.padded_inputs(model, prompts, completions)
    made["inputs"] = {
        k: v.to(dtype) if v.is_floating_point() and "pixel" in k else v for k, v in made["inputs"].items()
    }
    with torch.no_grad():
        attentions = model(**made["inputs"], output_attentions=True).attentions
    stacked = torch.stack([attentions[layer].float() for layer in layers]).mean(dim=(0, 2))  # (B, L, L)
    rows = stacked[:, made["width"] - 1 : -1]
    num_frames = max(p.num_frames for p in prompts)
    out = torch.zeros(rows.shape[0], rows.shape[1], num_frames)
    for row in range(rows.shape[0]):
        for frame in range(num_frames):
            members = made["frames"][row] == frame
            if members.any():
                out[row, :, frame] = rows[row][:, members].mean(dim=1)
    return out


def rounded(inputs, dtype=torch.bfloat16):
    return {k: v.to(dtype) if "pixel" in k else v for k, v in inputs.items()}


def valid_tokens(completions):
    lengths = torch.tensor([len(c) for group in completions for c in group])
    return torch.arange(int(lengths.max())) < lengths[:, None]


@torch.no_grad()
def probed(model, prompts, completions, layout, dtype=torch.float32):
    """Attention of the last three of four layers to five frames, (6, N, 5)."""
    # One MiB is smaller than these scores times the batch, so that the chunked path is the one under test.
    probe = FrameProbe((1, 2, 3), num_frames=5, chunk_mib=1)
    if layout == "padded":
        made = models.padded_inputs(model, prompts, completions)
        length = made["inputs"]["input_ids"].shape[1]
        rows = torch.arange(made["width"] - 1, length - 1).expand(6, -1)
        probe.plain = PlainRows(rows, made["inputs"]["attention_mask"].bool(), made["frames"])
        model(**rounded(made["inputs"], dtype), frame_probe=probe)
        return probe.attention()
    packed, inputs = packed_batch(model, prompts, completions)
    model(**rounded(inputs, dtype), frame_probe=probe)
    found = torch.zeros(6, valid_tokens(completions).shape[1], 5)
    for part, bucket in enumerate(packed.buckets):
        read = probe.attention(part)
        found[bucket.rows.flatten(), : read.shape[1]] = read
    return found


@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_probe_equals_eager_attention(family, layout, window):
    if window and family == "qwen3_vl":
        pytest.skip("Qwen3-VL has no sliding-window layers")
    prompts, completions = batch(family)
    expected = eager_frame_attention(family, prompts, completions, (1, 2, 3), window)
    found = probed(models.build(family, sliding_window=window), prompts, completions, layout)
    valid = valid_tokens(completions)
    torch.testing.assert_close(found[valid], expected[valid], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("family", models.FAMILIES)
def test_probe_in_bfloat16_stays_within_two_per_mille_of_eager(family, layout):
    """Or within eager's own rounding: Qwen3-VL's eager attention is itself 0.2 % off its float32 values here."""
    prompts, completions = batch(family)
    exact = eager_frame_attention(family, prompts, completions, (1, 2, 3))
    expected = eager_frame_attention(family, prompts, completions, (1, 2, 3), dtype=torch.bfloat16)
    found = probed(models.build(family).bfloat16(), prompts, completions, layout, torch.bfloat16)
    valid = valid_tokens(completions)
    error = (found - expected)[valid].norm() / expected[valid].norm()
    rounding = (expected - exact)[valid].norm() / exact[valid].norm()
    assert error < max(2e-3, 1.5 * rounding), f"relative error {error:.1e}, eager's own {rounding:.1e}"


def test_packed_in_bfloat16_is_no_further_from_float32_than_padded():
    prompts, completions = batch("qwen2_5_vl")
    valid = valid_tokens(completions)
    exact = plain_logits(models.build("qwen2_5_vl"), prompts, completions)[0][valid]
    model = models.build("qwen2_5_vl").bfloat16()
    made = models.padded_inputs(model, prompts, completions)
    padded = model(**rounded(made["inputs"])).logits[:, made["width"] - 1 : -1].float()[valid]
    packed, inputs = packed_batch(model, prompts, completions)
    logits = packed.unpack(model(**rounded(inputs)).logits[:, packed.scored], 6, made["tail"]).float()
    error, allowed = ((x - exact).norm() / exact.norm() for x in (logits[valid], padded))
    assert error < 1.5 * allowed, f"relative error {error:.1e}, padded {allowed:.1e}"


@pytest.mark.parametrize("closed", [True, False])
def test_a_closed_probe_is_not_read_again_by_checkpointing(monkeypatch, closed):
    """The backward pass runs every layer again; open, a probe would be asked again in each of them."""
    asked = {"layers": 0, "probe": 0}
    run, read = attention.packed_attention, FrameProbe.read

    def counting(name, function):
        def call(*args, **kwargs):
            asked[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(attention, "packed_attention", counting("layers", run))
    monkeypatch.setattr(FrameProbe, "read", counting("probe", read))
    model = models.build("qwen2_5_vl")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    _, inputs = packed_batch(model, *batch("qwen2_5_vl"))
    probe = FrameProbe((1, 2, 3), num_frames=5)
    loss = model(**inputs, frame_probe=probe).logits.sum()
    before = probe.attention(0).clone()
    buckets = len(inputs["packed"].buckets)
    assert asked == {"layers": 4, "probe": 3 * buckets}
    if closed:
        probe.close()
    loss.backward()
    assert asked == {"layers": 8, "probe": (3 if closed else 6) * buckets}
    # Either way what was read stays: a layer is added once.
    torch.testing.assert_close(probe.attention(0), before, atol=0, rtol=0)


def test_a_layer_that_was_not_read_is_named():
    with pytest.raises(RuntimeError, match=r"layers \[2\] were not read"):
        FrameProbe((2,), num_frames=1).attention()


def test_unsupported_architecture_is_refused_by_name(tmp_path):
    """Before its weights are read: there are none in the folder."""
    from transformers import LlavaConfig

    LlavaConfig().save_pretrained(tmp_path)
    with pytest.raises(attention.UnsupportedModel, match=r"model_type='llava'.*qwen2_5_vl"):
        load_policy(str(tmp_path), Model())


@pytest.mark.parametrize("implementation", ["sdpa", "eager", "flash_attention_2"])
@pytest.mark.parametrize("asked", ["shared prefix", "frame attention"])
def test_other_attention_functions_are_refused_by_name(implementation, asked):
    model = models.build("qwen2_5_vl")
    model.model.language_model.config._attn_implementation = implementation
    with pytest.raises(attention.UnsupportedModel, match=implementation):
        score(
            model,
            [],
            1,
            shared_prefix=asked == "shared prefix",
            pad_token_id=0,
            device=torch.device("cpu"),
            probe_layers=(1,) if asked == "frame attention" else None,
        )
