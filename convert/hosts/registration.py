"""How `import attnconvert` makes converted checkpoints load without trust_remote_code.

This file is read while transformers itself is being imported, so it touches as little of it as possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

# Auto classes and the tables of transformers that list their models; where several list one, the first counts
KINDS = {
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "AutoModel": "MODEL_MAPPING_NAMES",
    "AutoModelForImageClassification": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES",
}


def auto_class(name: str) -> str | None:
    """The auto class that loads an architecture such as BertModel; None for what is not converted."""
    from transformers.models.auto import modeling_auto

    return next((auto for auto, table in KINDS.items() if name in _listed(getattr(modeling_auto, table))), None)


def _listed(table: Mapping[str, str | tuple[str, ...]]) -> set[str]:
    """The classes that a table of transformers names; some model types have several."""
    return {name for given in table.values() for name in ((given,) if isinstance(given, str) else given)}


def lacks_head(name: str) -> bool:
    """Whether an architecture is a decoder without its head, such as LlamaModel."""
    from transformers.models.auto import modeling_auto as auto

    kinds = {kind for kind, bare in auto.MODEL_MAPPING_NAMES.items() if bare == name}
    return bool(kinds & set(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES))


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
