"""Train the bundled model: a small Llama-architecture language model on the docstrings of the
Python standard library.

    python tools/train_small_model.py [--out src/spikellm/assets/stdlib-2m] [--epochs 14]

Modules whose name hashes to the evaluation split (see ``spikellm.data.stdlib``) are never seen; one
module in seven of the
others picks the best epoch. Same Python version, torch version and thread count: same weights.
    Takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import math
import time
import zlib
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from spikellm.data.stdlib import is_held_out, iterate_docstrings

WINDOW = 256
VOCABULARY = 2048


def corpus() -> tuple[str, str]:
    """Training text and the text that picks the epoch, both disjoint from the evaluation split."""
    train: list[str] = []
    choose: list[str] = []
    for module, doc in iterate_docstrings():
        if not is_held_out(module):
            (choose if zlib.crc32(module.encode()) % 8 == 1 else train).append(doc)
    return "\n\n".join(train), "\n\n".join(choose)


def train_tokenizer(text: str) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.split("\n\n"), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def build_model() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=192,
            intermediate_size=512,
            num_hidden_layers=5,
            num_attention_heads=6,
            num_key_value_heads=3,
            head_dim=32,
            max_position_embeddings=WINDOW,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            attention_dropout=0.1,
        )
    )


def cut(ids: torch.Tensor, offset: int = 0) -> torch.Tensor:
    ids = ids[offset:]
    return ids[: len(ids) // WINDOW * WINDOW].view(-1, WINDOW)


@torch.no_grad()
def perplexity(model: LlamaForCausalLM, windows: torch.Tensor) -> float:
    model.eval()
    losses = [
        model(batch, labels=batch, use_cache=False).loss * len(batch) for batch in windows.split(16)
    ]
    return math.exp(sum(losses).item() / len(windows))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("src/spikellm/assets/stdlib-2m"))
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument(
        "--noise",
        type=float,
        default=0.1,
        help="share of input tokens replaced at random, against overfitting",
    )
    arguments = parser.parse_args()

    torch.manual_seed(0)
    text, choosing_text = corpus()
    tokenizer = train_tokenizer(text)
    ids = torch.tensor(tokenizer(text).input_ids)
    choosing = cut(torch.tensor(tokenizer(choosing_text).input_ids))
    model = build_model()
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}M parameters, {len(ids)} training"
        f" tokens, {choosing.numel()} to choose the epoch"
    )

    steps = arguments.epochs * math.ceil(len(cut(ids)) / arguments.batch)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.2}, {"params": vectors, "weight_decay": 0.0}],
        lr=arguments.rate,
        betas=(0.9, 0.95),
    )
    warm = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: (
            min(1.0, (s + 1) / warm)
            * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, s / steps))))
        ),
    )
    best, best_state, started = math.inf, None, time.monotonic()
    for epoch in range(arguments.epochs):
        model.train()
        windows = cut(ids, int(torch.randint(WINDOW, ())))
        for batch in windows[torch.randperm(len(windows))].split(arguments.batch):
            noisy = torch.where(
                torch.rand(batch.shape) < arguments.noise,
                torch.randint(2, VOCABULARY, batch.shape),
                batch,
            )
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = model(noisy, labels=batch, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
        value = perplexity(model, choosing)
        print(
            f"epoch {epoch + 1}/{arguments.epochs}  last loss {loss.item():.3f}  choosing"
            f" perplexity {value:.2f}  {time.monotonic() - started:.0f} s",
            flush=True,
        )
        if value < best:
            best, best_state = (
                value,
                {name: tensor.clone() for name, tensor in model.state_dict().items()},
            )

    assert best_state is not None
    model.load_state_dict(best_state)
    model.to(torch.bfloat16).save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    print(f"kept perplexity {best:.2f}; written to {arguments.out}")


if __name__ == "__main__":
    main()
