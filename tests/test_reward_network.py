"""A language model's body under a scalar head: packed scores, and the Hugging Face model it is."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_model
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen3Config,
)

from grpo_engine.kernels import pack_rollouts
from grpo_engine.manifest import weights_sha256
from grpo_engine.models.load import is_classifier, load_model
from grpo_engine.policy import Policy
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.types import UserError

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": 1,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SHAPE),
    "qwen3-tied": lambda: Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True),
    "mistral-window": lambda: MistralConfig(**SHAPE, sliding_window=5),
    "gemma2": lambda: Gemma2Config(**SHAPE, head_dim=8, sliding_window=4),
    "gpt2": lambda: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=128, bos_token_id=1
    ),
    "deepseek-v3": lambda: DeepseekV3Config(
        **SHAPE | {"num_key_value_heads": 4},
        q_lora_rank=12,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "granite": lambda: GraniteConfig(**SHAPE),
    "mamba": lambda: MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=50),
}
TEXTS = ["1+1=2", "what is 3+4? it is seven, or so i think", "a", "= <think>"]


def make_model(folder, name, dtype=torch.float32):
    """A random language model of that family, with the tiny character tokenizer."""
    make_tiny_model(folder)
    if name == "qwen2":
        return folder
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():  # the default init is so small that attention hardly matters
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    model.to(dtype).save_pretrained(folder)
    return folder


def packed_scores(network, texts):
    packed = pack_rollouts([network.encode(t, add_special_tokens=True) for t in texts])
    return network.scores(
        packed.token_ids, packed.position_ids, packed.cu_seqlens, packed.max_seqlen
    )


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "name", ["qwen2", "llama", "qwen3-tied", "mistral-window", "gemma2", "gpt2", "deepseek-v3"]
)
def test_the_saved_network_scores_the_same_in_transformers(tmp_path, name, side):
    """Padded on either side, transformers' own attention; the text ends in end-of-sequence."""
    network = RewardNetwork.from_model(make_model(tmp_path / "model", name), device="cpu")
    ours = packed_scores(network, TEXTS)
    network.save_pretrained(tmp_path / "saved")

    model, loading = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "saved", attn_implementation="eager", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved", padding_side=side)
    assert model.config.num_labels == 1
    batch = tokenizer(
        [text + tokenizer.eos_token for text in TEXTS], padding=True, return_tensors="pt"
    )
    mask = batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp_min(0)  # gpt2 learns positions: padding may not count
    theirs = model.eval()(
        input_ids=batch["input_ids"], attention_mask=mask, position_ids=positions
    ).logits
    assert theirs.shape == (4, 1)
    spread = max(1.0, ours.abs().max().item())
    torch.testing.assert_close(ours, theirs[:, 0], rtol=0, atol=1e-5 * spread)
    assert ours.std() > 0.05, "texts that all score alike test nothing"


def test_packed_equals_one_by_one(tmp_path):
    network = RewardNetwork.from_model(make_model(tmp_path, "llama"), device="cpu")
    together = packed_scores(network, TEXTS)
    alone = torch.cat([packed_scores(network, [text]) for text in TEXTS])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    reverse = packed_scores(network, TEXTS[::-1])
    torch.testing.assert_close(reverse, together.flip(0), rtol=0, atol=1e-5)


def test_saved_and_read_back_is_the_same_network(tmp_path):
    network = RewardNetwork.from_model(make_model(tmp_path / "model", "qwen2"), device="cpu")
    network.save_pretrained(tmp_path / "saved")
    again = RewardNetwork.from_saved(tmp_path / "saved", device="cpu")
    assert again.weights().keys() == network.weights().keys()
    for name, tensor in network.weights().items():
        assert torch.equal(tensor, again.weights()[name]), name
    assert torch.equal(packed_scores(network, TEXTS), packed_scores(again, TEXTS))
    assert not any(p.requires_grad for p in again.weights().values())
    assert all(p.requires_grad for p in network.weights().values())


def test_a_loaded_network_does_not_change_with_its_file(tmp_path):
    RewardNetwork.from_model(make_model(tmp_path / "model", "qwen2"), device="cpu").save_pretrained(
        tmp_path / "saved"
    )
    network = RewardNetwork.from_saved(tmp_path / "saved", device="cpu")
    before = packed_scores(network, TEXTS)
    file = tmp_path / "saved" / "model.safetensors"
    with file.open("r+b") as weights:  # in place, as a copy over it does
        weights.seek(file.stat().st_size // 2)
        weights.write(b"\0" * (file.stat().st_size // 2))
    assert torch.equal(packed_scores(network, TEXTS), before)


def test_training_can_begin_with_a_saved_network_and_keeps_its_head(tmp_path):
    first = RewardNetwork.from_model(make_model(tmp_path / "model", "qwen2"), device="cpu", seed=5)
    first.save_pretrained(tmp_path / "saved")
    second = RewardNetwork.from_model(tmp_path / "saved", device="cpu", seed=6)
    assert torch.equal(first.model.score.weight, second.model.score.weight)
    assert second.base_sha256 == weights_sha256(first.model)


def test_the_head_depends_on_its_seed_alone(tmp_path):
    folder = make_model(tmp_path, "qwen2")
    heads = []
    for noise, seed in ((1, 3), (2, 3), (1, 4)):
        torch.manual_seed(noise)
        heads.append(RewardNetwork.from_model(folder, device="cpu", seed=seed).model.score.weight)
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert 0.1 < heads[0].std() < 0.3  # 1 / sqrt(33) = 0.17


def test_the_body_is_the_language_models(tmp_path):
    folder = make_model(tmp_path, "qwen3-tied")
    language_model, _ = load_model(str(folder), torch.float32)
    network = RewardNetwork.from_model(folder, device="cpu")
    assert network.base_sha256 == weights_sha256(language_model)
    body = dict(language_model.base_model.named_parameters())
    for name, tensor in network.model.base_model.named_parameters():
        assert torch.equal(tensor, body.pop(name)), name
    assert not body


@pytest.mark.parametrize(
    ("name", "words"),
    [("granite", ["Granite", "sequence-classification"]), ("mamba", ["Mamba"])],
)
def test_an_architecture_that_cannot_be_one_is_refused(tmp_path, name, words):
    with pytest.raises(UserError) as refusal:
        RewardNetwork.from_model(make_model(tmp_path, name), device="cpu")
    assert all(word in str(refusal.value) for word in words), refusal.value


# -- padding ---------------------------------------------------------------------------------------


def retokenise(folder, **special):
    """Change the special tokens of the tokenizer in ``folder``."""
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | special
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def test_padding_is_never_the_end_of_sequence(tmp_path):
    """transformers scores the rightmost token that is not padding: with both the same, the one
    before the end."""
    folder = make_model(tmp_path / "model", "qwen2")
    retokenise(folder, pad_token="<eos>")
    network = RewardNetwork.from_model(folder, device="cpu")
    assert network.tokenizer.pad_token == "<pad>"  # of the vocabulary
    assert network.model.config.pad_token_id == 0
    network.save_pretrained(tmp_path / "saved")
    assert AutoTokenizer.from_pretrained(tmp_path / "saved").pad_token == "<pad>"


def test_a_pad_token_can_be_named(tmp_path):
    folder = make_model(tmp_path, "qwen2")
    network = RewardNetwork.from_model(folder, device="cpu", pad_token="<unk>")
    assert (network.tokenizer.pad_token, network.model.config.pad_token_id) == ("<unk>", 2)
    for wrong in ("<eos>", "<absent>"):
        with pytest.raises(UserError, match=f"pad_token='{wrong}'"):
            RewardNetwork.from_model(folder, device="cpu", pad_token=wrong)


def test_nothing_to_pad_with_is_an_error(tmp_path):
    folder = make_model(tmp_path, "qwen2")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    words = tokenizer["model"]["vocab"]
    tokenizer["model"]["vocab"] = {
        {"<pad>": "<one>", "<unk>": "<two>"}.get(word, word): i for word, i in words.items()
    }
    tokenizer["model"]["unk_token"] = "<two>"
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] == "<eos>"]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    retokenise(folder, pad_token=None, unk_token=None, added_tokens_decoder=None)
    with pytest.raises(UserError, match="no padding token.*--pad_token"):
        RewardNetwork.from_model(folder, device="cpu")
    RewardNetwork.from_model(folder, device="cpu", pad_token="<one>")


def test_no_end_of_sequence_is_an_error(tmp_path):
    folder = make_model(tmp_path, "qwen2")
    retokenise(folder, eos_token=None)
    with pytest.raises(UserError, match="end-of-sequence"):
        RewardNetwork.from_model(folder, device="cpu")


def test_text_that_ends_in_the_end_of_sequence_gets_no_second_one(tmp_path):
    network = RewardNetwork.from_model(make_model(tmp_path, "qwen2"), device="cpu")
    plain = network.encode("ab", add_special_tokens=True)
    assert plain[-1] == network.eos_id and plain.count(network.eos_id) == 1
    assert network.encode("ab<eos>", add_special_tokens=True) == plain
    assert network.encode("", add_special_tokens=True) == [network.eos_id]


# -- folders ---------------------------------------------------------------------------------------


def test_what_is_no_saved_network(tmp_path):
    folder = make_model(tmp_path / "model", "qwen2")
    for path in (folder, tmp_path / "absent", tmp_path):
        assert not is_classifier(path)
        with pytest.raises(UserError, match="sequence-classification"):
            RewardNetwork.from_saved(path, device="cpu")


def test_a_classifier_of_several_labels_is_refused(tmp_path):
    folder = make_model(tmp_path / "model", "qwen2")
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3)
    model.save_pretrained(tmp_path / "saved")
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="scalar head"):
        RewardNetwork.from_saved(tmp_path / "saved", device="cpu")


def test_autocast_leaves_the_head_in_fp32(tmp_path):
    network = RewardNetwork.from_model(make_model(tmp_path, "llama"), device="cpu")
    exact = packed_scores(network, TEXTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = packed_scores(network, TEXTS)
    assert rounded.dtype == torch.float32
    torch.testing.assert_close(rounded, exact, rtol=0, atol=0.15)
    # bf16 scores near 1 would be multiples of 2^-8
    assert (rounded * 256 - (rounded * 256).round()).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_the_self_test_whatever_the_head(tmp_path, dtype):
    """Rounding moves a score by a part of what the head may give, not of what it gives."""
    folder = make_model(tmp_path, "llama")
    for seed in range(8):
        network = RewardNetwork.from_model(folder, device="cpu", dtype=dtype, seed=seed)
        assert network._packing_error() < 0.05
    with torch.no_grad():  # a head that gives every short text nearly 0
        network.model.score.weight[:, ::2] = network.model.score.weight[:, 1::2]
    network._require_self_test()


def test_packed_rows_that_leak_into_each_other_are_refused(tmp_path, monkeypatch):
    folder = make_model(tmp_path, "llama")
    honest = RewardNetwork.hidden_states

    def leaking(self, token_ids, position_ids, cu_seqlens, max_seqlen):
        ends = cu_seqlens[[0, -1]]
        return honest(self, token_ids, position_ids, ends, len(token_ids))

    monkeypatch.setattr(RewardNetwork, "hidden_states", leaking)
    with pytest.raises(UserError, match="other scores for packed rows"):
        RewardNetwork.from_model(folder, device="cpu")


@pytest.mark.parametrize("loads", [Policy.load, RewardNetwork.from_model])
def test_a_weight_that_is_not_finite_is_named(tmp_path, loads):
    """The comparison of packed and single rows meets it first, and is not what is wrong."""
    folder = make_model(tmp_path, "llama")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model: model\.norm\.weight of \w+ is not finite"):
        loads(folder, device="cpu")


def test_a_reward_model_is_no_policy(tmp_path):
    """transformers would load it, with a language head of random weights."""
    folder = make_model(tmp_path / "model", "llama")
    RewardNetwork.from_model(folder, device="cpu").save_pretrained(tmp_path / "saved")
    with pytest.raises(UserError, match="saved' is a reward model"):
        Policy.load(str(tmp_path / "saved"), device="cpu")
