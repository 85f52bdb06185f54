"""attnconvert: make the attention of a pretrained transformer cheaper, and prove what was kept.

Importing it costs nothing; once transformers is imported too, `AutoModelForCausalLM.from_pretrained` loads converted
checkpoints without `trust_remote_code`, and pipelines of diffusers find the classes of converted denoisers here.
"""

from typing import Any

import wrapt

__version__ = "0.1.0"


@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register(configuration_auto: Any) -> None:
    from .convert.hosts.registration import register

    register(configuration_auto)


def __getattr__(name: str) -> Any:
    if name != "ModelMixin" and not name.startswith("Converted"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .convert.hosts.registration import converted_denoiser

    return converted_denoiser(name)
