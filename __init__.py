"""attnconvert: make the attention of a pretrained transformer cheaper, and prove what was kept.

    model = attnconvert.load("runs/demo/export")        # a checkpoint that was exported
    model = attnconvert.convert(model, "plan.yaml")     # a plan put to work; model.conversion.remove() undoes it
    found = attnconvert.profile(model, tokenizer, texts, candidates)
    chosen = attnconvert.select(found, {"groups": 0.5})
    sites = attnconvert.find_sites(model)
    names = attnconvert.register("operator.py")         # operators of your own

Importing it costs nothing; once transformers or diffusers is imported too, `AutoModelForCausalLM.from_pretrained` and
`DiffusionPipeline.from_pretrained` load converted checkpoints without `trust_remote_code`. The classes of converted
denoisers are found here by name, such as `attnconvert.ConvertedFluxTransformer2DModel`.
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

import wrapt

if TYPE_CHECKING:
    from .api import convert as convert
    from .api import find_sites as find_sites
    from .api import load as load
    from .api import profile as profile
    from .api import register as register
    from .api import select as select
    from .convert.plan import Plan as Plan
    from .convert.profiling import Profile as Profile
    from .convert.selection import Selection as Selection

__version__ = "0.1.0"

_PLACES = {
    **dict.fromkeys(("find_sites", "load", "profile", "register", "select"), ".api"),
    "Plan": ".convert.plan",
    "Profile": ".convert.profiling",
    "Selection": ".convert.selection",
}


class _Convert(ModuleType):
    """The folder `convert` is a function too: `attnconvert.convert(model, plan)`, see `attnconvert.api.convert`."""

    def __call__(self, model: Any, plan: Any) -> Any:
        from .api import convert

        return convert(model, plan)


importlib.import_module(".convert", __name__).__class__ = _Convert  # a folder without code: nothing is run


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register(configuration_auto: Any) -> None:
    from .convert.hosts.registration import register

    register(configuration_auto)


@wrapt.when_imported("diffusers.pipelines.pipeline_loading_utils")
def _register_pipelines(pipeline_loading_utils: Any) -> None:
    from .convert.hosts.registration_images import register_pipelines

    register_pipelines()


@wrapt.when_imported("diffusers.models.auto_model")
def _register_auto_model(auto_model: Any) -> None:
    from .convert.hosts.registration_images import register_auto

    register_auto(auto_model)


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        return getattr(importlib.import_module(_PLACES[name], __name__), name)
    if not name.startswith("Converted"):
        raise AttributeError(f"module 'attnconvert' has no attribute {name!r}")
    from .convert.hosts.registration_images import converted_class

    return converted_class(name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PLACES])
