"""One set of completions computed by every kernel in turn: the probe against eager attention, packed against plain.

The reference is float32 on the CPU, whose way through the code is the one that the tests hold. On a GPU that leaves out
nothing that is its own: the bias without a mask, kernels, products of two types.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

from benchmarks.gpu_check.parts import Place
from benchmarks.gpu_check.rows import Measure, Row, failed

TYPES = (
    "float32",
    "bfloat16",
    "bfloat16 weights",
)  # the last as under LoRA; else float32 masters under autocast
PROBE = {f"probe against eager: {t}, {layout}": (t, layout) for t in TYPES for layout in ("packed", "plain")}
PACKED = {f"packed against plain: {t}": t for t in TYPES}
ALONE = "probe against eager in float64: 3B's heads, the longest prompts"
WEIGHTS, KERNELS = "token weights against float64: bfloat16", "attention kernels: bfloat16, packed"


def rows(place: Place) -> list[str]:
    return [ALONE, *PROBE, *PACKED, WEIGHTS, KERNELS]


def run(
    names: Sequence[str], place: Place, began: Callable[[str], None], done: Callable[[Row], None]
) -> None:
    bench = Bench(place)
    for name in names:
        began(name)
        start = time.perf_counter()
        try:
            measures = bench.measure(name)
            done(Row(name, measures, time.perf_counter() - start))
        except Exception as error:
            done(failed(name, error, time.perf_counter() - start))
            if "CUDA error" in str(error):  # nothing that follows in this process can succeed
                raise


class Bench:
    """The models, made when first asked for: float32 on the CPU, and its weights in each type on the device."""

    def __init__(self, place: Place):
        import torch

        from benchmarks.shapes import SHAPES

        self.device = torch.device(place.device)
        # On a GPU 3B's heads and widths, as FlashAttention meets them; few layers and words, since float32 on the CPU
        # runs the same.
        self.shape = (
            replace(
                SHAPES["3b"], name="3b, 4 layers", layers=4, vision_layers=4, full_attention=(1, 3),
                vocabulary=16_384, frames=8, side=112, completion=64, groups=2,
            )
            if place.gpu
            else replace(SHAPES["tiny"], groups=2)
        )  # fmt: skip
        self._steps: dict[str, Any] = {}

    def measure(self, name: str) -> tuple[Measure, ...]:
        if name in PROBE:
            return self._probe(*PROBE[name])
        if name in PACKED:
            return self._packed(PACKED[name])
        return {ALONE: self._alone, WEIGHTS: self._weights, KERNELS: self._kernels}[name]()

    @cached_property
    def reference(self) -> Any:
        return self._made("float32", None)

    def step(self, kind: str) -> Any:
        if kind not in self._steps:
            self._steps[kind] = self._made(kind, self.reference.model)
        return self._steps[kind]

    def _made(self, kind: str, weights_of: Any) -> Any:
        import torch

        from appo.modeling.features import base_model
        from benchmarks.arms import Step
        from benchmarks.shapes import build_model, build_prompts, completions, sharpened

        lora = 4 if kind == TYPES[2] else 0
        shape = replace(self.shape, dtype=kind.split()[0], lora=lora, checkpointing=kind != "float32")
        model = build_model(shape, torch.device("cpu"))
        if weights_of is None:
            sharpened(model)
        else:
            _copy(weights_of, model)
            model.to(self.device)
            base_model(model).visual.to(self.device)  # detached, it does not move with the model
        return Step(shape, model, build_prompts(shape, model), completions(shape))

    @cached_property
    def exact(self) -> dict[str, Any]:
        """Of the reference: frame attention and log-probabilities of every group, and the gradient."""
        from benchmarks.arms import gradient

        attention, logps = self._eager(self.reference)
        return {
            "attention": attention,
            "logps": logps,
            "gradient": gradient(self.reference, "plain_dapo", False),
        }

    def _eager(self, step: Any) -> tuple[Any, Any]:
        return self._each_group(step, lambda *group: step._eager(*group)[1:])

    def _scored(self, step: Any, arm: str) -> tuple[Any, Any]:
        def score(rows: Any, num_tokens: int, _lengths: Any) -> tuple[Any, Any]:
            found = step._score(arm, rows, num_tokens, probe=True)
            return found.attention, found.logps

        return self._each_group(step, score, arm)

    def _each_group(self, step: Any, call: Any, arm: str = "plain_appo") -> tuple[Any, Any]:
        """(attention, log-probabilities) of all real tokens of all groups, on the CPU."""
        import torch

        found = []
        with torch.no_grad(), step._autocast():
            for group in range(self.shape.groups):
                rows = step._rows(arm, group)
                lengths = torch.tensor([len(row.tokens) for row in rows])
                num_tokens = int(lengths.max())
                valid = torch.arange(num_tokens) < lengths[:, None]
                values = call(rows, num_tokens, lengths.to(step.device))
                found.append([value.float().cpu()[valid] for value in values])
        attention, logps = (torch.cat(parts) for parts in zip(*found, strict=True))
        return attention, logps

    def _alone(self) -> tuple[Measure, ...]:
        """The probe's arithmetic without a model: Qwen2.5-VL-3B's heads, 4,096 keys, and what it holds of a GPU."""
        import torch

        from appo.perception.probe import attention_to_frames
        from benchmarks.gpu_check import bounds

        heads, kv_heads, width, frames, chunk_mib = 16, 2, 128, 15, 64
        length, keys = (512, 4096) if self.device.type == "cuda" else (64, 1024)
        generator = torch.Generator().manual_seed(0)
        queries, cache = (
            torch.randn(1, h, n, width, generator=generator).to(self.device, torch.bfloat16)
            for h, n in ((heads, length), (kv_heads, keys))
        )
        visible = torch.ones(length, keys, dtype=torch.bool, device=self.device).tril(keys - length)
        frame_of_key = (torch.arange(keys, device=self.device) * frames // keys).expand(1, -1)
        with torch.autocast(self.device.type, torch.bfloat16):  # of which it takes no notice
            found, held = _holding(
                lambda: attention_to_frames(
                    queries, cache, visible, frame_of_key, frames,
                    scaling=width**-0.5, chunk_bytes=chunk_mib << 20,
                )
            )  # fmt: skip
        repeated = cache.double().repeat_interleave(heads // kv_heads, dim=1)
        scores = (queries.double() @ repeated.transpose(-1, -2) * width**-0.5).masked_fill(
            ~visible, float("-inf")
        )
        members = torch.nn.functional.one_hot(frame_of_key[0], frames).double()
        exact = scores.softmax(-1).mean(1) @ (members / members.sum(0))
        # bfloat16 queries and keys are exact in float32; only sums of some hundred terms round.
        measures = (Measure("off by", bounds.relative(found, exact), bounds.EXACT),)
        return measures if held is None else (*measures, Measure("held", held, 1.25 * chunk_mib, unit=" MiB"))

    def _probe(self, kind: str, layout: str) -> tuple[Measure, ...]:
        from benchmarks.gpu_check import bounds

        step, exact = self.step(kind), self.exact["attention"]
        found = self._scored(step, "appo" if layout == "packed" else "probe_appo")[0]
        if kind == "float32":
            return (Measure("off by", bounds.relative(found, exact), bounds.SAME),)
        eager = self._eager(step)[0]
        rounding = bounds.relative(eager, exact)
        allowed = max(bounds.PROBE, bounds.PROBE_ROUNDINGS * rounding)
        return (
            Measure("off eager by", bounds.relative(found, eager), allowed),
            Measure("off float32 by", bounds.relative(found, exact), allowed),
            Measure("eager itself off by", rounding),
        )

    def _packed(self, kind: str) -> tuple[Measure, ...]:
        from benchmarks.arms import gradient
        from benchmarks.cell_distances import GRADIENT
        from benchmarks.gpu_check import bounds

        step = self.step(kind)
        logps = {arm: self._scored(step, arm)[1] for arm in ("probe_appo", "appo")}
        plain, packed = (bounds.relative(found, self.exact["logps"]) for found in logps.values())
        gradients = [gradient(step, arm, False) for arm in ("plain_dapo", "dapo")]
        if kind == TYPES[2]:  # of adapters, which the reference does not have
            return (
                Measure("log-probabilities off by", packed, bounds.PACKED_ROUNDINGS * plain),
                Measure(
                    "gradients apart by",
                    bounds.relative(gradients[1], gradients[0]),
                    GRADIENT["bfloat16"],
                ),
            )
        plain_way, packed_way = (bounds.relative(found, self.exact["gradient"]) for found in gradients)
        same = kind == "float32"
        return (
            Measure(
                "log-probabilities off by", packed, bounds.SAME if same else bounds.PACKED_ROUNDINGS * plain
            ),
            Measure(
                "gradient off by",
                packed_way,
                bounds.SAME_GRADIENT if same else bounds.PACKED_ROUNDINGS * plain_way,
            ),
        )

    def _weights(self) -> tuple[Measure, ...]:
        """Rows and head in bfloat16 on the device, against the same numbers in float64 on the CPU."""
        import torch

        from appo.perception import perception_weights_from_hidden
        from benchmarks.arms import _WEIGHTS
        from benchmarks.gpu_check import bounds

        step = self.step(TYPES[2])
        rows = step._rows("appo", 0)
        lengths = torch.tensor([len(row.tokens) for row in rows])
        with torch.no_grad(), step._autocast():
            scores = step._score("appo", rows, int(lengths.max()), probe=True)
        head = step.model.get_output_embeddings().weight.detach()
        given = [scores.attention, lengths.to(step.device), step.accuracy]
        found = perception_weights_from_hidden(*given, scores.hidden.bfloat16(), head.bfloat16(), **_WEIGHTS)
        exact = perception_weights_from_hidden(
            *(x.cpu() for x in given),
            scores.hidden.bfloat16().cpu().double(),
            head.bfloat16().cpu().double(),
            **_WEIGHTS,
        )
        apart = float((found.weights.cpu().double() - exact.weights.double()).abs().max())
        return (
            Measure("off by at most", apart, bounds.WEIGHTS),
            Measure("largest weight", float(exact.weights.max()), 1.0 + 1e-3, at_most=False),
        )

    def _kernels(self) -> tuple[Measure, ...]:
        """Share of the packed attention calls, forward, that a fused kernel ran; on a GPU FlashAttention's."""
        import torch

        import appo.modeling.attention as attention

        step, asked = self.step("bfloat16"), Counter[str]()
        run_one = attention._attend

        def counted(*args: Any) -> Any:
            asked["calls"] += 1
            return run_one(*args)

        attention._attend = counted
        try:
            rows = step._rows("dapo", 0)
            with torch.no_grad(), step._autocast(), _operators() as ran:
                step._score("dapo", rows, max(len(row.tokens) for row in rows), probe=False)
        finally:
            attention._attend = run_one
        flash = sum(count for name, count in ran.items() if "flash" in name)
        return (
            Measure("share on FlashAttention", flash / asked["calls"], 1.0, at_most=False),
            Measure("calls", asked["calls"]),
        )


def _holding(call: Callable[[], Any]) -> tuple[Any, float | None]:
    """What a call gives, and the most MiB of a GPU's memory that it held meanwhile; None on a CPU."""
    import torch

    if not torch.cuda.is_available():
        return call(), None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = call()
    return found, (torch.cuda.max_memory_allocated() - before) / 2**20


def _operators() -> Any:
    """A context that counts the operators that torch dispatches inside, by name."""
    from contextlib import contextmanager

    from torch.utils._python_dispatch import TorchDispatchMode

    counts = Counter[str]()

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[str(func)] += 1
            return func(*args, **(kwargs or {}))

    @contextmanager
    def counting() -> Any:
        with Counting():
            yield counts

    return counting()


def _copy(source: Any, target: Any) -> None:
    """The weights of one model in another of the same sizes, in the types that it has; adapters keep their own."""
    import torch

    from appo.modeling.features import base_model

    theirs = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            if ".lora_" not in name:
                parameter.copy_(theirs[name.removeprefix("base_model.model.").replace(".base_layer.", ".")])
    base_model(target).visual.load_state_dict(base_model(source).visual.state_dict())
