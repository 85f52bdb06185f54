"""attnconvert: make the attention of a pretrained transformer cheaper, and prove what was kept.

Importing it costs nothing; once transformers or diffusers is imported too, `AutoModelForCausalLM.from_pretrained` and
`DiffusionPipeline.from_pretrained` load converted checkpoints without `trust_remote_code`. The classes of converted
denoisers are found here by name, such as `attnconvert.ConvertedFluxTransformer2DModel`.
"""

from typing import Any

import wrapt

__version__ = "0.1.0"


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
    if not name.startswith("Converted"):
        raise AttributeError(f"module 'attnconvert' has no attribute {name!r}")
    from .convert.hosts.registration_images import converted_class

    return converted_class(name)
