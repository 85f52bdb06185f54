"""diffusers as a host: replace the operators of a denoiser's self-attentions, undo it, load it again.

Attention is intercepted where a processor hands it over, after projection, norms and rotary embedding: each site's
processor runs the stock processor's own code, in which the names `dispatch_attention_fn` and
`F.scaled_dot_product_attention` mean ours. No attention module is rebuilt, so each keeps its own details.

An exported checkpoint carries this file, `grids`, `sites` and `kernels`; it must import nothing else of attnconvert.
"""

from __future__ import annotations

import functools
import inspect
import json
import shutil
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.call import Call
from ...kernels.spec import Spec
from .grids import Moment, denoiser
from .sites import NAME, Conversion, Site, SiteOperators, Unsupported, read_plan_block, submodule

MODELING = f"modeling_{NAME}"  # the file of a checkpoint in which its class is found
CALLS = ("dispatch_attention_fn", "scaled_dot_product_attention")  # by these names processors call attention


class Running(threading.local):
    """The processor at work in this thread, and how many attentions it has called."""

    processor: Any = None
    calls: int = 0


RUNNING = Running()


def dispatch_attention_fn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    attention_kwargs: dict[str, Any] | None = None,
    *,
    backend: Any = None,
    parallel_config: Any = None,
) -> Tensor:
    """Stands in for diffusers' own: query (B, S, H, D), key, value (B, S, Hk, D) → (B, S, H, D)"""
    if attention_kwargs or parallel_config is not None:
        name = "attention_kwargs" if attention_kwargs else "parallel_config"
        raise Unsupported(f"{_name()} passes {name} to its attention, which no operator here knows")
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return _answer(q, k, v, attn_mask, dropout_p, is_causal, scale).transpose(1, 2)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Stands in for PyTorch's own: query (B, H, S, D), key, value (B, Hk, S, D) → (B, H, S, D)"""
    return _answer(query, key, value, attn_mask, dropout_p, is_causal, scale)


def _name() -> str:
    return str(RUNNING.processor._modules[NAME].site.name)


def _answer(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float, causal: bool, scale: float | None
) -> Tensor:
    """One self-attention of the processor at work: q (B, H, S, D), k, v (B, Hk, S, D) → (B, H, S, D)"""
    processor, calls = RUNNING.processor, RUNNING.calls
    RUNNING.calls = calls + 1
    operators, moment = processor._modules[NAME], processor.moment
    site: Site = operators.site
    if causal or dropout:
        what = "is causal" if causal else f"drops {dropout} of the attention"
        raise Unsupported(f"{site.name} {what}, which no operator here knows")
    if (q.shape[1], k.shape[1], q.shape[3]) != (site.heads, site.kv_heads, site.dim) or v.shape != k.shape:
        raise Unsupported(
            f"{site.name}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} are not of {site.heads} "
            f"heads, {site.kv_heads} KV heads and {site.dim} numbers a head: the plan is of another model"
        )
    layout = site.layout(moment.grid, 0)
    text = q.shape[2] - layout.tokens
    if k.shape[2] != q.shape[2] or not 0 <= text <= (moment.text if site.text else 0):
        raise Unsupported(
            f"{site.name}: {q.shape[2]} queries and {k.shape[2]} keys are not the tokens of a grid {layout.grid}"
            + (f" and of at most {moment.text} of text" if site.text else "")
        )
    if q.dtype != v.dtype:  # autocast leaves rotated queries and keys in fp32
        q, k = q.to(v.dtype), k.to(v.dtype)
    call = Call(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        valid=_valid(site, mask, moment, (q.shape[0], q.shape[2])),
        keep=False,
        causal=False,
        layout=site.layout(moment.grid, text) if text else layout,
        time=_time(site, moment, q, calls),
    )
    o: Tensor = operators(q, k, v, call)
    return o


def _valid(site: Site, mask: Tensor | None, moment: Moment, expected: tuple[int, int]) -> Tensor | None:
    """(B, S) of a padding mask (B, 1, 1, S) or (B, S), None where every token is real."""
    if mask is None:
        return None
    if moment.mask is not None and moment.mask[0] is mask and not torch.compiler.is_compiling():
        return moment.mask[1]
    padding = mask[:, 0, 0] if mask.ndim == 4 and mask.shape[1:3] == (1, 1) else mask
    if mask.dtype != torch.bool or padding.shape != expected:
        raise Unsupported(
            f"{site.name}: the attention mask has type {mask.dtype} and shape {tuple(mask.shape)}; this takes a "
            f"boolean padding mask of (batch, tokens) = {expected}"
        )
    if torch.compiler.is_compiling():  # a compiler sees shapes, not whether all are real
        return padding
    moment.mask = (mask, None if bool(padding.all()) else padding)
    return moment.mask[1]


def _time(site: Site, moment: Moment, q: Tensor, calls: int) -> Tensor | None:
    """The times of the samples in q (B, …); Mochi calls its attention once for each sample."""
    if moment.time is None:
        return None
    time, batch = moment.time.to(q.device), q.shape[0]
    if batch == moment.batch:
        return time
    if batch == 1 and calls < moment.batch:
        return time[calls : calls + 1]
    raise Unsupported(f"{site.name} has a batch of {batch}, the model one of {moment.batch}")


@functools.cache
def _module_f() -> types.ModuleType:
    """torch.nn.functional with our attention in it."""
    mine = types.ModuleType(F.__name__)
    mine.__dict__.update(F.__dict__, scaled_dot_product_attention=scaled_dot_product_attention)
    return mine


@functools.cache
def _processor_class(stock: type) -> type[nn.Module]:
    """The stand-in for a class of processors: it runs the stock code with our attention.

    One class and one function for all sites, so that a block that is compiled serves all blocks like it. The site is
    found through the thread, because the stock code passes nothing on that names it.

    Raises:
        Unsupported: the stock code does not call attention by a name that we know.
    """
    original: Any = inspect.unwrap(stock.__call__)
    code, known = original.__code__, original.__globals__
    named = set(CALLS) & set(code.co_names)
    if not named or ("scaled_dot_product_attention" in named and known.get("F") is not F):
        raise Unsupported(f"{stock.__name__} calls neither {CALLS[0]} nor F.{CALLS[1]}: it has its own attention")
    names = {**known, "dispatch_attention_fn": dispatch_attention_fn, "F": _module_f()}
    del names["__name__"]  # by which torch.compile would take the names of the stock module for ours, and reversely
    run = types.FunctionType(code, names, original.__name__, original.__defaults__, original.__closure__)
    run.__kwdefaults__ = original.__kwdefaults__

    class Processor(nn.Module):
        def __init__(self, original: Any = None, site: SiteOperators | None = None, moment: Any = None) -> None:
            super().__init__()
            if site is None:  # loaders of adapters build processors of the class that they find
                raise Unsupported("the model is converted: load adapters that bring processors first, then convert it")
            self.original, self.moment = original, moment
            self.add_module(NAME, site)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            before = RUNNING.processor, RUNNING.calls
            RUNNING.processor, RUNNING.calls = self, 0
            try:
                return run(self.original, *args, **kwargs)
            finally:
                RUNNING.processor, RUNNING.calls = before

    # diffusers drops the arguments that the signature of a processor does not name
    Processor.__call__.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    Processor.__name__ = Processor.__qualname__ = f"Converted{stock.__name__}"
    return Processor


class Watch:
    """Before a model runs: what its sites need to know of the call, and whether they are still in their places."""

    def __init__(self, model: Any, places: Mapping[str, Any], moment: Moment) -> None:
        self.row, self.moment, self.places = denoiser(model), moment, dict(places)
        self.processors = {name: attention.processor for name, attention in places.items()}
        self.operators = {name: processor._modules[NAME] for name, processor in self.processors.items()}
        self.augmented = {name for name, mine in self.operators.items() if _augments(mine, "augment_q")}
        self.names = list(inspect.signature(type(model).forward).parameters)[1:]

    def __call__(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name, attention in self.places.items():
            if submodule(model, name) is not attention:
                raise Unsupported(
                    f"{name} was replaced after the model was converted, by a {type(submodule(model, name)).__name__} "
                    "that would run full attention: remove the conversion, make the change, then convert again"
                )
            if attention.processor is not self.processors[name]:
                raise Unsupported(
                    f"the processor of {name} was replaced by {type(attention.processor).__name__} after the model "
                    "was converted, which would run full attention there: remove the conversion, make the change, "
                    "then convert again"
                )
            if getattr(attention, "fused_projections", False) and name in self.augmented:
                raise Unsupported(f"{name} has fused projections, which its operator cannot stand before: unfuse them")
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        moment, latent = self.moment, given["sample" if "sample" in given else "hidden_states"]
        prompt = given.get("encoder_hidden_states")
        moment.grid = tuple(int(n) for n in self.row.grid(model.config, given, moment))
        moment.text = 0 if prompt is None else int(prompt.shape[1])
        moment.batch, moment.mask = int(latent.shape[0]), None
        moment.time = self._time(given.get("timestep"), latent)

    def _time(self, timestep: Any, latent: Tensor) -> Tensor | None:
        """(B,) from 0 to 1 of a timestep that is a number, (), (1,), (B,), or of each token (B, N)."""
        if timestep is None:
            return None
        time = torch.as_tensor(timestep, device=latent.device).to(torch.float32)
        time = time.flatten(1).amax(1) if time.ndim > 1 else time.reshape(-1)  # tokens that are given have no noise
        time = (time - self.row.data) / (self.row.noise - self.row.data)
        return time.expand(latent.shape[0])


def _augments(operators: SiteOperators, part: str) -> list[Any]:
    """What was learned to stand before a projection, `augment_q` or `augment_k`."""
    return [x for x in (getattr(learned, part, None) for learned in operators.children()) if x is not None]


class Augment:
    """Before a projection runs: what an operator learned makes its input, as in LinFusion (Liu et al., 2024)."""

    def __init__(self, operators: SiteOperators, part: str) -> None:
        self.operators, self.part = operators, part

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not self.operators.active:
            return None
        hidden, *others = args  # (B, S, C)
        for augment in _augments(self.operators, self.part):
            hidden = augment(hidden)
        return (hidden, *others)


def convert(model: Any, plan: Mapping[Site, Sequence[Spec]]) -> Conversion:
    """Put a plan to work in the model.

    Raises:
        Unsupported: an operator does not fit its site, or a site is not where attention can be replaced.
        ValueError: the model is converted already.
    """
    denoiser(model)
    return Conversion(model, plan, _install, _uninstall)


def _install(model: Any, sites: Mapping[str, SiteOperators]) -> dict[str, Any]:
    places: dict[str, Any] = {name: submodule(model, name) for name in sites}
    before = {name: getattr(attention, "processor", None) for name, attention in places.items()}
    classes = {name: _stand_in(name, processor) for name, processor in before.items()}
    augments = [x for name, attention in places.items() for x in _projections(name, attention, sites[name])]
    moment = Moment()  # nothing is changed before all is known to fit
    for name, attention in places.items():
        attention.processor = classes[name](before[name], sites[name], moment)
    hooks = [projection.register_forward_pre_hook(augment) for projection, augment in augments]
    hooks.append(model.register_forward_pre_hook(Watch(model, places, moment), with_kwargs=True))
    return {"hooks": hooks, "processors": before}


def _stand_in(name: str, processor: Any) -> type[nn.Module]:
    """The class that takes the place of the processor of a site."""
    if processor is None:
        raise Unsupported(f"{name} has no attention processor that could be replaced")
    if NAME in getattr(processor, "_modules", {}):
        raise ValueError(f"{name} is converted already: remove the first conversion")
    if isinstance(processor, nn.Module):
        raise Unsupported(f"the processor of {name} ({type(processor).__name__}) has weights of its own")
    stock: Any = type(processor)
    try:
        return _processor_class(stock)
    except Unsupported as error:
        raise Unsupported(f"{name}: {error}") from None


def _projections(name: str, attention: Any, operators: SiteOperators) -> list[tuple[nn.Module, Augment]]:
    """Projections of a site that something learned wants to stand before."""
    found = []
    for part, projection in (("augment_q", "to_q"), ("augment_k", "to_k")):
        if not _augments(operators, part):
            continue
        target, site = getattr(attention, projection, None), operators.site
        width = getattr(target, "in_features", None)
        if target is None or width != site.heads * site.dim:
            has = f"takes {width} channels" if target is not None else "is missing"
            raise Unsupported(f"{name}: {part} needs a {projection} of {site.heads * site.dim} channels, and it {has}")
        found.append((target, Augment(operators, part)))
    return found


def _uninstall(model: Any, sites: Mapping[str, SiteOperators], kept: dict[str, Any]) -> None:
    for hook in kept["hooks"]:
        hook.remove()
    for name, mine in sites.items():
        attention: Any = submodule(model, name)
        if getattr(attention.processor, "_modules", {}).get(NAME) is mine:  # not what was put there since
            del attention.processor
            attention.processor = kept["processors"][name]


def converted_model(base: type[Any], write_code: Callable[[Path], None]) -> type[Any]:
    """The model class of a converted checkpoint: the stock class, with the plan of its config installed.

    Its config.json names this class, and a quantization that there is not: a stock class that is given the folder would
    otherwise only warn of what it does not know, and run full attention.

    Args:
        write_code: puts this code into the folder of a model that is saved.
    """

    class Model(base):  # type: ignore[misc]
        _keep_in_fp32_modules: ClassVar[list[str]] = [*(getattr(base, "_keep_in_fp32_modules", None) or ()), NAME]

        def __init__(self, *args: Any, attnconvert: Mapping[str, Any], **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.register_to_config(attnconvert=attnconvert)
            self.__module__ = MODELING  # a pipeline notes it, and looks there for the class when it is loaded again
            plan = sorted(read_plan_block(attnconvert).items(), key=lambda entry: entry[0].layer)
            self.conversion = convert(self, dict(plan))

        @classmethod
        def load_config(cls, *args: Any, **kwargs: Any) -> Any:
            """As ever, without the entries that are for others to read."""
            found = super().load_config(*args, **kwargs)
            config = found[0] if isinstance(found, tuple) else found
            if str((config.get("quantization_config") or {}).get("quant_method", "")).startswith(f"{NAME}:"):
                del config["quantization_config"]
            config.pop("auto_map", None)
            return found

        def save_config(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            """As ever, with the entries that keep stock classes from reading it and say where the code is."""
            super().save_config(save_directory, *args, **kwargs)
            file = Path(save_directory) / str(self.config_name)
            config = json.loads(file.read_text(encoding="utf-8"))
            config.update(_barrier(type(self).__name__))
            config.pop("_name_or_path", None)  # a folder of this machine
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

        def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
            """As ever, with the runtime beside the weights, so that what is saved again loads as this did."""
            super().save_pretrained(save_directory, *args, **kwargs)
            write_code(Path(save_directory))

    stock = inspect.signature(base.__init__)
    given = [p for p in stock.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    plan = inspect.Parameter(NAME, inspect.Parameter.KEYWORD_ONLY)
    # the names by which diffusers picks the arguments of a class out of its config
    Model.__init__.__signature__ = stock.replace(parameters=[*given, plan])  # type: ignore[attr-defined]
    Model.__name__ = Model.__qualname__ = f"Converted{base.__name__}"
    Model.__module__ = NAME if __name__.startswith(f"{NAME}.") else f"{__package__}.{MODELING}"  # where it is found
    return Model


def code_beside(modeling: str) -> Callable[[Path], None]:
    """How a checkpoint's copy of this code is written into another folder; `modeling` is the file that asks."""
    text, own = Path(modeling).read_text(encoding="utf-8"), Path(__file__)

    def write(folder: Path) -> None:
        for file in own.parent.glob(f"{own.stem.removesuffix('host')}*.py"):
            shutil.copyfile(file, folder / file.name)
        (folder / f"{MODELING}.py").write_text(text, encoding="utf-8")

    return write


def _barrier(name: str) -> dict[str, Any]:
    """What a config.json says beside the model's own: where its code is, and what makes stock classes give up.

    A stock class looks for the method of a quantization before it loads weights, and shows the unknown name.
    """
    method = f"{NAME}: the attention of this model was converted; import {NAME}, or load with trust_remote_code=True"
    return {"auto_map": {"AutoModel": f"{MODELING}.{name}"}, "quantization_config": {"quant_method": method}}
