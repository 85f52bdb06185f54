"""The parts of a recipe that say what is converted, and on which text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from .machine import number_type
from .recipe_fields import Conflict, Count, Flag, Name, Section, exactly_one

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
PackageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
Version = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9.!+_-]*$")]
Dtype = Literal["float32", "bfloat16", "float16"]


class PackageFile(Section):
    """One file inside a wheel of a package index."""

    name: PackageName = Field(description="package")
    version: Version = Field(description="exact version")
    file: str = Field(min_length=1, description="path of the file inside the package, from the wheel's root")
    sha256: Sha256 | None = Field(default=None, description="checksum of that file")


class ModelSource(Section):
    """A pretrained model: exactly one of hub, folder, gguf, package, shipped."""

    hub: str | None = Field(default=None, pattern=r"^[\w.-]+(/[\w.-]+)?$", description="Hugging Face id, owner/name")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit of the hub model")
    folder: Path | None = Field(
        default=None, description="folder with config.json and safetensors, from the recipe's folder"
    )
    gguf: Path | None = Field(default=None, description="GGUF file, from the recipe's folder")
    package: PackageFile | None = Field(
        default=None, description="file inside a package, fetched without its dependencies"
    )
    shipped: Name | None = Field(default=None, description="a small model that comes with attnconvert: flux-mnist")
    subfolder: str | None = Field(
        default=None,
        pattern=r"^[\w-]+$",
        description="of a pipeline's folder or hub id, where the denoiser is; null: transformer or unet",
    )
    dtype: Literal["auto"] | Dtype = Field(
        default="auto",
        validate_default=True,
        description="number type of the weights in memory; auto: bfloat16 where this machine computes with it",
    )
    words: str | None = Field(
        default=None,
        min_length=1,
        description="for a model whose folder has vocab.txt and no tokenizer: the regular expression of its tokens",
    )
    trust_remote_code: Flag = Field(default=False, description="run Python code that comes with the model")

    @field_validator("dtype")
    @classmethod
    def _known(cls, dtype: str) -> str:
        return number_type() if dtype == "auto" else dtype

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from exactly_one(fields, "hub", "folder", "gguf", "package", "shipped")
        if fields.get("revision") and "hub" in fields and not fields["hub"]:
            yield ("revision",), "only a hub model has revisions"


class TextPackage(Section):
    """Text files inside a wheel of a package index."""

    name: PackageName = Field(description="package")
    version: Version = Field(description="exact version")
    files: tuple[str, ...] = Field(min_length=1, description="globs inside the package, from the wheel's root")
    sha256: Sha256 | None = Field(default=None, description="checksum of the wheel, verified when it is downloaded")


class TextDataset(Section):
    """One text column of a dataset of the Hugging Face hub."""

    path: str = Field(min_length=1, description="dataset id")
    name: str | None = Field(default=None, description="configuration of the dataset")
    split: str = Field(default="train", min_length=1, description="split")
    column: str = Field(default="text", min_length=1, description="column that holds the text")
    revision: str | None = Field(default=None, min_length=1, description="branch, tag or commit")
    rows: Count = Field(default=1000, description="rows read from the start of the split")


class TextSource(Section):
    """Documents: exactly one of files, package, dataset."""

    files: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="paths or globs, from the recipe's folder"
    )
    package: TextPackage | None = Field(default=None, description="files inside a package")
    dataset: TextDataset | None = Field(default=None, description="a dataset of the Hugging Face hub")

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        yield from exactly_one(fields, "files", "package", "dataset")


class TextSources(Section):
    """The text the decisions are made on, and other text the result is judged on."""

    calibration: TextSource = Field(description="text for profiling and for prompts")
    heldout: TextSource = Field(description="text for evaluation; it must share no document with calibration")

    @classmethod
    def conflicts(cls, fields: Mapping[str, Any]) -> Iterator[Conflict]:
        if "calibration" in fields and fields.get("heldout") == fields["calibration"]:
            yield ("heldout",), "is the calibration text itself; judge the result on text that it was not made on"
