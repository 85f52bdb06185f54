"""The three formats of an export, and which one a plan can have.

| format | the folder holds | it loads |
|---|---|---|
| stock | weights of an architecture that transformers has | with plain `from_pretrained`, in engines that know it |
| remote | weights, the plan in config.json, our code | with trust_remote_code=True, or beside attnconvert |
| adapter | a PEFT adapter, what operators learned, the plan | beside its base model, with attnconvert |

`auto` takes the most portable that is exact: stock where the plan is one of full and sliding-window layers, else
remote.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..kernels.spec import Spec
from .errors import UsageError
from .export import export, keep_beside, verify
from .export_adapter import export_adapter, require_no_cast, verify_adapter
from .export_runtime import VerificationFailed, finish
from .export_stock import export_stock, retyped, verify_stock
from .hosts.sites import Site

if TYPE_CHECKING:
    from .recipe_inputs import ModelSource
    from .sources import ModelFiles

log = logging.getLogger("attnconvert")


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is exported: a student whose plan is installed and whose adapters are merged.

    `adapter` is the folder in which PEFT kept them, None where none were trained. `attached` are further files of the
    folder by name, such as the recipe. `dtype` casts the weights first; None leaves them as they are.
    """

    student: Any
    tokenizer: Any
    plan: Mapping[Site, Sequence[Spec]]
    source: ModelSource
    files: ModelFiles
    adapter: Path | None = None
    dtype: str | None = None
    attached: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Written:
    """The format that an export came to, why, what serving engines make of it, and what its proof found."""

    form: str
    why: str
    serving: str = ""
    verified: Mapping[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        return {"form": self.form, "why": self.why, **({"serving": self.serving} if self.serving else {})}


def write_checkpoint(
    given: Export, folder: Path, card: Callable[[Written], str], wanted: str = "auto", check: bool = True
) -> Written:
    """Write a checkpoint in the wanted format and prove it; what was chosen and why is said aloud.

    Args:
        card: the text of README.md for the format that it comes to.
        wanted: auto, stock, remote or adapter; check: whether to load it again in clean processes.

    Raises:
        UsageError: the plan cannot be had in the wanted format. VerificationFailed: it is not what it should be.
    """
    if wanted == "adapter":
        require_no_cast(given.dtype)
    cast(given.student, given.dtype)
    chosen = choose(wanted, given.student, given.plan)
    try:
        return _write(given, folder, card, chosen, check)
    except VerificationFailed as error:
        if wanted != "auto" or chosen.form != "stock":
            raise
        clear(folder)
        why = f"as stock it was not exact ({error})"
        return _write(given, folder, card, Written(form="remote", why=why), check)


def choose(wanted: str, student: Any, plan: Mapping[Site, Sequence[Spec]]) -> Written:
    """The format, and why.

    Raises:
        UsageError: stock is wanted, and no stock architecture has the plan.
    """
    if wanted not in ("auto", "stock"):
        return Written(form=wanted, why="as asked")
    try:
        found = retyped(student, plan)
    except UsageError as error:
        if wanted == "stock":
            raise
        return Written(form="remote", why=str(error).partition(": take the format remote")[0].partition(", or take")[0])
    return Written(form="stock", why=f"{found.model} has all that the plan needs", serving=found.serving)


def _write(given: Export, folder: Path, card: Callable[[Written], str], chosen: Written, check: bool) -> Written:
    log.info("exporting as %s: %s", chosen.form, chosen.why)
    if chosen.serving:
        log.warning(chosen.serving)
    if chosen.form == "remote":
        export(given.student, given.tokenizer, given.plan, folder, card(chosen), None, given.attached)
        return _proven(chosen, verify(given.student, folder) if check else None)
    if chosen.form == "stock":
        export_stock(given.student, given.tokenizer, given.plan, folder)
        keep_beside(Path(str(given.student.config._name_or_path)), folder)
    else:
        export_adapter(given.student, given.plan, folder, given.source, given.files, given.adapter)
    finish(folder, card(chosen), given.attached)
    if not check:
        return chosen
    if chosen.form == "stock":
        return _proven(chosen, verify_stock(given.student, folder))
    return _proven(chosen, verify_adapter(given.student, folder, given.files))


def _proven(chosen: Written, found: Mapping[str, Any] | None) -> Written:
    return Written(form=chosen.form, why=chosen.why, serving=chosen.serving, verified=found)


def cast(student: Any, dtype: str | None) -> None:
    """Weights of another number type; what operators learned stays fp32."""
    from .hosts.sites import NAME

    if dtype is None:
        return
    for name, p in student.named_parameters():
        if f".{NAME}." not in name:
            p.data = p.data.to(getattr(torch, dtype))
    student.config.dtype = getattr(torch, dtype)


def clear(folder: Path) -> None:
    """Takes away what an export wrote; what says how far the stage is stays."""
    from .runs import DONE, KEY

    for entry in folder.iterdir():
        if entry.name in (KEY, DONE):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()
