"""Check and measure the kernels on the GPU: `make gpu RESULTS=dir` writes dir/<device>.json, in under 10 minutes.

Needs Python, torch with Triton and a clone, nothing installed. The correctness on the device comes first; a failure
is said, makes the exit status 1, and the timing goes on. Each section runs in a process of its own, so that a kernel
that takes the device down takes only its own case with it; all providers of a shape are in one process and take turns.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MINUTES = 9.5
CHECK_SECONDS = 150
TESTS = ("test_triton_*.py", "test_ops.py", "test_operators.py", "test_kernels_*.py", "test_gpu*.py")
STARTS = 4  # of one section: after a lost device it begins again without what lost it
SECTIONS = {"flux": 11, "wan": 10, "llama": 11, "decode": 3, "smollm2": 5}  # and their share of the time
POISONED = 9  # exit status of a section that lost the device


def environment(folder: Path) -> dict[str, str]:
    """For all processes. Where the package is not installed, `folder` gets the repository under the package's name."""
    path = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p]
    if importlib.util.find_spec("attnconvert") is None:
        (folder / "attnconvert").symlink_to(ROOT, target_is_directory=True)
        path.insert(0, str(folder))
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


# ------------------------------------------------------------------------------------------- in a process of its own


def work(given: argparse.Namespace) -> int:
    """One section: writes what it finds line by line, so that nothing is lost with the process."""
    say = _writer(given.out)
    if given.work == "machine":
        say(machine=_machine(given.dry))
        return 0
    from cases import warm
    from gpu_cases import MAKERS, Place

    place = Place(device="cpu", backend="torch", dry=True) if given.dry else Place()
    if given.work == "check":
        import gpu_check

        found = gpu_check.run(place.backend, place.device, given.dry)
        say(check=found)
        return 1 if found["failed"] else 0
    warm(place.backend, place.device)
    return _section(MAKERS[given.work](place), given, say)


def _writer(out: Path) -> Callable[..., None]:
    def say(**what: Any) -> None:
        with out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(what, ensure_ascii=False) + "\n")

    return say


def _section(groups: Iterable[Any], given: argparse.Namespace, say: Callable[..., None]) -> int:
    from measure import Cuda, Poisoned, Wall, measure, skipped
    from shapes import Peaks

    peaks = Peaks(flops=given.flops or None, bandwidth=given.bandwidth or None)
    end = time.monotonic() + given.seconds
    speed: dict[str, Any] = {"rounds": (1, 1), "sample_ms": 0} if given.dry else {"rounds": (5, 20)}
    for number, group in enumerate(groups):
        if number < given.skip:
            continue
        say(group=number, title=group.title)
        left = end - time.monotonic()
        if left <= 0:
            say(rows=skipped(group, f"the {given.seconds:.0f} s of section {given.work} were over", given.machine))
            continue
        print(f"  {group.title} ({left:.0f} s left)", flush=True)
        try:
            rows = measure(
                group,
                Wall() if given.dry else Cuda(),
                seconds=min(6.0, left / 4),
                peaks=peaks,
                machine=given.machine,
                without=given.without,
                begun=lambda name: say(at=name),
                **speed,
            )
        except Poisoned as error:
            say(poisoned=error.entry, error=str(error))
            return POISONED
        say(rows=rows)
    return 0


def _machine(dry: bool) -> dict[str, Any]:
    """Device, versions, and the two peaks that floors are counted from: TFLOP/s of bf16 products, TB/s of copies."""
    import torch

    from attnconvert.convert.machine import hardware, versions

    device = "cpu" if dry else "cuda"
    found: dict[str, Any] = {"device": "dry run"}
    if not dry:
        torch.zeros(1, device=device)
        properties = torch.cuda.get_device_properties(0)
        found = {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
        }
        found |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    size, count = (64, 2**10) if dry else (8192, 2**32)
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    old, new = (torch.empty(count, dtype=torch.uint8, device=device) for _ in range(2))
    product, copy = _best(lambda: a @ b, dry), _best(lambda: new.copy_(old), dry)
    found |= {"flops": 2 * size**3 / product, "bandwidth": 2 * count / copy}
    return {**hardware(), **found, "versions": versions()}


def _best(run: Callable[[], Any], dry: bool) -> float:
    """Seconds: the median of ten."""
    from measure import Cuda, Wall

    clock = Wall() if dry else Cuda()
    for _ in range(3):
        run()
    return sorted(clock.sample(run, 1)[0] for _ in range(10))[5] / 1e3


# ------------------------------------------------------------------------------------------------ the run as a whole


class Run:
    """Starts the processes, keeps to the time, gathers the rows."""

    def __init__(self, given: argparse.Namespace, folder: Path) -> None:
        self.given, self.folder, self.begin = given, folder, time.monotonic()
        self.environment = environment(folder)
        self.peaks: dict[str, Any] = {}
        self.processes = 0

    @property
    def left(self) -> float:
        return 60 * self.given.minutes - (time.monotonic() - self.begin)

    def start(self, what: str, seconds: float, *more: str) -> tuple[int | None, list[dict[str, Any]]]:
        """Exit status (None: it took too long) and what was written."""
        self.processes += 1
        out = self.folder / f"{self.processes}.jsonl"
        command = [sys.executable, str(HERE / "gpu.py"), "--work", what, "--out", str(out), *more]
        command += ["--dry"] if self.given.dry else []
        code = call(command, seconds, env=self.environment)
        lines = out.read_text(encoding="utf-8").splitlines() if out.exists() else []
        return code, [json.loads(line) for line in lines if line.endswith("}")]

    def section(self, name: str, seconds: float) -> list[dict[str, Any]]:
        """The rows of a section, through as many processes as it takes."""
        end, rows, skip, without = time.monotonic() + seconds, [], 0, []
        for _ in range(STARTS):
            left = end - time.monotonic()
            if left < 5 and not self.given.dry:
                break
            more = ["--seconds", f"{left:.0f}", "--skip", str(skip), "--machine", self.peaks.get("device", "")]
            more += [f"--flops={self.peaks.get('flops', 0)}", f"--bandwidth={self.peaks.get('bandwidth', 0)}"]
            more += [f"--without={entry}" for entry in without]
            code, said = self.start(name, left + 20, *more)
            rows += [row for line in said for row in line.get("rows", [])]
            if code == 0:
                return rows
            skip, at = _where(said, skip)
            lost = next((line for line in said if "poisoned" in line), None)
            why = "took too long" if code is None else f"the process ended with {code}"
            title = next((line["title"] for line in reversed(said) if "title" in line), name)
            entry = lost["poisoned"] if lost else at
            rows.append(_lost(title, entry, lost["error"] if lost else why))
            print(f"  {title}: {entry or name}: {rows[-1]['note']}", flush=True)
            if entry is None:
                skip += 1
            else:
                without.append(entry)
            if code is None:
                break
        rows.append(_lost(name, None, "what was left of the section was not measured"))
        return rows

    def check(self) -> dict[str, Any]:
        """pytest where it is installed, else the built-in check."""
        seconds = min(CHECK_SECONDS, self.left)
        if not self.given.dry and importlib.util.find_spec("pytest") is not None:
            return self._pytest(seconds)
        code, said = self.start("check", seconds)
        found = next((line["check"] for line in said if "check" in line), None)
        if found is None:
            why = "took too long" if code is None else f"ended with {code}"
            found = {"how": "built-in check against fp64", "passed": 0, "failed": [f"the check {why}"]}
        return found

    def _pytest(self, seconds: float) -> dict[str, Any]:
        files = sorted({str(f) for pattern in TESTS for f in (ROOT / "tests").glob(pattern)})
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]
        if importlib.util.find_spec("pytest_timeout") is None:
            command += ["-o", "addopts=--import-mode=importlib --strict-markers"]  # the rest asks for that plugin
        elif [int(n) for n in metadata.version("pytest-timeout").split(".")[:2]] >= [2, 3]:
            command += [f"--session-timeout={seconds - 15:.0f}"]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", "8"]
        log = self.folder / "pytest.txt"
        with log.open("w", encoding="utf-8") as file:
            more = {"stdout": file, "stderr": subprocess.STDOUT}
            code = call(command, seconds, cwd=ROOT, env=self.environment, **more)
        text = log.read_text(encoding="utf-8", errors="replace")
        print("\n".join(text.splitlines()[-15:]), flush=True)
        return pytest_result(text, code, seconds)


def call(command: list[str], seconds: float, **more: Any) -> int | None:
    """The exit status; None where it took too long and was ended, with all that it had started."""
    process = subprocess.Popen(command, start_new_session=True, **more)
    try:
        return process.wait(max(seconds, 1))
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)  # the group of this process, with workers that would disturb what comes
        process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return None
        raise


def pytest_result(text: str, code: int | None, seconds: float) -> dict[str, Any]:
    """What the output of pytest says: passed, failed (with the reasons), whether it came to its end."""
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|failed|skipped|error)", text[-600:])}
    failed = re.findall(r"^(?:FAILED|ERROR) (.*)$", text, re.MULTILINE)
    cut = code is None or "session-timeout" in text or "Session timeout" in text
    if not failed and code not in (0, None) and not cut:
        failed = [f"pytest ended with {code}"]
    dots = sum(line.count(".") for line in re.findall(r"^[.sFExX]+", text, re.MULTILINE))  # where no summary came
    found = {"how": "pytest on the device", "passed": counts.get("passed", dots), "failed": [f[:300] for f in failed]}
    return {**found, "skipped": counts.get("skipped", 0), **({"stopped_after_s": round(seconds)} if cut else {})}


def _where(said: list[dict[str, Any]], skip: int) -> tuple[int, str | None]:
    """The group and the entry at which a process ended, None before the first entry."""
    number, at = skip, None
    for line in said:
        if "group" in line:
            number, at = line["group"], None
        elif "at" in line:
            at = line["at"]
        elif "rows" in line:
            number, at = number + 1, None
    return number, at


def _lost(title: str, entry: str | None, note: str) -> dict[str, Any]:
    provider, _, case = (entry or f"–: {title}").partition(": ")
    fields = ("dtype", "median_ms", "p20_ms", "p80_ms", "ratio", "baseline", "target", "met")
    empty = dict.fromkeys(fields)
    return {"case": case, "provider": provider, "pass": None, "shape": {"model": title}, **empty, "note": note}


def slug(device: str) -> str:
    """`NVIDIA H200` → `h200`."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower().replace("nvidia", "").replace("amd", "")).strip("-") or "gpu"


def measured(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that goes into the file."""
    run = Run(given, folder)
    print("the machine", flush=True)
    code, said = run.start("machine", 120)
    machine = next((line["machine"] for line in said if "machine" in line), None)
    if machine is None:
        why = "no answer in 120 s" if code is None else f"exit status {code}"
        raise SystemExit(f"no CUDA device that works: {why}; the lines above say more")
    run.peaks = machine
    versions = machine.pop("versions")
    speed = f"{machine['flops'] / 1e12:.0f} TFLOP/s, {machine['bandwidth'] / 1e12:.2f} TB/s"
    print(f"{machine['device']}: {speed}; correctness", flush=True)
    check = {"how": "left out", "passed": 0, "failed": []} if given.no_check else run.check()
    print(
        f"{check['how']}: {check['passed']} passed, {len(check['failed'])} failed ({run.left:.0f} s left)", flush=True
    )
    rows: list[dict[str, Any]] = []
    names = [name for name in SECTIONS if not given.only or name in given.only]
    for number, name in enumerate(names):
        share = SECTIONS[name] / sum(SECTIONS[n] for n in names[number:])
        print(f"section {name}, {run.left * share:.0f} s", flush=True)
        rows += run.section(name, run.left * share)
    return {
        "kind": "gpu",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine,
        "versions": versions,
        "check": check,
        "seconds": round(time.monotonic() - run.begin),
        "rows": rows,
    }


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE, help="folder of the JSON file")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--only", action="append", choices=tuple(SECTIONS), help="this section only (may be repeated)")
    parser.add_argument("--no-check", action="store_true", help="time without the correctness check")
    parser.add_argument("--dry", action="store_true", help="on the CPU with tiny shapes, to try the control flow")
    for name, kind in {"work": str, "out": Path, "machine": str}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    for name in ("seconds", "flops", "bandwidth"):
        parser.add_argument(f"--{name}", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--skip", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.work:
        return work(given)
    with tempfile.TemporaryDirectory(prefix="attnconvert-gpu-") as folder:
        found = measured(given, Path(folder))
    from tables import save, short

    given.results.mkdir(parents=True, exist_ok=True)
    target = given.results / f"{slug(found['machine']['device'])}.json"
    save(found, target)
    wrong = [r for r in found["rows"] if "WRONG" in r["note"]]
    print("\n".join(short(found)), f"\n{target}: {len(found['rows'])} rows in {found['seconds']} s", flush=True)
    return 1 if found["check"]["failed"] or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
