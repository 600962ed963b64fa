"""How a policy lies over processes, and how to have it whole: for rollouts, for its head, for a checkpoint.

Four layouts: one copy on every process (`ddp`, also one process alone), parameters sharded by torch's `fully_shard`
(`fsdp2`), and DeepSpeed's ZeRO with optimizer state sharded (`zero2`) or parameters too (`zero3`). In all of them full
fine-tuning updates float32 masters; what leaves the training is those, rounded once to `model.dtype`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from appo.modeling import features, windows
from appo.modeling.generation import save_with_its_settings

if TYPE_CHECKING:
    from appo.config import Model, Recipe

SHARDED = ("fsdp2", "zero2", "zero3")


def keeps_masters(recipe: Recipe) -> bool:
    """Whether the model's own parameters are the float32 masters. DeepSpeed keeps them in its optimizer, and under LoRA
    only the adapters train, which are float32 as PEFT makes them.
    """
    return recipe.model.lora is None and not recipe.training.distributed.startswith("zero")


def set_precision(accelerator: Any, dtype: torch.dtype) -> None:
    """FSDP2 computes in `dtype` on parameters that stay float32, and sums gradients up in float32.

    accelerate's default would sum gradients in bfloat16 and round what the model returns, log-probabilities among it.
    """
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is None or dtype == torch.float32:
        return
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Inputs are not cast: torch would hand copies of the frame probe and the packing to the layers.
    plugin.mixed_precision_policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )


def detach_tower(model: Any, recipe: Recipe, device: torch.device) -> None:
    """Keep the frozen tower whole on every process's device, apart from what is sharded, moved and saved."""
    tower = features.detach_tower(model, getattr(torch, recipe.model.dtype)).to(device)
    windows.install(model)
    if recipe.training.distributed == "fsdp2" and torch.distributed.is_initialized():
        # The first process alone has read the weights, as accelerate wants it (cpu_ram_efficient_loading).
        for tensor in [*tower.parameters(), *tower.buffers()]:
            torch.distributed.broadcast(tensor.data, src=0)


def prepare_frozen(model: Any, accelerator: Any) -> Any:
    """Lay a model that does not train out as the policy is: sharded where the policy's parameters are."""
    from accelerate import DistributedType

    if accelerator.distributed_type == DistributedType.FSDP:
        from accelerate.utils import fsdp2_prepare_model

        return fsdp2_prepare_model(accelerator, model).eval()
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        from trl.models import prepare_deepspeed

        return prepare_deepspeed(model, accelerator)
    return accelerator.prepare_model(model, evaluation_mode=True)


@contextmanager
def whole_policy(trainer: Any) -> Iterator[Any]:
    """The policy, unwrapped, with every parameter on this process: what generates and is looked at.

    Nothing inside waits for other processes, which may need another number of passes.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_fsdp_enabled:
        with _unsharded(policy), _keeping_a_cache(policy, trainer.args.gradient_checkpointing_kwargs):
            yield policy
        return
    from trl.models import unwrap_model_for_generation

    with unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=True,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    ) as model:
        yield model


@contextmanager
def _unsharded(policy: Any) -> Iterator[None]:
    from torch.distributed.fsdp import FSDPModule

    sharded = [module for module in policy.modules() if isinstance(module, FSDPModule)]
    before = [_post_forward_mesh(module) for module in sharded]
    for module in sharded:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module, mesh in zip(sharded, before, strict=True):
            module.set_reshard_after_forward(mesh is not None, recurse=False)
            module.reshard()


@contextmanager
def _keeping_a_cache(policy: Any, kwargs: Any) -> Iterator[None]:
    """transformers' checkpointed layers drop keys and values, and generation would see the last token alone."""
    checkpointed = policy.is_gradient_checkpointing
    if checkpointed:
        policy.gradient_checkpointing_disable()
    try:
        yield
    finally:
        if checkpointed:
            policy.gradient_checkpointing_enable(kwargs)


def _post_forward_mesh(module: Any) -> Any:
    """None where a module's parameters stay whole after its forward pass; torch has no public way to ask."""
    group = module._get_fsdp_state()._fsdp_param_group
    return None if group is None else group.post_forward_mesh_info


def whole_tensor(parameter: Tensor, dtype: torch.dtype) -> Tensor:
    """A parameter in `dtype`, whole, without gradient. Collective where it is sharded."""
    if hasattr(parameter, "ds_id") and not _is_gathered(parameter):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([parameter]):
            return parameter.detach().to(dtype, copy=True)
    rounded = parameter.detach().to(dtype)  # before it travels
    return rounded.full_tensor() if hasattr(rounded, "full_tensor") else rounded


def whole_head(model: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The output embedding, whole. Sharded masters are rounded to `dtype`, in which the head computes, before they are
    gathered; a weight that lies here is not copied.
    """
    head = model.get_output_embeddings()
    found = [
        None if p is None else whole_tensor(p, dtype) if _is_sharded(p) else p.detach()
        for p in (head.weight, getattr(head, "bias", None))
    ]
    assert found[0] is not None, "a head has a weight"
    return found[0], found[1]


@contextmanager
def head_at_hand(model: Any) -> Iterator[None]:
    """Under FSDP2, unshard the output embedding for a pass that reads its weight without calling the module.

    TRL's fused head would otherwise take a sharded weight with `full_tensor()`, whose gradient no process adds up.
    """
    while hasattr(model, "module"):
        model = model.module
    head = model.get_output_embeddings()
    if not hasattr(head, "unshard"):
        yield
        return
    head.unshard()
    try:
        yield
    finally:
        if not torch.is_grad_enabled():  # else the backward pass does, once it has reduced the gradient
            head.reshard()


def _is_sharded(parameter: Tensor) -> bool:
    partitioned = hasattr(parameter, "ds_id") and not _is_gathered(parameter)
    return partitioned or hasattr(parameter, "full_tensor")


def _is_gathered(parameter: Any) -> bool:
    return bool(parameter.ds_status.name == "AVAILABLE")


def published_weights(policy: Any, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Trained and frozen parameters outside a detached tower, one at a time, under their names in a checkpoint.

    Each is whole and equals its master rounded once to `dtype`; adapters are merged, and the weights they change stay
    as they are: merged in place and taken out again, a bfloat16 weight would drift. Collective.
    """
    adapted = _adapted_layers(policy)
    prefix = "base_model.model." if adapted else ""
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            continue
        public = name.removeprefix(prefix).replace(".base_layer.", ".")
        layer = adapted.get(name.removesuffix(".base_layer.weight"))
        if layer is None or not name.endswith(".base_layer.weight"):
            yield public, whole_tensor(parameter, dtype)
            continue
        merged = whole_tensor(parameter, torch.float32).clone()
        for adapter in layer.active_adapters:
            down = whole_tensor(layer.lora_A[adapter].weight, torch.float32)
            up = whole_tensor(layer.lora_B[adapter].weight, torch.float32)
            merged.addmm_(up, down, alpha=layer.scaling[adapter])
        yield public, merged.to(dtype)


def _adapted_layers(policy: Any) -> dict[str, Any]:
    """Module name -> LoRA layer."""
    if not hasattr(policy, "peft_config"):
        return {}
    from peft.tuners.lora import LoraLayer

    return {name: module for name, module in policy.named_modules() if isinstance(module, LoraLayer)}


def publish(trainer: Any, folder: Path, settings: Model) -> None:
    """Write the policy as a checkpoint that transformers, vLLM and PEFT load: in `model.dtype`, the tower included.

    Adapters alone where LoRA was trained. Collective; the first process writes.
    """
    dtype = getattr(torch, settings.dtype)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    is_first = trainer.is_world_process_zero()
    if hasattr(policy, "peft_config"):
        trained = [(name, p) for name, p in policy.named_parameters() if ".lora_" in name]
        state = {name: whole_tensor(p, dtype).cpu() for name, p in trained}
    else:
        state = {name: tensor.cpu() for name, tensor in published_weights(policy, dtype)}
        state |= {name: tensor.cpu() for name, tensor in features.tower_names(policy).items()}
    if is_first:
        folder.mkdir(parents=True, exist_ok=True)
        save_with_its_settings(policy, folder, state_dict=state)
        _name_dtype(folder / "config.json", settings.dtype)
    trainer.accelerator.wait_for_everyone()


def _name_dtype(path: Path, dtype: str) -> None:
    """transformers writes the type of the parameters that it finds, which are the masters'."""
    if not path.is_file():
        return
    from appo.storage import write_atomic

    config = json.loads(path.read_text(encoding="utf-8"))
    config["dtype"] = dtype
    for section in ("text_config", "vision_config"):
        if "dtype" in config.get(section, {}):
            config[section]["dtype"] = dtype
    write_atomic(path, json.dumps(config, indent=2) + "\n")
