"""A weight sync against an engine in this process: what it sends, and that each way in which an
engine can end up with other weights is found out. With the real vLLM: test_vllm_sync.py."""

import contextlib
import copy
import gc
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from tiny_model import make_tiny_model

from grpo_engine.generation.canary import LIMITS, Canary, trainer_products
from grpo_engine.generation.engine import LoadedWeights
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.generation.shared_weights import (
    CHECKSUM_WORDS,
    PublishedWeights,
    ReceivedWeights,
    checksum,
    total_checksum,
)
from grpo_engine.generation.weight_sync import WeightSync, checkpoint_weights
from grpo_engine.policy import Policy
from grpo_engine.types import GeneratorError


class CopyEngine:
    """Samples from a copy of the policy that only weight updates change. ``fault`` names what goes
    wrong in ``update_weights``."""

    def __init__(
        self, policy: Policy, dtype: torch.dtype = torch.float32, max_model_len: int = 512
    ):
        self.policy = copy.copy(policy)
        self.policy.model = copy.deepcopy(policy.model).to(dtype)
        with torch.no_grad():  # an engine that starts with load_format=dummy
            for parameter in self.policy.model.parameters():
                parameter.zero_()
        self.dtype, self.max_model_len, self.fault = dtype, max_model_len, None
        self.fp32_products = torch.float32
        self.finest = self.seen = None
        self.generator = HFGenerator(self.policy)

    def generate(self, requests, sampling, *, on_batch=None):
        return self.generator.generate(requests, sampling, on_batch=on_batch)

    @torch.no_grad()
    def update_weights(self, update):
        received = ReceivedWeights(update.memory, update.version)
        ours = dict(self.policy.model.named_parameters())
        self.seen = {place.name: place.dtype for place in received.places}
        for name, tensor in received:
            if self.fault == "corrupted" and name.endswith("layers.1.mlp.up_proj.weight"):
                tensor = tensor.clone()
                tensor.view(-1)[5] += 1
                received.checksums[name] = checksum(tensor)
            if self.fault == "stale tensor" and name.endswith("layers.1.mlp.up_proj.weight"):
                received.checksums[name] = checksum(ours[name])
                continue
            if self.fault == "missing tensor" and name.endswith("layers.1.mlp.up_proj.weight"):
                del received.checksums[name]
                continue
            if self.fault != "skipped":
                ours[name].copy_(tensor)
        if self.fault != "no reply":
            received.reply(0, 2 if self.fault == "one rank of two" else 1, self.finest)
        received.close()
        version = update.version - 1 if self.fault == "wrong version" else update.version
        return LoadedWeights(version)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture
def policy(folder):
    return Policy.load(str(folder), device="cpu")


@torch.no_grad()
def train(policy, size, seed=0):
    """Stands for an update: Adam moves each weight by about the learning rate ``size``."""
    drawn = torch.Generator().manual_seed(seed)
    for parameter in policy.weights().values():
        parameter.add_(torch.randn(parameter.shape, generator=drawn), alpha=size)


@pytest.fixture
def lively(policy):
    """At its first size the model's distribution is flat, whatever its weights are."""
    with torch.no_grad():
        for parameter in policy.model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return policy


# -- the memory ----------------------------------------------------------------------------------

ODD = {
    "fp32": torch.arange(-7, 8, dtype=torch.float32),
    "bf16": torch.linspace(-3, 3, 33, dtype=torch.bfloat16).view(3, 11),
    "transposed": torch.randn(5, 7).T,
    "slice": torch.randn(9)[1:4],
    "ids": torch.arange(5),
    "one": torch.tensor(2.5),
    "none": torch.empty(0, 3),
    "parameter": torch.nn.Parameter(torch.randn(4, 4)),
}


def published(tensors=ODD, version=3, **options):
    weights = PublishedWeights(tensors, version, **options)
    return weights, ReceivedWeights(weights.path, version)


def test_tensors_arrive_as_they_are():
    weights, received = published()
    arrived = dict(received)
    assert list(arrived) == list(ODD)
    for name, tensor in ODD.items():
        assert arrived[name].dtype == tensor.dtype and arrived[name].shape == tensor.shape
        assert torch.equal(arrived[name], tensor.detach())
    assert received.checksums == weights.checksums
    assert weights.nbytes >= sum(t.numel() * t.itemsize for t in ODD.values())


def test_floating_tensors_are_published_in_the_engines_dtype():
    weights, received = published(dtype=torch.bfloat16)
    arrived = dict(received)
    assert arrived["fp32"].dtype == torch.bfloat16 and arrived["ids"].dtype == torch.int64
    assert torch.equal(arrived["transposed"], ODD["transposed"].bfloat16())
    assert received.checksums == weights.checksums


def test_replies_come_back_by_rank():
    weights, received = published()
    assert weights.replies() == []
    list(received)
    received.reply(0, 2)
    ReceivedWeights(weights.path, 3).reply(1, 2)  # has read nothing
    first, second = weights.replies()
    assert (first.rank, first.ranks, first.version) == (0, 2, 3) and second.rank == 1
    assert first.checksums == weights.checksums and second.checksums == {}


def test_the_memory_can_be_read_after_the_trainer_has_let_go():
    weights, received = published()
    weights.close()
    assert torch.equal(dict(received)["ids"], ODD["ids"])
    with pytest.raises(RuntimeError, match="cannot be opened"):
        ReceivedWeights(weights.path, 3)


def test_a_path_that_holds_something_else_is_refused(tmp_path):
    weights, _ = published()
    with pytest.raises(RuntimeError, match="holds the weights of version 3, not of 4"):
        ReceivedWeights(weights.path, 4)
    other = tmp_path / "other"
    other.write_bytes(b"something else" * 9)
    with pytest.raises(RuntimeError, match="does not hold weights"):
        ReceivedWeights(str(other), 4)


CRASH = """
import os, signal, torch
from grpo_engine.generation.shared_weights import PublishedWeights
weights = PublishedWeights({"w": torch.ones(1 << 20)}, 1)
print(weights.path, os.path.exists(weights.path), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_nothing_is_left_after_a_crash_of_the_trainer():
    before = set(os.listdir("/dev/shm"))
    done = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True)
    path, existed = done.stdout.split()
    assert done.returncode == -9 and existed == "True"
    assert not os.path.exists(path)
    assert set(os.listdir("/dev/shm")) <= before


def reference_checksum(tensor):
    """The definition, in Python's integers."""
    octets = bytes(tensor.contiguous().view(-1).view(torch.uint8).tolist())
    octets += bytes(-len(octets) % 8)
    words = [
        int.from_bytes(octets[i : i + 8], "little", signed=True) for i in range(0, len(octets), 8)
    ]
    plain = sum(words) % 2**64
    weighted = sum((2 * i + 1) * w for i, w in enumerate(words)) % 2**64
    return f"{plain:016x}{weighted:016x}"


@pytest.mark.parametrize("name", ODD)
def test_the_checksum_is_its_definition(name):
    assert checksum(ODD[name]) == reference_checksum(ODD[name].detach())


def test_the_checksum_of_many_chunks(monkeypatch):
    tensor = torch.randn(2 * 50 + 1)
    monkeypatch.setitem(CHECKSUM_WORDS, "cpu", 7)
    assert checksum(tensor) == reference_checksum(tensor)


def test_the_checksum_sees_a_flipped_bit_and_a_swap():
    tensor = torch.randn(1001)
    before = checksum(tensor)
    for place in (0, 500, 1000):
        flipped = tensor.clone()
        flipped.view(torch.int32)[place] ^= 1
        assert checksum(flipped) != before
    swapped = tensor.clone()
    swapped[:4] = tensor[[2, 3, 0, 1]]  # whole words
    assert checksum(swapped) != before
    assert total_checksum({"a": "1", "b": "2"}) != total_checksum({"a": "2", "b": "1"})


# -- the sync ----------------------------------------------------------------------------------


@dataclass
class Pair:
    """A policy, an engine that holds its weights since version 0, and the sync between them."""

    policy: Policy
    engine: CopyEngine
    sync: WeightSync


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def synced(lively, request):
    engine, sync = CopyEngine(lively, request.param), WeightSync(lively)
    sync.sync(engine, 0)
    return Pair(lively, engine, sync)


def test_a_sync_brings_the_weights_and_says_what_it_cost(lively):
    engine, sync = CopyEngine(lively), WeightSync(lively)
    row = sync.sync(engine, 5)
    ours = dict(engine.policy.model.named_parameters())
    assert all(torch.equal(ours[n], p) for n, p in lively.model.named_parameters())
    assert row["sync/bytes"] >= sum(p.numel() * 4 for p in ours.values())
    assert row["sync/seconds"] > 0 and row["sync/canary_seconds"] > 0
    assert row["sync/logp_difference_mean"] < 1e-6
    assert sync.method == "native"


@pytest.mark.parametrize("size", [1e-6, 1e-4, 1e-2, 0.1])
def test_a_right_sync_passes_however_small_the_update(synced, size):
    for version in range(1, 9):
        train(synced.policy, size, seed=version)
        row = synced.sync.sync(synced.engine, version)
        assert row["sync/logp_difference_mean"] < LIMITS[synced.engine.dtype] / 2


def test_a_right_sync_of_unchanged_weights_passes(synced):
    for version in range(1, 4):
        synced.sync.sync(synced.engine, version)
    assert synced.sync.canary.anchor.version == 0  # nothing to tell versions apart by


FAULTS = {
    "corrupted": "loaded other bytes of model.layers.1.mlp.up_proj.weight than",
    "stale tensor": "loaded other bytes of model.layers.1.mlp.up_proj.weight than",
    "missing tensor": "did not load model.layers.1.mlp.up_proj.weight of version 1",
    "wrong version": "version 1 was sent, the engine reports 0",
    "no reply": "version 1 was sent, but the engine does not say that it loaded it",
    "one rank of two": r"version 1 was sent, but only ranks \[0\] of the engine's 2",
    "skipped": "version 1 was loaded, but the engine still samples from an older one",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found_at_the_sync_where_they_happen(synced, fault):
    train(synced.policy, 0.05)
    synced.engine.fault = fault
    with pytest.raises(GeneratorError, match=FAULTS[fault]):
        synced.sync.sync(synced.engine, 1)


def test_an_engine_that_never_loaded_anything_is_found_at_the_first_sync(lively):
    engine = CopyEngine(lively)
    engine.fault = "skipped"
    with pytest.raises(GeneratorError, match="does not sample from the trainer's weights"):
        WeightSync(lively).sync(engine, 0)


def test_skipped_loads_of_tiny_updates_add_up(synced):
    """Each is below what can be seen, in fp32 too; the anchor stays until they can."""
    synced.engine.fault = "skipped"
    size = 1e-6 if synced.engine.dtype == torch.float32 else 3e-4
    with pytest.raises(GeneratorError, match="since version 0 .* in the trainer and by 0 in the"):
        for version in range(1, 200):
            train(synced.policy, size, seed=version)
            synced.sync.sync(synced.engine, version)
    assert 1 < version < 100
    assert synced.sync.canary.last.differences.abs().mean() < LIMITS[synced.engine.dtype]


def test_a_tensor_that_was_read_but_not_loaded_is_seen_by_the_canary(lively):
    engine, sync = CopyEngine(lively), WeightSync(lively)
    sync.sync(engine, 0)
    train(lively, 0.02)
    head = engine.policy.head.weight
    stale = head.detach().clone()
    update = engine.update_weights

    def forgets_the_head(sent):
        answer = update(sent)
        with torch.no_grad():
            head.copy_(stale)
        return answer

    engine.update_weights = forgets_the_head
    with pytest.raises(GeneratorError, match="1 was loaded, but|after version 1 was loaded"):
        sync.sync(engine, 1)


def test_the_limit_follows_the_coarsest_dtype_of_the_two_sides(lively):
    engine, sync = CopyEngine(lively, torch.bfloat16), WeightSync(lively)
    assert sync.canary._precision(engine) == (torch.bfloat16, "bfloat16")
    engine.dtype = torch.float32
    assert sync.canary._precision(engine) == (torch.float32, "float32")
    with torch.autocast("cpu", torch.bfloat16):
        assert sync.canary._precision(engine) == (torch.bfloat16, "bfloat16")
        seen = sync.sync(CopyEngine(lively), 0)["sync/logp_difference_mean"]
    assert 1e-4 < seen < LIMITS[torch.bfloat16]  # the trainer rounds, the engine does not


@pytest.fixture
def products():
    """Sets torch's precision of fp32 products; puts it back."""
    yield
    torch.set_float32_matmul_precision("highest")
    for settings in (torch.backends, torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        settings.fp32_precision = "none"
    assert torch.backends.cuda.matmul.allow_tf32 is False


def by_the_older_name():
    torch.backends.cuda.matmul.allow_tf32 = True


def for_all_at_once():
    torch.backends.fp32_precision = "tf32"


@pytest.mark.parametrize(
    ("allow", "on_cuda", "on_cpu"),
    [
        (lambda: None, torch.float32, torch.float32),
        (by_the_older_name, torch.float16, torch.float32),
        (for_all_at_once, torch.float16, torch.float16),
        (lambda: torch.set_float32_matmul_precision("high"), torch.float16, torch.float16),
        (lambda: torch.set_float32_matmul_precision("medium"), torch.float16, torch.bfloat16),
    ],
)
def test_the_products_of_the_trainer_are_known_by_torchs_settings(products, allow, on_cuda, on_cpu):
    allow()
    assert (trainer_products("cuda"), trainer_products("cpu")) == (on_cuda, on_cpu)


@pytest.mark.parametrize("side", [None, "trainer", "engine"])
def test_tf32_on_either_side_is_no_other_weights(lively, products, side):
    """Differences of 0.01, as rounded factors may make them."""
    engine, sync = CopyEngine(lively), WeightSync(lively)
    generate = engine.generate

    def off(requests, sampling, *, on_batch=None):
        drawn = generate(requests, sampling)
        for number, one in enumerate(drawn):
            one.sampler_logprobs[:] = [x + 0.01 * (-1) ** number for x in one.sampler_logprobs]
        return drawn

    engine.generate = off
    if side == "trainer":
        torch.backends.mkldnn.matmul.fp32_precision = "tf32"
    if side == "engine":
        engine.fp32_products = torch.float16
    if side:
        assert 0.005 < sync.sync(engine, 0)["sync/logp_difference_mean"] < 0.015
        engine.fault = "skipped"
        train(lively, 0.2)
        words = "still samples from an older one|limit 0.04 in TF32"
    else:
        words = "limit 0.001 in float32"
    with pytest.raises(GeneratorError, match=words):
        sync.sync(engine, 1)


@pytest.mark.parametrize("version", [0, 1])
def test_an_engine_that_answers_nan_is_found(lively, version):
    engine, sync = CopyEngine(lively), WeightSync(lively)
    if version:
        sync.sync(engine, 0)
        train(lively, 0.02)
    generate = engine.generate

    def nan(requests, sampling, *, on_batch=None):
        drawn = generate(requests, sampling)
        drawn[3].sampler_logprobs[0] = float("nan")
        return drawn

    engine.generate = nan
    with pytest.raises(GeneratorError, match="differ from the trainer's by nan"):
        sync.sync(engine, version)


@pytest.mark.parametrize("finest", [None, torch.bfloat16, torch.float32])
def test_weights_are_rounded_only_for_an_engine_that_rounds_all_of_them(lively, finest):
    """One that keeps a norm in fp32, say, is sent what the trainer has, from the first sync on."""
    engine, sync = CopyEngine(lively, torch.bfloat16), WeightSync(lively)
    engine.finest, wide = finest, finest == torch.float32
    first, second = sync.sync(engine, 0)["sync/bytes"], sync.sync(engine, 1)["sync/bytes"]
    assert set(engine.seen.values()) == {"float32" if wide else "bfloat16"}
    assert first == pytest.approx(1.5 * second if wide else second, rel=0.01)
    sync.close()
    engine.finest = torch.bfloat16  # another engine
    sync.sync(engine, 2)
    assert set(engine.seen.values()) == {"bfloat16"}


def test_nothing_of_a_sync_stays_open(lively):
    engine, sync = CopyEngine(lively), WeightSync(lively)
    sync.sync(engine, 0)
    before, mapped = descriptors(), mappings()
    for version, fault in enumerate(["corrupted", None, "no reply"], 1):
        engine.fault = fault
        try:
            sync.sync(engine, version)
        except GeneratorError:
            assert fault
        assert descriptors() <= before
    assert mappings() == mapped


def descriptors() -> set[tuple[str, str]]:
    """Number and target of each open one. Those an earlier test left to the collector may go."""
    found, folder = set(), Path("/proc/self/fd")
    for number in os.listdir(folder):
        with contextlib.suppress(FileNotFoundError):  # the one that listed the folder
            found.add((number, os.readlink(folder / number)))
    return found


def mappings() -> int:
    """Of published weights, in this process; those of a failed test's traceback go with it."""
    gc.collect()
    return Path("/proc/self/maps").read_text().count("grpo-engine-weights")


def test_the_canarys_prompts_fit_the_engine(policy):
    canary = Canary(policy)
    for room in (12, 64, 512):
        prompts = canary._prompts(CopyEngine(policy, max_model_len=room))
        assert len(prompts) == 16 and max(map(len, prompts)) + 8 <= room
        assert all(prompts) and not {i for p in prompts for i in p} & {*policy.eos_ids}
        assert prompts == canary._prompts(CopyEngine(policy, max_model_len=room))
    assert max(map(len, prompts)) > 128  # fills a block of any prefix cache


def test_every_weight_goes_under_its_name_in_a_checkpoint(folder, policy, tmp_path):
    from safetensors.torch import load_file

    policy.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    named = checkpoint_weights(policy)
    assert named.keys() == saved.keys()  # the tied head once
    assert all(torch.equal(named[n], saved[n]) for n in saved)


# -- LoRA ----------------------------------------------------------------------------------


class AdapterEngine(CopyEngine):
    """Applies an adapter as peft does; ``sent`` names what came."""

    def __init__(self, policy: Policy):
        super().__init__(policy)
        self.policy.adapter = copy.copy(policy.adapter)
        self.policy.adapter.model = self.policy.model
        modules = dict(self.policy.model.named_modules())
        self.policy.adapter.layers = {n: modules[n] for n in policy.adapter.layers}
        self.sent: list[str] = []
        self.how = ("native", True)  # it loads the base, and whether it replies

    @torch.no_grad()
    def update_weights(self, update):
        self.sent.append("adapter" if update.adapter else "base")
        received = ReceivedWeights(update.memory, update.version)
        named = dict(received)
        if update.adapter:
            assert '"r": 4' in received.adapter_config
            targets = self.policy.adapter.file_tensors()
        else:
            targets = {
                n.replace(".base_layer.", "."): p
                for n, p in self.policy.model.named_parameters()
                if ".lora_" not in n
            }
        for name, tensor in named.items():
            targets[name].copy_(tensor)
        received.reply()
        method, replied = self.how
        return LoadedWeights(update.version, "lora" if update.adapter else method, replied)


def test_with_lora_the_base_goes_once_and_the_adapter_at_every_sync(folder):
    pytest.importorskip("peft")
    from grpo_engine.lora import LoraOptions

    policy = Policy.load(str(folder), device="cpu", lora=LoraOptions(4))
    engine, sync = AdapterEngine(policy), WeightSync(policy)
    first = sync.sync(engine, 0)
    train(policy, 0.1)
    second = sync.sync(engine, 1)
    assert engine.sent == ["base", "adapter", "adapter"]
    assert second["sync/bytes"] < first["sync/bytes"] / 2
    assert second["sync/logp_difference_mean"] < 1e-6 and sync.method == "lora"
    assert sync.notes == []
    sync.close()  # the next engine has no base yet
    engine.sent.clear()
    sync.sync(engine, 2)
    assert engine.sent == ["base", "adapter"]


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (("reload_weights", True), ["this version has no interface for new weights"]),
        (("native", False), ["the server cannot say what it has read of an adapter"]),
    ],
)
def test_what_stood_in_for_the_usual_way_is_said_once(folder, how, words):
    pytest.importorskip("peft")
    from grpo_engine.lora import LoraOptions

    policy = Policy.load(str(folder), device="cpu", lora=LoraOptions(4))
    engine, sync = AdapterEngine(policy), WeightSync(policy)
    engine.how = how
    for version in range(3):
        sync.sync(engine, version)
    assert len(sync.notes) == len(words) and words[0] in sync.notes[0]
