"""The canary: does an engine give the trainer's own log-probs to a few fixed tokens?

Checksums prove that the bytes arrived. Whether the engine then computes with them (a load that was
skipped, weights that it had repacked and did not repack again, a prefix cache filled by older
weights) only its answers can tell. After each weight update it continues fixed prompts by a few
tokens, through the same door as every rollout, and the trainer computes the log-probs of these
tokens itself. Two verdicts, which do not cry wolf:

* **They differ**: the mean absolute difference passes the limit of the dtype (``LIMITS``). Measured
  between vLLM on a CPU and the trainer: 1e-6 (miniature) to 1e-5 (SmolLM2-135M) in fp32; 0.01 and
  0.05 in bf16, where vLLM rounds the logits themselves, to 1/8 between 16 and 32. The limits leave
  room for larger logits; a wrong tensor makes differences of the order of 1. TF32 (its rounding
  imitated on a CPU) moves the log-probs by 4e-4 (miniature) to 4e-3 (SmolLM2-135M), in attention
  alone by 1e-3: where fp32 products may be computed in it the limit is that of fp16, which has as
  many bits. The trainer's own products are known by torch's settings; of the engine's only what
  vLLM says (``engine.fp32_products``), which on a GPU is never full fp32.
* **Stale**: small updates move log-probs less than such a limit. So the engine's *movement* since
  an earlier version (the anchor) is compared with the trainer's, over the tokens that were drawn
  both times: slope = <e - e0, t - t0> / |t - t0|^2, 1 for an engine that follows, 0 for one that
  stands still. What the two compute differently cancels in the differences, so that this sees far
  below the limit. It is asked only once the trainer has moved by ``SHARP`` = 4 times the noise. The
  rounding in t and t0, which e does not follow, then lowers the slope by at most 2 / 4^2 = 1/8,
  that in e and e0 moves it by sqrt(2 / 32) / 4 = 0.06 (one standard deviation, 32 tokens): 1/2 is
  far from either verdict. (Stale is also said only of an engine that moved less than half as far as
  the trainer; one that went elsewhere is left to the limit.) Until then the anchor stays, so that
  updates too small to be seen one by one add up against it: a stale engine can go on no longer than
  its log-probs remain within four times the noise of the right ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from grpo_engine.generation.engine import Engine
from grpo_engine.kernels import linear_logprobs
from grpo_engine.policy import Policy
from grpo_engine.types import GenerationRequest, GeneratorError, SamplingParams

# Mean absolute difference of log-probs, nats; see above.
LIMITS = {torch.float32: 1e-3, torch.float16: 0.04, torch.bfloat16: 0.3}
FLOOR = 0.01  # of the limit: noise is never taken to be less
SHARP = 4.0
MIN_TOKENS = 32  # fewer drawn both times: the engine has moved
SHORT_PROMPTS, LONG_PROMPTS = 14, 2  # the long ones fill blocks of the prefix cache
LONG_PROMPT_TOKENS = 160  # vLLM's largest block is 128 tokens, on a CPU
NEW_TOKENS = 8


@dataclass(frozen=True)
class Reading:
    """What engine and trainer said of the canary's tokens at one version."""

    version: int
    completions: list[list[int]]
    engine: Tensor  # [n] fp64 log-probs, completion after completion
    trainer: Tensor  # [n] fp64

    @property
    def differences(self) -> Tensor:
        return self.engine - self.trainer

    def rows_shared_with(self, other: Reading) -> tuple[Tensor, Tensor]:
        """Positions, here and there, of the tokens that both drew after the same tokens."""
        ours, theirs, start, other_start = [], [], 0, 0
        for mine, its in zip(self.completions, other.completions, strict=True):
            shared = 0
            while shared < min(len(mine), len(its)) and mine[shared] == its[shared]:
                shared += 1
            ours += range(start, start + shared)
            theirs += range(other_start, other_start + shared)
            start, other_start = start + len(mine), other_start + len(its)
        return torch.tensor(ours, dtype=torch.long), torch.tensor(theirs, dtype=torch.long)


class Canary:
    """The fixed prompts of ``policy``, and what was seen at earlier versions."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.anchor: Reading | None = None
        self.last: Reading | None = None

    def check(self, engine: Engine, version: int) -> dict[str, float]:
        """Compare after an update to ``version``; returns the differences as metrics.

        Raises GeneratorError where the engine samples from other weights than the policy's.
        """
        reading = self._read(engine, version)
        self.last = reading
        dtype, precision = self._precision(engine)
        limit = LIMITS[dtype]
        if reading.differences.isfinite().all():
            self._require_moved(reading, limit)
        mean = reading.differences.abs().mean().item()
        largest = reading.differences.abs().max().item()
        if not mean <= limit:  # a NaN fails too
            raise GeneratorError(
                f"weights: after version {version} was loaded, the engine's log-probs of "
                f"{len(reading.engine)} fixed tokens differ from the trainer's by {mean:.3g} on "
                f"average (largest {largest:.3g}, limit {limit:g} in {precision}): it does not "
                "sample from the trainer's weights"
            )
        return {"sync/logp_difference_mean": mean, "sync/logp_difference_max": largest}

    def _require_moved(self, now: Reading, limit: float) -> None:
        """Raise for an engine that stands where it stood at the anchor; move the anchor on."""
        before = self.anchor
        if before is None:
            self.anchor = now
            return
        rows, rows_before = now.rows_shared_with(before)
        if len(rows) < min(MIN_TOKENS, len(before.engine)):
            self.anchor = now
            return
        moved = now.trainer[rows] - before.trainer[rows_before]
        followed = now.engine[rows] - before.engine[rows_before]
        noise = max(_rms(before.differences), FLOOR * limit)
        if _rms(moved) < SHARP * noise:
            return
        slope = (followed.dot(moved) / moved.dot(moved)).item()
        if slope >= 0.5:
            self.anchor = now
        elif _rms(followed) < _rms(moved) / 2:
            raise GeneratorError(
                f"weights: version {now.version} was loaded, but the engine still samples from an "
                f"older one: since version {before.version} the log-probs of {len(rows)} fixed "
                f"tokens moved by {_rms(moved):.3g} in the trainer and by {_rms(followed):.3g} in "
                "the engine"
            )

    def _read(self, engine: Engine, version: int) -> Reading:
        prompts = self._prompts(engine)
        requests = [GenerationRequest(ids, seed) for seed, ids in enumerate(prompts)]
        drawn = engine.generate(requests, SamplingParams(max_completion_length=NEW_TOKENS))
        completions = [generation.completion_ids for generation in drawn]
        says = [x for generation in drawn for x in generation.sampler_logprobs]
        trainer = self._logprobs(prompts, completions)
        return Reading(
            version, completions, torch.tensor(says, dtype=torch.float64), trainer.double().cpu()
        )

    def _prompts(self, engine: Engine) -> list[list[int]]:
        """Random ids, always the same; the long prompts share all but their last tokens."""
        config = self.policy.text_config
        room = min(engine.max_model_len, getattr(config, "max_position_embeddings", math.inf))
        long = max(1, min(LONG_PROMPT_TOKENS, int(room) - NEW_TOKENS - LONG_PROMPTS))
        lengths = [min(4 + i, long) for i in range(SHORT_PROMPTS)]
        ends = {*self.policy.eos_ids, self.policy.pad_id}
        plain = next(i for i in range(config.vocab_size) if i not in ends)
        drawn = torch.Generator().manual_seed(0)

        def ids(count: int) -> list[int]:
            some = torch.randint(0, config.vocab_size, (count,), generator=drawn).tolist()
            return [plain if i in ends else i for i in some]

        shared = ids(long)
        return [*(ids(n) for n in lengths), *(shared + ids(1 + i) for i in range(LONG_PROMPTS))]

    @torch.no_grad()
    def _logprobs(self, prompts: Sequence[list[int]], completions: Sequence[list[int]]) -> Tensor:
        """[n] fp32: the trainer's, from one packed forward of the policy as it is."""
        policy, head = self.policy, self.policy.head
        sequences = [p + c for p, c in zip(prompts, completions, strict=True)]
        lengths = [len(s) for s in sequences]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        rows = [
            torch.arange(len(prompt) - 1, length - 1) + start
            for prompt, length, start in zip(prompts, lengths, bounds.tolist(), strict=False)
        ]
        device = policy.device
        hidden = policy.hidden_states(
            torch.tensor(sum(sequences, []), device=device),
            torch.cat([torch.arange(n) for n in lengths]).to(device),
            bounds.to(device=device, dtype=torch.int32),
            max(lengths),
        )
        hidden = hidden.index_select(0, torch.cat(rows).to(device))
        with torch.autocast(device.type, enabled=False):  # the head in the dtype of its input
            return linear_logprobs(
                hidden,
                head.weight.to(hidden.dtype),
                torch.tensor(sum(completions, []), device=device),
                bias=None if head.bias is None else head.bias.to(hidden.dtype),
                logit_softcap=head.logit_softcap,
                logit_scale=head.logit_scale,
            )

    def _precision(self, engine: Engine) -> tuple[torch.dtype, str]:
        """The coarsest dtype that either side computes in, by its limit, and its name."""
        device = self.policy.device.type
        dtypes = {self.policy.dtype, engine.dtype}
        if torch.is_autocast_enabled(device):
            dtypes.add(torch.get_autocast_dtype(device))
        found = max(dtypes, key=_coarseness)
        if found != torch.float32:
            return found, str(found)[6:]
        found = max(trainer_products(device), engine.fp32_products, key=_coarseness)
        return found, {torch.float32: "float32", torch.float16: "TF32"}.get(found, "bf16 products")


def _coarseness(dtype: torch.dtype) -> float:
    return LIMITS.get(dtype, 0.0)


def trainer_products(device: str) -> torch.dtype:
    """What torch rounds the factors of fp32 matrix products to on ``device``; float16 stands for
    TF32. ``set_float32_matmul_precision`` and ``allow_tf32`` set the same."""
    backend = torch.backends.cuda if device == "cuda" else torch.backends.mkldnn
    rounded = {"tf32": torch.float16, "bf16": torch.bfloat16}
    return rounded.get(backend.matmul.fp32_precision, torch.float32)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()
