"""One row cut into shards, folded and merged in one process: on a GPU, and on a CPU."""

from __future__ import annotations

import pytest
import torch

from grpo_engine.kernels.top_logits import TopLogits
from grpo_engine.kernels.vocab_parallel import fold_shard, merge_parts
from grpo_engine.kernels.vocab_rows import LogitOptions, RowGrads, dlogits_rows, fold_rows

ROWS, VOCAB = 9, 517


@pytest.mark.parametrize("cuts", [(256,), (5, 300), (128, 129, 516)])
@pytest.mark.parametrize("softcap", [None, 6.0])
def test_shards_add_up_to_the_whole_row(cuts, softcap, device) -> None:
    generator = torch.Generator().manual_seed(len(cuts))
    logits = (torch.randn(ROWS, VOCAB, generator=generator) * 4).to(device)
    ids = torch.randint(VOCAB, (ROWS,), generator=generator).to(device)
    grads = RowGrads(*(torch.randn(ROWS, generator=generator).to(device) for _ in range(2)))
    options = LogitOptions(temperature=0.8, logit_softcap=softcap)
    whole = (logits.clone(), torch.empty_like(logits))
    expected = fold_rows(*whole, ids, options, want_entropy=True)
    true_grad = dlogits_rows(whole[1], whole[0], ids, options, expected, grads).clone()

    edges = [0, *cuts, VOCAB]
    shards = [slice(a, b) for a, b in zip(edges[:-1], edges[1:], strict=True)]
    buffers = [(logits[:, s].clone(), torch.empty_like(logits[:, s])) for s in shards]
    parts = torch.stack(
        [
            fold_shard(raw, scratch, ids - s.start, options, want_entropy=True)
            for (raw, scratch), s in zip(buffers, shards, strict=True)
        ]
    )
    known = torch.ones_like(ids, dtype=torch.bool)
    pieces = []
    for rank, ((raw, scratch), shard) in enumerate(zip(buffers, shards, strict=True)):
        stats = merge_parts(parts, rank, known, options, want_entropy=True)
        for name in ("logprobs", "entropy", "lse"):
            found, wanted = getattr(stats, name), getattr(expected, name)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5, msg=name)
        pieces.append(dlogits_rows(scratch, raw, ids - shard.start, options, stats, grads))
    torch.testing.assert_close(torch.cat(pieces, 1), true_grad, rtol=1e-5, atol=1e-6)


def test_beside_a_token_that_holds_all_nothing_decides() -> None:
    """Its shard's other exponentials are 0 in sum, of which every entry would be a large part."""
    logits, ids = torch.zeros(2, 300), torch.tensor([7, 7])
    logits[0, 7], logits[1, [7, 250]] = 200.0, 60.0
    top = TopLogits()
    fold_shard(logits, torch.empty_like(logits), ids, LogitOptions(), want_entropy=False, top=top)
    assert (top.rows.tolist(), top.ids.tolist()) == ([0, 1, 1], [7, 7, 250])
