"""How `import attnconvert` makes converted checkpoints load without trust_remote_code.

This file is read while transformers itself is being imported, so it touches as little of it as possible.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


def auto_class(name: str) -> str | None:
    """The auto class that loads an architecture such as BertModel; None for what is not converted.

    Causal language models, and encoders of text: with a masked-token head, or bare.
    """
    from transformers.models.auto import modeling_auto as auto

    if name in auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        return "AutoModelForCausalLM"
    if name in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES.values():
        return "AutoModelForMaskedLM"
    kinds = {kind for kind, bare in auto.MODEL_MAPPING_NAMES.items() if bare == name}
    if kinds & set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES):
        return "AutoModel"
    return "AutoModelForCausalLM" if kinds else None  # a decoder that lacks its head, which loading then says


def loader(base: str) -> str:
    """The auto class of a stock class that was converted; one that transformers does not list is a decoder."""
    return auto_class(base) or "AutoModelForCausalLM"


class ConvertedConfig(PreTrainedConfig):
    """What AutoConfig reads for the model type `attnconvert`: it becomes the config of the stock class beneath."""

    model_type = "attnconvert"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the converted class, which is registered with its auto class on the way."""
        import transformers

        from ..checkpoints import require_library
        from .sites import NAME

        require_library("transformers")
        from .transformers import converted_config, converted_model

        base = getattr(transformers, config_dict[NAME]["base"])
        config = converted_config(base)
        auto = getattr(transformers, loader(base.__name__))
        auto.register(config, converted_model(base, config))
        return config.from_dict(config_dict, **kwargs)


def register(configuration_auto: Any) -> None:
    """Teach AutoConfig the model type; `configuration_auto` is the module that defines it."""
    configuration_auto.AutoConfig.register(ConvertedConfig.model_type, ConvertedConfig, exist_ok=True)
