"""What the sections of a recipe are made of: its base class, numbers and operators."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    PlainSerializer,
    PlainValidator,
    TypeAdapter,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import InitErrorDetails, PydanticCustomError

from ..kernels.spec import OPERATORS, Spec, operator_names, plain, spec_from_dict, spec_to_dict
from .recipe_errors import did_you_mean, show

Count = Annotated[int, Field(strict=True, ge=1)]
Whole = Annotated[int, Field(strict=True, ge=0)]
Length = Annotated[int, Field(strict=True, ge=8)]
Flag = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0)]
AtLeastZero = Annotated[float, Field(strict=True, ge=0)]
Share = Annotated[float, Field(strict=True, ge=0, le=1)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")]
AtLength = dict[Annotated[int, Field(ge=8)], Positive]  # context length in tokens: bound

RESOURCES = ("prefill_ms", "decode_ms", "flops", "kv_bytes")  # what a budget may be of; convert/costs.py measures them

Conflict = tuple[tuple[str | int, ...], str]  # where in the section, and what is wrong there


def exactly_one(fields: Mapping[str, Any], *names: str) -> Iterator[Conflict]:
    """A conflict unless one of the named fields is given; silent while one of them is wrong by itself."""
    if not set(names) <= set(fields):
        return
    given = [name for name in names if fields[name] is not None]
    if len(given) != 1:
        yield (), f"give exactly one of {', '.join(names)}; given: {', '.join(given) or 'none'}"


def _located(where: tuple[str | int, ...], message: str, given: object) -> InitErrorDetails:
    return InitErrorDetails(
        type=PydanticCustomError("recipe", "{message}", {"message": message}), loc=where, input=given
    )


class Section(BaseModel):
    """A frozen part of a recipe that refuses unknown keys.

    It tells all that is wrong with it at once: pydantic validates each field, and `conflicts` what concerns several
    fields together, also when other fields of the section are wrong.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        """What is wrong between fields; `fields` holds those that are valid by themselves, defaults included."""
        yield from ()

    @model_validator(mode="wrap")
    @classmethod
    def _tell_everything(cls, data: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        found: list[InitErrorDetails] = []
        result = None
        try:
            result = handler(data)
            fields = {name: getattr(result, name) for name in cls.model_fields}
        except ValidationError as error:
            if not isinstance(data, Mapping):
                raise
            found = [_again(details) for details in error.errors(include_url=False)]
            fields = cls._valid_fields(data, {details["loc"][0] for details in error.errors() if details["loc"]})
        found += [_located(where, message, data) for where, message in cls.conflicts(fields)]
        if found:
            raise ValidationError.from_exception_data(cls.__name__, found)
        return result

    @classmethod
    def _valid_fields(cls, data: Mapping[str, Any], wrong: set[str | int]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for name, info in cls.model_fields.items():
            if name in wrong:
                continue
            if name in data:
                adapter: TypeAdapter[Any] = TypeAdapter(Annotated[info.annotation, info])  # type: ignore[arg-type]
                fields[name] = adapter.validate_python(data[name])
            elif not info.is_required():
                fields[name] = info.get_default(call_default_factory=True, validated_data={})
        return fields


def _again(details: Any) -> InitErrorDetails:
    """A finding of one ValidationError, ready for another."""
    kind, context = details["type"], details.get("ctx", {})
    if kind == "recipe":
        return _located(details["loc"], context["message"], details["input"])
    return InitErrorDetails(type=kind, loc=details["loc"], input=details["input"], ctx=context)


# --- operators --------------------------------------------------------------------------------------------------------


def _spec(given: Any) -> Spec:
    """An operator spec from its mapping; every wrong setting is told, not only the first."""
    if type(given) in OPERATORS.values():
        return given
    wrong = list(_spec_findings(given))
    if wrong:
        raise ValidationError.from_exception_data("operator", wrong)
    return spec_from_dict(given)


def _spec_findings(given: Any) -> Iterator[InitErrorDetails]:
    if not isinstance(given, Mapping):
        yield _located((), f"must be an operator such as {{operator: window, size: 128}}, not {show(given)}", given)
        return
    name = given.get("operator")
    if not isinstance(name, str) or (name not in OPERATORS and name not in operator_names()):
        where = ("operator",) if name is not None else ()
        yield _located(where, _refusal({"operator": str(name)} if where else {}), given)
        return
    if all(isinstance(key, str) for key in given) and not _refusal(given):
        return  # settings that are wrong by themselves may be right together
    for key, value in given.items():
        if key != "operator" and (message := _refusal({"operator": name, str(key): value})):
            yield _located((key,), message, value)


def _refusal(given: Mapping[str, Any]) -> str:
    try:
        spec_from_dict(given)
    except ValueError as error:
        return str(error)
    return ""


def _spec_schema() -> dict[str, Any]:
    """JSON Schema of the operators, from the dataclasses that define them."""
    kinds = {int: "integer", float: "number", bool: "boolean", str: "string", list: "array", dict: "object"}
    choices = []
    for name, cls in sorted(OPERATORS.items()):
        settings: dict[str, Any] = {"operator": {"const": name}}
        spec = cls()
        for setting in dataclasses.fields(cls):
            default = plain(getattr(spec, setting.name))
            kind: Any = kinds[type(default)]
            settings[setting.name] = {"type": [kind, "integer"] if kind == "array" else kind, "default": default}
        text = " ".join((cls.__doc__ or "").split())
        choices.append(
            {
                "type": "object",
                "title": name,
                "description": text,
                "properties": settings,
                "required": ["operator"],
                "additionalProperties": False,
            }
        )
    return {"oneOf": choices}


OperatorSpec = Annotated[
    Spec, PlainValidator(_spec), PlainSerializer(spec_to_dict, return_type=dict), WithJsonSchema(_spec_schema())
]


def layers_of(key: object) -> range | None:
    """The layers that a key such as 12 or "11-17" names."""
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", str(key))
    return range(int(match[1]), int(match[2] or match[1]) + 1) if match else None


def _explicit(given: Any) -> dict[int, Spec]:
    """{"11-17": spec, 19: spec} with one entry per layer."""
    if not isinstance(given, Mapping):
        message = f"must map layers to operators, e.g. {{11-17: {{operator: window}}}}, not {show(given)}"
        raise ValidationError.from_exception_data("explicit", [_located((), message, given)])
    result: dict[int, Spec] = {}
    wrong: list[InitErrorDetails] = []
    for key, value in given.items():
        findings = list(_spec_findings(value)) if type(value) not in OPERATORS.values() else []
        wrong += [InitErrorDetails(type=f["type"], loc=(key, *f["loc"]), input=f["input"]) for f in findings]
        for part in str(key).split(","):
            layers = layers_of(part.strip())
            if not layers:
                message = f"must be a layer (12), a range (11-17), or several with commas, not {show(key)}"
                wrong.append(_located((key,), message, key))
                continue
            twice = [str(layer) for layer in layers if layer in result]
            if twice:
                wrong.append(_located((key,), f"layer {', '.join(twice)} is given twice", key))
            result.update(dict.fromkeys(layers, None if findings else _spec(value)))
    if wrong:
        raise ValidationError.from_exception_data("explicit", wrong)
    return dict(sorted(result.items()))


Explicit = Annotated[
    dict[int, Spec],
    PlainValidator(_explicit),
    PlainSerializer(lambda given: {str(layer): spec_to_dict(spec) for layer, spec in given.items()}, return_type=dict),
    WithJsonSchema({"type": "object", "additionalProperties": _spec_schema()}),
]


# --- budgets ----------------------------------------------------------------------------------------------------------

PERCENT = re.compile(r"(\d{1,3}(?:\.\d+)?|\.\d+) ?%")


def percentage(given: object) -> float | None:
    """The share that a text such as "40%" names, None for anything else."""
    match = PERCENT.fullmatch(given) if isinstance(given, str) else None
    return float(match[1]) / 100 if match else None


def _amount(given: Any) -> str:
    """What is wrong with the amount of a budget, or nothing."""
    share = percentage(given)
    if share is not None:
        return "" if 0 < share <= 1 else f'must be above "0%" and at most "100%", not {show(given)}'
    if not isinstance(given, int | float) or isinstance(given, bool):
        return f'must be a number (ms, FLOPs, bytes) or a share of the original\'s such as "40%", not {show(given)}'
    return "" if 0 < given < float("inf") else f"must be above 0, not {show(given)}"


def _budgets(given: Any) -> dict[str, dict[int, float | str]]:
    """{resource: {length: number or "40%"}}; every wrong entry is told."""
    wrong: list[InitErrorDetails] = []
    result: dict[str, dict[int, float | str]] = {}
    if not isinstance(given, Mapping) or not given:
        message = f'must map resources to amounts by length, e.g. {{kv_bytes: {{8192: "40%"}}}}, not {show(given)}'
        raise ValidationError.from_exception_data("budgets", [_located((), message, given)])
    for name, amounts in given.items():
        if name not in RESOURCES:
            message = f"no such resource{did_you_mean(name, RESOURCES)}; known are {', '.join(RESOURCES)}"
            wrong.append(_located((name,), message, name))
        elif not isinstance(amounts, Mapping) or not amounts:
            message = f'must say at which length, e.g. {{8192: "40%"}}, not {show(amounts)}'
            wrong.append(_located((name,), message, amounts))
        else:
            for length, amount in amounts.items():
                number = int(length) if re.fullmatch(r"\d{1,9}", str(length)) else 0
                message = (
                    _amount(amount) if number >= 8 else f"must be a length of at least 8 tokens, not {show(length)}"
                )
                if message:
                    wrong.append(_located((name, length), message, amount))
                result.setdefault(name, {})[number] = amount
    if wrong:
        raise ValidationError.from_exception_data("budgets", wrong)
    return result


_AMOUNTS = {
    "type": "object",
    "patternProperties": {
        "^[0-9]+$": {"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "string", "pattern": "%$"}]}
    },
    "additionalProperties": False,
}
Budgets = Annotated[
    dict[str, dict[int, float | str]],
    PlainValidator(_budgets),
    PlainSerializer(lambda given: {r: {str(n): a for n, a in at.items()} for r, at in given.items()}, return_type=dict),
    WithJsonSchema({"type": "object", "properties": dict.fromkeys(RESOURCES, _AMOUNTS), "additionalProperties": False}),
]
