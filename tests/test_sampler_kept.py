"""What top-k and top-p keep, against Hugging Face transformers' own logits warpers."""

from __future__ import annotations

import importlib

import pytest
import torch

from grpo_engine.kernels import (
    kept_by_sampler,
    kept_by_sampler_ref,
    linear_kept_by_sampler,
    linear_kept_by_sampler_ref,
    linear_logprobs,
)
from grpo_engine.kernels.truncated_mask import kept_mask

MODULE = importlib.import_module("grpo_engine.kernels.sampler_kept")
BY_TOP_K = [(1, 1.0), (5, 1.0), (40, 1.0), (20, 0.8), (20, 1e-9)]
BY_TOP_P = [(500, 0.3), (0, 0.9), (0, 1e-9), (0, 0.999)]  # of 203 ids


def make_logits(num_rows, vocab, spread=3.0):
    g = torch.Generator().manual_seed(num_rows + vocab)
    logits = torch.randn(num_rows, vocab, generator=g) * spread
    assert all(len(row.unique()) == vocab for row in logits), "distinct logits: no ties"
    return logits


def warped(logits, top_k, top_p, temperature):
    """[N, V] bool by transformers, warpers in the order in which generate() builds them."""
    process = pytest.importorskip("transformers.generation.logits_process")
    warpers = [process.TemperatureLogitsWarper(float(temperature))]
    if top_k:
        warpers.append(process.TopKLogitsWarper(top_k=top_k))
    if top_p < 1:
        warpers.append(process.TopPLogitsWarper(top_p=top_p))
    for warper in warpers:
        logits = warper(None, logits)
    return logits > -torch.inf


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize(("top_k", "top_p"), BY_TOP_K + BY_TOP_P)
def test_keeps_what_transformers_keeps(top_k, top_p, temperature, device) -> None:
    logits = make_logits(30, 203)
    options = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    kept = kept_by_sampler(logits.to(device), **options)
    bounded = 0 < top_k < 203
    assert kept.dtype == (torch.int32 if bounded else torch.uint8)
    assert kept.shape == (30, top_k if bounded else -(-203 // 8))
    mask = kept_mask(kept, 203).cpu()
    assert torch.equal(mask, warped(logits, top_k, top_p, temperature))
    assert mask.any(1).all()
    if bounded:
        number = (kept >= 0).sum(1)
        assert torch.equal(number.cpu(), mask.sum(1)), "no id twice"
        chosen = logits.to(device).gather(1, kept.clamp(min=0).long())
        for row, count in zip(chosen, number.tolist(), strict=True):
            assert torch.equal(row[:count], row[:count].sort(descending=True).values)
        assert (kept[torch.arange(top_k, device=device) >= number[:, None]] == -1).all()


@pytest.mark.parametrize(("top_k", "top_p"), [*BY_TOP_K, *BY_TOP_P, (300, 0.9)])
def test_agrees_with_the_specification(top_k, top_p, device) -> None:
    logits = make_logits(12, 203).to(device)
    temperature = torch.linspace(0.6, 1.7, 12, device=device)
    options = {"top_k": top_k, "top_p": top_p, "temperature": temperature}
    assert torch.equal(kept_by_sampler(logits, **options), kept_by_sampler_ref(logits, **options))

    generator = torch.Generator().manual_seed(top_k)
    hidden, weight = torch.randn(12, 16, generator=generator), torch.eye(203, 16)
    weight += torch.randn(203, 16, generator=generator)
    head = {"bias": torch.linspace(-1, 1, 203), "logit_softcap": 9.0, "logit_scale": 0.7}
    head["bias"] = head["bias"].to(device)
    arguments = (hidden.to(device), weight.to(device))
    ours = linear_kept_by_sampler(*arguments, **options, **head)
    spec = linear_kept_by_sampler_ref(*arguments, **options, **head)
    assert torch.equal(kept_mask(ours, 203), kept_mask(spec, 203))


def test_temperature_comes_before_top_p(device) -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]], device=device)
    counts = [
        int(kept_mask(kept_by_sampler(logits, top_p=0.8, temperature=t), 4).sum())
        for t in (0.3, 1.0, 3.0)
    ]
    assert counts == [1, 2, 3]


def test_a_temperature_for_each_row(device) -> None:
    logits = make_logits(3, 50).to(device)
    temperature = torch.tensor([0.5, 1.0, 2.0], device=device)
    together = kept_by_sampler(logits, top_p=0.7, temperature=temperature)
    for n in range(3):
        alone = kept_by_sampler(logits[n : n + 1], top_p=0.7, temperature=float(temperature[n]))
        assert torch.equal(together[n], alone[0])


def test_ties(device) -> None:
    """Exactly top_k ids, where transformers keeps all that equal the k-th."""
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]], device=device)
    kept = kept_by_sampler(logits, top_k=2)
    assert kept[0, 0] == 0 and kept[0, 1] in (1, 2, 3)
    assert warped(logits.cpu(), 2, 1.0, 1.0).sum() == 4


def test_chunks_change_nothing(monkeypatch, device) -> None:
    logits = make_logits(30, 203).to(device)
    whole = [kept_by_sampler(logits, top_k=k, top_p=0.8) for k in (0, 9)]
    monkeypatch.setattr(MODULE, "SORT_ELEMENTS", 203 * 7)
    for k, expected in zip((0, 9), whole, strict=True):
        assert torch.equal(kept_by_sampler(logits, top_k=k, top_p=0.8), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("top_k", [0, 9])
def test_from_hidden_states(top_k, dtype, monkeypatch, device) -> None:
    """The head's logits, options included, without [N, V]; and they fit linear_logprobs."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(30, 16, generator=g).to(device, dtype)
    weight = torch.randn(203, 16, generator=g).to(device, dtype)
    bias = torch.randn(203, generator=g).to(device, dtype)
    head = {"bias": bias, "logit_scale": 0.7, "logit_softcap": 4.0, "temperature": 0.8}
    logits = 4.0 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) * 0.7 / 4.0)
    expected = kept_by_sampler(logits.float(), top_k=top_k, top_p=0.9, temperature=0.8)
    monkeypatch.setattr(MODULE, "SORT_ELEMENTS", 203 * 7)
    kept = linear_kept_by_sampler(hidden, weight, top_k=top_k, top_p=0.9, **head)
    assert torch.equal(kept_mask(kept, 203), kept_mask(expected, 203))
    likeliest = logits.argmax(1)
    logprobs = linear_logprobs(hidden, weight, likeliest, kept=kept, **head)
    untruncated = linear_logprobs(hidden, weight, likeliest, **head)
    assert (logprobs <= 0).all() and (logprobs > untruncated).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "top_k=0 and top_p=1.0 keep all 5 ids"),
        ({"top_k": 5}, "top_k=5 and top_p=1.0 keep all 5 ids"),
        ({"top_k": -1}, "top_k must be an integer >= 0"),
        ({"top_k": 1.5}, "top_k must be an integer >= 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"top_p": 1.1}, r"top_p must be in \(0, 1\], got 1.1"),
        ({"top_k": 2, "temperature": 0.0}, "temperature must be finite and > 0"),
        ({"top_k": 2, "temperature": torch.tensor([1.0, -1.0])}, "temperature must be > 0"),
        ({"top_k": 2, "temperature": torch.tensor([1.0, torch.nan])}, "temperature must be > 0"),
    ],
)
def test_bad_options(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        kept_by_sampler(torch.zeros(2, 5), **options)
    with pytest.raises(ValueError, match=message):
        linear_kept_by_sampler(torch.zeros(2, 3), torch.zeros(5, 3), **options)


def test_bad_logits() -> None:
    with pytest.raises(ValueError, match=r"logits must have shape \[N, V\]"):
        kept_by_sampler(torch.zeros(5), top_k=2)
    with pytest.raises(ValueError, match="logits must be float32"):
        kept_by_sampler(torch.zeros(2, 5).long(), top_k=2)
    with pytest.raises(ValueError, match=r"weight must have shape \[V, 3\]"):
        linear_kept_by_sampler(torch.zeros(2, 3), torch.zeros(5, 4), top_k=2)


def test_no_rows() -> None:
    assert kept_by_sampler(torch.zeros(0, 5), top_k=2).shape == (0, 2)
    assert linear_kept_by_sampler(torch.zeros(0, 3), torch.zeros(9, 3), top_p=0.5).shape == (0, 2)
