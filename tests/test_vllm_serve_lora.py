"""LoRA against the real `vllm serve`: the adapter is sent, and the base weights only once."""

import pytest
import torch
from real_vllm_server import serve

from grpo_engine.generation.hf import HFGenerator
from grpo_engine.generation.weight_sync import WeightSync
from grpo_engine.lora import LoraOptions
from grpo_engine.policy import Policy
from grpo_engine.types import GenerationRequest, SamplingParams

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def names_of(engine):
    """Of the models that the server serves."""
    return [model["id"] for model in engine._service.call("/v1/models", seconds=60)["data"]]


def test_each_sync_replaces_the_adapter_that_the_server_samples_with(tmp_path):
    policy = Policy.load("miniature", device="cpu", lora=LoraOptions(8))
    requests = [GenerationRequest([5 + i, 40, 7], i) for i in range(6)]
    greedy, seen = SamplingParams(24, top_k=1), []
    with serve(policy, tmp_path, max_model_len=512, lora_rank=8) as (server, options):
        engine, sync = server.connect(policy, options), WeightSync(policy)
        for version in range(3):
            metrics = sync.sync(engine, version)
            assert metrics["sync/logp_difference_mean"] < 1e-4
            drawn = engine.generate(requests, greedy)
            expected = HFGenerator(policy).generate(requests, greedy)
            seen.append([d.completion_ids for d in drawn])
            assert seen[-1] == [e.completion_ids for e in expected]
            with torch.no_grad():
                for weight in policy.weights().values():
                    weight += 0.05 * torch.randn(weight.shape)
        base, adapter = names_of(engine)
        assert "grpo-engine-2" in adapter
        engine.close()
        assert names_of(engine) == [base]
    assert seen[0] != seen[1] != seen[2]
