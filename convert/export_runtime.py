"""What exports of both hosts share: the code beside the weights, checksums, and proof in clean processes.

The code is `kernels` and the files of one host, flat, with imports that name the files beside them, so that a
checkpoint loads with trust_remote_code=True where attnconvert is not installed.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..kernels import outside
from ..kernels.spec import Spec
from .checkpoints import LEAST
from .errors import AttnConvertError, UsageError
from .files import sha256_file, write_text
from .hosts.sites import NAME
from .integrity import SUMS
from .runs import DONE, KEY

HOSTS = {  # files of each
    "transformers": ("sites", "architectures", "caches", "packing", "transformers"),
    "diffusers": ("sites", "grids", "diffusers"),
}
ROOTS = ("operators", "backend_torch", "backend_cpp", "backend_triton")  # beside the files of Triton, loaded by name
SEVERAL = r"^( *)from {} import (\([\w,\s]+\)|[\w, ]+)$"  # modules by name, in one line or in parentheses
OPERATOR = "operator_"  # begins the names of the modules of operators that are not ours
CPP_SOURCES = "cpp_sources"  # the module that holds the C++ files in a checkpoint, as `kernels.cpp_build` expects it
GUARD = """\
import warnings

import {library}

if tuple(int(part) for part in {library}.__version__.split(".")[:2]) < {least}:
    raise ImportError(
        f"this checkpoint needs {library} {written} or later, {{{library}.__version__}} is installed: "
        "pip install -U {library}"
    )
if int({library}.__version__.partition(".")[0]) > {least[0]}:
    warnings.warn(
        f"this checkpoint was made for {library} {least[0]}, {{{library}.__version__}} is installed: if it fails, "
        "pip install '{library}<{after}'",
        stacklevel=2,
    )
"""  # before anything of the library is taken that may be named otherwise there
HEADER = """# attnconvert {version}, https://github.com/attnconvert/attnconvert, Apache-2.0
# Part of an exported checkpoint: it loads with trust_remote_code=True where attnconvert is not installed.
"""


class VerificationFailed(AttnConvertError):
    """The exported folder, loaded in a clean process, does not give what the student gave here."""


# --- the code beside the weights --------------------------------------------------------------------------------------


def write_runtime(
    folder: Path, host: str, specs: Iterable[Spec], templates: Mapping[str, str], names: Mapping[str, str]
) -> None:
    """The code of `kernels`, of a host and of operators among `specs` that are not ours, and what loads it.

    The host's own file is `host`. Files of diffusers have a digest of the whole code in their names: diffusers copies
    the code of all checkpoints on a machine into one folder, where those of another version must not meet.

    Args:
        templates: file → text with `names` in braces, beside them `runtime`, which begins the names of the code's
            files, `imports`, a line for each: the libraries fetch the files that a module names, `operators`, a line
            for each that must be imported to be registered, and `guard`, which refuses versions of the library that
            this code does not know.

    Raises:
        UsageError: the file of an operator that is not ours cannot go along.
    """
    sources, header = runtime(host, specs), HEADER.format(version=__version__)
    prefix = NAME if host == "transformers" else f"{NAME}_{_digest(sources)}"
    for name, source in sources.items():
        write_text(folder / f"{prefix}_{name}.py", header + flatten_imports(source, prefix))
    imports = "\n".join(f"    from .{prefix}_{name} import __name__ as _{name}  # noqa" for name in sources)
    own = [name for name in sources if name.startswith(OPERATOR)]
    registered = "".join(f"from .{prefix}_{name} import __name__ as _{name}  # noqa\n" for name in own)
    least = LEAST[host]
    guard = GUARD.format(library=host, least=least, written=".".join(map(str, least)), after=least[0] + 1).rstrip()
    for name, text in templates.items():
        filled = text.format(**names, runtime=prefix, imports=imports, operators=registered, guard=guard)
        write_text(folder / name, header + filled)


def runtime(host: str, specs: Iterable[Spec] = ()) -> dict[str, str]:
    """Module → source, as it stands in the package; operators that are not ours as `operator_<name>`."""
    try:
        own = {f"{OPERATOR}{name}": source for name, source in outside.sources(specs).items()}
    except ValueError as error:
        raise UsageError(str(error)) from None
    package = files("attnconvert")
    needed = kernels(own.values())
    sources = {name: (package / "kernels" / f"{name}.py").read_text(encoding="utf-8") for name in needed} | own
    for file in HOSTS[host]:
        source = (package / "convert" / "hosts" / f"{file}.py").read_text(encoding="utf-8")
        sources["host" if file == host else file] = source
    cpp = sorted((package / "kernels" / "cpp").iterdir(), key=lambda path: path.name)
    texts = {path.name: path.read_text(encoding="utf-8") for path in cpp if path.name.endswith((".h", ".cpp"))}
    lines = [f"    {name!r}: {text!r}," for name, text in texts.items()]
    sources[CPP_SOURCES] = "\n".join(['"""The C++ kernels, file by file."""', "", "FILES = {", *lines, "}", ""])
    return sources


def _digest(sources: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps([__version__, *sorted(sources.items())]).encode()).hexdigest()[:8]


def kernels(others: Iterable[str] = ()) -> list[str]:
    """The files of `kernels` that a checkpoint needs: those that are loaded by name, and all that they and the sources
    `others` import.
    """
    folder, found = files("attnconvert") / "kernels", set[str]()
    left = [*ROOTS, *(path.name[:-3] for path in folder.iterdir() if re.fullmatch(r"triton_\w+\.py", path.name))]
    for source in others:
        left += _imported(source)
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            left += _imported((folder / f"{name}.py").read_text(encoding="utf-8"))
    return sorted(found)


def _imported(source: str) -> list[str]:
    """The files of `kernels` that a source imports."""
    found: list[str] = re.findall(r"^ *from \.(\w+) import", source, flags=re.M)
    for _, names in re.findall(SEVERAL.format(r"\."), source, flags=re.M):
        found += re.findall(r"\w+", names)
    return found


def flatten_imports(source: str, prefix: str = NAME) -> str:
    """Relative imports of the package, rewritten for a folder in which every file is named <prefix>_<name>.py."""

    def several(match: re.Match[str]) -> str:
        names = re.findall(r"\w+", match[2])
        return f"{match[1]}from . import " + ", ".join(f"{prefix}_{name} as {name}" for name in names)

    source = re.sub(SEVERAL.format(r"\.+(?:kernels)?"), several, source, flags=re.M)
    return re.sub(r"^( *)from \.+(?:kernels\.)?(\w+) import", rf"\1from .{prefix}_\2 import", source, flags=re.M)


# --- the folder -------------------------------------------------------------------------------------------------------


def finish(folder: Path, card: str, attached: Mapping[str, str] | None = None) -> None:
    """README.md, the attached files by their names, and SHA256SUMS of every file."""
    write_text(folder / "README.md", card)
    for name, text in (attached or {}).items():
        write_text(folder / name, text)
    own = (SUMS, KEY, DONE)  # not of the checkpoint: these say how far the stage is
    kept = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name not in own]
    sums = [f"{sha256_file(p)}  {p.relative_to(folder).as_posix()}" for p in kept]
    write_text(folder / SUMS, "\n".join(sums) + "\n")


# --- proof ------------------------------------------------------------------------------------------------------------


def load_elsewhere(check: str, folder: Path, where: str, way: str, device: str) -> dict[str, Any]:
    """What a script prints as JSON in a clean process that gets `folder where way device` as its arguments.

    Raises:
        VerificationFailed: it fails.
    """
    if way == "installed":  # what is registered here is registered there, as whoever uses it would
        files_of = [str(path) for path in outside.loaded_files()]
        check = "".join(f"import attnconvert; attnconvert.register({name!r})\n" for name in files_of) + check
    environment = os.environ | {"HF_MODULES_CACHE": f"{where}/modules", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", check, str(folder.resolve()), where, way, device],
        capture_output=True,
        text=True,
        env=environment,
        cwd=where,
        check=False,
    )
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise VerificationFailed(f"{folder} does not load in a clean process ({way}): {last[0]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference by the largest value."""
    return ((found.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
