"""The sampler against transformers' decoding, the policy's logprobs and the true distribution."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from grpo_engine.generation import Generator, HFGenerator
from grpo_engine.generation import hf as hf_module
from grpo_engine.generation.hf import draw, ranked_logprobs, sampling_config
from grpo_engine.generation.prefix import SharedPrefix
from grpo_engine.kernels.attention import dense_attention
from grpo_engine.policy import Policy
from grpo_engine.types import GenerationRequest, SamplingParams, UserError

V, EOS = 20, 1
SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": V,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "llama": lambda: LlamaConfig(**SHAPE),
    "mistral-window": lambda: MistralConfig(**SHAPE, sliding_window=6),
    "qwen2-hybrid": lambda: Qwen2Config(  # the first layer sees everything, the second a window
        **SHAPE, use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "gemma2": lambda: Gemma2Config(
        **SHAPE,
        head_dim=8,
        sliding_window=5,
        attn_logit_softcapping=0.5,
        final_logit_softcapping=3.0,
    ),
    "gpt2": lambda: GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=V, n_positions=128, eos_token_id=EOS
    ),
}
PROMPTS = [[2, 3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13, 14, 15], [2, 3, 4, 5], [16, 17]]


def make_model(name, attention="eager"):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=attention).eval()
    with torch.no_grad():  # the default init gives nearly equal logits and nearly no attention
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def make_requests(count=24, seed=0):
    return [GenerationRequest(PROMPTS[i % len(PROMPTS)], seed * 1000 + i) for i in range(count)]


def packed_logprobs(policy, prompt, completion, temperature):
    """Logprobs of a completion from the training path: packed row, LM head, log-softmax."""
    ids = torch.tensor(prompt + completion)
    hidden = policy.hidden_states(
        ids, torch.arange(len(ids)), torch.tensor([0, len(ids)], dtype=torch.int32), len(ids)
    )
    logits = torch.nn.functional.linear(hidden, policy.head.weight, policy.head.bias)
    if policy.head.logit_softcap is not None:
        cap = policy.head.logit_softcap
        logits = cap * torch.tanh(logits / cap)
    logprobs = (logits / temperature).log_softmax(-1)
    rows = torch.arange(len(prompt) - 1, len(ids) - 1)
    return logprobs[rows, ids[len(prompt) :]].tolist()


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("count", [5, 24])
def test_cold_sampling_is_greedy_generate(name, count):
    """Token for token, past the window, for mixed prompts, with and without shared ones."""
    requests = make_requests(count) if count > 5 else [GenerationRequest(PROMPTS[2], 0)]
    generator = HFGenerator(Policy(make_model(name)))
    got = generator.generate(requests, SamplingParams(20, temperature=1e-4))
    model = make_model(name)
    for request, generation in zip(requests, got, strict=True):
        want = model.generate(
            torch.tensor([request.prompt_ids]),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=EOS,
        )[0, len(request.prompt_ids) :].tolist()
        assert generation.completion_ids == want


@pytest.mark.parametrize("name", ["mistral-window", "gemma2", "qwen2-hybrid", "qwen2"])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_ragged_batch_is_the_padded_batch_of_generate(name, copies):
    """Left padding within and beyond the window; groups of one and of three."""
    prompts = [p for p in (*PROMPTS[:3], PROMPTS[4]) for _ in range(copies)]
    generator = HFGenerator(Policy(make_model(name)))
    requests = [GenerationRequest(p, i) for i, p in enumerate(prompts)]
    got = generator.generate(requests, SamplingParams(20, temperature=1e-4))
    width = max(len(p) for p in prompts)
    rows = (
        make_model(name)
        .generate(
            torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
            max_new_tokens=20,
            do_sample=False,
            pad_token_id=EOS,
        )[:, width:]
        .tolist()
    )
    for row, generation in zip(rows, got, strict=True):
        assert generation.completion_ids == row[: len(generation.completion_ids)]
        assert set(row[len(generation.completion_ids) :]) <= {EOS}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("shared", [False, True])
def test_sampler_logprobs_are_the_policys(name, shared):
    policy = Policy(make_model(name))
    requests = make_requests() if shared else [GenerationRequest(p, 3) for p in PROMPTS[:3]]
    for request, generation in zip(
        requests,
        HFGenerator(policy).generate(requests, SamplingParams(16, temperature=0.7)),
        strict=True,
    ):
        want = packed_logprobs(policy, request.prompt_ids, generation.completion_ids, 0.7)
        assert generation.sampler_logprobs == pytest.approx(want, abs=1e-4)


def test_a_seed_gives_its_tokens_whoever_is_in_the_batch():
    policy = Policy(make_model("qwen2"))
    requests, sampling = make_requests(40), SamplingParams(24)
    together = HFGenerator(policy).generate(requests, sampling)
    assert len({tuple(g.completion_ids) for g in together}) > 20
    backward = HFGenerator(policy).generate(requests[::-1], sampling)[::-1]
    small = HFGenerator(policy, max_batch_size=3).generate(requests, sampling)
    tight = HFGenerator(policy, max_batch_tokens=70).generate(requests, sampling)
    alone = [HFGenerator(policy).generate([r], sampling)[0] for r in requests]
    for other in (backward, small, tight, alone):
        assert [g.completion_ids for g in other] == [g.completion_ids for g in together]
        for a, b in zip(other, together, strict=True):
            assert a.sampler_logprobs == pytest.approx(b.sampler_logprobs, abs=1e-4)
            assert a.finish_reason == b.finish_reason


def test_rows_that_end_leave_the_batch(monkeypatch):
    """The forwards get narrower, and what the others draw does not change."""
    policy = Policy(make_model("qwen2"))
    requests, sampling = make_requests(40), SamplingParams(48)
    widths = []
    hook = policy.model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    dropping = HFGenerator(policy).generate(requests, sampling)
    hook.remove()
    assert widths[0] == 4  # distinct prompts, run once
    assert widths[1] <= 40 and widths[-1] <= 20
    assert sum(widths) < 0.8 * 40 * len(widths)
    monkeypatch.setattr(hf_module, "DROP_FRACTION", 2.0)  # never
    kept = HFGenerator(policy).generate(requests, sampling)
    assert [g.completion_ids for g in kept] == [g.completion_ids for g in dropping]


class HostWaits(TorchDispatchMode):
    """Counts masks used as an index: the host would wait for a GPU to count them."""

    def __init__(self):
        super().__init__()
        self.masks = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_):
            self.masks += any(i is not None and i.dtype == torch.bool for i in args[1])
        return func(*args, **(kwargs or {}))


def test_no_mask_is_an_index_while_decoding():
    policy = Policy(make_model("qwen2"))
    with HostWaits() as waits:
        generations = HFGenerator(policy).generate(make_requests(8), SamplingParams(48))
    assert any(g.finish_reason == "stop" for g in generations)
    assert waits.masks == 0


@pytest.mark.parametrize("prompt_of_row", [[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 0, 1, 1], [2, 0, 1]])
@pytest.mark.parametrize("softcap", [None, 0.7])
def test_shared_prefix_is_attention_over_prompt_and_completion(prompt_of_row, softcap):
    """Against dense attention over the concatenated keys; again after rows have left."""
    rows, layer = torch.tensor(prompt_of_row), 1
    keys, values = ([torch.randn(3, 2, 5, 8, dtype=torch.float64) for _ in "ab"] for _ in "kv")
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])
    query = torch.randn(len(rows), 4, 1, 8, dtype=torch.float64)
    key, value = (torch.randn(len(rows), 2, 3, 8, dtype=torch.float64) for _ in "kv")
    allowed = torch.cat([mask[rows].bool(), torch.ones(len(rows), 3, dtype=torch.bool)], dim=1)
    want = dense_attention(
        query,
        torch.cat([keys[layer][rows], key], dim=2),
        torch.cat([values[layer][rows], value], dim=2),
        allowed[:, None, None],
        None,
        softcap,
    ).transpose(1, 2)
    prefix = SharedPrefix(keys, values, mask, rows)
    got = prefix.attend(layer, query, key, value, None, softcap)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)  # our softmax is fp32
    kept = torch.arange(1, len(rows))
    prefix.keep(kept)
    assert len(prefix.keys[0]) == len(set(prompt_of_row[1:]))
    got = prefix.attend(layer, query[kept], key[kept], value[kept], None, softcap)
    torch.testing.assert_close(got, want[kept], rtol=0, atol=1e-6)


def test_finish_reason_and_end_of_sequence():
    policy = Policy(make_model("qwen2"))
    generations = HFGenerator(policy).generate(make_requests(60), SamplingParams(12))
    reasons = {g.finish_reason for g in generations}
    assert reasons == {"stop", "length"}
    for generation in generations:
        ids = generation.completion_ids
        assert len(ids) == len(generation.sampler_logprobs)
        assert EOS not in ids[:-1]
        if generation.finish_reason == "stop":
            assert ids[-1] == EOS
        else:
            assert len(ids) == 12 and ids[-1] != EOS
        assert all(math.isfinite(x) and x <= 0 for x in generation.sampler_logprobs)


def test_every_end_of_sequence_id_of_the_generation_config_ends():
    model = make_model("qwen2")
    model.generation_config.eos_token_id = [EOS, 5, 6, 7]
    generations = HFGenerator(Policy(model)).generate(make_requests(60), SamplingParams(30))
    last = {g.completion_ids[-1] for g in generations if g.finish_reason == "stop"}
    assert len(last) > 1 and last <= {EOS, 5, 6, 7}
    assert not any({EOS, 5, 6, 7} & set(g.completion_ids[:-1]) for g in generations)


def test_first_tokens_follow_the_models_distribution():
    """4,000 seeds of one prompt: chi-square with 19 degrees of freedom, 43.8 is p = 0.001."""
    policy = Policy(make_model("qwen2"))
    requests = [GenerationRequest([2, 3, 4], seed) for seed in range(4000)]
    drawn = HFGenerator(policy).generate(requests, SamplingParams(1, temperature=1.5))
    counts = torch.bincount(torch.tensor([g.completion_ids[0] for g in drawn]), minlength=V)
    logits = make_model("qwen2")(input_ids=torch.tensor([[2, 3, 4]])).logits[0, -1]
    expected = 4000 * (logits / 1.5).softmax(-1)
    assert expected.min() > 5
    assert ((counts - expected) ** 2 / expected).sum().item() < 43.8


LOGITS = torch.log(torch.tensor([[0.05, 0.4, 0.1, 0.3, 0.15], [0.25, 0.21, 0.19, 0.18, 0.17]]))


def probs_of(sampling):
    """Of LOGITS, through the processors that generate hands to the loop, in vocabulary order."""
    policy = Policy(make_model("qwen2"))
    logits_processor = policy.model.generate(
        torch.tensor([[2]]),
        generation_config=sampling_config(policy, sampling),
        custom_generate=lambda model, input_ids, logits_processor, **_: logits_processor,
    )
    logprobs, ids = ranked_logprobs(logits_processor(None, LOGITS), sampling)
    probs = logprobs.exp()
    if ids is None:
        return probs
    assert (probs.diff(dim=-1) <= 0).all()  # likeliest first
    return torch.zeros_like(LOGITS).scatter(-1, ids, probs)


@pytest.mark.parametrize(
    ("top_p", "top_k", "support"),
    [
        (1.0, 0, [0, 1, 2, 3, 4]),
        (1.0, 2, [1, 3]),
        (0.5, 0, [1, 3]),
        (0.69, 0, [1, 3]),
        (0.71, 0, [1, 3, 4]),
        (1e-6, 0, [1]),
        (1.0, 9, [0, 1, 2, 3, 4]),
        (0.5, 2, [1]),  # of the renormalised pair, 0.57 + 0.43
    ],
)
def test_support_is_cut_and_renormalised(top_p, top_k, support):
    got = probs_of(SamplingParams(4, top_p=top_p, top_k=top_k))[0]
    want = torch.zeros(5)
    want[support] = LOGITS[0].exp()[support]
    torch.testing.assert_close(got, want / want.sum())


def test_temperature_comes_before_top_p():
    got = probs_of(SamplingParams(4, temperature=0.5, top_p=0.6))[0]
    want = torch.tensor([0.0, 0.16, 0.0, 0.09, 0.0]) / 0.25
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("options", [{"top_p": 0.6}, {"top_k": 3}, {"top_p": 0.8, "top_k": 6}])
def test_drawn_tokens_and_logprobs_respect_truncation(options):
    policy = Policy(make_model("qwen2"))
    sampling = SamplingParams(4, **options)
    requests = make_requests(60)
    cut = False
    for request, generation in zip(
        requests, HFGenerator(policy).generate(requests, sampling), strict=True
    ):
        ids = request.prompt_ids + generation.completion_ids
        logits = policy.model(input_ids=torch.tensor([ids])).logits[0]
        probs = logits[len(request.prompt_ids) - 1 : -1].softmax(-1)
        for row, token, logprob in zip(
            probs, generation.completion_ids, generation.sampler_logprobs, strict=True
        ):
            order = row.argsort(descending=True)[: options.get("top_k") or V]
            mass = row[order] / row[order].sum()
            kept = order[mass.cumsum(0) - mass < options.get("top_p", 1.0)]
            assert token in kept
            assert logprob == pytest.approx((row[token] / row[kept].sum()).log().item(), abs=1e-3)
            cut |= len(kept) < V
    assert cut


def test_the_checkpoints_generation_config_does_not_apply():
    """As Qwen ships them, and worse; the config is the model's own again afterwards."""
    policy = Policy(make_model("qwen2"))
    for options in ({}, {"top_k": 8, "top_p": 0.9, "temperature": 0.7}):
        sampling, requests = SamplingParams(12, **options), make_requests(20)
        policy.model.generation_config = GenerationConfig(eos_token_id=EOS)
        expected = HFGenerator(policy).generate(requests, sampling)
        shipped = GenerationConfig(
            do_sample=True,
            temperature=0.1,
            top_k=2,
            top_p=0.3,
            min_p=0.2,
            repetition_penalty=5.0,
            no_repeat_ngram_size=2,
            suppress_tokens=[2, 3, 4],
            max_new_tokens=3,
            num_return_sequences=4,
            eos_token_id=EOS,
        )
        policy.model.generation_config = shipped
        assert HFGenerator(policy).generate(requests, sampling) == expected
        assert policy.model.generation_config is shipped


def test_a_model_without_generate_is_refused(monkeypatch):
    policy = Policy(make_model("qwen2"))
    monkeypatch.setattr(policy.model, "can_generate", lambda: False)
    with pytest.raises(UserError, match="Qwen2ForCausalLM has no generate"):
        HFGenerator(policy)


def test_draw_inverts_the_cdf():
    logprobs = torch.log(torch.tensor([[0.25, 0.0, 0.5, 0.25, 0.0]])).expand(6, -1)
    uniforms = torch.tensor([0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(logprobs, uniforms).tolist() == [0, 0, 2, 2, 3, 3]


def test_draw_reaches_every_id_in_the_tail_of_a_large_vocabulary():
    """Ids of mass 8e-10 after one of mass 0.9999: steps far below fp32's resolution near 1."""
    tail = 2**-13 / 150_000
    probs = torch.full((1, 150_001), tail)
    probs[0, 0] = 1 - 2**-13
    uniforms = 1 - 2**-14 + tail * torch.arange(32, dtype=torch.float64)  # one id further each
    columns = draw(probs.log().expand(32, -1), uniforms)
    assert len(columns.unique()) >= 31
    assert columns.max() - columns.min() <= 32


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "request 1 is empty"),
        ([3, V], f"request 1 has token id {V}"),
        ([-1], "request 1 has token id -1"),
        ([3] * 120, "max_completion_length: 10 after the 120 prompt tokens of request 1"),
    ],
)
def test_bad_prompts(prompt, message):
    requests = [GenerationRequest([2], 0), GenerationRequest(prompt, 0)]
    with pytest.raises(UserError, match=message):
        HFGenerator(Policy(make_model("qwen2"))).generate(requests, SamplingParams(10))


def test_diverged_weights_are_not_sampled_from():
    policy = Policy(make_model("qwen2"))
    with torch.no_grad():
        policy.head.weight[3, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        HFGenerator(policy).generate(make_requests(4), SamplingParams(4))


def test_no_requests():
    assert HFGenerator(Policy(make_model("qwen2"))).generate([], SamplingParams(4)) == []


def test_training_state_is_left_alone():
    policy = Policy(make_model("qwen2"), gradient_checkpointing=True)
    modes = [m.training for m in policy.model.modules()]
    assert any(modes)
    HFGenerator(policy).generate(make_requests(8), SamplingParams(4))
    assert [m.training for m in policy.model.modules()] == modes
    ids = torch.tensor([2, 3, 4])
    hidden = policy.hidden_states(ids, torch.arange(3), torch.tensor([0, 3]).int(), 3)
    hidden.sum().backward()
    assert policy.head.weight.grad is not None


def test_new_weights_are_sampled_from_at_once():
    policy = Policy(make_model("qwen2"))
    generator: Generator = HFGenerator(policy)
    requests, sampling = make_requests(10), SamplingParams(8)
    before = generator.generate(requests, sampling)
    with torch.no_grad():
        policy.head.weight.mul_(0.2)
    generator.sync_weights(1)
    assert generator.weights_version == 1
    after = generator.generate(requests, sampling)
    assert [g.completion_ids for g in after] != [g.completion_ids for g in before]
    with pytest.raises(ValueError, match="version"):
        generator.sync_weights(0)
    generator.close()
    with pytest.raises(RuntimeError, match="close"):
        generator.generate(requests, sampling)


@pytest.mark.parametrize("options", [{"max_batch_size": 0}, {"max_batch_tokens": 0}])
def test_bad_batch_limits(options):
    with pytest.raises(ValueError, match="must be >= 1"):
        HFGenerator(Policy(make_model("qwen2")), **options)
