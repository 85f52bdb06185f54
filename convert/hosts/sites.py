"""What every host has in common: sites, the operators that hang in them, a plan at work, and how it is written down.

An exported checkpoint carries this file, the host's own and `kernels`; it must import nothing else of attnconvert.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ...kernels import operators
from ...kernels.call import Call
from ...kernels.masks import Layout
from ...kernels.spec import (
    Full,
    Spec,
    Window,
    causal_only,
    grid_axes,
    grid_only,
    label,
    nested,
    spec_from_dict,
    spec_to_dict,
    whole_site,
)

NAME = "attnconvert"  # of the submodule of a site, the attention implementation, the config block and the model type
FORMAT = 1  # of the config block
GRIDS = {2: "images", 3: "videos"}  # by axes
ON_GRIDS = {"window": "disc or neighbourhood", "span": "disc or neighbourhood", "hybrid": "sla", "retention": "sparse"}

Observer = Callable[["SiteOperators", Tensor, Tensor, Tensor, Call], "Tensor | None"]
Install = Callable[[Any, Mapping[str, "SiteOperators"]], Any]
Remove = Callable[[Any, Mapping[str, "SiteOperators"], Any], None]


class Unsupported(ValueError):
    """The model, or something asked of it, is beyond what can be converted; the message names the module and why."""


@dataclasses.dataclass(frozen=True)
class Site:
    """One self-attention: `name` of its module, layer index, query heads, KV heads, head dimension, own window.

    Where it is not `causal` rows read in both directions, as in an encoder. In a diffusion model the tokens stand on a
    grid of `axes` axes (2: image, 3: video), at 1 / `down` of the model's own resolution, and where `text` is `first`
    or `last` the prompt's tokens take part on that side. `slot` is its place in the cache where that is not `layer`.
    """

    name: str
    layer: int
    heads: int
    kv_heads: int
    dim: int
    limit: int | None = None
    causal: bool = True
    axes: int = 0
    down: int = 1
    text: str = ""
    slot: int | None = None

    def layout(self, grid: Sequence[int], text: int) -> Layout:
        """Of its tokens where the model's grid is `grid` and the prompt has `text` tokens."""
        own = tuple(-(-n // self.down) for n in grid)
        first, last = text * (self.text == "first"), text * (self.text == "last")
        return Layout(grid=own, text_first=first, text_last=last)


def refusal(site: Site, spec: Spec) -> str | None:
    """Why a site cannot take an operator, or None where it can."""
    for own in nested(spec):
        if reason := refusal(site, own):
            return reason
    axes = grid_axes(spec)
    if not site.axes and grid_only(spec):
        return f"{site.name} is of a sequence, and {label(spec)} is for image or video tokens on their grid"
    if site.axes and axes is not None and axes != site.axes:
        return f"{site.name} is of {GRIDS[site.axes]}, and {label(spec)} is for {GRIDS.get(axes, f'{axes} axes')}"
    if site.axes and (other := ON_GRIDS.get(spec.operator)):
        return f"{site.name} has its tokens on a grid, and {label(spec)} counts along a text: take {other} instead"
    if not site.causal and causal_only(spec):
        return f"{site.name} reads in both directions, and {label(spec)} keeps what later rows will read"
    if site.limit is None or isinstance(spec, Full):
        return None
    if not isinstance(spec, Window):
        return f"{site.name} has a sliding window of {site.limit} tokens of its own, which {label(spec)} reads beyond"
    if spec.size + spec.sinks >= site.limit:
        return f"{site.name} has a sliding window of {site.limit} tokens of its own: {label(spec)} keeps no less"
    return None


def all_full(sites: Iterable[Site]) -> dict[Site, list[Spec]]:
    """The plan that converts nothing: the teacher on our own code."""
    return {site: [Full()] * site.kv_heads for site in sites}


class Calling(threading.local):
    """In this thread: the site that the host calls, and the cache layer that its call comes with."""

    site: Any = None
    layer: Any = None


CALLING = Calling()  # not in the site itself: one model may serve several threads, each with a cache of its own


def _not_installed(site: SiteOperators, *args: Any, **kwargs: Any) -> Any:
    raise Unsupported(f"{site.site.name}: operators answer only while they are installed in a model")


class SiteOperators(nn.Module):
    """What attnconvert hangs into an attention module: the operator of each KV group and what it learned.

    `active` False runs full attention everywhere: the teacher. An `observer` sees every call and may answer it.
    """

    def __init__(self, site: Site, specs: Sequence[Spec]) -> None:
        super().__init__()
        if len(specs) != site.kv_heads:
            raise ValueError(f"{site.name} has {site.kv_heads} KV groups but the plan names {len(specs)} operators")
        for spec in specs:
            if reason := refusal(site, spec):
                raise Unsupported(reason)
            if whole_site(spec) and len(set(specs)) > 1:
                raise Unsupported(f"{site.name}: {label(spec)} changes what is projected, so it must serve all heads")
        self.site, self.specs = site, tuple(specs)
        self.active = True
        self.observer: Observer | None = None
        self.respond: Callable[..., Any] = _not_installed  # how the host's calls are answered
        group = site.heads // site.kv_heads
        self.parts = [(s, tuple(i for i, x in enumerate(specs) if x == s)) for s in dict.fromkeys(specs)]
        self.names = [label(spec) for spec, _ in self.parts]  # made once: torch.compile does not see through `label`
        for spec, groups in self.parts:
            heads = len(groups)
            learned = operators.of(spec).parameters(spec, heads * group, heads, site.dim)
            if learned is not None:
                self.add_module(label(spec), learned)

    def learned(self, spec: Spec) -> nn.Module | None:
        """The feature maps and gates of one operator, or None."""
        return self._modules.get(label(spec))

    @property
    def layer(self) -> Any:
        """The layer of the cache that the host's call comes with; None where it has no cache."""
        return CALLING.layer if CALLING.site is self else None

    def called_with(self, layer: Any) -> None:
        """Before a call of the host: the cache layer of this call, until `operate` takes it."""
        CALLING.site, CALLING.layer = self, layer

    def answer(self, *args: Any, **kwargs: Any) -> Any:
        """One call of the host's attention, in the host's own words."""
        return self.respond(self, *args, **kwargs)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        """q (B, H, Q, D), k, v (B, Hk, Q, D), all of the new tokens → (B, H, Q, D)"""
        answer = self.observer(self, q, k, v, call) if self.observer is not None else None
        return self.operate(q, k, v, call, self.active) if answer is None else answer

    def operate(self, q: Tensor, k: Tensor, v: Tensor, call: Call, student: bool) -> Tensor:
        """Attention as the student does it, or as the teacher. Shapes as in `forward`."""
        layer = self.layer
        self.called_with(None)
        uses = [operators.Use(Full(), tuple(range(self.site.kv_heads)))]
        if student:
            named = zip(self.parts, self.names, strict=True)
            uses = [operators.Use(spec, groups, self._modules.get(name)) for (spec, groups), name in named]
        if layer is None:
            return operators.attend_all(uses, q, k, v, call, [None] * len(uses))[0]
        o: Tensor = layer.attend(self, uses, q, k, v, call)
        return o


class Conversion:
    """A plan at work in a model. `teacher()` switches it off for a while, `remove()` takes it out again.

    `install` and `uninstall` are the host's: the one hangs the operators of the sites, by name, into the model and
    returns what the other needs to take them out. A copy of the model takes its conversion along.
    """

    def __init__(self, model: Any, plan: Mapping[Site, Sequence[Spec]], install: Install, uninstall: Remove) -> None:
        self.model, self.uninstall = model, uninstall
        self.sites: dict[str, SiteOperators] = {}
        for site, specs in plan.items():
            mine = SiteOperators(site, specs)
            module = submodule(model, site.name)
            where = next(module.parameters(recurse=True), None)
            self.sites[site.name] = mine if where is None or where.is_meta else mine.to(where.device)
        self.kept = install(model, self.sites)
        self.installed = True

    @contextlib.contextmanager
    def teacher(self) -> Iterator[None]:
        """Full attention everywhere: the original model."""
        with setting(self.sites.values(), "active", False):
            yield

    @contextlib.contextmanager
    def observe(self, observer: Observer) -> Iterator[None]:
        """`observer` sees q, k, v of every site and may answer in its place."""
        with setting(self.sites.values(), "observer", observer):
            yield

    def learned(self) -> dict[str, nn.Parameter]:
        """Feature maps and gates by their names in the model's state dict."""
        mine = set(self.sites.values())
        places = {name: module for name, module in self.model.named_modules() if module in mine}
        return {f"{place}.{key}": p for place, module in places.items() for key, p in module.named_parameters()}

    def remove(self) -> None:
        """Leave the model as it was found."""
        self.installed = False
        self.uninstall(self.model, self.sites, self.kept)


def submodule(model: nn.Module, name: str) -> nn.Module:
    """A module by its name.

    Raises:
        Unsupported: the model has none of this name.
    """
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise Unsupported(f"{type(model).__name__} has no module {name!r}: the plan is of another model") from None


@contextlib.contextmanager
def setting(objects: Any, attribute: str, value: Any) -> Iterator[None]:
    """Inside, this attribute of the objects has this value."""
    objects = list(objects)
    before = [getattr(x, attribute) for x in objects]
    try:
        for x in objects:
            setattr(x, attribute, value)
        yield
    finally:
        for x, old in zip(objects, before, strict=True):
            setattr(x, attribute, old)


def plan_block(base: str, plan: Mapping[Site, Sequence[Spec]]) -> dict[str, Any]:
    """The `attnconvert` block of an exported config.json of class `base`; `read_plan_block` is its inverse."""
    specs = {label(s): spec_to_dict(s) for groups in plan.values() for s in groups}
    sites = {
        site.name: {**dataclasses.asdict(site), "groups": [label(s) for s in groups]} for site, groups in plan.items()
    }
    for entry in sites.values():
        del entry["name"]
    return {"format": FORMAT, "base": base, "operators": specs, "sites": sites}


def read_plan_block(block: Mapping[str, Any]) -> dict[Site, list[Spec]]:
    """Sites and operators from the block of a config.json."""
    if block.get("format") != FORMAT:
        raise Unsupported(
            f"the checkpoint's attnconvert format is {block.get('format')!r}, this code reads {FORMAT}: "
            "pip install -U attnconvert, or load it with trust_remote_code=True"
        )
    try:
        specs = {name: spec_from_dict(given) for name, given in block["operators"].items()}
    except ValueError as error:
        raise Unsupported(
            f"the checkpoint of attnconvert {block.get('version', '?')} has an operator unknown here ({error}): "
            "attnconvert.register its file, pip install -U attnconvert, or load it with trust_remote_code=True"
        ) from None
    for name, entry in block["sites"].items():
        if missing := [x for x in entry["groups"] if x not in specs]:
            raise Unsupported(f"the checkpoint is damaged: {name} names {missing[0]!r}, which its operators lack")
    plan = {}
    for name, entry in block["sites"].items():
        settings = {key: value for key, value in entry.items() if key != "groups"}
        plan[Site(name, **settings)] = [specs[x] for x in entry["groups"]]
    return plan
