"""What becomes of a finished run: other formats, its papers, the hub, a comparison, the same run again."""

from __future__ import annotations

import base64
import http.server
import json
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from commands import RECIPE, attnconvert, finished, place, save_tokenizer, whole  # noqa: F401 – fixtures
from models import tiny
from peft import PeftModel
from transformers import AutoModelForCausalLM

from attnconvert.convert.card import attachments
from attnconvert.convert.comparing import read_side
from attnconvert.convert.errors import AssetMissing
from attnconvert.convert.exported import load_exported
from attnconvert.convert.files import read_json, write_json
from attnconvert.convert.recipe import load_recipe
from attnconvert.convert.recipe_inputs import ModelSource
from attnconvert.convert.reproducing import version_grade

# --- formats of a run -------------------------------------------------------------------------------------------------


def test_a_run_is_exported_in_another_format_without_redoing_the_rest(attnconvert, finished, place, tmp_path):  # noqa: F811
    before = read_json(finished / "manifest.json")
    assert before["metrics"]["export_format"]["form"] == "remote"
    assert "sinks" in before["metrics"]["export_format"]["why"] or "mixes" in before["metrics"]["export_format"]["why"]
    done = attnconvert("export", finished, "--format", "adapter", "--json")
    assert done.code == 0, done.err
    assert done.document["form"] == "adapter"
    assert done.document["verified"]["installed"]["logits_error"] == 0.0
    assert done.document["verified"]["peft"]["weights_equal"]
    after = read_json(finished / "manifest.json")
    for stage in ("profile", "select", "sample", "distill", "evaluate"):
        assert after["stages"][stage] == before["stages"][stage]
    folder = finished / "export"
    assert "not the\nconverted model" in (folder / "README.md").read_text()
    assert attnconvert("evaluate", finished, "--json").code in (0, 4)  # from the adapter and its base
    check_bases(folder, place / "model", tmp_path)
    stock = attnconvert("export", finished, "--format", "stock")
    assert stock.code == 2
    assert "take the format remote" in stock.message
    assert (folder / "adapter_config.json").exists()  # what is there stays
    assert load_recipe(finished / "recipe.yaml").export.format == "adapter"


def check_bases(folder: Path, model: Path, tmp_path: Path) -> None:
    """PEFT alone loads the adapter; attnconvert wants the base model as it was, wherever it lies."""
    base = AutoModelForCausalLM.from_pretrained(model)
    assert any("lora" in name for name, _ in PeftModel.from_pretrained(base, folder).named_parameters())
    tiny("llama", seed=1).save_pretrained(tmp_path / "other")
    save_tokenizer(tmp_path / "other", 99)
    with pytest.raises(AssetMissing, match=r"is not the file that .* was trained on"):
        load_exported(folder, base=ModelSource(folder=tmp_path / "other"))
    shutil.copytree(model, tmp_path / "same")
    moved = load_exported(folder, base=ModelSource(folder=tmp_path / "same"))
    ids = torch.arange(2, 60)[None]
    assert torch.equal(moved(ids).logits, load_exported(folder)(ids).logits)


def test_a_checkpoint_has_its_recipe_its_manifest_and_its_figures_but_no_paths(whole, place):  # noqa: F811
    folder = whole / "export"
    assert load_recipe(folder / "recipe.yaml").name == "tiny-window"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert set(manifest["files"]) >= {"profile", "select", "sample", "distill", "evaluate"}
    assert (folder / "plan.yaml").read_text() == (whole / "plan.yaml").read_text()
    for name in ("recipe.yaml", "manifest.json", "README.md"):
        assert str(place) not in (folder / name).read_text()
    head = yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])
    (results,) = head["model-index"][0]["results"]
    assert {"kl", "perplexity", "accuracy"} <= {metric["type"] for metric in results["metrics"]}


def test_no_path_is_left_in_the_lists_of_a_recipe_or_of_its_command(place, tmp_path):  # noqa: F811
    own = Path(__file__).parents[1] / "docs" / "examples" / "taylor.py"
    listed = [f"operators=[{own}]", f"text.heldout.files=[{place / 'heldout.txt'}, {place}/calibration.txt]"]
    recipe = load_recipe(place / "recipe.yaml", listed)
    manifest = {"command": shlex.join(["attnconvert", "run", str(place / "recipe.yaml"), "--set", *listed])}
    found = attachments(recipe, manifest, tmp_path / "none")
    assert "taylor.py" in found["recipe.yaml"]
    for text in found.values():
        assert str(place) not in text
        assert str(own.parent) not in text
    told = json.loads(found["manifest.json"])["command"]
    assert told.endswith("'operators=[taylor.py]' 'text.heldout.files=[heldout.txt, calibration.txt]'")


def test_half_an_export_is_not_taken_for_a_checkpoint(attnconvert, finished):  # noqa: F811
    (finished / "export" / "done.json").unlink()
    for command in (("push", finished, "owner/name", "--dry-run"), ("bench", finished / "export")):
        done = attnconvert(*command)
        assert done.code == 2
        assert "is half an export" in done.message
    assert not read_side(finished).weights


def test_a_checkpoint_is_not_taken_for_a_run(attnconvert, whole, tmp_path):  # noqa: F811
    folder = shutil.copytree(whole / "export", tmp_path / "export")
    for command in ("sample", "evaluate"):
        done = attnconvert(command, folder)
        assert done.code == 2
        assert "is an exported checkpoint, not a run" in done.message
    assert attnconvert("inspect", folder, "--json").document["operators"]


def test_a_recipe_asks_for_a_format_and_one_that_cannot_be_is_an_error(attnconvert, place):  # noqa: F811
    both = "export: {format: adapter, dtype: bfloat16}\n"
    (place / "both.yaml").write_text(RECIPE + both)
    done = attnconvert("recipes", "validate", place / "both.yaml")
    assert done.code == 2
    assert "an adapter leaves the weights" in done.err + done.out
    done = attnconvert("run", "flux-mnist-local", "--set", "export.format=stock", "--dry-run")
    assert done.code == 2
    assert "exported with its code" in done.err


# --- the hub ----------------------------------------------------------------------------------------------------------


class Hub:
    """A stand-in for the hub: what huggingface_hub asks of it while pushing, answered, and what came, kept."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []
        self.tokens: set[str | None] = set()
        self.created: dict[str, Any] = {}
        self.refuse = 0
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

            def answer(self, document: Any, status: int = 200) -> None:
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def do_PUT(self) -> None:
                hub.blobs[self.path.rpartition("/")[2]] = self.body()
                self.answer({})

            def do_GET(self) -> None:
                self.answer({"sha": "0" * 40, "siblings": [], "id": "owner/name"})

            def do_POST(self) -> None:
                hub.asked.append(("POST", self.path))
                hub.tokens.add(self.headers.get("Authorization"))
                sent = self.body()
                if hub.refuse:
                    self.answer({"error": "no"}, hub.refuse)
                elif self.path == "/api/repos/create":
                    hub.created = json.loads(sent)
                    self.answer({"url": f"http://{self.headers['Host']}/owner/name", "name": "owner/name"})
                elif "/preupload/" in self.path:
                    files = json.loads(sent)["files"]
                    large = {f["path"]: f["path"].endswith(".safetensors") for f in files}
                    modes = {path: "lfs" if x else "regular" for path, x in large.items()}
                    told = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
                    self.answer({"files": told})
                elif self.path.endswith("/info/lfs/objects/batch"):
                    objects = json.loads(sent)["objects"]
                    to = f"http://{self.headers['Host']}/blobs/"
                    ways = [{**o, "actions": {"upload": {"href": to + o["oid"]}}} for o in objects]
                    self.answer({"transfer": "basic", "objects": ways})
                elif "/commit/" in self.path:
                    hub.commit([json.loads(line) for line in sent.splitlines()])
                    where = f"http://{self.headers['Host']}/owner/name/commit/{'1' * 40}"
                    self.answer({"commitUrl": where, "commitOid": "1" * 40})
                else:
                    self.answer({})

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[value["path"]] = self.blobs[value["oid"]]

    def run(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """The command in a process of its own: the libraries read the endpoint when they are imported."""
        endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"
        settings = {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        program = "from attnconvert.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", program, *map(str, arguments)],
            env={**os.environ, **settings, **environment},
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def hub() -> Iterator[Hub]:
    stand_in = Hub()
    yield stand_in
    stand_in.server.shutdown()


def test_a_checkpoint_is_pushed_whole_in_one_commit(hub, whole):  # noqa: F811
    done = hub.run("push", whole, "owner/name", "--private", "--revision", "tried", "--json")
    assert done.returncode == 0, done.stderr
    assert "hf_secret" not in done.stdout + done.stderr
    assert json.loads(done.stdout)["commit"] == "1" * 40
    folder = whole / "export"
    kept = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert hub.files == {name: text for name, text in kept.items() if name not in ("key", "done.json")}
    assert hub.created["visibility" if "visibility" in hub.created else "private"] in ("private", True)
    assert hub.tokens == {"Bearer hf_secret"}
    assert [path for _, path in hub.asked if "/commit/" in path] == ["/api/models/owner/name/commit/tried"]
    assert ("POST", "/api/models/owner/name/branch/tried") in hub.asked


def test_a_push_that_cannot_be_says_why_and_what_to_do(hub, whole, attnconvert, monkeypatch):  # noqa: F811
    offline = attnconvert("push", whole, "owner/name")  # as all tests are
    assert offline.code == 5
    assert "HF_HUB_OFFLINE forbids the network" in offline.message
    hub.refuse = 403
    refused = hub.run("push", whole, "owner/name")
    assert refused.returncode == 5
    assert "refuses to write to owner/name (403): set HF_TOKEN" in refused.stderr.replace("\n", " ")

    def unreachable(*args: Any, **kwargs: Any) -> None:
        raise type("ConnectError", (Exception,), {"__module__": "httpx"})("[Errno 111] Connection refused")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", unreachable)  # which itself tries for half a minute
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    gone = attnconvert("push", whole, "owner/name")
    assert gone.code == 5
    assert "the hub is not reachable: [Errno 111] Connection refused" in gone.message


def test_a_dry_run_lists_what_would_be_pushed_and_a_changed_file_is_refused(attnconvert, whole, tmp_path):  # noqa: F811
    folder = Path(shutil.copytree(whole / "export", tmp_path / "export"))
    (folder / "notes.txt").write_text("mine")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_text("url = https://user:secret@somewhere")
    (folder / "README.md").write_text((folder / "README.md").read_text() + "my own words")
    done = attnconvert("push", folder, "owner/name", "--dry-run", "--json")
    assert done.code == 0, done.err
    found = done.document
    assert found["files"]["model.safetensors"] == (folder / "model.safetensors").stat().st_size
    assert found["files"]["notes.txt"] == 4
    assert ".git/config" not in found["files"]
    assert found["bytes"] == sum(found["files"].values())
    assert found["card"]["library_name"] == "transformers"
    assert "notes.txt" in found["notes"][0]
    shown = attnconvert("push", folder, "owner/name", "--dry-run")
    assert "Would push" in shown.out
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    done = attnconvert("push", folder, "owner/name", "--dry-run")
    assert done.code == 5
    assert "has changed since it was exported" in done.message


# --- side by side, and again ------------------------------------------------------------------------------------------


def test_a_comparison_names_what_differs(attnconvert, whole, finished, tmp_path):  # noqa: F811
    same = attnconvert("diff", whole, whole / "export", "--json").document
    assert same["weights"]["different"] == []
    assert same["plan"]["changed"] == 0
    assert same["same"]  # a checkpoint's recipe has no folders
    other = Path(shutil.copytree(whole / "export", tmp_path / "export"))
    config = read_json(other / "config.json")
    site = next(iter(config["attnconvert"]["sites"].values()))
    before, site["groups"] = site["groups"], ["full"] * len(site["groups"])
    config["attnconvert"]["operators"]["full"] = {"operator": "full"}
    write_json(other / "config.json", config)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(weights)
    recipe = (other / "recipe.yaml").read_text()
    (other / "recipe.yaml").write_text(recipe.replace("groups: 0.6", "groups: 0.5", 1))
    found = attnconvert("diff", whole / "export", other, "--json").document
    assert found["recipe"] == {"select.groups": [0.6, 0.5]}
    assert found["plan"]["changed"] == sum(name != "full" for name in before)
    assert len(found["weights"]["different"]) == 1
    assert found["same"] is False
    assert found["figures"]["quality.64.kl"][0] == found["figures"]["quality.64.kl"][1]
    shown = attnconvert("diff", whole / "export", other)
    assert "1 different" in shown.out
    assert attnconvert("diff", whole, tmp_path).code == 2
    (other / "model.safetensors").write_bytes(bytes(weights[:300]))
    cut = attnconvert("diff", whole, other)
    assert cut.code == 5
    assert "is truncated" in cut.message


def test_the_recipe_of_a_manifest_gives_the_same_again(attnconvert, whole, tmp_path):  # noqa: F811
    again = tmp_path / "again"
    done = attnconvert("reproduce", whole / "manifest.json", "--out", again, "--json", "--quiet")
    assert done.code == 0, done.err
    found = done.document
    assert found["result"] == "bit-identical"
    assert found["environment"] == []
    assert set(found["stages"]) >= {"select", "sample", "distill", "export"}
    assert not any(entry["different"] for entry in found["stages"].values())
    assert attnconvert("diff", whole, again, "--json").document["same"] is True
    other = Path(shutil.copytree(whole, tmp_path / "other"))
    manifest = read_json(other / "manifest.json")
    manifest["files"]["distill"] = dict.fromkeys(manifest["files"]["distill"], "0" * 64)
    manifest["versions"] = {**manifest["versions"], "torch": "2.12.1"}
    manifest["hardware"] = {**manifest["hardware"], "cpu": "Another CPU"}
    write_json(other / "manifest.json", manifest)
    near = attnconvert("reproduce", other, "--out", again, "--json")  # which is done: only compared
    assert near.code == 0
    assert near.document["result"] == "equal to tolerance"
    assert {row["grade"] for row in near.document["environment"]} == {"minor version", "other hardware"}
    manifest["metrics"]["quality"]["64"]["kl"] += 0.5
    write_json(other / "manifest.json", manifest)
    apart = attnconvert("reproduce", other, "--out", again)
    assert apart.code == 4
    assert "The result is different" in apart.out
    assert "gate missed" in apart.message


def test_what_cannot_be_reproduced_is_told(attnconvert, whole, tmp_path):  # noqa: F811
    assert "does not exist" in attnconvert("reproduce", tmp_path / "manifest.json").message
    done = attnconvert("reproduce", whole / "manifest.json", "--out", whole)
    assert done.code == 2
    assert "use another --out" in done.message
    done = attnconvert("reproduce", whole / "export", "--out", whole)
    assert done.code == 2
    assert "use another --out" in done.message
    assert "was begun with" not in done.message
    earlier = Path(shutil.copytree(whole, tmp_path / "earlier", ignore=shutil.ignore_patterns("export")))
    manifest = read_json(earlier / "manifest.json")
    write_json(earlier / "manifest.json", {key: value for key, value in manifest.items() if key != "files"})
    assert "has no hashes" in attnconvert("reproduce", earlier).message
    manifest["model"]["sha256"] = dict.fromkeys(manifest["model"]["sha256"], "0" * 64)
    write_json(earlier / "manifest.json", manifest)
    done = attnconvert("reproduce", earlier, "--out", tmp_path / "x")
    assert done.code == 2
    assert "is not the file that the first run began with" in done.message
    assert not (tmp_path / "x").exists()
    folder = Path(shutil.copytree(whole / "export", tmp_path / "export"))
    done = attnconvert("reproduce", folder, "--out", tmp_path / "x")
    assert done.code == 5
    assert "no folder" in done.message or "no file" in done.message  # a checkpoint does not say where things lie
    (folder / "recipe.yaml").unlink()
    assert "is read with the recipe" in attnconvert("reproduce", folder).message


def test_versions_are_told_apart_by_their_first_difference():
    pairs = {("2.11.0", "2.13.0"): "minor version", ("2.13.0", "2.13.1"): "patch version"}
    pairs |= {("4.1", "5.1"): "major version", ("2.13.0+cpu", "2.13.0"): "other build"}
    pairs |= {(None, "1"): "absent before", ("1", None): "absent now"}
    assert {pair: version_grade(*pair) for pair in pairs} == pairs
