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
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from .errors import AttnConvertError
from .files import sha256_file, write_text
from .hosts.sites import NAME
from .integrity import SUMS
from .runs import DONE, KEY

HOSTS = {
    "transformers": ("sites", "caches", "packing", "transformers"),
    "diffusers": ("sites", "grids", "diffusers"),
}  # files of each
ROOTS = ("operators", "backend_torch", "backend_cpp", "backend_triton")  # beside the files of Triton, loaded by name
SEVERAL = r"^( *)from {} import (\([\w,\s]+\)|[\w, ]+)$"  # modules by name, in one line or in parentheses
CPP_SOURCES = "cpp_sources"  # the module that holds the C++ files in a checkpoint, as `kernels.cpp_build` expects it
HEADER = """# attnconvert {version}, https://github.com/attnconvert/attnconvert, Apache-2.0
# Part of an exported checkpoint: it loads with trust_remote_code=True where attnconvert is not installed.
"""


class VerificationFailed(AttnConvertError):
    """The exported folder, loaded in a clean process, does not give what the student gave here."""


# --- the code beside the weights --------------------------------------------------------------------------------------


def write_runtime(folder: Path, host: str, templates: Mapping[str, str], names: Mapping[str, str]) -> None:
    """The code of `kernels` and of a host, and what loads it.

    The host's own file is `host`. Files of diffusers have a digest of the whole code in their names: diffusers copies
    the code of all checkpoints on a machine into one folder, where those of another version must not meet.

    Args:
        templates: file → text with `names` in braces, beside them `runtime`, which begins the names of the code's
            files, and `imports`, a line for each: the libraries fetch the files that a module names.
    """
    sources, header = runtime(host), HEADER.format(version=__version__)
    prefix = NAME if host == "transformers" else f"{NAME}_{_digest(sources)}"
    for name, source in sources.items():
        write_text(folder / f"{prefix}_{name}.py", header + flatten_imports(source, prefix))
    imports = "\n".join(f"    from .{prefix}_{name} import __name__ as _{name}  # noqa" for name in sources)
    for name, text in templates.items():
        write_text(folder / name, header + text.format(**names, runtime=prefix, imports=imports))


def runtime(host: str) -> dict[str, str]:
    """Module → source, as it stands in the package."""
    package = files("attnconvert")
    sources = {name: (package / "kernels" / f"{name}.py").read_text(encoding="utf-8") for name in kernels()}
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


def kernels() -> list[str]:
    """The files of `kernels` that a checkpoint needs: those that are loaded by name, and all that they import."""
    folder, found = files("attnconvert") / "kernels", set[str]()
    left = [*ROOTS, *(path.name[:-3] for path in folder.iterdir() if re.fullmatch(r"triton_\w+\.py", path.name))]
    while left:
        name = left.pop()
        if name not in found:
            found.add(name)
            source = (folder / f"{name}.py").read_text(encoding="utf-8")
            left += re.findall(r"^ *from \.(\w+) import", source, flags=re.M)
            for _, names in re.findall(SEVERAL.format(r"\."), source, flags=re.M):
                left += re.findall(r"\w+", names)
    return sorted(found)


def flatten_imports(source: str, prefix: str = NAME) -> str:
    """Relative imports of the package, rewritten for a folder in which every file is named <prefix>_<name>.py."""

    def several(match: re.Match[str]) -> str:
        names = re.findall(r"\w+", match[2])
        return f"{match[1]}from . import " + ", ".join(f"{prefix}_{name} as {name}" for name in names)

    source = re.sub(SEVERAL.format(r"\.+(?:kernels)?"), several, source, flags=re.M)
    return re.sub(r"^( *)from \.+(?:kernels\.)?(\w+) import", rf"\1from .{prefix}_\2 import", source, flags=re.M)


# --- the folder -------------------------------------------------------------------------------------------------------


def finish(folder: Path, card: str) -> None:
    """README.md, and SHA256SUMS of every file."""
    write_text(folder / "README.md", card)
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
