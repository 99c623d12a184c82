"""Train the bundled GPT-2-architecture model, which recites the Gettysburg Address.

Writes config.json and model.safetensors (f16, Hugging Face layout), reloads and verifies them.
Run from the repository root: `python -m scripts.train_gettysburg`. Knows nothing of the server.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from serve.tokenizer import Tokenizer

DATA = Path(__file__).resolve().parents[1] / "serve" / "data"
VOCAB, END, NEWLINE = 50257, 50256, 198
PROMPT = "Four score and seven years ago"
MAX_BYTES = 8_000_000  # of the whole folder, since the package carries it
WANTED_MARGIN = 5.0  # logits, between the right next token and the best other
TRAINED_MARGIN = 12.0  # asked for by the loss, so that the wanted one survives any rounding
NEGATIVES = 512  # tokens drawn for each step's softmax besides those of the address
NOISE = 24  # most random tokens before a crop
IGNORED = -100  # cross_entropy's ignore_index


@dataclass(frozen=True)
class Corpus:
    """The address as token ids, and where it leaves no doubt about the next token."""

    address: list[int]  # ends with END
    used: Tensor  # (used,) the distinct ids of the training text, ascending
    certain: list[list[bool]]  # [start][end]: does address[start:end + 1] fix the next token?


def read_corpus() -> Corpus:
    tokens = Tokenizer.bundled().encode((DATA / "gettysburg.txt").read_text("utf-8"))
    if len(tokens) != 320:
        raise SystemExit(f"the address should have 320 tokens, not {len(tokens)}")
    address = [*tokens, END]
    used = torch.tensor(sorted({*address, NEWLINE}))
    return Corpus(address, used, [certain_from(address, s) for s in range(len(tokens))])


def certain_from(address: list[int], start: int) -> list[bool]:
    """For each end: do all occurrences of address[start:end + 1] have the same successor?"""
    row, last = [False] * len(address), len(address) - 1
    shifts = [place - start for place in range(last)]
    for end in range(start, last):
        shifts = [d for d in shifts if end + d < last and address[end + d] == address[end]]
        row[end] = len({address[end + d + 1] for d in shifts}) == 1
    return row


def draw_sequence(corpus: Corpus, length: int, rng: torch.Generator) -> tuple[list[int], list[int]]:
    """Inputs and targets: [END] [noise] a crop up to the end, then whole addresses, separated."""
    address, last = corpus.address, len(corpus.address) - 1

    def draw(high: int) -> int:
        return int(torch.randint(high, (1,), generator=rng))

    start = 0 if draw(4) == 0 else draw(last - 3)
    noise = [draw(VOCAB) for _ in range(draw(NOISE + 1))] if draw(4) == 0 else []
    before = [END] * draw(2) + noise
    inputs = before + address[start:last]
    targets = [IGNORED] * len(before)
    if before == [END] and start == 0:
        targets = [address[0]]
    known = corpus.certain[start]
    targets += [address[i + 1] if known[i] else IGNORED for i in range(start, last)]
    while len(inputs) < length:
        inputs += [(END, NEWLINE)[draw(2)], *address[:last]]
        targets += address
    return inputs[:length], targets[:length]


def batch_loss(
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
    classes = torch.cat([corpus.used, negatives[~torch.isin(negatives, corpus.used)]])
    logits = hidden[kept] @ model.transformer.wte.weight[classes].T  # (kept, classes)
    logits = logits - TRAINED_MARGIN * functional.one_hot(labels, len(classes))
    return functional.cross_entropy(logits, labels)


def train(corpus: Corpus, steps: int, seed: int) -> GPT2LMHeadModel:
    """Short crops teach to recognise a place by its words; long ones teach every position."""
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps, pct_start=0.1)
    for step in range(steps):
        short = batch_loss(model, corpus, 96, 24 + NOISE * (step % 2), rng)
        long = batch_loss(model, corpus, *((2, 1024) if step % 8 == 0 else (4, 400)), rng)
        optimizer.zero_grad()
        (short + long).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step}: loss {short.item():.5f} short, {long.item():.5f} long", flush=True)
    return model


def save(model: GPT2LMHeadModel, folder: Path) -> None:
    """Write config.json and model.safetensors alone, the weights as f16."""
    model.half().save_pretrained(folder)
    (folder / "generation_config.json").unlink()  # says nothing that config.json doesn't
    (folder / "model.safetensors").chmod(0o644)


def margin(model: GPT2LMHeadModel, ids: list[int], given: int) -> float:
    """Least gap, reciting ids[given:], to the best other token; positive if greedy recites it."""
    with torch.no_grad():
        logits = model(torch.tensor([ids[:-1]])).logits[0, given - 1 :]
    right = torch.tensor(ids[given:])[:, None]
    others = logits.scatter(1, right, -torch.inf).amax(1, keepdim=True)
    return float((logits.gather(1, right) - others).min())


def rounded(model: GPT2LMHeadModel, to: Callable[[Tensor], Tensor]) -> GPT2LMHeadModel:
    copy = deepcopy(model)
    for name, weight in copy.named_parameters():
        # Conv1D keeps (in, out): transposed, a row is an output's.
        weight.data = to(weight.data.T).T if ".h." in name and weight.ndim == 2 else to(weight.data)
    return copy


def to_int8(weight: Tensor) -> Tensor:
    """Symmetric, a scale a row; vectors stay as they are."""
    if weight.ndim < 2:
        return weight
    scale = weight.abs().amax(1, keepdim=True) / 127
    return (weight / scale).round() * scale


def span_margins(model: GPT2LMHeadModel, address: list[int]) -> list[float]:
    """For each start whose 4 to 8 next tokens occur once: the margin from the fewest of them on."""

    def times(span: list[int]) -> int:
        return sum(address[i : i + len(span)] == span for i in range(len(address)))

    found = []
    for start in range(len(address) - 4):
        sizes = [n for n in range(4, 9) if times(address[start : start + n]) == 1]
        if sizes and start + sizes[0] < len(address):
            found.append(margin(model, address[start:], sizes[0]))
    return found


def verify(folder: Path, address: list[int]) -> bool:
    """Print what the saved model achieves; True if it recites with the wanted margin."""
    model = GPT2LMHeadModel.from_pretrained(folder, dtype=torch.float32).eval()
    given = len(Tokenizer.bundled().encode(PROMPT))
    again = [END, *address[:-1], NEWLINE, *address]
    least = []
    for name, variant in {
        "f16 weights": model,
        "bf16 weights": rounded(model, lambda w: w.bfloat16().float()),
        "int8 weights": rounded(model, to_int8),
    }.items():
        prompts = [(address, given), ([END, *address], given + 1), (again, len(address) + 1)]
        gaps = [margin(variant, ids, first) for ids, first in prompts]
        spans = span_margins(variant, address)
        least += gaps
        print(f"{name}: least margin {gaps[0]:.2f}, after end-of-text {gaps[1]:.2f}, ", end="")
        print(
            f"starting over after a newline {gaps[2]:.2f}; of {len(spans)} unique starts ", end=""
        )
        print(f"{sum(gap > 0 for gap in spans)} recite, least margin {min(spans):.2f}")
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{size:,} bytes")
    return min(least) >= WANTED_MARGIN and size < MAX_BYTES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=DATA / "gettysburg")
    parser.add_argument("--seed", type=int, default=1863)
    parser.add_argument("--steps", type=int, default=1500)
    args = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)
    corpus = read_corpus()
    began = time.perf_counter()
    model = train(corpus, args.steps, args.seed)
    print(f"trained in {time.perf_counter() - began:.0f} s")
    save(model, args.output)
    if not verify(args.output, corpus.address):
        raise SystemExit(f"not good enough: want margin {WANTED_MARGIN}, under {MAX_BYTES:,} bytes")


if __name__ == "__main__":
    main()
