"""What all tests share. Set before any test imports a library: nothing here may reach out to the network.

Without a GPU the Triton kernels run in Triton's interpreter, which `triton_shim` teaches bf16.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined

KERNEL_TESTS = re.compile(r"test_(torch|cpp|triton|ops|kernels)_?.*\.py")  # here memory without a value is NaN


class _RootIsNoTestPackage:
    """pytest would import the repository's __init__.py as a module of tests, under the name of the clone's folder."""

    @pytest.hookimpl
    def pytest_collect_directory(self, path: Path, parent: pytest.Collector) -> pytest.Collector | None:
        return pytest.Dir.from_parent(parent, path=path) if path == Path(__file__).parents[1] else None


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_RootIsNoTestPackage())
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None:
        import triton_shim

        triton_shim.install()


@pytest.fixture
def seed() -> int:
    """Another one each time; pytest shows it beside a failure. ATTNCONVERT_SEED repeats a run."""
    import kernel_cases

    drawn = kernel_cases.draw_seed()
    print(f"\nATTNCONVERT_SEED={drawn}")  # noqa: T201 – captured, and shown where a test fails
    torch.manual_seed(drawn)
    return drawn


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Tensors made without a value (torch.empty and its kin, in C++ too) hold NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # which fills what has no value
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def _poison_kernel_tests(request: pytest.FixtureRequest) -> None:
    if KERNEL_TESTS.fullmatch(request.path.name):
        request.getfixturevalue("poisoned")


@pytest.fixture(autouse=True)
def _operators_as_they_were() -> Iterator[None]:
    """What a test registers is gone behind it."""
    from attnconvert.kernels.spec_registry import OPERATORS

    before = dict(OPERATORS)
    yield
    OPERATORS.clear()
    OPERATORS.update(before)
