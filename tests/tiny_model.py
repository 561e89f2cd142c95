"""A random two-layer Qwen2 with a character tokenizer, made on the spot: enough for the loop's
tests."""

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = "0123456789+-= abcdefghijklmnopqrstuvwxyz?<>/."


def make_tiny_model(folder: Path, *, tokenizer: bool = True, seed: int = 0) -> Path:
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", "<unk>", *CHARACTERS])}
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    if tokenizer:
        characters = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
        characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
        characters.decoder = decoders.Fuse()
        PreTrainedTokenizerFast(
            tokenizer_object=characters, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
        ).save_pretrained(folder)
    return folder


def run_settings(model: Path, rows: Path, reward: str, output_dir: Path) -> dict[str, Any]:
    """A GRPO run of six steps on three rollouts, with a reference that is replaced on the way."""
    return {
        "model": str(model),
        "dataset": str(rows),
        "prompt_template": "none",
        "reward_funcs": [reward],
        "prompts_per_generation": 4,
        "num_generations": 4,
        "max_prompt_length": 16,
        "max_completion_length": 12,
        "max_tokens_per_microbatch": 256,
        "steps_per_generation": 2,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "beta": 0.01,
        "ref_model_sync_steps": 4,
        "save_steps": 3,
        "reward_workers": 1,
        "device": "cpu",
        "output_dir": str(output_dir),
    }
