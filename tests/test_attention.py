"""varlen_attention against its dense reference: values, gradients, shapes; what it refuses."""

from __future__ import annotations

import sys
import types
import warnings

import pytest
import torch

from grpo_engine.kernels import attention
from grpo_engine.kernels.attention import plan_buckets, varlen_attention, varlen_attention_ref

LENGTHS = [5, 3, 17, 1, 40, 39, 100, 66, 70]


def make_pack(lengths, heads=4, kv_heads=4, width=16, dtype=torch.float64, device="cpu"):
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    n = sum(lengths)
    drawn = torch.Generator().manual_seed(7)
    q, k, v = (
        torch.randn(n, h, width, generator=drawn, dtype=torch.float64)
        .to(device, dtype)
        .requires_grad_()
        for h in (heads, kv_heads, kv_heads)
    )
    return q, k, v, {"cu_seqlens": cu_seqlens, "max_seqlen": max(lengths, default=0)}


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"window": 7},
        {"window": 1},
        {"window": 1000},
        {"softcap": 2.0},
        {"softcap": 2.0, "window": 6, "scale": 0.5},
        {"causal": False},
        {"causal": False, "softcap": 2.0},
    ],
    ids=str,
)
def test_values_and_gradients_match_the_reference(kv_heads, options):
    q, k, v, pack = make_pack(LENGTHS, kv_heads=kv_heads)
    ours = varlen_attention(q, k, v, **pack, **options)
    truth = varlen_attention_ref(q, k, v, **pack, **options)
    upstream = torch.randn_like(truth)
    torch.testing.assert_close(ours, truth, rtol=0, atol=1e-12)
    for got, want in zip(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(truth, (q, k, v), upstream),
        strict=True,
    ):
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_reference_is_attention_of_each_sequence_alone():
    q, k, v, pack = make_pack([4, 1, 6])
    out = varlen_attention_ref(q, k, v, **pack)
    for start, end in ((0, 4), (4, 5), (5, 11)):
        for head in range(4):
            for i in range(start, end):
                scores = k[start : i + 1, head] @ q[i, head] / 4.0
                want = scores.softmax(0) @ v[start : i + 1, head]
                torch.testing.assert_close(out[i, head], want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_the_dtype(dtype):
    q, k, v, pack = make_pack(LENGTHS, dtype=dtype)
    truth = varlen_attention_ref(q.double(), k.double(), v.double(), **pack)
    ours = varlen_attention(q, k, v, **pack)
    assert ours.dtype == dtype
    bound = 4 * torch.finfo(dtype).eps * v.abs().max().item()
    assert (ours.double() - truth).abs().max().item() <= bound


@pytest.mark.parametrize(
    "lengths", [[1], [33], [0, 5, 0, 0, 3, 0], [8] * 6, list(range(1, 30)), []]
)
def test_odd_packs(lengths):
    q, k, v, pack = make_pack(lengths)
    ours = varlen_attention(q, k, v, **pack)
    torch.testing.assert_close(ours, varlen_attention_ref(q, k, v, **pack), rtol=0, atol=1e-12)


def test_other_sequences_cannot_be_seen():
    """NaN in one sequence stays in it, forward and backward."""
    q, k, v, pack = make_pack([6, 9, 4])
    with torch.no_grad():
        for x in (q, k, v):
            x[6:15] = torch.nan
    out = varlen_attention(q, k, v, **pack)
    out.sum().backward()
    clean = torch.ones(19, dtype=torch.bool)
    clean[6:15] = False
    for x in (out, q.grad, k.grad, v.grad):
        assert torch.isfinite(x[clean]).all()
    assert out[6:15].isnan().all()


def test_second_derivative():
    q, k, v, pack = make_pack([3, 2], heads=2, kv_heads=1, width=4)
    # softcap takes the path of plain matmuls: sdpa has no second derivative of its own.
    torch.autograd.gradgradcheck(lambda *x: varlen_attention(*x, **pack, softcap=3.0), (q, k, v))


def test_plan_places_every_token_once_and_pads_little():
    drawn = torch.Generator().manual_seed(3)
    lengths = torch.randint(60, 400, (200,), generator=drawn).tolist()
    plan = plan_buckets(torch.tensor([0, *lengths]).cumsum(0).int())
    n = sum(lengths)
    assert torch.equal(plan.token_of_slot[plan.slot_of_token], torch.arange(n))
    assert len(plan.token_of_slot) == n + len(plan.padding_slots)
    assert len(plan.padding_slots) < n / 5
    assert len(plan.buckets) <= 15
    exact = plan_buckets(torch.tensor([0, *lengths]).cumsum(0).int(), exact=True)
    assert len(exact.padding_slots) == 0


def test_no_square_of_the_pack_is_made():
    """2,000 sequences of 16 tokens: a [N, N] mask would be 1e9 entries; the largest tensor made is
    that of the bucket, N x 16."""
    q, k, v, pack = make_pack([16] * 2000, heads=1, kv_heads=1, width=8, dtype=torch.float32)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    Largest.numel = max(Largest.numel, x.numel())
            return out

    with Largest():
        varlen_attention(q, k, v, **pack).sum().backward()
    assert 0 < Largest.numel <= 32_000 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window"),
        ({"window": 3, "causal": False}, "window"),
        ({"softcap": 0.0}, "softcap"),
        ({"backend": "magic"}, "backend"),
        ({"backend": "torch", "softcap": 2.0}, "softcap"),
        ({"max_seqlen": -1}, "max_seqlen"),
        ({"max_seqlen": 3}, "max_seqlen = 3, but a sequence has 4 tokens"),
        ({"max_seqlen": 3, "backend": "torch"}, "max_seqlen = 3, but a sequence has 4 tokens"),
        ({"cu_seqlens": torch.tensor([1, 4], dtype=torch.int32)}, r"ascend from 0, got \[1, 4\]"),
        ({"cu_seqlens": torch.tensor([0, 6, 4], dtype=torch.int32)}, "ascend from 0"),
        (
            {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32), "backend": "torch"},
            "cu_seqlens ends at 3, q has 4",
        ),
        ({"cu_seqlens": torch.tensor([0, 4])}, "int32"),
        ({"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32)}, "cu_seqlens ends at 3"),
        ({"k": torch.zeros(5, 4, 16), "v": torch.zeros(5, 4, 16)}, "differ in tokens"),
        ({"k": torch.zeros(4, 3, 16), "v": torch.zeros(4, 3, 16)}, "multiple"),
        ({"v": torch.zeros(4, 4, 16, dtype=torch.float16)}, "dtype"),
        ({"q": torch.zeros(4, 64)}, "must be"),
    ],
)
def test_bad_input_is_refused(change, message):
    inputs = {x: torch.zeros(4, 4, 16) for x in "qkv"}
    inputs |= {"cu_seqlens": torch.tensor([0, 4], dtype=torch.int32), "max_seqlen": 4} | change
    with pytest.raises(ValueError, match=message):
        varlen_attention(inputs.pop("q"), inputs.pop("k"), inputs.pop("v"), **inputs)


def test_padded_plan_is_refused_without_causality():
    q, k, v, pack = make_pack([4, 7])
    plan = plan_buckets(pack["cu_seqlens"])
    assert len(plan.padding_slots) > 0
    with pytest.raises(ValueError, match="exact"):
        varlen_attention(q, k, v, **pack, causal=False, plan=plan)


def dense_as_flash(q, k, v, cu, max_seqlen, window, causal, scale, softcap=None):
    """The reference under FlashAttention's convention: keys left and right of the query's own."""
    return varlen_attention_ref(
        q,
        k,
        v,
        cu_seqlens=cu,
        max_seqlen=max_seqlen,
        causal=causal,
        scale=scale,
        window=None if window[0] < 0 else window[0] + 1,
        softcap=softcap,
    )


def varlen_attn_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):
    assert q.shape[1] == k.shape[1]
    return dense_as_flash(q, k, v, cu_q, max_q, (-1, -1), is_causal, None)


def varlen_attn_2_11(
    q, k, v, cu_q, cu_k, max_q, max_k, *, return_aux=None, scale=None, window_size=(-1, -1)
):
    assert q.shape[1] == k.shape[1]
    return dense_as_flash(q, k, v, cu_q, max_q, window_size, window_size[1] == 0, scale)


def varlen_attn_2_13(
    q,
    k,
    v,
    cu_q,
    cu_k,
    max_q,
    max_k,
    *,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
):
    assert enable_gqa or q.shape[1] == k.shape[1]
    return dense_as_flash(q, k, v, cu_q, max_q, window_size, window_size[1] == 0, scale)


@pytest.mark.parametrize("version", [varlen_attn_2_10, varlen_attn_2_11, varlen_attn_2_13])
@pytest.mark.parametrize("options", [{}, {"scale": 0.7}, {"causal": False}, {"window": 5}], ids=str)
def test_every_signature_of_torch_varlen_attn(monkeypatch, version, options):
    """The function itself needs CUDA; that we translate to each release's arguments does not."""
    monkeypatch.setattr(attention, "_torch_varlen", attention._torch_varlen.__wrapped__)
    monkeypatch.setitem(
        sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=version)
    )
    q, k, v, pack = make_pack([5, 9, 2], kv_heads=2)
    if "window" in options and version is varlen_attn_2_10:
        with pytest.raises(ValueError, match="window=5"):
            varlen_attention(q, k, v, **pack, **options, backend="torch")
        return
    ours = varlen_attention(q, k, v, **pack, **options, backend="torch")
    torch.testing.assert_close(ours, varlen_attention_ref(q, k, v, **pack, **options))


def test_installed_torch_has_a_signature_we_know():
    found = attention._torch_varlen()
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    assert (found is not None) == (version >= (2, 10))
    assert found is None or {"window_size", "is_causal"} & found[1]


class OnCuda:
    """What ``choose_backend`` asks of a CUDA tensor."""

    is_cuda, device = True, torch.device("cuda", 1)
    dtype, shape = torch.bfloat16, (9, 4, 64)


@pytest.mark.parametrize(
    ("capability", "backend"), [(70, "buckets"), (75, "buckets"), (80, "torch"), (120, "torch")]
)
def test_auto_takes_flash_attention_only_where_the_device_has_it(monkeypatch, capability, backend):
    asked = []
    monkeypatch.setattr(attention, "device_arch", lambda index: asked.append(index) or capability)
    monkeypatch.setattr(attention, "_torch_varlen", lambda: (None, frozenset({"window_size"})))
    assert attention.choose_backend(OnCuda, OnCuda, None, None) == backend
    assert asked == [1]


def test_refusals_of_the_torch_backend_name_the_way_out(monkeypatch):
    arguments = (OnCuda, None, None, None, 9, True, None, None)
    monkeypatch.setattr(attention, "device_arch", lambda index: 75)
    monkeypatch.setattr(attention, "_torch_varlen", lambda: (None, frozenset()))
    with pytest.raises(ValueError, match=r"8\.0 or newer, cuda:1 has 7\.5; backend='buckets'"):
        attention._attention_torch(*arguments)
    monkeypatch.setattr(attention, "_torch_varlen", lambda: None)
    with pytest.raises(ValueError, match=r"torch >= 2\.10, this is .*; backend='buckets'"):
        attention._attention_torch(*arguments)


@pytest.mark.gpu
def test_plan_of_a_cuda_pack_costs_one_sync():
    """The read of cu_seqlens; the indices go back from pinned memory."""
    cu_seqlens = torch.tensor([0, *LENGTHS], device="cuda").cumsum(0).int()
    assert plan_buckets(cu_seqlens).token_of_slot.is_cuda
    with warnings.catch_warnings(record=True) as syncs:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            plan_buckets(cu_seqlens)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(syncs) == 1, [str(sync.message) for sync in syncs]


def test_flash_attn_arguments(monkeypatch):
    def flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, max_q, max_k, *, softmax_scale, causal, window_size, softcap
    ):
        return dense_as_flash(
            q, k, v, cu_q, max_q, window_size, causal, softmax_scale, softcap or None
        )

    fake = types.ModuleType("flash_attn")
    fake.flash_attn_varlen_func = flash_attn_varlen_func
    q, k, v, pack = make_pack([5, 9, 2], kv_heads=2)
    with pytest.raises(ValueError, match="not installed"):
        varlen_attention(q, k, v, **pack, backend="flash-attn")
    monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: fake)
    monkeypatch.setitem(sys.modules, "flash_attn", fake)
    for options in ({}, {"window": 3}, {"softcap": 2.0, "scale": 0.4}, {"causal": False}):
        ours = varlen_attention(q, k, v, **pack, **options, backend="flash-attn")
        torch.testing.assert_close(ours, varlen_attention_ref(q, k, v, **pack, **options))


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("options", [{}, {"scale": 0.3}, {"window": 7}, {"causal": False}], ids=str)
def test_cuda_flash_attention_matches_the_reference(kv_heads, options):
    q, k, v, pack = make_pack(
        LENGTHS, kv_heads=kv_heads, width=64, dtype=torch.bfloat16, device="cuda"
    )
    ours = varlen_attention(q, k, v, **pack, **options, backend="torch")
    truth = varlen_attention_ref(*(x.double() for x in (q, k, v)), **pack, **options)
    upstream = torch.randn_like(ours)
    assert (ours.double() - truth).abs().max().item() < 0.03
    for got, want in zip(
        torch.autograd.grad(ours, (q, k, v), upstream),
        torch.autograd.grad(truth, (q, k, v), upstream.double()),
        strict=True,
    ):
        assert (got.double() - want.double()).abs().max() <= 0.03 * want.abs().max()
