"""How `import attnconvert` makes converted checkpoints load without trust_remote_code.

This file is read while transformers itself is being imported, so it touches as little of it as possible.
"""

from __future__ import annotations

from typing import Any

from transformers.configuration_utils import PreTrainedConfig


class ConvertedConfig(PreTrainedConfig):
    """What AutoConfig reads for the model type `attnconvert`: it becomes the config of the stock class beneath."""

    model_type = "attnconvert"

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The config of the converted class, which is registered with AutoModelForCausalLM on the way."""
        import transformers

        from .transformers import NAME, converted_config, converted_model

        base = getattr(transformers, config_dict[NAME]["base"])
        config = converted_config(base)
        transformers.AutoModelForCausalLM.register(config, converted_model(base, config))
        return config.from_dict(config_dict, **kwargs)


def register(configuration_auto: Any) -> None:
    """Teach AutoConfig the model type; `configuration_auto` is the module that defines it."""
    configuration_auto.AutoConfig.register(ConvertedConfig.model_type, ConvertedConfig, exist_ok=True)
