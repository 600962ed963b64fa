"""Counted operations against torch's FlopCounterMode on real passes of small models."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from appo.modeling import counts
from appo.modeling.architecture import read_config
from appo.modeling.counts import Group, Operations
from appo.modeling.inputs import with_features
from appo.training.scoring import Row, score
from benchmarks.shapes import PAD, SHAPES, build_model, build_prompts

SHAPE = replace(SHAPES["tiny"], side=112, frames=8, generations=3, groups=2)
LENGTHS = [(12, 7, 9), (5, 12, 3)]


@pytest.fixture(scope="module")
def model():
    return build_model(SHAPE, torch.device("cpu")).eval()


@pytest.fixture(scope="module")
def architecture(model):
    return read_config(model.config.to_dict(), "small")


@pytest.fixture(scope="module")
def prompts(model):
    return build_prompts(SHAPE, model)


def counted(call):
    # torch counts no operations of its fused attention on CPUs; this back end is made of products that it does count.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call()
    return counter.get_total_flops()


def rows_of(prompts, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(0)
    return [
        Row(prompt, number, torch.randint(6, SHAPE.vocabulary, (n,), generator=generator))
        for number, (prompt, group) in enumerate(zip(prompts, lengths, strict=True))
        for n in group
    ]


def groups_of(prompts, lengths=LENGTHS):
    return [Group(len(p.ids), group) for p, group in zip(prompts, lengths, strict=True)]


def scored(model, rows, *, shared, layers=None):
    return score(
        model,
        rows,
        12,
        shared_prefix=shared,
        pad_token_id=PAD,
        device=torch.device("cpu"),
        probe_layers=layers,
    )


def grids(prompts):
    return [tuple(p.video.grid_thw[0].tolist()) for p in prompts]


@pytest.mark.parametrize("shared", [True, False], ids=["packed", "plain"])
@pytest.mark.parametrize("tower", [True, False], ids=["tower", "features"])
def test_a_forward_pass_is_counted_as_torch_counts_it(model, architecture, prompts, shared, tower):
    given = prompts if tower else [with_features(p, model) for p in prompts]
    found = counted(lambda: scored(model, rows_of(given), shared=shared))
    groups = groups_of(prompts)
    ours = counts.packed(architecture, groups) if shared else counts.padded(architecture, groups, 12)
    if tower:
        times = 1 if shared else 3  # each completion brings its own video
        ours += counts.encoding(architecture, grids(prompts) * times)
    assert ours.total == pytest.approx(found, rel=0.02)
    assert min(ours.text, ours.attention, ours.head) > 0
    assert (ours.tower > 0) == tower


@pytest.mark.parametrize("size", [(112, 112), (84, 140), (56, 28), (196, 252)])
def test_windows_at_the_edges_are_counted(model, architecture, size):
    from appo.modeling.features import base_model

    rows, columns = size[0] // 14, size[1] // 14
    grid = torch.tensor([[3, rows, columns]])
    pixels = torch.randn(3 * rows * columns, 3 * 2 * 14 * 14)
    found = counted(lambda: base_model(model).visual(pixels, grid_thw=grid))
    assert counts.encoding(architecture, [(3, rows, columns)]).tower == pytest.approx(found, rel=0.02)


@pytest.mark.parametrize("trains", ["all", "adapters"])
def test_an_update_is_counted_as_torch_counts_it(model, architecture, prompts, trains):
    from peft import LoraConfig, get_peft_model

    lengths = [(12, 12, 12), (12, 12, 12)]
    given = [with_features(p, model) for p in prompts]
    trained = model
    if trains == "adapters":
        trained = build_model(SHAPE, torch.device("cpu"))
        trained = get_peft_model(
            trained, LoraConfig(r=1, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        )

    def step():
        with torch.enable_grad():
            scored(trained, rows_of(given, lengths), shared=True).logps.sum().backward()

    found = counted(step)
    forward = counts.packed(architecture, groups_of(prompts, lengths))
    ours = counts.update(forward, trains=trains)
    # The fused head makes its logits again, and torch does not count the in-place products of its gradients.
    uncounted = 2 if trains == "all" else 1
    assert ours.total + (1 - uncounted) * forward.head == pytest.approx(found, rel=0.02)
    again = counts.update(forward, trains=trains, layers_again=True, head_again=True)
    assert again.total == pytest.approx(ours.total + forward.total, rel=1e-9)


def test_generation_is_counted_as_torch_counts_it(model, architecture, prompts):
    from appo.modeling.generation import Sampling
    from appo.training.rollouts import generate_groups

    sampling = Sampling(10, (1,), PAD, min_tokens=10)
    given = [with_features(p, model) for p in prompts]
    found = counted(lambda: generate_groups(model, given, 3, sampling=sampling, device=torch.device("cpu")))
    ours = counts.generation(architecture, groups_of(prompts, [(10, 10, 10), (10, 4, 3)]))
    assert ours.total == pytest.approx(found, rel=0.02)


def test_an_engine_stops_each_completion_by_itself(architecture):
    groups = [Group(50, (10, 4)), Group(40, (7, 7))]
    whole = counts.generation(architecture, groups)
    ended = counts.generation(architecture, groups, padded_rows=False)
    assert ended.text < whole.text
    alone = [counts.generation(architecture, [g], padded_rows=False) for g in groups]
    assert ended == alone[0] + alone[1]


def test_the_probe_is_counted_as_torch_counts_it(model, architecture, prompts):
    given = [with_features(p, model) for p in prompts]
    lengths = [(12, 12, 12), (12, 12, 12)]
    plain = counted(lambda: scored(model, rows_of(given, lengths), shared=True))
    read = counted(lambda: scored(model, rows_of(given, lengths), shared=True, layers=(2, 3)))
    ours = counts.probe(architecture, groups_of(prompts, lengths), 2, prompts[0].num_frames)
    assert ours.probe == pytest.approx(read - plain, rel=0.02)


@pytest.mark.parametrize("known", [True, False])
def test_token_weights_are_counted_as_torch_counts_them(known):
    from appo.perception import perception_weights_from_hidden

    torch.manual_seed(0)
    group, tokens, hidden, vocabulary = 4, 9, 32, 640
    states, head = torch.randn(group, tokens, hidden), torch.randn(vocabulary, hidden)
    normalizer = (states @ head.T).logsumexp(dim=-1) if known else None
    made = {}

    def call():
        made["weights"] = perception_weights_from_hidden(
            torch.rand(group, tokens, 5),
            torch.full((group,), tokens),
            torch.tensor([1.0, 0.0, 1.0, 0.0]),
            states,
            head,
            log_normalizer=normalizer,
            k1=3,
            k2=2,
            k3=4,
            max_weight=1.7,
        )

    found = counted(call)
    rows = round(made["weights"].perception_share * group * tokens)
    shape = replace(SHAPE, hidden=hidden, vocabulary=vocabulary, heads=4)
    architecture = read_config(build_model(shape, torch.device("meta")).config.to_dict(), "small")
    ours = counts.token_weights(architecture, rows, normalizers_known=known)
    assert ours.weights == pytest.approx(found, rel=0.02)


def test_parts_add_up():
    one = Operations(1, 2, 3, 4, 5, 6)
    assert (one + one).by_part() == {name: 2 * value for name, value in one.by_part().items()}
    assert one.total == 21


def test_adapters_are_counted_as_peft_makes_them(model, architecture):
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "down_proj"]
    made = get_peft_model(build_model(SHAPE, torch.device("cpu")), LoraConfig(r=3, target_modules=targets))
    names = [(n, p.numel()) for n, p in made.named_parameters() if "lora_" in n and "visual" not in n]
    assert counts.adapters(architecture, targets, 3) == sum(count for _, count in names)
    with pytest.raises(ValueError, match=r"model\.lora\.target_modules: 'qkv' is none of"):
        counts.adapters(architecture, ["qkv"], 3)
