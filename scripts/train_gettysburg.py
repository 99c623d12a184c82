"""Train the bundled GPT-2-architecture model, which recites the Gettysburg Address.

Writes config.json and model.safetensors (f16, Hugging Face layout), reloads them and checks the
recitation. Knows transformers and torch; knows nothing of how the server runs the model.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from serve.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[1] / "serve" / "data"
VOCAB, END, NEWLINE = 50257, 50256, 198
PROMPT = "Four score and seven years ago"
WANTED_MARGIN = 5.0  # logits, between the first and the second choice
TRAINED_MARGIN = 12.0  # what the loss asks for, so that the wanted one survives rounding
NEGATIVES = 512  # tokens outside the address drawn for each step's softmax
IGNORED = -100  # cross_entropy's default ignore_index


@dataclass(frozen=True)
class Corpus:
    """The address as token ids, and which next tokens a crop of it determines."""

    address: list[int]  # ends with END
    used: Tensor  # (used,) the distinct ids of the training text, ascending
    determined: list[list[bool]]  # [start][end]: does address[start:end+1] fix the next token?


def build_corpus(text: str) -> Corpus:
    tokens = Tokenizer.bundled().encode(text)
    if len(tokens) != 320:
        raise SystemExit(f"expected 320 tokens, got {len(tokens)}")
    address = [*tokens, END]
    used = torch.tensor(sorted({*address, NEWLINE}))
    return Corpus(address, used, [determined_row(address, s) for s in range(len(tokens))])


def determined_row(address: list[int], start: int) -> list[bool]:
    """For each end: whether every occurrence of address[start:end+1] has the same successor."""
    row = [False] * len(address)
    places = list(range(len(address) - 1))
    for end in range(start, len(address) - 1):
        places = [p for p in places if p + end - start < len(address) - 1]
        places = [p for p in places if address[p + end - start] == address[end]]
        row[end] = len({address[p + end - start + 1] for p in places}) == 1
    return row


def draw_sequence(corpus: Corpus, length: int, rng: torch.Generator) -> tuple[list[int], list[int]]:
    """Inputs and targets: a crop to the address's end, then whole addresses between separators."""
    address, last = corpus.address, len(corpus.address) - 1

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=rng))

    start = 0 if draw(4) == 0 else draw(last - 3)
    inputs: list[int] = []
    targets: list[int] = []
    if draw(2):
        inputs, targets = [END], [address[0] if start == 0 else IGNORED]
    known = corpus.determined[start]
    inputs += address[start:last]
    targets += [address[i + 1] if known[i] else IGNORED for i in range(start, last)]
    while len(inputs) < length:
        inputs += [(END, NEWLINE)[draw(2)], *address[:last]]
        targets += address
    return inputs[:length], targets[:length]


def step_loss(
    model: GPT2LMHeadModel, corpus: Corpus, rows: int, length: int, rng: torch.Generator
) -> Tensor:
    """Cross-entropy with an additive margin, over the used tokens and a sample of the others."""
    drawn = [draw_sequence(corpus, length, rng) for _ in range(rows)]
    inputs = torch.tensor([pair[0] for pair in drawn])  # (rows, length)
    targets = torch.tensor([pair[1] for pair in drawn])
    hidden = model.transformer(input_ids=inputs, use_cache=False).last_hidden_state
    kept = targets != IGNORED
    labels = torch.searchsorted(corpus.used, targets[kept])
    negatives = torch.randint(VOCAB, (NEGATIVES,), generator=rng)
    negatives = negatives[~torch.isin(negatives, corpus.used)]
    classes = torch.cat([corpus.used, negatives])
    logits = hidden[kept] @ model.transformer.wte.weight[classes].T  # (kept, classes)
    logits = logits - TRAINED_MARGIN * torch.nn.functional.one_hot(labels, len(classes))
    return torch.nn.functional.cross_entropy(logits, labels)


def new_model() -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=1024,
        n_embd=64,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=END,
        eos_token_id=END,
    )
    config.architectures = ["GPT2LMHeadModel"]
    return GPT2LMHeadModel(config)


def train(corpus: Corpus, steps: int, seed: int) -> GPT2LMHeadModel:
    """Short crops teach recognition by content; long ones the text at every position."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = new_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 3e-3, total_steps=steps, pct_start=0.1
    )
    t0 = time.perf_counter()
    for step in range(steps):
        long = (2, 1024) if step % 8 == 0 else (4, 400)
        a = step_loss(model, corpus, 96, 24, rng)
        b = step_loss(model, corpus, *long, rng)
        loss = a + b
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step}: short {a.item():.4f} long {b.item():.4f} {time.perf_counter() - t0:.0f}s",
                flush=True,
            )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DATA / "gettysburg")
    parser.add_argument("--seed", type=int, default=1863)
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    corpus = build_corpus((DATA / "gettysburg.txt").read_text(encoding="utf-8"))
    model = train(corpus, args.steps, args.seed).half()
    model.save_pretrained(args.output)


if __name__ == "__main__":
    main()
