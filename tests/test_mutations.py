"""Bugs planted into the sources are noticed: the tests of the kernels fail for each, and pass without."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SEEDS = ("1", "2", "3")  # the problems are random: the first may happen not to touch the bug, all of them must not


def mark(mutation):
    return pytest.param(mutation, id=mutation.name, marks=() if mutation.quick else pytest.mark.slow)


def package(folder, mutation=None):
    """A package whose kernels are copies, all else links; the mutation is in the copy."""
    target = folder / "attnconvert"
    target.mkdir()
    shutil.copytree(ROOT / "kernels", target / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    for path in ROOT.iterdir():
        if path.suffix == ".py" or path.name in ("convert", "distill", "recipes", "py.typed"):
            (target / path.name).symlink_to(path)
    if mutation is not None:
        file = target / mutation.file
        file.write_text(file.read_text().replace(mutation.old, mutation.new))
    return folder


def run(folder, file, select, **more):
    environment = {
        **os.environ,
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }
    environment["XDG_CACHE_HOME"] = str(folder / "cache")  # C++ that was built with a bug in it goes with it
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    command += ["-m", "not slow", "-k", select, str(TESTS / file)]
    check = f"import attnconvert.kernels.problem as p; assert p.__file__.startswith({str(folder)!r}), p.__file__"
    subprocess.run([sys.executable, "-c", check], env=environment, cwd=folder, check=True)
    return subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)


def test_every_mutation_applies_to_the_sources():
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS) >= 14
    for m in MUTATIONS:
        count = (ROOT / m.file).read_text().count(m.old)
        assert count == 1, f"{m.name}: {m.old!r} stands {count} times in {m.file}"
        assert m.old != m.new
        assert (TESTS / m.tests).exists(), f"{m.name}: there is no {m.tests}"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutation", [mark(m) for m in MUTATIONS])
def test_a_planted_bug_is_noticed(mutation, tmp_path):
    folder = package(tmp_path, mutation)
    for seed in SEEDS:
        done = run(folder, mutation.tests, mutation.select, ATTNCONVERT_SEED=seed)
        if done.returncode != 0:
            break
    assert done.returncode == 1, f"{mutation.name} went unnoticed, or its tests did not run\n{done.stdout[-3000:]}"
    assert " failed" in done.stdout
    assert " error" not in done.stdout.splitlines()[-1], f"not a failure but an error\n{done.stdout[-3000:]}"


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("tests", "select"), sorted({(m.tests, m.select) for m in MUTATIONS}))
def test_the_plain_sources_pass_what_the_planted_bugs_fail(tests, select, tmp_path):
    done = run(package(tmp_path), tests, select)
    assert done.returncode == 0, done.stdout[-3000:]
