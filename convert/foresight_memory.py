"""What training a denoiser will take in memory, counted on a model without values.

The model runs once forward on the meta device, and what autograd would keep for the backward pass is added up. Softmax
attention counts as a fused kernel: queries, keys, values, output and one number a row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..kernels import operators
from ..kernels.spec import Full, Spec
from .hosts.denoisers import dummy_inputs
from .hosts.sites import Site, submodule

if TYPE_CHECKING:
    from .recipe_images import ImageRecipe

ADAPTER, LEARNED = 4, 4  # bytes of a number of adapters, and of what operators learn: both are fp32


def training_memory(
    recipe: ImageRecipe,
    model: Any,
    sites: Sequence[Site],
    plan: Mapping[Site, Sequence[Spec]] | None,
    grid: Sequence[int],
    text: int,
    share: float | None = None,
) -> dict[str, Any] | None:
    """Numbers that are trained and bytes that training takes; None where nothing is trained.

    Where the plan is not decided yet, the share of the budget counts as converted to the first candidate, of all sites
    alike. `activations_bytes` is rough: those of one forward pass of the full model, for the batch.
    """
    settings = recipe.distill.training
    if settings is None:
        return None
    part = 1.0
    if plan is None:
        part = 1.0 if share is None else share
        first = recipe.select.operator or recipe.profile.candidates[0]
        plan = {site: [first] * site.kv_heads for site in sites}
    converted = {site: specs for site, specs in plan.items() if any(spec != Full() for spec in specs)}
    element = getattr(torch, recipe.model.dtype).itemsize
    weights = sum(p.numel() for p in model.parameters()) * element
    layers = [layer for site in converted for layer in _linear(submodule(model, site.name))]
    projections = sum(p.numel() for layer in layers for p in layer.parameters())
    adapters = sum(settings.rank * (layer.in_features + layer.out_features) for layer in layers)
    projections, adapters, learned = (round(part * n) for n in (projections, adapters, _learned(converted)))
    beside = {"lora": (adapters, ADAPTER), "projections": (projections, element), "operators": (0, 0)}
    count, size = beside[settings.weights]
    trained = count * size + learned * LEARNED
    copies = projections * element if settings.weights == "projections" else 0  # the teacher's own
    kept, largest, boundaries = _saved(model, converted, grid, text, element)
    once = largest + boundaries if settings.gradient_checkpointing else kept
    outputs = sum(_output(site, grid, text, element) for site in converted) if settings.feature else 0
    outputs = round(part * outputs)
    parts = {
        "weights_bytes": weights,
        "trained_bytes": (trained if settings.weights != "projections" else learned * LEARNED) + copies,
        "gradients_bytes": trained,
        "optimizer_bytes": 2 * trained,
        "activations_bytes": settings.batch * once,
        "targets_bytes": settings.batch * outputs,
    }
    return {
        "weights": settings.weights,
        "steps": settings.steps,
        "batch": settings.batch,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "parameters": count + learned,
        **parts,
        "total_bytes": sum(parts.values()),
        "a_sample_bytes": once + outputs,
    }


def _linear(module: nn.Module) -> Iterable[nn.Linear]:
    return [child for child in module.modules() if isinstance(child, nn.Linear)]


def _learned(plan: Mapping[Site, Sequence[Spec]]) -> int:
    """Numbers that the operators learn."""
    total = 0
    with torch.device("meta"):
        for site, specs in plan.items():
            group = site.heads // site.kv_heads
            for spec in dict.fromkeys(specs):
                heads = list(specs).count(spec)
                found = operators.of(spec).parameters(spec, heads * group, heads, site.dim)
                total += sum(p.numel() for p in found.parameters()) if found is not None else 0
    return total


def _output(site: Site, grid: Sequence[int], text: int, element: int) -> int:
    """Bytes of what a site gives for one sample."""
    return site.layout(grid, text).tokens * site.heads * site.dim * element


class _Fused(torch.autograd.Function):
    """Attention as a fused kernel keeps it: its inputs, its output, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        o = q.new_empty(*q.shape[:-1], v.shape[-1])
        ctx.save_for_backward(q, k, v, o, q.new_empty(q.shape[:-1], dtype=torch.float32))
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise AssertionError("a model without values is not trained")


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value")
            q, k, v = (args[n] if len(args) > n else kwargs[name] for n, name in enumerate(names))
            return _Fused.apply(q, k, v)  # type: ignore[no-untyped-call]
        return func(*args, **kwargs)


def _block(name: str) -> str:
    """The block that a site is part of: what gradient checkpointing computes again at once."""
    return re.sub(r"(.*\.\d+)\..*", r"\1", name)


def _saved(
    model: Any, plan: Mapping[Site, Sequence[Spec]], grid: Sequence[int], text: int, element: int
) -> tuple[int, int, int]:
    """Bytes that a forward pass of one sample keeps: all of them, the most of one block, the inputs of all blocks."""
    own = {x.untyped_storage()._cdata for x in (*model.parameters(), *model.buffers())}
    blocks = {name: submodule(model, name) for name in dict.fromkeys(_block(site.name) for site in plan)}
    kept: dict[int, Tensor] = {}  # alive, so that no storage takes the place of another
    by_block: dict[str, int] = {}
    running: list[str] = [""]
    inputs = 0
    dtype = model.dtype  # looks at every parameter each time it is asked for
    scale = element / dtype.itemsize

    def pack(x: Tensor) -> Tensor:
        key = x.untyped_storage()._cdata
        if key not in own and key not in kept:
            kept[key] = x
            bytes_ = round(x.untyped_storage().nbytes() * (scale if x.dtype == dtype else 1))
            by_block[running[-1]] = by_block.get(running[-1], 0) + bytes_
        return x

    def enter(name: str) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            nonlocal inputs
            running.append(name)
            held = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
            inputs += sum(round(x.numel() * x.element_size() * scale) for x in held)

        return hook

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        running.pop()

    model.requires_grad_(False)
    for site in plan:  # what is frozen keeps nothing but what leads back to these
        for layer in _linear(submodule(model, site.name)):
            layer.requires_grad_(True)
    hooks = [block.register_forward_pre_hook(enter(name), with_kwargs=True) for name, block in blocks.items()]
    hooks += [block.register_forward_hook(leave) for block in blocks.values()]
    try:
        with (
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x),
            attention_backend("native"),
            _FusedAttention(),
        ):
            model(**dummy_inputs(model, grid, text or None))
    finally:
        for hook in hooks:
            hook.remove()
    inside = [size for name, size in by_block.items() if name]
    return sum(by_block.values()), by_block.get("", 0) + max(inside, default=0), inputs
