"""Weight syncs into the real vLLM: log-probs equal the trainer's afterwards, and injected faults
are caught."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from grpo_engine.generation import vllm_transfer, weight_sync
from grpo_engine.generation.canary import LIMITS
from grpo_engine.generation.shared_weights import ReceivedWeights, write_adapter
from grpo_engine.generation.weight_sync import WeightSync, checkpoint_weights
from grpo_engine.lora import LoraOptions
from grpo_engine.policy import Policy
from grpo_engine.types import Generation, GeneratorError

pytestmark = pytest.mark.vllm

SIZES = dict(
    vocab_size=300,
    hidden_size=128,
    intermediate_size=192,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    eos_token_id=1,
    pad_token_id=0,
    bos_token_id=None,
)
FAMILIES = {
    "qwen2-tied": (Qwen2ForCausalLM, Qwen2Config, True),
    "llama-tied": (LlamaForCausalLM, LlamaConfig, True),
    "llama-untied": (LlamaForCausalLM, LlamaConfig, False),
}


class InProcess:
    """vLLM in this process, as an Engine; the worker process of test_vllm.py is left out."""

    max_model_len = SIZES["max_position_embeddings"]
    fp32_products = torch.float32
    notes = ()

    def __init__(self, policy, folder, **options):
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        vllm_transfer.register()
        policy.model.config.save_pretrained(folder)
        self.dtype = options.pop("dtype", policy.dtype)
        self.llm = LLM(
            model=str(folder),
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=str(self.dtype)[6:],
            enforce_eager=True,
            max_model_len=self.max_model_len,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            enable_prefix_caching=True,
            weight_transfer_config={"backend": vllm_transfer.BACKEND},
            **options,
        )
        self.loader = vllm_transfer.WeightLoader(self.llm)

    def generate(self, requests, sampling, *, on_batch=None):
        from vllm import SamplingParams

        params = [
            SamplingParams(
                max_tokens=sampling.max_completion_length,
                temperature=sampling.temperature,
                logprobs=0,
                seed=request.seed,
                ignore_eos=True,
                detokenize=False,
            )
            for request in requests
        ]
        outputs = self.llm.generate(
            [{"prompt_token_ids": request.prompt_ids} for request in requests],
            params,
            use_tqdm=False,
            lora_request=self.loader.lora_request,
        )
        self.cached_tokens = [output.num_cached_tokens for output in outputs]
        drawn = [output.outputs[0] for output in outputs]
        return [
            Generation(
                list(one.token_ids),
                [row[i].logprob for row, i in zip(one.logprobs, one.token_ids, strict=True)],
                "length",
            )
            for one in drawn
        ]

    def update_weights(self, update):
        return self.loader.load(update)


def make_policy(family="qwen2-tied", dtype=torch.float32, **options):
    kind, config, tied = FAMILIES[family]
    torch.manual_seed(0)
    model = kind(config(tie_word_embeddings=tied, **SIZES))
    model.config.architectures = [kind.__name__]
    with torch.no_grad():  # at its first size the distribution is flat, whatever the weights are
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(3)
    model.config.dtype = dtype
    return Policy(model.to(dtype), **options)


@torch.no_grad()
def train(policy, size, seed=0):
    """Stands for an update: Adam moves each weight by about the learning rate ``size``."""
    drawn = torch.Generator().manual_seed(seed)
    for parameter in policy.weights().values():
        parameter.add_(
            torch.randn(parameter.shape, generator=drawn).to(parameter.dtype), alpha=size
        )


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    policy = make_policy(request.param)
    return policy, InProcess(policy, tmp_path_factory.mktemp("config"))


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    policy = make_policy()
    return policy, InProcess(policy, tmp_path_factory.mktemp("config"))


@pytest.fixture
def synced(shared):
    """A policy, an engine that holds its weights, and the sync between them."""
    policy, engine = shared
    sync = WeightSync(policy)
    sync.sync(engine, 0)
    return policy, engine, sync


def test_log_probs_are_the_trainers_after_every_sync(family):
    policy, engine = family
    sync = WeightSync(policy)
    for version in range(4):
        seen = sync.sync(engine, version)
        assert seen["sync/logp_difference_mean"] < 1e-5
        assert sync.canary.anchor.version == version
        train(policy, 1e-2, seed=version)
    assert sync.method == "native" and engine.llm.get_weight_version() == "3"


def test_a_right_sync_passes_however_small_the_update(synced):
    policy, engine, sync = synced
    for version in range(1, 7):
        train(policy, 1e-6, seed=version)
        sync.sync(engine, version)


def test_the_canary_goes_through_the_prefix_cache(synced):
    _, engine, sync = synced
    sync.canary.check(engine, 0)
    assert max(engine.cached_tokens) >= 128
    sync.sync(engine, 1)
    assert engine.cached_tokens[0] == 0 and engine.cached_tokens[-2] == 0  # dropped by the sync


# -- injected faults ------------------------------------------------------------------------------


def flip_a_byte(monkeypatch, engine):
    def corrupted(path, version):
        received = ReceivedWeights(path, version)
        place = next(p for p in received.places if p.name == UP)
        received._memory[place.offset + 5] ^= 64
        return received

    monkeypatch.setattr(vllm_transfer, "ReceivedWeights", corrupted)


def skip_the_load(monkeypatch, engine):
    """Everything was read, nothing loaded; version, checksums and count are right."""
    monkeypatch.setattr(vllm_transfer, "load_all", lambda model, received, names: list(received))


def lose_a_tensor(monkeypatch, engine):
    """Read, and dropped between the memory and the model."""
    plain = vllm_transfer.load_all

    class Without:
        def __init__(self, received):
            self.received, self.version = received, received.version

        def __iter__(self):
            return (pair for pair in self.received if pair[0] != UP)

    def load_the_rest(model, received, names):
        plain(model, Without(received), names)

    monkeypatch.setattr(vllm_transfer, "load_all", load_the_rest)


def keep_the_prefix_cache(monkeypatch, engine):
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: True)


def leave_the_tied_head(monkeypatch, engine):
    """vLLM 0.32 on a CPU as it is. Passes without this fault once vLLM repacks the head itself."""
    monkeypatch.setattr(vllm_transfer, "repack_tied_heads", lambda model: None)


def report_another_version(monkeypatch, engine):
    monkeypatch.setattr(engine.llm, "get_weight_version", lambda: "0")


UP = "model.layers.1.mlp.up_proj.weight"
OLDER, OTHER = "still samples from an older one", "does not sample from the trainer's weights"
FAULTS = {
    flip_a_byte: f"loaded other bytes of {UP} than",
    skip_the_load: f"version 1 was loaded, but the engine {OLDER}",
    lose_a_tensor: f"{OLDER}|{OTHER}",
    keep_the_prefix_cache: f"{OLDER}|{OTHER}",
    leave_the_tied_head: f"{OLDER}|{OTHER}",
    report_another_version: "version 1 was sent, the engine reports 0",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_an_injected_fault_is_found(synced, monkeypatch, fault):
    policy, engine, sync = synced
    train(policy, 0.02)
    fault(monkeypatch, engine)
    with pytest.raises(GeneratorError, match=FAULTS[fault]):
        sync.sync(engine, 1)
    monkeypatch.undo()
    sync.close()
    sync.sync(engine, 2)  # nothing of it stays


def without_the_norm(named):
    named.pop("model.norm.weight")


def of_another_shape(named):
    """v, after q and k have been given to the layer that holds all three."""
    name = "model.layers.1.self_attn.v_proj.weight"
    named[name] = named[name][:40]


def too_narrow(named):
    named[DOWN] = named[DOWN][:, :100]


DOWN = "model.layers.0.mlp.down_proj.weight"
REFUSALS = {
    without_the_norm: "has nothing for 1 of the model's .* such as model.norm.weight",
    of_another_shape: r"layers.1.self_attn.v_proj.weight \(40, 128\) of version 1 does not fit",
    too_narrow: r"layers.0.mlp.down_proj.weight \(128, 100\) of version 1 does not fit the model",
}


@pytest.mark.parametrize("damage", REFUSALS, ids=lambda damage: damage.__name__)
def test_what_the_model_cannot_take_is_refused_and_the_next_update_starts_anew(
    synced, monkeypatch, damage
):
    policy, engine, sync = synced
    damaged = checkpoint_weights(policy)
    damage(damaged)
    monkeypatch.setattr(weight_sync, "checkpoint_weights", lambda policy: damaged)
    with pytest.raises(RuntimeError, match=REFUSALS[damage]):
        sync.sync(engine, 1)
    monkeypatch.undo()
    train(policy, 0.02)
    sync.sync(engine, 2)


def test_a_prefix_cache_that_vllm_does_not_drop_is_an_error(synced, monkeypatch):
    _, engine, sync = synced
    monkeypatch.setattr(engine.llm, "reset_prefix_cache", lambda: False)
    with pytest.raises(RuntimeError, match="prefix cache of the old weights could not be dropped"):
        sync.sync(engine, 1)


def test_a_vllm_without_the_three_calls_reloads(synced, monkeypatch):
    from vllm.entrypoints.rl.offline import RLOfflineMixin

    policy, engine, sync = synced
    monkeypatch.delattr(RLOfflineMixin, "start_weight_update")
    monkeypatch.setattr(engine, "loader", vllm_transfer.WeightLoader(engine.llm))
    train(policy, 0.02)
    sync.sync(engine, 1)
    assert sync.method == "reload_weights" and sync.canary.anchor.version == 1


# -- bf16, LoRA ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    policy = make_policy()
    folder = tmp_path_factory.mktemp("config")
    return policy, InProcess(policy, folder, dtype=torch.bfloat16)


def test_a_bf16_engine_beside_fp32_weights(half, monkeypatch):
    policy, engine = half
    sync = WeightSync(policy)
    for version in range(6):
        seen = sync.sync(engine, version)
        assert seen["sync/logp_difference_mean"] < LIMITS[torch.bfloat16] / 2
        assert seen["sync/bytes"] < 2.1 * sum(p.numel() for p in policy.weights().values())
        train(policy, 1e-6, seed=version)
    train(policy, 0.02)
    skip_the_load(monkeypatch, engine)
    with pytest.raises(GeneratorError, match=OLDER):
        sync.sync(engine, 6)


def test_what_the_engine_keeps_in_fp32_reaches_it_unrounded(tmp_path):
    """In a process of its own: vLLM makes room for experts with the first model of a process."""
    code = "import sys, test_vllm_sync; test_vllm_sync.sync_a_router(sys.argv[1])"
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def sync_a_router(folder):
    """That of GLM-4, in a bf16 engine beside fp32 weights."""
    torch.manual_seed(0)
    experts = dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)
    model = Glm4MoeForCausalLM(
        Glm4MoeConfig(**SIZES, **experts, moe_intermediate_size=64, head_dim=32)
    )
    model.config.architectures, model.config.dtype = ["Glm4MoeForCausalLM"], torch.float32
    bias = model.model.layers[1].mlp.gate.e_score_correction_bias
    bias.copy_(torch.randn(4))
    policy = Policy(model)
    engine, sync = InProcess(policy, folder, dtype=torch.bfloat16), WeightSync(policy)
    for version in range(2):
        seen = sync.sync(engine, version)
        (there,) = engine.llm.apply_model(bias_of)
        assert there.dtype == torch.float32 and torch.equal(there, bias)
        bias.mul_(1.01)
    assert not torch.equal(bias, bias.bfloat16())  # or it shows nothing
    assert seen["sync/bytes"] >= sum(4 * p.numel() for p in model.parameters())


def bias_of(model):
    return model.model.layers[1].mlp.gate.e_score_correction_bias.detach().clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lora_goes_as_an_adapter(tmp_path, monkeypatch, dtype):
    pytest.importorskip("peft")
    folders = []
    monkeypatch.setattr(
        vllm_transfer, "write_adapter", lambda r, f: (folders.append(f), write_adapter(r, f))
    )
    policy = make_policy("llama-tied", dtype, lora=LoraOptions(4))
    base = {name: p.clone() for name, p in checkpoint_weights(policy).items()}
    engine = InProcess(policy, tmp_path, enable_lora=True, max_lora_rank=8, max_loras=1)
    sync = WeightSync(policy)
    first = sync.sync(engine, 0)
    for version in range(1, 4):
        train(policy, 0.1, seed=version)
        seen = sync.sync(engine, version)
        assert seen["sync/logp_difference_mean"] < (1e-5 if dtype == torch.float32 else 0.05)
        assert seen["sync/bytes"] < first["sync/bytes"] / 4
        assert sync.canary.anchor.version == version  # moved with the adapter
    assert sync.method == "lora" and engine.llm.llm_engine.list_loras() == {4}
    assert len(folders) == 4 and not any(folder.exists() for folder in folders)
    assert all(torch.equal(p, base[name]) for name, p in checkpoint_weights(policy).items())
