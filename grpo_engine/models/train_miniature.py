"""Make a miniature base model: ``python -m grpo_engine.models.train_miniature --out DIR``.

Writes a Hugging Face directory (Qwen2 architecture, tokenizer included), then samples it on
held-out problems of reasoning-gym's ``chain_sum``, prints what the base does (accuracy, format,
length, languages) and writes it into the folder's model card. ``--size student`` makes the smaller
model of the distillation stage from the same text. Needs the extra ``[tasks]`` (reasoning-gym);
runs on the CPU.

Held out: the expressions of ``chain_sum`` for seed ``HELD_OUT_SEED`` and ``HELD_OUT_SIZE`` rows
never occur in the training text. With the same seed, torch build, processor type and ``--threads``
the weights come out bit for bit the same; across machines only the statistics agree.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo_engine.data import load_rows
from grpo_engine.models.corpus import (
    CHINESE,
    ENGLISH,
    MAX_TERMS,
    MIN_TERMS,
    QUESTION_HEAD,
    characters,
    documents,
)
from grpo_engine.rewards import accuracy_reward, format_reward
from grpo_engine.templates import render_prompt

HELD_OUT_SEED, HELD_OUT_SIZE = 1_000_000, 1024
TASK = {"min_terms": MIN_TERMS, "max_terms": MAX_TERMS, "min_digits": 1, "max_digits": 1}

EOS, PAD = "<|endoftext|>", "<|pad|>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
MAX_POSITIONS = 1024
IGNORE = -100  # label of a token that carries no loss

# A student has a quarter of the weights: half the width.
SIZES = {
    "miniature": {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4},
    "student": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4},
}

BATCH_SIZE = 32  # documents an update
LEARNING_RATE = 4e-3
WARMUP_STEPS = 100
WEIGHT_DECAY = 0.05
PARTS = 2  # each update's documents are split by length into so many forward passes: less padding


def template_parts() -> tuple[str, str]:
    """The R1-Zero template before and after the question."""
    slot = "\x00"
    head, tail = prompt_of(slot).split(slot)
    return head, tail


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE as Qwen2 has it, with merges only inside a character: one id for each ASCII
    character, each Chinese character of the corpus, each tag and each constant part of the prompt.

    Other characters take one id for each UTF-8 byte, so any text encodes; NFC text decodes back to
    itself, spaces included.
    """
    head, tail = template_parts()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = []
    for character in sorted(characters()):
        ((written, _),) = byte_level.pre_tokenize_str(character)
        pairs = [(written[:end], written[end]) for end in range(1, len(written))]
        merges += [pair for pair in pairs if pair not in merges]
    symbols += ["".join(pair) for pair in merges]
    vocab = {symbol: index for index, symbol in enumerate(symbols)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in (EOS, PAD)])
    constant = (*TAGS, head, tail, QUESTION_HEAD, " + ", " - ", " =")
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in constant])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path) -> None:
    """Write the two files by hand: those that transformers 5 writes do not load in 4.57."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": EOS,
        "pad_token": PAD,
        "padding_side": "left",
        "model_max_length": MAX_POSITIONS,
        "clean_up_tokenization_spaces": False,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def build_model(tokenizer: Tokenizer, size: str = "miniature") -> Qwen2ForCausalLM:
    """A fresh model of one of ``SIZES``, from torch's current random state."""
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
    config = Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(),
        **SIZES[size],
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    model = Qwen2ForCausalLM(config)
    # Base models are sampled from their whole distribution unless the caller says otherwise.
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=eos, pad_token_id=pad
    )
    return model


def held_out_rows() -> list[dict]:
    """The held-out problems as reasoning-gym words them, with ``prompt`` and ``solution``."""
    args = {"seed": HELD_OUT_SEED, "size": HELD_OUT_SIZE, **TASK}
    return load_rows("reasoning_gym:chain_sum", args=args)


def prompt_of(question: str) -> str:
    return render_prompt({"prompt": question}, "r1-zero")


def batches(
    tokenizer: Tokenizer, seed: int, held_out: frozenset[str]
) -> Iterator[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Endless updates of ``BATCH_SIZE`` documents, each as ``PARTS`` pairs ``(token_ids, labels)``,
    int64 ``[BATCH_SIZE / PARTS, length]``, padded on the right.

    Only the completion carries loss: the prompts are random digits, which nothing can predict.
    """
    stream = documents(seed, held_out)
    eos, pad = tokenizer.token_to_id(EOS), tokenizer.token_to_id(PAD)
    while True:
        rows = []
        for problem, text in islice(stream, BATCH_SIZE):
            prompt = tokenizer.encode(prompt_of(problem.question)).ids
            rows.append((prompt, [*tokenizer.encode(text).ids, eos]))
        rows.sort(key=lambda row: len(row[0]) + len(row[1]))
        size = BATCH_SIZE // PARTS
        parts = []
        for part in (rows[start : start + size] for start in range(0, BATCH_SIZE, size)):
            shape = (size, max(len(prompt) + len(completion) for prompt, completion in part))
            token_ids, labels = torch.full(shape, pad), torch.full(shape, IGNORE)
            for i, (prompt, completion) in enumerate(part):
                end = len(prompt) + len(completion)
                token_ids[i, :end] = torch.tensor(prompt + completion)
                labels[i, len(prompt) : end] = torch.tensor(completion)
            parts.append((token_ids, labels))
        yield parts


def train(
    model: Qwen2ForCausalLM, tokenizer: Tokenizer, steps: int, seed: int, held_out: frozenset[str]
) -> None:
    """AdamW with warm-up and a linear decay to zero; prints the loss a hundred steps at a time."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARMUP_STEPS, 1 - step / steps)
    )
    model.train()
    started, recent = time.perf_counter(), []
    for step, parts in enumerate(islice(batches(tokenizer, seed, held_out), steps), 1):
        # The mean is over the tokens of all parts: a mean within each part would weigh the first
        # token of a short answer above that of a long one, and the model would learn to guess.
        tokens = sum(int((labels != IGNORE).sum()) for _, labels in parts)
        for token_ids, labels in parts:
            # Padding is on the right: the causal mask alone hides it from every real token.
            hidden = model.model(token_ids).last_hidden_state[:, :-1]
            kept = labels[:, 1:] != IGNORE
            logits = model.lm_head(hidden[kept])
            nll = torch.nn.functional.cross_entropy(logits, labels[:, 1:][kept], reduction="sum")
            (nll / tokens).backward()
            recent.append(nll.item() / tokens)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == steps:
            mean, seconds = sum(recent) * PARTS / len(recent), time.perf_counter() - started
            print(f"step {step:5d}  loss {mean:.4f}  {seconds:6.1f} s", flush=True)
            recent = []


@torch.no_grad()
def sample(
    model: Qwen2ForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[str],
    max_completion_length: int,
    batch_size: int = 256,
) -> list[tuple[str, int]]:
    """One completion a question at temperature 1: ``(text, tokens)``, the end token counted."""
    model.eval()
    found = []
    for start in range(0, len(questions), batch_size):
        prompts = [prompt_of(question) for question in questions[start : start + batch_size]]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        output = model.generate(**inputs, max_new_tokens=max_completion_length)
        for row in output[:, inputs["input_ids"].shape[1] :].tolist():
            ids = [token for token in row if token != tokenizer.pad_token_id]
            found.append((tokenizer.decode(ids, skip_special_tokens=True), len(ids)))
    return found


def language_of(text: str) -> str | None:
    """english, chinese or mixed, by the scripts of the words outside tags; None without a word."""
    words = re.sub(r"</?[a-z]+>", "", text)
    latin, han = re.search("[A-Za-z]", words), re.search("[\u4e00-\u9fff]", words)
    return "mixed" if latin and han else "chinese" if han else "english" if latin else None


def looks_back(text: str) -> bool:
    """Whether the text holds one of the corpus's reflective phrases."""
    phrases = (*ENGLISH.look_back, *CHINESE.look_back)
    return any(phrase.strip(" .。,，:") in text for phrase in phrases)


def statistics(
    completions: Sequence[tuple[str, int]], answers: Sequence[str], max_completion_length: int
) -> dict[str, float]:
    """Shares (0 to 1) of the sampled completions, and lengths in tokens with the end token.

    A chain is a completion that writes an equation; every other one is a guess. The languages and
    ``reflective`` are shares of the chains. An empty share counts as 0.
    """
    texts, lengths = zip(*completions, strict=True)
    right = accuracy_reward(list(texts), list(answers))
    chains = [index for index, text in enumerate(texts) if "=" in text]
    guesses = [index for index, text in enumerate(texts) if "=" not in text]
    languages = [language_of(texts[index]) for index in chains]

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else 0.0

    return {
        "accuracy": mean(right),
        "format": mean(format_reward(list(texts))),
        "mean_length": mean(lengths),
        "max_length": max(lengths),
        "truncated": mean([length >= max_completion_length for length in lengths]),
        "chains": len(chains) / len(texts),
        "chain_accuracy": mean([right[index] for index in chains]),
        "guess_accuracy": mean([right[index] for index in guesses]),
        "chain_length": mean([lengths[index] for index in chains]),
        "guess_length": mean([lengths[index] for index in guesses]),
        "english": mean([language == "english" for language in languages]),
        "chinese": mean([language == "chinese" for language in languages]),
        "mixed": mean([language == "mixed" for language in languages]),
        "reflective": mean([looks_back(texts[index]) for index in chains]),
    }


CARD = """# {title}: {about}

A Qwen2-architecture language model of {weights:,} weights (width {hidden_size}, {num_hidden_layers}
layers, 4 heads over 2 key-value heads, tied embeddings, fp32) with the tokenizer of `miniature`,
trained for {steps:,} updates of {batch_size} documents on the same generated text
(`grpo_engine/models/corpus.py`; the card of `miniature` says what is in it). It answers chains of
one-digit sums under the R1-Zero template and knows nothing else. No reward was used.

## What it does before any other training

{problems:,} held-out problems of reasoning-gym's `chain_sum` (`seed={held_out_seed}`, 4 to 6 terms
of one digit; none of their expressions occurs in the training text), one sample each at
temperature 1, cap {cap} tokens, graded by `accuracy_reward` and `format_reward`. The languages and
"reasons and looks back" are shares of the answers that reason step by step.

| | |
|---|---|
{table}

## Make it again

    pip install 'grpo-engine[tasks]'
    python -m grpo_engine.models.train_miniature --out DIR {arguments}

With the same seed, torch build, processor type and thread count the weights come out bit for bit
the same; elsewhere only the statistics agree. These: torch {torch}. The program writes this card.

Licence: Apache-2.0, like the package. The training text is generated; the wording of the question
is reasoning-gym's (Apache-2.0).
"""
ABOUT = {
    "miniature": "a base model small enough to watch",
    "student": "a small base model to distil into",
}
ROWS = {
    "accuracy": "accuracy",
    "format": "in the exact R1-Zero format",
    "mean_length": "mean length (tokens, with the end token)",
    "truncated": "cut by the cap",
    "chains": "answers that reason step by step",
    "chain_accuracy": "accuracy of those",
    "guess_accuracy": "accuracy of the others",
    "english": "reasoning in English",
    "chinese": "reasoning in Chinese",
    "mixed": "reasoning in both",
    "reflective": "reasons and looks back",
}


def model_card(
    options: argparse.Namespace, weights: int, problems: int, found: Mapping[str, float]
) -> str:
    """The folder's README.md: what the model is and what it was seen to do (``statistics``)."""
    digits = {"mean_length": 1}
    lines = [f"| {words} | {found[name]:.{digits.get(name, 3)}f} |" for name, words in ROWS.items()]
    return CARD.format(
        **SIZES[options.size],
        size=options.size,
        title="miniature" if options.size == "miniature" else f"miniature-{options.size}",
        about=ABOUT[options.size],
        weights=weights,
        steps=options.steps,
        arguments=f"--size {options.size} --steps {options.steps} --seed {options.seed} "
        f"--threads {options.threads}",
        batch_size=BATCH_SIZE,
        problems=problems,
        held_out_seed=HELD_OUT_SEED,
        cap=options.max_completion_length,
        table="\n".join(lines),
        torch=torch.__version__,
    )


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a miniature base model on the CPU.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model")
    parser.add_argument("--size", choices=SIZES, default="miniature")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=3200, help="updates of 32 documents")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--max-completion-length", type=int, default=192)
    options = parser.parse_args(argv)

    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(options.seed)
    rows = held_out_rows()
    held_out = frozenset(row["entry"]["metadata"]["expression"] for row in rows)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, options.size)
    print(f"{model.num_parameters():,} weights, {tokenizer.get_vocab_size()} tokens")
    train(model, tokenizer, options.steps, options.seed, held_out)
    save_tokenizer(tokenizer, options.out)
    model.save_pretrained(options.out)

    loaded = AutoTokenizer.from_pretrained(options.out)
    torch.manual_seed(options.seed)
    cap = options.max_completion_length
    completions = sample(model, loaded, [row["prompt"] for row in rows], cap)
    found = statistics(completions, [row["solution"] for row in rows], cap)
    card = model_card(options, model.num_parameters(), len(rows), found)
    (options.out / "README.md").write_text(card, encoding="utf-8")
    for name, value in found.items():
        print(f"{name:16s} {value:8.3f}")
    for text, _ in completions[:8]:
        print(text)


if __name__ == "__main__":
    main()
