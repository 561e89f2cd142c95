"""Every provider that there is, ours first, for each job."""

from __future__ import annotations

from grpo_engine.bench.cases import JOBS
from grpo_engine.bench.peers import cce, liger, ours, packed, plain_torch, quack, trl, verl
from grpo_engine.bench.provider import Provider

__all__ = ["PROVIDERS", "Provider", "providers_of"]

PROVIDERS: tuple[Provider, ...] = (
    *ours.PROVIDERS,
    *plain_torch.PROVIDERS,
    *packed.PROVIDERS,
    *trl.PROVIDERS,
    *liger.PROVIDERS,
    *cce.PROVIDERS,
    *verl.PROVIDERS,
    *quack.PROVIDERS,
)


def providers_of(job: str) -> list[Provider]:
    """The providers of one job, in the order in which tables show them."""
    if job not in JOBS:
        raise ValueError(f"job must be one of {', '.join(JOBS)}; got {job!r}")
    return [provider for provider in PROVIDERS if provider.job == job]
