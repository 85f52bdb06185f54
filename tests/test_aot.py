"""The ahead-of-time gate: what ships compiles for every chip without spills, and aot.json is of today's kernels."""

import importlib.util
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attnconvert.kernels.problem import Blocks, Ranges, Softmax

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[1] / "docs" / "benchmarks" / "aot.py"


@pytest.fixture(scope="module")
def aot():
    spec = importlib.util.spec_from_file_location("aot", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def archs():
    from attnconvert.kernels.triton_common import ARCHITECTURES

    return ARCHITECTURES


def gate(*arguments):
    """Runs in a process of its own, since kernels made under TRITON_INTERPRET cannot be compiled."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_every_kernel_file_lists_its_variants(aot, archs):
    import attnconvert.kernels.triton_common as common

    folder = Path(common.__file__).parent
    jitted = {f.stem for f in folder.glob("triton_*.py") if "\n@triton.jit" in f.read_text()}
    listed = {aot.source(aot.raw(v.function)) for m in aot.modules() for arch in archs for v in aot.variants(m, arch)}
    for stem in jitted:
        module = importlib.import_module(f"attnconvert.kernels.{stem}")
        for name, value in vars(module).items():
            if type(value).__name__ in ("JITFunction", "InterpretedFunction"):
                (head,) = re.findall(r"^def .*$", aot.source(aot.raw(value)).split("\n@")[0], re.MULTILINE)[:1]
                assert any(head in source for source in listed), f"{stem}.{name} is in no variant"


def test_the_committed_table_is_of_the_kernels_as_they_stand(aot, archs):
    want = {(r["arch"], r["hash"]): f"{r['kernel']} on {r['arch']}" for r in aot.expected(archs)}
    have = {(r["arch"], r["hash"]): f"{r['kernel']} on {r['arch']}" for r in aot.load()}
    old, new = ([x[key] for key in x if key not in y] for x, y in ((have, want), (want, have)))
    told = "{} rows of aot.json are {}, {} …: run python docs/benchmarks/aot.py"
    assert not old, told.format(len(old), "of older kernels", old[:3])
    assert not new, told.format(len(new), "missing", new[:3])


def softmax(rows, dim, dtype, where):
    q = torch.empty(1, 1, rows, dim, dtype=dtype, device="meta")
    return Softmax(q=q, k=q, v=q, scale=1.0, causal=True, where=where)


def covers(v, tile, dim, own, walk, kind):
    """Whether a compiled kernel has this tile, at as large a head and as long a step."""
    c = v.constants
    same = (c[own], v.warps, v.stages) == (tile.own, tile.warps, tile.stages)
    return same and c["PAD"] >= dim and c[walk] >= tile.walk and v.signature["q"] == f"*{kind}"


@pytest.mark.parametrize("kind", ["bf16", "fp32"])
def test_every_tile_that_mixed_attention_launches_is_compiled(aot, archs, kind):
    from attnconvert.kernels.triton_mixed_shapes import fitted, key_tile, padded, query_tile, tile_for

    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    none = torch.zeros(1, 1, 1, dtype=torch.int32)
    lists = [
        Blocks(block=(m, n), starts=none, counts=none, columns=none)
        for m, n in ((128, 128), (64, 64), (48, 96), (16, 32))
    ]
    ranges = Ranges(sizes=(1,), window=none)
    for arch in archs:
        known = {}
        for v in aot.variants("triton_mixed_variants", arch):
            known.setdefault(v.name.split("-")[1], []).append(v)
        for dim, where, full in itertools.product((16, 64, 72, 128, 256), (ranges, *lists), (True, False)):
            for rows in (1, 40, 500):
                p = softmax(rows, dim, dtype, where)
                t = tile_for(p, arch, full)
                assert any(covers(v, t, dim, "BM", "BN", kind) for v in known["forward"]), (arch, dim, rows, where, t)
                assert ranges is where or where.block[0] % t.own == 0, f"{t.own} rows, blocks of {where.block[0]}"
            t = fitted(query_tile(arch, dtype != torch.float32, padded(dim)), p, 0)
            assert any(covers(v, t, dim, "BM", "BN", kind) for v in known["query"]), (arch, dim, where, t)
            t = fitted(key_tile(arch, dtype != torch.float32, padded(dim), full, isinstance(where, Blocks)), p, 1)
            assert any(covers(v, t, dim, "BN", "BM", kind) for v in known["key"]), (arch, dim, where, t)
            assert ranges is where or where.block[1] % t.own == 0, f"{t.own} keys, blocks of {where.block[1]}"


def test_nothing_in_the_committed_table_spills_or_is_too_large(aot):
    assert not aot.problems(aot.load())


def test_a_hash_is_of_what_is_compiled(aot, archs):
    rows = list(aot.expected(archs[:2]))
    assert len({r["hash"] for r in rows}) == len(rows), "two variants are the same"
    module = aot.modules()[0]
    v = aot.variants(module, archs[0])[0]
    row = aot.describe(module, archs[0], v)
    assert row["hash"] == aot.describe(module, archs[0], v)["hash"]
    wider = type(v)(**{**vars(v), "warps": v.warps * 2})
    assert row["hash"] != aot.describe(module, archs[0], wider)["hash"]
    text = aot.source(aot.raw(v.function))
    assert '"""' not in text
    assert "#" not in text


def test_the_gate_names_what_spills_is_too_large_or_does_not_compile(aot):
    row = {"module": "triton_x", "kernel": "x bf16", "arch": "gfx942", "registers": 9, "shared": 65536, "spills": 0}
    assert aot.problems([row]) == []
    (line,) = aot.problems([{**row, "shared": 65537}])
    assert "x bf16 on gfx942" in line
    assert "65536" in line
    assert "spills 8" in aot.problems([{**row, "spills": 8}])[0]
    assert "does not compile" in aot.problems([{**row, "error": "no"}])[0]
    text = ".vgpr_count:     72\n.vgpr_spill_count: 0\n.sgpr_spill_count: 3\n; ScratchSize: 0\n"
    assert aot._amd_usage(text) == {"registers": 72, "spills": 0, "scalar_spills": 3}
    assert aot._amd_usage(text.replace("ScratchSize: 0", "ScratchSize: 12"))["spills"] == 12


def test_the_table_has_a_line_for_each_kernel(aot, archs):
    row = {"registers": 64, "shared": 49152, "spills": 0}
    names = ("mixed forward bf16 64", "mixed forward bf16 128", "decode merge 64")
    rows = [{**row, "kernel": name, "arch": arch} for name in names for arch in archs]
    lines = aot.table([*rows, {"kernel": "linear scan", "arch": archs[0], "error": "no"}])
    assert lines[2] == "| mixed forward | 8 | 64, 48 KB | 64, 48 KB | 64, 48 KB | 64, 48 KB | 0 |"
    assert lines[4] == "| linear scan | 1 | – | – | – | – | 1 |"
    assert {line.count("|") for line in lines} == {8}


def test_some_kernels_compile_for_every_chip():
    done = gate("--sample", 1, "--jobs", 1)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
def test_every_configuration_compiles_for_every_chip(tmp_path):
    results = tmp_path / "aot.json"
    done = gate("--results", results)
    assert done.returncode == 0, done.stdout + done.stderr
