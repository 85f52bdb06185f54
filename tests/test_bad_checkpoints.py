"""A checkpoint that cannot be loaded here says in one line why, and what to do: through attnconvert and by its code."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from commands import attnconvert, save_tokenizer  # noqa: F401 – a fixture
from models import tiny
from transformers import AutoModelForCausalLM

from attnconvert.convert.checkpoints import LEAST, require_library
from attnconvert.convert.errors import AssetMissing, PreflightError, UsageError
from attnconvert.convert.export import export
from attnconvert.convert.exported import load_exported
from attnconvert.convert.files import read_json, write_json
from attnconvert.convert.hosts.models import find_sites
from attnconvert.convert.hosts.sites import Unsupported
from attnconvert.convert.hosts.surgery import convert
from attnconvert.kernels.spec import Window


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    model = tiny("llama")
    plan = {site: [Window(size=8, sinks=2)] * site.kv_heads for site in find_sites(model)}
    convert(model, plan)
    export(model, None, plan, folder, "card", None)
    save_tokenizer(folder, 99)
    return folder


def changed(folder: Path, place: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy whose config says something else, and whose checksums fit it."""
    shutil.copytree(folder, place)
    config = read_json(place / "config.json")
    change(config["attnconvert"])
    write_json(place / "config.json", config)
    (place / "SHA256SUMS").unlink()
    return place


def test_a_newer_format_says_to_upgrade(exported, tmp_path, attnconvert):  # noqa: F811
    folder = changed(exported, tmp_path / "new", lambda block: block.update(format=7, version="9.9"))
    with pytest.raises(UsageError, match=r"exported by attnconvert 9\.9 in format 7.*pip install -U attnconvert"):
        load_exported(folder)
    with pytest.raises(Unsupported, match=r"format is 7, this code reads 1: pip install -U attnconvert"):
        AutoModelForCausalLM.from_pretrained(folder)
    done = attnconvert("bench", folder)
    assert done.code == 2
    assert "pip install -U attnconvert" in done.message


def test_an_operator_that_is_not_there_is_named(exported, tmp_path):
    def rename(block: dict[str, Any]) -> None:
        next(iter(block["operators"].values()))["operator"] = "spiral"

    folder = changed(exported, tmp_path / "other", rename)
    with pytest.raises(UsageError, match=r"the operator 'spiral', which attnconvert here does not have.*pip install"):
        load_exported(folder)
    with pytest.raises(Unsupported, match=r"an operator unknown here \(no operator 'spiral'.*pip install"):
        AutoModelForCausalLM.from_pretrained(folder)
    lost = changed(exported, tmp_path / "lost", lambda block: block["operators"].clear())
    with pytest.raises(Unsupported, match=r"names 'window-8-2', which its operators lack"):
        AutoModelForCausalLM.from_pretrained(lost)


def test_a_file_that_was_changed_is_named(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("99", "98", 1))
    with pytest.raises(AssetMissing, match=r"config\.json has changed since it was exported \(SHA256SUMS\)"):
        load_exported(folder)


@pytest.mark.parametrize(
    ("sums", "told"),
    [(b"\xff\xfe", "is damaged"), (b"", "is damaged"), (b"0  README.md\n", "does not list config.json")],
)
def test_a_list_of_files_that_is_not_whole_vouches_for_nothing(exported, tmp_path, sums, told):
    folder = shutil.copytree(exported, tmp_path / "copy")
    (folder / "SHA256SUMS").write_bytes(sums)
    with pytest.raises(AssetMissing, match=told):
        load_exported(folder)


def test_a_block_of_another_shape_is_damage(exported, tmp_path):
    folder = changed(exported, tmp_path / "other", lambda block: block.update(operators=["window"]))
    with pytest.raises(AssetMissing, match="has no operators by name"):
        load_exported(folder)


def test_the_versions_that_are_checked_are_those_of_the_package():
    wanted = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]
    for name, least in LEAST.items():
        assert f"{name}>={'.'.join(map(str, least))}" in wanted


def test_a_library_that_is_too_old_is_refused(exported, monkeypatch):
    found = {"transformers": "5.16.4"}
    monkeypatch.setattr(metadata, "version", lambda name: found[name])
    with pytest.raises(PreflightError, match=r"transformers 5\.16\.4 is installed, and 5\.17 or later is needed"):
        load_exported(exported)
    with pytest.raises(PreflightError, match=r"transformers 5\.16\.4"):
        AutoModelForCausalLM.from_pretrained(exported)
    found["transformers"] = "5.17.0.dev0"
    require_library("transformers")


@pytest.mark.slow
def test_the_code_in_the_folder_refuses_a_library_that_is_too_old_by_itself(exported):
    code = "import sys; sys.modules['attnconvert'] = None\nimport transformers\n"
    code += "transformers.__version__ = sys.argv[2]\n"
    code += "transformers.AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True)"
    command = [sys.executable, "-W", "always", "-c", code, str(exported)]
    old = subprocess.run([*command, "5.9.1"], capture_output=True, text=True, check=False)
    assert old.returncode != 0
    want = (
        "ImportError: this checkpoint needs transformers 5.17 or later, 5.9.1 is installed: pip install -U transformers"
    )
    assert old.stderr.strip().splitlines()[-1] == want
    new = subprocess.run([*command, "6.0.0"], capture_output=True, text=True, check=False)
    assert new.returncode == 0, new.stderr
    assert "was made for transformers 5, 6.0.0 is installed" in new.stderr
