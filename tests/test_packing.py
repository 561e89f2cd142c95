"""Packing against a chain of torch operations, bit for bit. CPU and CUDA share every test."""

import numpy as np
import pytest
import torch

from grpo_engine import _C
from grpo_engine.kernels.packing import (
    completion_rows,
    pack_rollouts,
    pack_rollouts_ref,
    unpack,
    unpack_ref,
)

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
]
LENGTHS = {
    "one": [5],
    "one token each": [1, 1, 1],
    "odd": [3, 17, 1, 33, 7, 129, 2],
    "with empty": [0, 4, 0, 0, 9, 0],
    "all empty": [0, 0],
    "none": [],
    "aligned": [16, 32, 64],  # whole 16-byte vectors, where the wide copies are taken
    "long": [4097, 1, 8191, 3000],  # several blocks a sequence
    "many": [i % 5 for i in range(3000)],  # many sequences a block
}


def values(count, dtype, device, seed=0):
    """Bits that a copy could get wrong: integers of all widths, floats with nan and infinity."""
    generator = torch.Generator().manual_seed(seed + count)
    if dtype.is_floating_point:
        out = torch.randn(count, generator=generator).to(dtype)
        out[::7] = float("nan")
        out[3::11] = float("-inf")
        return out.to(device)
    top = {torch.bool: 2, torch.uint8: 256}.get(dtype, 2**15)
    return torch.randint(0, top, (count,), generator=generator).to(dtype).to(device)


def assert_same_bits(ours, reference):
    assert ours.dtype == reference.dtype
    assert ours.device == reference.device
    assert ours.shape == reference.shape
    as_bytes = (t.contiguous().reshape(-1).view(torch.uint8) for t in (ours, reference))
    assert torch.equal(*as_bytes)


def assert_same_batch(ours, reference):
    for name in ("token_ids", "position_ids", "segment_ids", "cu_seqlens"):
        assert_same_bits(getattr(ours, name), getattr(reference, name))
    assert ours.max_seqlen == reference.max_seqlen
    assert ours.lengths == reference.lengths
    assert list(ours.fields) == list(reference.fields)
    for name in ours.fields:
        assert_same_bits(ours.fields[name], reference.fields[name])


def in_form(flat, lengths, form):
    """The flat tensor in one of the accepted forms."""
    pieces = flat.split(lengths)
    if form == "flat":
        return flat
    if form == "pieces":
        return [piece.clone() for piece in pieces]
    if form == "lists":
        return [piece.tolist() for piece in pieces]
    padded = torch.full((len(lengths), max(lengths, default=0) + 3), 99).to(flat)
    for row, piece in zip(padded, pieces, strict=True):
        row[: len(piece)] = piece
    return padded


def shape_arguments(lengths, form):
    if form == "flat":
        return {"offsets": np.cumsum([0, *lengths])}
    return {"lengths": lengths} if form == "padded" else {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["flat", "padded", "pieces"])
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_pack_every_dtype(lengths, form, device):
    total = sum(lengths)
    sequences = in_form(values(total, torch.int64, device), lengths, form)
    fields = {str(d): in_form(values(total, d, device), lengths, form) for d in DTYPES}
    per_sequence = {f"{d} each": values(len(lengths), d, device) for d in DTYPES}
    arguments = dict(per_sequence=per_sequence, **shape_arguments(lengths, form))
    ours = pack_rollouts(sequences, fields, **arguments)
    assert_same_batch(ours, pack_rollouts_ref(sequences, fields, **arguments))
    assert ours.num_tokens == total


@pytest.mark.parametrize("device", DEVICES)
def test_pack_python_numbers(device):
    batch = pack_rollouts(
        [[7, 8, 9], [], [5]],
        {"old_logprobs": [[-1, -0.5, 0.0], [], [-2.0]], "mask": [[True, False, True], [], [True]]},
        per_sequence={"advantages": [1.0, 2.0, -0.5], "group": [0, 0, 1]},
        device=device,
    )
    assert batch.token_ids.device.type == device
    assert batch.token_ids.tolist() == [7, 8, 9, 5]
    assert batch.position_ids.tolist() == [0, 1, 2, 0]
    assert batch.segment_ids.tolist() == [0, 0, 0, 2]
    assert batch.cu_seqlens.tolist() == [0, 3, 3, 4]
    assert batch.max_seqlen == 3
    assert batch.fields["old_logprobs"].tolist() == [-1.0, -0.5, 0.0, -2.0]
    assert batch.fields["mask"].tolist() == [True, False, True, True]
    assert batch.fields["advantages"].tolist() == [1.0, 1.0, 1.0, -0.5]
    dtypes = {name: tensor.dtype for name, tensor in batch.fields.items()}
    assert dtypes == {
        "old_logprobs": torch.float32,
        "mask": torch.bool,
        "advantages": torch.float32,
        "group": torch.int64,
    }
    assert (batch.segment_ids.dtype, batch.cu_seqlens.dtype) == (torch.int32, torch.int32)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", ["flat", "padded", "pieces", "lists"])
@pytest.mark.parametrize("order", [[2, 0], [], [5, 5, 1, 3], [6, 5, 4, 3, 2, 1, 0]], ids=str)
def test_pack_in_order(order, form, device):
    """Any subset in any order, as a chunk of a plan names it."""
    lengths = LENGTHS["odd"]
    flat = values(sum(lengths), torch.int64, device)
    if form == "lists" and device == "cuda":
        flat = flat.cpu()  # host lists going to the device
    sequences = in_form(flat, lengths, form)
    fields = {"same": in_form(flat, lengths, form), "flat": flat}
    arguments = dict(
        order=order,
        device=device,
        per_sequence={"row": list(range(len(lengths)))},  # host values, wherever the ids are
        **shape_arguments(lengths, form),
    )
    ours = pack_rollouts(sequences, fields, **arguments)
    assert_same_batch(ours, pack_rollouts_ref(sequences, fields, **arguments))
    assert ours.lengths == tuple(lengths[i] for i in order)


@pytest.mark.parametrize("device", DEVICES)
def test_pack_unaligned_sources(device):
    """Source runs that start at every byte offset of a 16-byte vector."""
    storage = values(4096, torch.uint8, device)
    starts = np.arange(40) * 67 + np.arange(40) % 16
    offsets = np.append(starts, starts[-1] + 50)
    ids = storage[1:].to(torch.int64)
    fields = {"bytes": storage[1:], "halves": storage[1:].to(torch.float16)}
    ours = pack_rollouts(ids, fields, offsets=offsets)
    assert_same_batch(ours, pack_rollouts_ref(ids, fields, offsets=offsets))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
def test_unpack(lengths, dtype, device):
    packed = values(sum(lengths), dtype, device)
    cu_seqlens = torch.tensor(np.cumsum([0, *lengths]), dtype=torch.int32, device=device)
    pieces = unpack(packed, cu_seqlens)
    assert [len(piece) for piece in pieces] == lengths
    for piece, reference in zip(pieces, unpack_ref(packed, cu_seqlens), strict=True):
        assert_same_bits(piece, reference)
    for extra in (0, 1, 13):
        width = max(lengths, default=0) + extra
        padded = unpack(packed, cu_seqlens, padded=True, pad_value=1, max_seqlen=width)
        assert padded.shape == (len(lengths), width)
        reference = unpack_ref(packed, cu_seqlens, padded=True, pad_value=1, max_seqlen=width)
        assert_same_bits(padded, reference)
        assert_same_bits(
            unpack(packed, cu_seqlens, padded=True, lengths=lengths, pad_value=1)
            if extra == 0
            else padded,
            reference,
        )


@pytest.mark.parametrize("device", DEVICES)
def test_pad_values_reach_the_tensor(device):
    cu_seqlens = torch.tensor([0, 1, 1], dtype=torch.int32, device=device)
    for dtype, pad in ((torch.int64, -100), (torch.bfloat16, -0.5), (torch.float32, float("-inf"))):
        packed = torch.ones(1, dtype=dtype, device=device)
        assert unpack(packed, cu_seqlens, padded=True, pad_value=pad).tolist() == [[1], [pad]]


@pytest.mark.parametrize("device", DEVICES)
def test_round_trip(device):
    lengths = LENGTHS["odd"]
    padded = in_form(values(sum(lengths), torch.float32, device), lengths, "padded")
    ids = torch.zeros_like(padded, dtype=torch.int64)
    batch = pack_rollouts(ids, {"x": padded}, lengths=lengths)
    back = unpack(
        batch.fields["x"],
        batch.cu_seqlens,
        padded=True,
        pad_value=99,
        lengths=batch.lengths,
        max_seqlen=padded.shape[1],
    )
    assert_same_bits(back, padded)


@pytest.mark.gpu
def test_packing_does_not_sync():
    lengths = LENGTHS["odd"]
    ids = values(sum(lengths), torch.int64, "cuda")
    offsets = np.cumsum([0, *lengths])
    torch.cuda.set_sync_debug_mode("error")
    try:
        batch = pack_rollouts(ids, {"x": ids}, offsets=offsets)
        unpack(batch.token_ids, batch.cu_seqlens, padded=True, lengths=batch.lengths)
        pack_rollouts([[1, 2], [3]], per_sequence={"a": [0.5, 1.0]}, device="cuda")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_packing_is_one_launch():
    """Copies of the plan and the offsets aside: they come from the host."""
    lengths = LENGTHS["odd"]
    ids = values(sum(lengths), torch.int64, "cuda")
    offsets = np.cumsum([0, *lengths])
    batch = pack_rollouts(ids, {"x": ids}, offsets=offsets)

    def launches_of(call):
        call()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            call()
            torch.cuda.synchronize()
        on_device = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
        return [event.name for event in on_device if not event.name.startswith("Mem")]

    (packed,) = launches_of(lambda: pack_rollouts(ids, {"x": ids}, offsets=offsets))
    assert "pack_kernel" in packed
    (unpacked,) = launches_of(
        lambda: unpack(batch.token_ids, batch.cu_seqlens, padded=True, lengths=batch.lengths)
    )
    assert "unpack_kernel" in unpacked


def test_fields_are_independent_for_autograd():
    """The outputs share memory but no version counter: changing one must not spoil another that
    autograd saved."""
    batch = pack_rollouts([[1, 2]], {"scale": [[2.0, 3.0]], "mask": [[1.0, 1.0]]})
    x = torch.ones(2, requires_grad=True)
    loss = (x * batch.fields["scale"]).sum()
    batch.fields["mask"].zero_()
    loss.backward()
    assert x.grad.tolist() == [2.0, 3.0]


def test_what_no_pass_writes_is_poisoned(monkeypatch):
    """The tests above can only miss an unwritten integer if memory happens to hold the answer."""
    monkeypatch.setattr(_C, "pack_cpu", lambda *arguments: None)
    batch = pack_rollouts([[1, 2], [3]], {"x": [[1.0, 2.0], [3.0]]})
    a5 = torch.tensor([0xA5], dtype=torch.uint8)
    for tensor in (batch.token_ids, batch.position_ids, batch.segment_ids, batch.fields["x"]):
        assert (tensor.view(torch.uint8) == a5).all()
    assert (torch.empty_strided((2, 3), (1, 4), dtype=torch.int16) == -0x5A5B).all()
    assert torch.ones(2).new_empty(3, dtype=torch.bool).all()


def test_outputs_do_not_alias():
    ids = torch.arange(6)
    batch = pack_rollouts(ids, {"x": ids}, offsets=[0, 2, 6])
    batch.fields["x"].fill_(-1)
    assert ids.tolist() == batch.token_ids.tolist() == [0, 1, 2, 3, 4, 5]
    assert all(t.data_ptr() % 16 == 0 for t in (batch.token_ids, *batch.fields.values()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(fields={"x": [[1.0]]}), r"x has 1 entries for 2 sequences"),
        (dict(fields={"x": [1.0, 2.0]}), r"x\[0\] is one value, not 2; use per_sequence"),
        (dict(fields={"x": [[1.0, 2.0], [3.0, 4.0]]}), r"x\[1\] has 2 values for 1 tokens"),
        (
            dict(fields={"x": torch.ones(4)}),
            r"x has shape \(4,\); 2 sequences need \[3\] or \[2, >= 2\]",
        ),
        (dict(fields={"x": [["a", "b"], ["c"]]}), "x must hold numbers, got <U1"),
        (dict(fields={"x": [[1.0, None], [2.0]]}), "x must hold numbers, got object"),
        (dict(fields={"x": torch.ones(3, dtype=torch.complex128)}), "x has elements of 16 bytes"),
        (dict(fields={"x": torch.ones(3, requires_grad=True)}), "x requires grad"),
        (dict(per_sequence={"a": [1.0]}), r"a has shape \(1,\) for 2 sequences"),
        (dict(fields={"a": torch.ones(3)}, per_sequence={"a": [1.0, 2.0]}), r"\['a'\] in both"),
        (dict(order=[0, 2]), "order names sequence 2 of 2"),
        (dict(order=[-1]), "order names sequence -1 of 2"),
        (dict(lengths=[2, 1]), "lengths and offsets describe one tensor"),
        (
            dict(fields={"x": torch.ones(3, device="meta")}),
            "x is on meta, the sequences are on cpu",
        ),
    ],
)
def test_pack_names_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_rollouts([[1, 2], [3]], **arguments)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.arange(3.0)[::-1], r"x has negative strides \(-8,\)"),
        (np.arange(3, dtype=">i4"), "x has dtype >i4, not this machine's byte order"),
        (np.arange(3, dtype=np.longdouble), "x has elements of 16 bytes"),
    ],
)
def test_pack_names_arrays_that_torch_cannot_hold(array, message):
    with pytest.raises(ValueError, match=message):
        pack_rollouts([[1, 2], [3]], {"x": array})
    with pytest.raises(ValueError, match=message.replace("x has", "sequences has")):
        pack_rollouts(array, offsets=[0, 3])


@pytest.mark.parametrize(
    ("sequences", "arguments", "message"),
    [
        (torch.arange(3), {}, r"got shape \(3,\), offsets missing, lengths missing"),
        (torch.arange(3), dict(offsets=[0, 2, 4]), r"offsets must ascend within \[0, 3\]"),
        (torch.arange(3), dict(offsets=[0, 2, 1]), r"offsets must ascend"),
        (torch.ones(2, 3).long(), dict(lengths=[1]), "lengths has 1 entries for 2 sequences"),
        (torch.ones(2, 3).long(), dict(lengths=[1, 4]), r"lengths\[1\] = 4 outside \[0, 3\]"),
        ([[0.5], [1.0]], {}, "sequences must hold token ids, got torch.float32"),
        ([torch.ones(2), torch.arange(2)], {}, r"sequences\[1\] has shape \(2,\) and torch.int64"),
        (torch.ones(3, device="meta"), dict(offsets=[0, 3]), "only cpu and cuda can be packed"),
    ],
)
def test_pack_names_wrong_sequences(sequences, arguments, message):
    with pytest.raises(ValueError, match=message):
        pack_rollouts(sequences, **arguments)


@pytest.mark.parametrize(
    ("packed", "cu_seqlens", "arguments", "message"),
    [
        (torch.ones(2, 2), [0, 2], {}, r"one-dimensional, got shape \(2, 2\)"),
        (torch.ones(2, requires_grad=True), [0, 2], {}, "detach"),
        (torch.ones(3), [0, 2], {}, "3 tokens, but cu_seqlens runs from 0 to 2"),
        (torch.ones(2), [1, 3], {}, "2 tokens, but cu_seqlens runs from 1 to 3"),
        (torch.ones(2), [-1, 1], dict(padded=True), "cu_seqlens runs from -1 to 1"),
        (torch.ones(2), [0, 4, 2], {}, r"cu_seqlens\[2\] = 2 is below cu_seqlens\[1\] = 4"),
        (torch.ones(2), [], {}, r"cu_seqlens must be .* \(0,\)"),
        (torch.ones(2), [0, 9, 2], dict(lengths=[1, 1], padded=True), r"cu_seqlens\[2\] = 2 is"),
        (torch.ones(2), [7, 7, 7], dict(lengths=[1, 1], padded=True), "runs from 7 to 7"),
        (torch.ones(2), [0, 2, 2], dict(lengths=[1, 1]), r"lengths\[0\] = 1, but .* has 2"),
        (torch.ones(2), [0, 2, 2], dict(lengths=[3, -1]), r"lengths\[1\] = -1 is negative"),
        (torch.ones(2), [0, 2], dict(lengths=[1, 1]), "cu_seqlens 2 entries; the 2 lengths"),
        (torch.ones(2), [0, 2], dict(padded=True, max_seqlen=1), "max_seqlen = 1, but .* 2 tokens"),
        (torch.arange(2), [0, 2], dict(padded=True, pad_value=0.5), "pad_value = 0.5"),
        (
            torch.ones(2, dtype=torch.uint8),
            [0, 2],
            dict(padded=True, pad_value=300),
            "pad_value = 300 .*uint8",
        ),
        (torch.arange(2), [0, 2], dict(padded=True, pad_value=float("inf")), "pad_value = inf"),
        (torch.arange(2), [0, 2], dict(padded=True, pad_value=float("nan")), "pad_value = nan"),
        (torch.ones(2).half(), [0, 2], dict(padded=True, pad_value=1e6), "pad_value = 1000000.0"),
        (torch.ones(2).bool(), [0, 2], dict(padded=True, pad_value=2), "pad_value = 2 .*bool"),
    ],
)
def test_unpack_names_what_is_wrong(packed, cu_seqlens, arguments, message):
    with pytest.raises(ValueError, match=message):
        unpack(packed, torch.tensor(cu_seqlens, dtype=torch.int32), **arguments)


@pytest.mark.parametrize(
    "cu_seqlens", [[1, 3], [0, 3], [-1, 2], [0, 5, 2], [0, -4, 2], [2**30, 2**30 + 2]]
)
def test_the_extension_itself_refuses_rows_outside_the_field(cu_seqlens):
    """Behind every check in Python: nothing is read past the two tokens, nothing written."""
    packed, out = torch.ones(2), torch.zeros(len(cu_seqlens) - 1, 2)
    offsets = torch.tensor(cu_seqlens, dtype=torch.int32)
    job = _C.Unpack(
        destination=out.data_ptr(),
        packed=packed.data_ptr(),
        num_tokens=2,
        cu_seqlens=offsets.data_ptr(),
        num_sequences=len(cu_seqlens) - 1,
        row_length=2,
        element_size=4,
        pad_bits=0,
    )
    with pytest.raises(ValueError, match="cu_seqlens must ascend from 0 to 2, got"):
        _C.unpack_cpu(job)
    assert not out.any()


@pytest.mark.gpu
def test_lengths_are_the_truth_on_the_device():
    """With ``lengths`` a CUDA cu_seqlens is not read, so wrong ones do no harm."""
    packed = torch.arange(3, device="cuda")
    wrong = torch.tensor([7, 900_000_000, -5], dtype=torch.int32, device="cuda")
    rows = unpack(packed, wrong, padded=True, lengths=[1, 2], pad_value=-1)
    assert rows.tolist() == [[0, -1], [1, 2]]
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] = -5 is below"):
        unpack(packed, wrong)


@pytest.mark.gpu
def test_cuda_errors():
    ids = torch.arange(3, device="cuda")
    with pytest.raises(ValueError, match="x is on cpu, the sequences are on cuda:0"):
        pack_rollouts(ids, {"x": torch.ones(3)}, offsets=[0, 3])
    with pytest.raises(ValueError, match="on the host"):
        pack_rollouts(ids, offsets=torch.tensor([0, 3], device="cuda"))
    with pytest.raises(ValueError, match="pack there, then move to cpu"):
        pack_rollouts(ids, offsets=[0, 3], device="cpu")


@pytest.mark.gpu
@pytest.mark.skipif(_C.built_with_cuda, reason="needs a CPU-only extension")
def test_cpu_only_extension_refuses_cuda_tensors():
    with pytest.raises(RuntimeError, match="GRPO_ENGINE_CUDA=1"):
        pack_rollouts(torch.arange(3, device="cuda"), offsets=[0, 3])


def test_completion_rows():
    # Sequences of 2+2, 1+0 and 3+1 tokens start at rows 0, 4 and 5.
    rows = completion_rows([2, 1, 3], [2, 0, 1])
    assert rows.dtype == torch.int64
    assert rows.tolist() == [1, 2, 7]
    assert completion_rows([], []).tolist() == []
    assert completion_rows([0], [0]).tolist() == []


def test_completion_rows_predict_the_completions():
    generator = np.random.default_rng(0)
    prompts, completions = generator.integers(1, 9, 50), generator.integers(0, 9, 50)
    sequences = [
        [1000 + s] * p + [s * 10 + t for t in range(c)]
        for s, (p, c) in enumerate(zip(prompts, completions, strict=True))
    ]
    token_ids = pack_rollouts(sequences).token_ids
    expected = [s * 10 + t for s, c in enumerate(completions) for t in range(c)]
    assert token_ids[completion_rows(prompts, completions) + 1].tolist() == expected


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([1], [1, 2], "prompt_lengths has 1 sequences, completion_lengths 2"),
        ([0], [1], r"prompt_lengths\[0\] = 0: nothing predicts"),
        ([1, 2], [1, -2], r"completion_lengths\[1\] = -2 is negative"),
    ],
)
def test_completion_rows_names_what_is_wrong(prompts, completions, message):
    with pytest.raises(ValueError, match=message):
        completion_rows(prompts, completions)
