"""A random two-layer Qwen2 with a character tokenizer, made on the spot: enough for the loop's
tests."""

from pathlib import Path

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
