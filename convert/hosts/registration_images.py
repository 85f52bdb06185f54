"""How `import attnconvert` makes converted denoisers load without trust_remote_code.

Nothing of diffusers is imported before somebody asks for a class.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping
from typing import Any

PREFIX = "Converted"
LOADING = ("subfolder", "cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")


@functools.cache
def converted_class(name: str) -> type[Any]:
    """`ConvertedFluxTransformer2DModel` and so on.

    Raises:
        AttributeError: there is no such class.
    """
    import diffusers

    from ..export_images import write_code
    from .diffusers import converted_model
    from .grids import DENOISERS

    base = name.removeprefix(PREFIX)
    if not name.startswith(PREFIX) or base not in DENOISERS:
        raise AttributeError(f"module 'attnconvert' has no attribute {name!r}")
    return converted_model(getattr(diffusers, base), functools.partial(write_code, base=base))


def register_pipelines() -> None:
    """Let pipelines find the class of a converted denoiser here: where model_index.json names a file of code beside
    the weights, diffusers looks among its own modules first.
    """
    from .diffusers import MODELING

    setattr(sys.modules["diffusers.pipelines"], MODELING, sys.modules["attnconvert"])


def register_auto(auto_model: Any) -> None:
    """Let diffusers' AutoModel load converted denoisers; `auto_model` is the module that defines it."""
    stock = auto_model.AutoModel.from_pretrained.__func__

    def from_pretrained(cls: Any, /, pretrained_model_or_path: Any = None, **kwargs: Any) -> Any:
        try:
            return stock(cls, pretrained_model_or_path, **kwargs)
        except ValueError:  # it must not run the code beside the weights; ours is here
            trusted = kwargs.pop("trust_remote_code", False)
            found = None if trusted else _class_of(pretrained_model_or_path, kwargs)
            if found is None:
                raise
        return found.from_pretrained(pretrained_model_or_path, **kwargs)

    functools.update_wrapper(from_pretrained, stock)
    auto_model.AutoModel.from_pretrained = classmethod(from_pretrained)


def _class_of(where: Any, kwargs: Mapping[str, Any]) -> type[Any] | None:
    """Our class for what AutoModel is asked for, or None where it is no checkpoint of ours."""
    from diffusers.configuration_utils import ConfigMixin

    reader: Any = type("Reader", (ConfigMixin,), {"config_name": "config.json"})
    try:
        config = reader.load_config(where, **{key: kwargs[key] for key in LOADING if key in kwargs})
    except OSError:
        return None
    return converted_class(config["_class_name"]) if "attnconvert" in config else None
