"""Distil: attention transfer for what the operators learn, then LoRA with the KL to the teacher.

Teacher and student are one set of weights: the teacher is the adapters off and full attention on. Training state is
kept as safetensors with the step in its header, so an interrupted run continues with the same numbers.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..convert.errors import AttnConvertError, UsageError
from ..convert.files import replacing, write_text
from ..convert.hosts import models, surgery
from ..convert.hosts.sites import Conversion, Site, all_full, refusal, submodule
from ..convert.hosts.surgery import convert
from ..convert.seeds import rng
from ..convert.text import Samples, Texts, samples_of
from ..kernels.spec import Full, Spec, label
from .objectives import attention_transfer, difference

if TYPE_CHECKING:
    from ..convert.progress import Track
    from ..convert.recipe import DistillSettings, LoraSettings, TransferSettings
    from ..convert.recipe_images import ImageTraining, ImageTransfer

OPERATORS, ADAPTER, PROJECTIONS = "operators.safetensors", "adapter", "projections.safetensors"
LOG = "log.jsonl"


class Diverged(AttnConvertError):
    """The loss or a gradient is no longer a number."""


def distill(
    model: Any,
    plan: Mapping[Site, Sequence[Spec]],
    samples: Tensor,
    settings: DistillSettings,
    folder: Path,
    track: Track,
) -> None:
    """Train one arm and leave operators.safetensors, adapter/ and log.jsonl in `folder`; the model is left as it was.

    Args:
        samples: (n, S) token sequences of the teacher.
    """
    torch.manual_seed(settings.seed)
    with without_dropout(model), surgery.frozen(model), surgery.converted(model, plan) as conversion:
        learned = conversion.learned()
        if settings.transfer and settings.transfer.steps and learned:
            transfer(model, conversion, Texts(samples), settings.transfer, settings.seed, folder, track)
        if settings.lora and any(spec != Full() for specs in plan.values() for spec in specs):
            _lora(model, conversion, plan, samples, settings.lora, settings.seed, folder, track)
        with replacing(folder / OPERATORS) as temporary:
            save_file({name: p.detach().contiguous() for name, p in learned.items()}, temporary)


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Inside, nothing is dropped: the student is to match the teacher, not a noisy version of it."""
    dropouts = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for module in dropouts:
        module.p = 0.0
    try:
        yield
    finally:
        for module, rate in dropouts.items():
            module.p = rate


def transfer(
    model: Any,
    conversion: Conversion,
    samples: Samples,
    settings: TransferSettings | ImageTransfer,
    seed: int,
    folder: Path,
    track: Track,
) -> None:
    """What operators learn fits the teacher's attention outputs; the steps are kept in `folder`."""
    learned = conversion.learned()
    for p in learned.values():
        p.requires_grad_(True)
    optimizer = torch.optim.AdamW(list(learned.values()), lr=settings.lr, weight_decay=0.0)
    trainer = Trainer("transfer", learned, optimizer, settings.lr, settings.steps, 0.0, 1.0, 20, folder)

    def step(rows: Tensor) -> dict[str, float]:
        return {"loss": attention_transfer(model, conversion, samples, rows)}

    trainer.run(step, torch.arange(len(samples)), settings.batch, seed, track)
    for p in learned.values():
        p.requires_grad_(False)


def fit_operators(
    model: Any,
    sites: Sequence[Site],
    spec: Spec,
    samples: Tensor | Samples,
    settings: TransferSettings | ImageTransfer,
    seed: int,
    folder: Path,
    track: Track,
) -> dict[tuple[str, str], nn.Module]:
    """What an operator learns at every site by attention transfer alone, {(site name, label): module}.

    Each site is fitted on the teacher's hidden states, so it does not matter which others are converted in the end.
    The steps are kept in `folder`; the model is left as it was.
    """
    able = [site for site in sites if refusal(site, spec) is None]
    plan = all_full(sites) | {site: [spec] * site.kv_heads for site in able}
    with surgery.frozen(model), surgery.converted(model, plan) as conversion:
        if settings.steps and conversion.learned():
            transfer(model, conversion, samples_of(samples), settings, seed, folder, track)
        found = {site.name: conversion.sites[site.name].learned(spec) for site in able}
    return {(name, label(spec)): module for name, module in found.items() if module is not None}


def _lora(
    model: Any,
    conversion: Conversion,
    plan: Mapping[Site, Sequence[Spec]],
    samples: Tensor,
    settings: LoraSettings,
    seed: int,
    folder: Path,
    track: Track,
) -> None:
    student = get_peft_model(model, _adapter_config(model, plan, settings))
    learned = {name: p for name, p in student.named_parameters() if p.requires_grad} | conversion.learned()
    trainer = Trainer.of("lora", learned, settings, settings.epochs * math.ceil(len(samples) / settings.batch), folder)

    def step(ids: Tensor) -> dict[str, float]:
        with torch.no_grad(), conversion.teacher(), student.disable_adapter():
            want = models.trunk(model)(ids, use_cache=False).last_hidden_state
        got = models.trunk(model)(ids, use_cache=False).last_hidden_state
        loss = difference(model, want, got, settings.logit_chunk)
        loss.backward()
        return {"loss": loss.item()}

    try:
        with checkpointing(model, settings.gradient_checkpointing):
            trainer.run(step, samples, settings.batch, seed, track)
        with replacing_folder(folder / ADAPTER) as temporary:
            student.save_pretrained(str(temporary), save_embedding_layers=False)
    finally:
        student.unload()
        forget_adapters(model)


def forget_adapters(model: Any) -> None:
    """peft leaves a note of its adapters on the model, which its library would take for adapters that are there."""
    if hasattr(model, "peft_config"):
        del model.peft_config


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Like `replacing`, for a folder whose files are few and whose absence means that it is to be made."""
    temporary = path.with_name(f".{path.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    shutil.rmtree(path, ignore_errors=True)
    temporary.rename(path)


@contextmanager
def checkpointing(model: Any, wanted: bool) -> Iterator[None]:
    """Both hosts checkpoint gradients in training mode only; without it the model stays as it is."""
    if wanted:
        enable, disable = _checkpointing_of(model)
        enable()
        model.train()
    try:
        yield
    finally:
        model.eval()
        if wanted:
            disable()


def _checkpointing_of(model: Any) -> tuple[Callable[[], None], Callable[[], None]]:
    """What turns it on and off."""
    if hasattr(model, "enable_gradient_checkpointing"):  # of diffusers
        return model.enable_gradient_checkpointing, model.disable_gradient_checkpointing
    # renamed in transformers 5.2x
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    enable = partial(getattr(model, f"{word}_checkpointing_enable"), {"use_reentrant": False})
    return enable, getattr(model, f"{word}_checkpointing_disable")


def _adapter_config(model: Any, plan: Mapping[Site, Sequence[Spec]], settings: LoraSettings) -> LoraConfig:
    names: list[str] = []
    for site, specs in plan.items():
        if any(spec != Full() for spec in specs):
            names += surgery.linear_layers(submodule(model, site.name), site.name)
    if settings.targets is not None:
        chosen = [n for n in names if n.rpartition(".")[2] in settings.targets]
        if not chosen:
            known = sorted({n.rpartition(".")[2] for n in names})
            raise UsageError(f"distill.lora.targets {list(settings.targets)} matches nothing; there are {known}")
        names = chosen
    alpha: Any = settings.alpha  # a float will do, whatever peft's annotation says
    return LoraConfig(r=settings.rank, lora_alpha=alpha, target_modules=names, lora_dropout=0.0, bias="none")


class Trainer:
    """Steps over samples in a seeded order, with a cosine schedule, clipping, a log and checkpoints to resume from."""

    def __init__(
        self,
        phase: str,
        learned: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        lr: float,
        steps: int,
        warmup: float,
        clip: float,
        every: int,
        folder: Path,
    ) -> None:
        self.phase, self.learned, self.optimizer = phase, dict(learned), optimizer
        self.lr, self.steps, self.warmup, self.clip, self.every = lr, steps, max(1, round(warmup * steps)), clip, every
        self.folder = folder
        self.path = folder / f"{phase}.safetensors"
        self.at = 0  # the step that runs

    @staticmethod
    def of(
        phase: str,
        learned: Mapping[str, nn.Parameter],
        settings: LoraSettings | ImageTraining,
        steps: int,
        folder: Path,
    ) -> Trainer:
        """As the settings say; what is learned then asks for gradients."""
        for p in learned.values():
            p.requires_grad_(True)
        optimizer = torch.optim.AdamW(list(learned.values()), lr=settings.lr, weight_decay=settings.weight_decay)
        how = settings.lr, steps, settings.warmup, settings.clip, settings.checkpoint_every
        return Trainer(phase, learned, optimizer, *how, folder)

    def rate(self, step: int) -> float:
        """Linear warm-up, then cosine to zero."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * 0.5 * (1 + math.cos(math.pi * done))

    def run(
        self, step: Callable[[Tensor], dict[str, float]], samples: Tensor, batch: int, seed: int, track: Track
    ) -> None:
        """Train to the last step. `step` leaves gradients behind and returns what is logged, "loss" among it."""
        first = self._resume()
        device = next(iter(self.learned.values())).device
        for n in track(range(first, self.steps), f"{self.phase} training"):
            start, self.at = time.perf_counter(), n
            self.optimizer.zero_grad()
            logged = step(samples[self._rows(n, len(samples), batch, seed)].to(device))
            norm = torch.nn.utils.clip_grad_norm_(list(self.learned.values()), self.clip).item()
            if not (math.isfinite(logged["loss"]) and math.isfinite(norm)):
                self._diverged(n, logged["loss"], norm)
            for group in self.optimizer.param_groups:
                group["lr"] = self.rate(n)
            self.optimizer.step()
            line = {"phase": self.phase, "step": n, **logged, "lr": self.rate(n), "grad_norm": norm}
            self._log(line | {"seconds": time.perf_counter() - start})
            if (n + 1) % self.every == 0 or n + 1 == self.steps:
                self._save(n + 1)

    @staticmethod
    def _rows(step: int, samples: int, batch: int, seed: int) -> Tensor:
        """The samples of a step: every epoch is a fresh permutation that depends on its number alone."""
        per_epoch = math.ceil(samples / batch)
        epoch, place = divmod(step, per_epoch)
        return torch.randperm(samples, generator=rng("order", seed, epoch))[place * batch : (place + 1) * batch]

    def _diverged(self, step: int, loss: float, norm: float) -> None:
        kept = f"the last good checkpoint is {self.path}" if self.path.exists() else "no checkpoint was written before"
        raise Diverged(
            f"{self.phase} training diverged at step {step}: loss {loss}, gradient norm {norm}; {kept}. "
            f"Lower distill.{self.phase}.lr (now {self.lr:g}) and run again"
        )

    def _log(self, line: dict[str, Any]) -> None:
        with (self.folder / LOG).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _save(self, step: int) -> None:
        tensors = {f"parameter.{name}": p.detach().contiguous() for name, p in self.learned.items()}
        for name, p in self.learned.items():
            for key, value in self.optimizer.state[p].items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value).contiguous()
        with replacing(self.path) as temporary:
            save_file(tensors, temporary, metadata={"step": str(step)})

    def _resume(self) -> int:
        """Take up the last checkpoint; the log is cut back to it."""
        if not self.path.exists():
            self._cut_log(0)
            return 0
        with safe_open(self.path, framework="pt") as file:
            step = int(file.metadata()["step"])
        tensors = load_file(self.path)
        with torch.no_grad():
            for name, p in self.learned.items():
                p.copy_(tensors[f"parameter.{name}"])
        for name, p in self.learned.items():
            keys = [k for k in tensors if k.startswith("optimizer.") and k.split(".", 2)[2] == name]
            moments = {k.split(".", 2)[1]: tensors[k] for k in keys}
            self.optimizer.state[p] = {k: x if k == "step" else x.to(p.device) for k, x in moments.items()}
        self._cut_log(step)
        return step

    def _cut_log(self, step: int) -> None:
        path = self.folder / LOG
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            return
        kept = []
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # torn by an interruption
            if entry["phase"] != self.phase or entry["step"] < step:
                kept.append(line)
        write_text(path, "".join(f"{line}\n" for line in kept))


def load_student(model: Any, plan: Mapping[Site, Sequence[Spec]], folder: Path | None) -> Conversion:
    """Turn the model into the student of an arm: plan installed, learned parameters loaded, adapter merged.

    `folder` is what `distill` filled, or None for an arm that was not trained.
    """
    if folder is not None and (folder / ADAPTER).exists():
        merged = PeftModel.from_pretrained(model, str(folder / ADAPTER)).merge_and_unload()
        assert merged is model
        forget_adapters(model)
    if folder is not None and (folder / PROJECTIONS).exists():
        with torch.no_grad():
            for name, value in load_file(folder / PROJECTIONS).items():
                model.get_parameter(name).copy_(value)
    conversion = convert(model, plan)
    if folder is not None and (folder / OPERATORS).exists():
        learned, stored = conversion.learned(), load_file(folder / OPERATORS)
        with torch.no_grad():
            for name, p in learned.items():
                p.copy_(stored[name])
    model.requires_grad_(False)
    return conversion
