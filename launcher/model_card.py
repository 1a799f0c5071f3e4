"""README.md of an exported model: what it is, what it was trained on, how it was proved, how to load it."""

import json
import os
import re
from pathlib import Path
from typing import Any

import yaml

from data.fast_tokenizer import SENTENCEPIECE
from launcher.config import FinetuneConfig, OriginConfig, RunConfig
from launcher.redaction import hide
from launcher.run_dir import Ledger
from launcher.task_config import ChatTask, ClassifyTask, PreferenceTask, TagTask, TextTask
from launcher.trained import Checkpoint, lora_of
from model.hf_config import is_masked

_LOAD = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer("{prompt}", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens={tokens})[0], skip_special_tokens=True))
"""
_LOAD_SENTENCEPIECE = """\
import sentencepiece, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("{folder}")
tokenizer = sentencepiece.SentencePieceProcessor(model_file="{folder}/{own}/tokenizer.model")
inputs = torch.tensor([tokenizer.encode("{prompt}")])
print(tokenizer.decode(model.generate(inputs, max_new_tokens={tokens})[0].tolist()))
"""

_LOAD_CLASSIFIER = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained("{folder}")
tokenizer = AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer(["a text", "another, which is longer"], padding=True, truncation=True, return_tensors="pt")
print([model.config.id2label[label] for label in model(**inputs).logits.argmax(-1).tolist()])
"""
_LOAD_TAGGER = """\
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer
model = AutoModelForTokenClassification.from_pretrained("{folder}").eval()
tokenizer, words = AutoTokenizer.from_pretrained("{folder}"), ["Words", "of", "a", "sentence"]
ids = [tokenizer(("{join}" if i else "") + word).input_ids for i, word in enumerate(words)]  # each word by itself
tags = iter(model(torch.tensor([sum(ids, [])])).logits[0].argmax(-1).tolist())
print([model.config.id2label[[next(tags) for _ in of_word][{at}]] for of_word in ids])
"""


_LOAD_MASKED_TAGGER = """\
import torch
from transformers import AutoModelForTokenClassification, AutoTokenizer
model = AutoModelForTokenClassification.from_pretrained("{folder}").eval()
tokenizer, words = AutoTokenizer.from_pretrained("{folder}"), ["Words", "of", "a", "sentence"]
ids = [tokenizer(("{join}" if i else "") + word, add_special_tokens=False).input_ids for i, word in enumerate(words)]
row = [tokenizer.cls_token_id, *sum(ids, []), tokenizer.sep_token_id]  # each word by itself
tags = iter(model(torch.tensor([row])).logits[0, 1:-1].argmax(-1).tolist())
print([model.config.id2label[[next(tags) for _ in of_word][{at}]] for of_word in ids])
"""
_LOAD_MASKED = """\
from transformers import pipeline
fill = pipeline("fill-mask", model="{folder}")
for found in fill("{prompt}" + fill.tokenizer.mask_token + " "):
    print(f"{{found['score']:.3f}} {{found['token_str']!r}}")
"""


def snippet(folder: str, fast: bool, seq_len: int, prompt: str = "The ") -> str:
    """Python that loads an exported folder and generates, with nothing of Longhaul."""
    tokens = max(1, min(50, seq_len // 2))  # with the prompt within the context, which a GPT-2 cannot leave
    template = _LOAD if fast else _LOAD_SENTENCEPIECE
    return template.format(folder=folder, own=SENTENCEPIECE, prompt=prompt, tokens=tokens)


def last_held_out(run_dir: Path, step: int) -> dict[str, float]:
    """The newest evaluation at or before a step: {"step", "loss/valid", ...}; empty where there was none."""
    found: dict[str, float] = {}
    try:
        lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    for line in lines:
        try:
            values = json.loads(line)
            if "loss/valid" in values and values["step"] <= step:
                found = values
        except (ValueError, KeyError, TypeError):
            continue  # cut by a crash
    return {key: value for key, value in found.items() if key == "step" or key.startswith("loss/")}


def model_card(checkpoint: Checkpoint, report: dict[str, Any], name: str) -> str:
    """The card. It holds no path of this machine: whoever reads it is elsewhere."""
    cfg, logits, tokenizer, held_out = checkpoint.cfg, report["logits"], report["tokenizer"], report["held_out"]
    recipe = cfg.model_dump(mode="json", include={"model", "optim", "train"})
    recipe["parallel"] = cfg.parallel.model_dump(mode="json", include={"zero_stage", "precision"})
    if (lora := lora_of(cfg)) is not None:
        recipe["lora"] = lora.model_dump(mode="json")
    recipe["seeds"] = {"run": cfg.run.seed, "data": cfg.data.seed}
    of_tokenizer = (
        f"`AutoTokenizer` gives the ids of training: compared on {tokenizer['documents']} documents ({report['text']}) and "
        f"{tokenizer['adversarial']} adversarial strings, {tokenizer['tokens']:,} ids."
        if tokenizer["auto_tokenizer"]
        else f"`AutoTokenizer` cannot load this tokenizer; the SentencePiece model is in `{SENTENCEPIECE}/`."
    )
    text = f"""\
---
library_name: transformers
pipeline_tag: {_pipeline(checkpoint)}
tags: [longhaul]
---

# {name}

{_kind(checkpoint)} of {report["parameters"]:,} parameters ({report["architecture"]}, context {cfg.model.seq_len:,} tokens),
{_made(checkpoint)} with Longhaul: step {report["step"]:,} of the run `{report["run"]}`. {_does(cfg)}

No licence is stated here: that is for whoever publishes it to decide, as it depends on the data.

## Load it

Run from the folder that `{name}` lies in:

```python
{_snippet(checkpoint, report, name)}```

{_note(checkpoint, report)}

## Data

{_seen(checkpoint, report)}, of:

{_sources(checkpoint)}

## Held-out loss

{_held_out_table(held_out)}

## Proof

Weights are {report["dtype"]}. On {logits["tokens"]:,} tokens of {report["text"]}, `transformers` and the training code, both
computing in fp32 with these weights, differ by at most {logits["largest_difference"]:.2e} in a logit (the largest is
{logits["largest_logit"]:.3g}{_losses(logits)}). {of_tokenizer}
{_notes(report)}
`export_report.json` has all figures, and every file's size and xxh3-128 hash.

## Recipe

```yaml
{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}```

## Versions

| | trained with | exported with |
|---|---|---|
{_versions(report["versions"])}
"""
    return hide(text)


def _snippet(checkpoint: Checkpoint, report: dict[str, Any], name: str) -> str:
    fast, head = report["tokenizer"]["auto_tokenizer"], checkpoint.label_head
    if head is None and is_masked(checkpoint.cfg.model):
        return _LOAD_MASKED.format(folder=name, prompt="The ")
    if head is None:
        return snippet(name, fast, checkpoint.cfg.model.seq_len)
    assert isinstance(checkpoint.cfg, FinetuneConfig)
    if isinstance(checkpoint.cfg.task, TagTask):
        tagger, task = _LOAD_MASKED_TAGGER if is_masked(checkpoint.cfg.model) else _LOAD_TAGGER, checkpoint.cfg.task
        return tagger.format(folder=name, join=task.join, at=-1 if task.word_token == "last" else 0)
    return _LOAD_CLASSIFIER.format(folder=name)


def _note(checkpoint: Checkpoint, report: dict[str, Any]) -> str:
    if checkpoint.label_head is None and is_masked(checkpoint.cfg.model):
        return "A text stands between the two tokens that the tokenizer puts around it."
    if checkpoint.label_head is None:
        return (
            f"A document begins after the end of another one (id {report['ids']['eos']}), so that is also the id to begin "
            "an empty text\nwith; nothing else is put before a text."
        )
    masked = is_masked(checkpoint.cfg.model)
    around = (
        "A text stands between the two tokens that the tokenizer puts around it"
        if masked
        else "Nothing is put before a text"
    )
    return f"{around}. Labels: " + ", ".join(f"`{label}`" for label in checkpoint.label_head.labels) + "."


def _pipeline(checkpoint: Checkpoint) -> str:
    head = checkpoint.label_head
    if head is None and is_masked(checkpoint.cfg.model):
        return "fill-mask"
    return "text-generation" if head is None else "token-classification" if head.per_token else "text-classification"


def _kind(checkpoint: Checkpoint) -> str:
    head = checkpoint.label_head
    return "A language model" if head is None else "A tagger of words" if head.per_token else "A classifier of texts"


def _losses(logits: dict[str, Any]) -> str:
    if logits["loss_here"] is None:
        return ""
    return f"; loss {logits['loss_there']:.6f} and {logits['loss_here']:.6f}"


def _made(checkpoint: Checkpoint) -> str:
    made, distill = _begun(checkpoint), checkpoint.cfg.distill
    if distill is None or distill.origin is None:
        return made
    return f"{made} while learning from {_named(distill.teacher, distill.origin)}"


def _named(place: str, origin: OriginConfig) -> str:
    name = re.sub(r"@\d+$", "", os.path.basename(place.rstrip("/")))  # no path of this machine
    return f"`{name}`{'' if origin.step is None else f' at step {origin.step:,}'} (digest {origin.digest})"


def _begun(checkpoint: Checkpoint) -> str:
    cfg = checkpoint.cfg
    if (imported := Ledger(checkpoint.run_dir).imported()) is not None:
        origin = os.path.basename(str(imported["place"]).rstrip("/"))
        return f"pretrained from the weights of `{origin}` (digest {imported['digest']})"
    if not isinstance(cfg, FinetuneConfig):
        return "pretrained"
    return f"fine-tuned from {_named(cfg.init, cfg.origin)}"


def _does(cfg: RunConfig) -> str:
    if isinstance(cfg, FinetuneConfig) and isinstance(cfg.task, ChatTask):
        return "It was tuned on conversations, with the loss on the answers alone."
    if isinstance(cfg, FinetuneConfig) and isinstance(cfg.task, PreferenceTask):
        return f"It was tuned on pairs of answers, to prefer the better one (DPO, beta {cfg.task.beta:g})."
    if isinstance(cfg, FinetuneConfig) and isinstance(cfg.task, ClassifyTask | TagTask):
        return f"It gives {'each word' if isinstance(cfg.task, TagTask) else 'a text'} one of {len(cfg.task.labels)} labels."
    if is_masked(cfg.model):
        return "It fills in hidden tokens from both sides; it does not\ncontinue text."
    return "It continues text; it was not taught to\nfollow instructions."


def _seen(checkpoint: Checkpoint, report: dict[str, Any]) -> str:
    seen, unit = report["tokens_seen"], checkpoint.cfg.what_counts
    return f"An unknown number of {unit}" if seen is None else f"{seen:,} {unit}"


def _sources(checkpoint: Checkpoint) -> str:
    cfg, data = checkpoint.cfg, checkpoint.cfg.data
    if isinstance(cfg, FinetuneConfig) and not isinstance(cfg.task, TextTask):
        return (
            f"- examples for the task `{cfg.task.kind}`, in all passes of the fine-tuning, without what its origin read"
        )
    if data.stream is not None:
        return f"- raw text, streamed{_hub(data.stream.dataset)}"
    lines = []
    for source in data.sources:
        weight = "" if source.weight is None else f", weight {source.weight:g}"
        lines.append(f"- `{source.label}`: {source.kind}{_hub(getattr(source, 'path', None))}{weight}")
    return "\n".join(lines)


def _hub(path: str | None) -> str:
    """A dataset's name on the hub; nothing for what is or may be a path of this machine."""
    named = path is not None and re.fullmatch(r"[\w.-]+/[\w.-]+", path) and not path.startswith(".")
    return f" `{path}`" if named and not os.path.exists(str(path)) else ""


def _held_out_table(values: dict[str, float]) -> str:
    if not values:
        return "None was measured."
    rows = [f"| {key.removeprefix('loss/')} | {value:.4f} |" for key, value in values.items() if key != "step"]
    return "\n".join([f"Measured at step {values['step']:,}:", "", "| | |", "|---|---|", *rows])


def _notes(report: dict[str, Any]) -> str:
    return "".join(f"\n- {note}" for note in report["notes"]) + ("\n" if report["notes"] else "")


def _versions(versions: dict[str, dict[str, str]]) -> str:
    before, after = versions["trained_with"], versions["exported_with"]
    names = list(dict.fromkeys([*before, *after]))
    return "\n".join(f"| {name} | {before.get(name, '')} | {after.get(name, '')} |" for name in names)
