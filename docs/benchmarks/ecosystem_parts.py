"""What `make ecosystem` runs: other people's libraries on converted checkpoints, each part by itself.

A part takes folders and returns what it saw. It raises where something is not as it should be, so that a figure in
ecosystem.json is one that held. Checkpoints are loaded with trust_remote_code=True, as where attnconvert is absent.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SENTENCES = (
    "The ferry leaves the harbour at seven.",
    "A boat goes to the island every morning.",
    "Boil the rice for twelve minutes, then let it stand under a lid while you slice the onions and warm the plates.",
    "Interest rates were raised by a quarter of a point, which markets had expected for weeks.",
    "The cat slept.",
    "Central banks tightened their policy again. " * 12,
)
ERROR = 2e-5  # of fp32, relative to the largest value


@dataclass(frozen=True, kw_only=True)
class Folders:
    """`decoder` and `encoder` are converted checkpoints, the teachers what they were made of, `scratch` is empty."""

    decoder: Path
    decoder_teacher: Path
    encoder: Path
    encoder_teacher: Path
    scratch: Path


# --- what parts share -------------------------------------------------------------------------------------------------


def require(fact: bool, message: str) -> None:
    if not fact:
        raise RuntimeError(message)


def load(folder: Path, **settings: Any) -> Any:
    """A causal language model from its folder, by its own code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


def tokenizer_of(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def tokens(model: Any, rows: int = 2, length: int = 96, seed: int = 0) -> Tensor:
    """Random tokens (rows, length)."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(2, model.config.vocab_size - 2, (rows, length), generator=draw)


@torch.no_grad()
def logits(model: Any, ids: Tensor) -> Tensor:
    found: Tensor = model(ids, use_cache=False).logits
    return found.float()


def difference(found: Tensor, wanted: Tensor) -> float:
    """The largest difference over the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def operators(model: Any) -> list[str]:
    """What each converted site of a model has, as text."""
    return [str(module.specs) for module in model.modules() if type(module).__name__ == "SiteOperators"]


def same(name: str, found: Tensor, wanted: Tensor, most: float = ERROR) -> float:
    error = difference(found, wanted)
    require(error <= most, f"{name}: logits differ by {error:.1e} of the largest, at most {most:.0e} was expected")
    return error


# --- the parts --------------------------------------------------------------------------------------------------------


def safetensors(folders: Folders) -> dict[str, Any]:
    """The weights file: its metadata, and that nothing else in the folder holds weights."""
    from safetensors import safe_open
    from safetensors.torch import load_file

    found = {}
    for name in ("decoder", "encoder"):
        path = getattr(folders, name) / "model.safetensors"
        with safe_open(path, framework="pt") as file:
            metadata, keys = file.metadata(), sorted(file.keys())
        require(metadata == {"format": "pt"}, f"{path} has the metadata {metadata}")
        require(keys == sorted(load_file(path)), f"{path}: names differ between readers")
        pickles = [p.name for p in path.parent.rglob("*") if p.suffix in (".bin", ".pt", ".pkl", ".ckpt")]
        require(not pickles, f"{path.parent} holds {pickles}")
        found[name] = {"metadata": metadata, "tensors": len(keys)}
    return found


def peft(folders: Folders) -> dict[str, Any]:
    """LoRA on a converted model: trained, saved, loaded again, merged, saved merged, loaded again."""
    from peft import LoraConfig, PeftModel, get_peft_model

    torch.manual_seed(0)
    model = load(folders.decoder)
    had, ids = operators(model), tokens(model)
    before = logits(model, ids)
    tuned = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]))
    learned = [p for p in tuned.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=5e-3)
    losses = []
    for _ in range(4):
        loss = tuned(ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    require(losses[-1] < losses[0], f"training lowered nothing: {losses}")
    after = logits(tuned, ids)
    require(difference(after, before) > 1e-3, "training changed nothing")
    tuned.save_pretrained(folders.scratch / "adapter")
    again = PeftModel.from_pretrained(load(folders.decoder), folders.scratch / "adapter")
    loaded = same("the adapter loaded again", logits(again, ids), after)
    merged = tuned.merge_and_unload()
    joined = same("the merged model", logits(merged, ids), after, 1e-4)
    merged.save_pretrained(folders.scratch / "merged")
    last = load(folders.scratch / "merged")
    require(operators(last) == had, "the merged checkpoint lost its operators")
    saved = same("the merged model loaded again", logits(last, ids), logits(merged, ids))
    return {
        "steps": len(losses),
        "loss": [losses[0], losses[-1]],
        "error_adapter": loaded,
        "error_merged": joined,
        "error_merged_loaded": saved,
        "sites": len(had),
    }


def trl(folders: Folders) -> dict[str, Any]:
    """A few steps of SFT, padded and packed; what packing says where it is refused."""
    found: dict[str, Any] = {}
    for name, packing in (("padded", False), ("packed", True)):
        try:
            found[name] = _sft(folders, packing)
        except ValueError as error:  # what a converted model refuses with
            require(packing, f"SFT without packing is refused: {error}")
            found[name] = {"refused": " ".join(str(error).split())}
    return found


def _sft(folders: Folders, packing: bool) -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    torch.manual_seed(0)
    texts = Dataset.from_dict({"text": [f"{one} {two}" for one in SENTENCES[:5] for two in SENTENCES[:5]]})
    model = load(folders.decoder)
    had = operators(model)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer_of(folders.decoder),
        train_dataset=texts,
        args=SFTConfig(
            output_dir=str(folders.scratch / f"sft-{packing}"),
            max_steps=4,
            per_device_train_batch_size=2,
            learning_rate=1e-4,
            max_length=96,
            packing=packing,
            logging_steps=1,
            report_to="none",
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="no",
            disable_tqdm=True,
        ),
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    require(len(losses) == 4 and all(map(torch.isfinite, map(torch.tensor, losses))), f"losses are {losses}")
    trainer.save_model(str(folders.scratch / "sft"))
    again = load(folders.scratch / "sft")
    require(operators(again) == had, "the tuned checkpoint lost its operators")
    ids = tokens(again)
    return {
        "steps": 4,
        "loss": [losses[0], losses[-1]],
        "error_loaded": same("SFT", logits(again, ids), logits(trainer.model.eval(), ids)),
    }


def sentence_transformers(folders: Folders) -> dict[str, Any]:
    """A converted sentence encoder, encoding a padded batch: what each sentence alone gives by transformers."""
    from sentence_transformers import SentenceTransformer
    from transformers import AutoModel

    ours = SentenceTransformer(str(folders.encoder), trust_remote_code=True, device="cpu")
    teacher = SentenceTransformer(str(folders.encoder_teacher), device="cpu")
    texts = list(SENTENCES)
    found, wanted = (torch.tensor(model.encode(texts, batch_size=len(texts))) for model in (ours, teacher))
    model, tokenizer = AutoModel.from_pretrained(folders.encoder, trust_remote_code=True).eval(), ours.tokenizer
    most = ours.max_seq_length
    with torch.no_grad():
        rows = [tokenizer(text, return_tensors="pt", truncation=True, max_length=most) for text in texts]
        alone = torch.cat([model(**row).last_hidden_state.mean(1) for row in rows])
    kept = len(operators(ours))
    require(kept > 0, "sentence-transformers loaded a model without operators")
    error = difference(F.normalize(found, dim=-1), F.normalize(alone, dim=-1))
    require(error <= ERROR, f"embeddings differ by {error:.1e} from those of each sentence alone")
    cosine = F.cosine_similarity(found, wanted)
    return {
        "sentences": len(texts),
        "sites": kept,
        "error": error,
        "cosine_to_teacher": cosine.mean().item(),
        "cosine_least": cosine.min().item(),
    }


class Prefill(nn.Module):
    """The stateless prefill of a model: tokens and their padding mask in, logits out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        found: Tensor = self.model(ids, attention_mask=mask, use_cache=False).logits
        return found


def torch_export(folders: Folders) -> dict[str, Any]:
    """torch.export of the prefill with a length that may vary, saved, loaded and run at other lengths."""
    model = load(folders.decoder)
    length, ids = torch.export.Dim("length", min=2, max=200), tokens(model, 1, 64)
    with torch.no_grad():
        program = torch.export.export(
            Prefill(model),
            (ids, torch.ones_like(ids)),
            dynamic_shapes={"ids": {1: length}, "mask": {1: length}},
            strict=False,
        )
    path = folders.scratch / "prefill.pt2"
    torch.export.save(program, path)
    again = torch.export.load(path).module()
    errors = {}
    for size in (17, 64, 150):
        ids = tokens(model, 1, size, seed=size)
        with torch.no_grad():
            found = again(ids, torch.ones_like(ids)).float()
        errors[str(size)] = same(f"the exported program at {size} tokens", found, logits(model, ids))
    return {"errors": errors, "nodes": len(program.graph.nodes)}


def torchao(folders: Folders) -> dict[str, Any]:
    """Weights in 8 bits by torchao, on CPU."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return _quantised(folders, TorchAoConfig(Int8WeightOnlyConfig()))


def bitsandbytes(folders: Folders) -> dict[str, Any]:
    """Weights in 8 bits by bitsandbytes, on CPU."""
    from transformers import BitsAndBytesConfig

    return _quantised(folders, BitsAndBytesConfig(load_in_8bit=True), device_map="cpu")


def _quantised(folders: Folders, config: Any, **settings: Any) -> dict[str, Any]:
    from transformers import AutoConfig

    plain = load(folders.decoder)
    skipped = ["lm_head"]
    kind = type(AutoConfig.from_pretrained(folders.decoder, trust_remote_code=True)).__name__
    small = load(folders.decoder, quantization_config=config, **settings)
    require(operators(small) == operators(plain), "the quantised model lost its operators")
    linear = [m for n, m in small.named_modules() if n.endswith("q_proj")]
    changed = [m for m in linear if type(m) is not nn.Linear or type(m.weight.data) is not Tensor]
    require(len(changed) == len(linear) > 0, f"{len(changed)} of {len(linear)} projections are quantised")
    ids = tokens(plain)
    want, got = (logits(model, ids).log_softmax(-1) for model in (plain, small))
    kl = F.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean().item()
    require(kl < 0.1, f"KL of the quantised model is {kl:.3f}")
    out = small.generate(ids[:, :16], max_new_tokens=8, do_sample=False, pad_token_id=0)
    require(out.shape == (2, 24), f"generated {tuple(out.shape)}")
    return {"config": kind, "projections": len(changed), "kept": skipped, "kl": kl}


def lm_eval(folders: Folders) -> dict[str, Any]:
    """lm-evaluation-harness from its command line, on the converted checkpoint and on its teacher."""
    import ecosystem_tasks

    names = ecosystem_tasks.write(folders.scratch / "tasks")
    found: dict[str, Any] = {"tasks": {}}
    for who, folder in (("converted", folders.decoder), ("teacher", folders.decoder_teacher)):
        results = _evaluated(folder, names, folders.scratch / "tasks", folders.scratch / who)
        for task, values in results.items():
            figures = {k.partition(",")[0]: v for k, v in values.items() if isinstance(v, float) and "stderr" not in k}
            found["tasks"].setdefault(task, {})[who] = figures
    require(set(found["tasks"]) == set(names), f"tasks without a result: {set(names) - set(found['tasks'])}")
    return found


def _evaluated(folder: Path, names: list[str], tasks: Path, out: Path) -> dict[str, Mapping[str, Any]]:
    command = [
        *(sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "4"),
        *("--model_args", f"pretrained={folder},trust_remote_code=True,dtype=float32"),
        *("--tasks", ",".join(names), "--include_path", str(tasks), "--output_path", str(out)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    files = sorted(out.rglob("results_*.json"))
    require(done.returncode == 0 and bool(files), f"lm_eval ended with {done.returncode}: {done.stderr[-2000:]}")
    results: dict[str, Mapping[str, Any]] = json.loads(files[-1].read_text())["results"]
    return results


# name → distribution, part; in the order of the page
PARTS: dict[str, tuple[str, Callable[[Folders], dict[str, Any]]]] = {
    "lm_eval": ("lm_eval", lm_eval),
    "peft": ("peft", peft),
    "trl": ("trl", trl),
    "sentence_transformers": ("sentence-transformers", sentence_transformers),
    "torch_export": ("torch", torch_export),
    "safetensors": ("safetensors", safetensors),
    "torchao": ("torchao", torchao),
    "bitsandbytes": ("bitsandbytes", bitsandbytes),
}


def run(name: str, folders: Folders) -> dict[str, Any]:
    """What a part saw, with the version of what it ran."""
    distribution, part = PARTS[name]
    folders.scratch.mkdir(parents=True, exist_ok=True)
    return {"version": version(distribution), "what": (part.__doc__ or "").strip(), **part(folders)}
