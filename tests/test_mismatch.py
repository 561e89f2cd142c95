"""What is said of the gap between sampler and trainer, what it costs, and rollouts that are sampled
ahead. The engine here is a copy of the policy, so that its weights can be old or wrong."""

import copy
import json
import math
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_model import make_tiny_model, run_settings

from grpo_engine.checkpoint import list_checkpoints
from grpo_engine.config import build_config
from grpo_engine.generation.base import GeneratorError
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.grpo import GRPORun
from grpo_engine.metrics import health_warnings, read_metrics
from grpo_engine.mismatch import effective_share, mismatch_metrics
from grpo_engine.policy import Policy
from grpo_engine.report import write_report
from grpo_engine.rewards import RewardPool, RewardSpec
from grpo_engine.rollouts import Prompt
from grpo_engine.train import train_grpo
from grpo_engine.types import UserError

REWARD = """
def share_of_a(prompts, completions, **columns):
    return [completion.count("a") / max(1, len(completion)) for completion in completions]
"""


# -- the figures -----------------------------------------------------------------------------------


def test_the_figures_are_those_of_their_formulas():
    generator = torch.Generator().manual_seed(0)
    lengths = [3, 0, 5, 1]
    sampler = -torch.rand(9, generator=generator)
    ours = sampler + 0.3 * torch.randn(9, generator=generator)
    sampler[4] = math.nan  # not scored
    found = mismatch_metrics(ours, sampler, lengths)
    gaps = (ours.double() - sampler.double()).numpy()
    tokens = np.delete(gaps, 4)
    ratios = np.exp(tokens)
    sums = np.array([gaps[:3].sum(), np.nansum(gaps[3:8]), gaps[8]])
    weights = np.exp(sums)
    assert found == {
        "sampling/kl": pytest.approx(np.mean(ratios - 1 - tokens)),
        "sampling/logp_difference_max": pytest.approx(np.abs(tokens).max()),
        "sampling/importance_sampling_ratio_min": pytest.approx(ratios.min()),
        "sampling/importance_sampling_ratio_max": pytest.approx(ratios.max()),
        "sampling/ess_token": pytest.approx(ratios.sum() ** 2 / (8 * (ratios**2).sum())),
        "sampling/ess_sequence": pytest.approx(weights.sum() ** 2 / (3 * (weights**2).sum())),
    }


def test_equal_logprobs_differ_in_nothing():
    logprobs = -torch.rand(7)
    found = mismatch_metrics(logprobs, logprobs.clone(), [4, 3])
    assert found["sampling/kl"] == found["sampling/logp_difference_max"] == 0
    shares = [found["sampling/ess_token"], found["sampling/ess_sequence"]]
    assert shares == pytest.approx([1, 1], abs=1e-12)


def test_one_weight_above_all_leaves_one_sample():
    share = effective_share(torch.tensor([500.0, 0.0, 0.0, 0.0], dtype=torch.float64))
    assert float(share) == pytest.approx(1 / 4)


def test_what_was_not_scored_or_is_broken():
    nothing = torch.full((3,), math.nan)
    assert mismatch_metrics(torch.zeros(3), nothing, [3]) == {}
    found = mismatch_metrics(torch.tensor([0.0, -math.inf]), torch.tensor([-1.0, -1.0]), [2])
    assert found["sampling/logp_difference_max"] == math.inf
    huge = mismatch_metrics(torch.tensor([0.0]), torch.tensor([-1e30]), [1])
    assert all(math.isfinite(value) for value in huge.values())


@pytest.mark.parametrize(
    ("row", "rule", "words"),
    [
        ({"sampling/kl": 0.5}, "sampler-kl", "0.5 nats per token"),
        ({"sampling/ess_token": 0.4}, "sampler-ess", "40.0%"),
    ],
)
def test_alarms(row, rule, words):
    (sentence,) = health_warnings({"step": 5, **row}, [])
    assert sentence.startswith(f"{rule}: ") and words in sentence
    assert health_warnings({"step": 5, "sampling/kl": 1e-3, "sampling/ess_token": 0.99}, []) == []


def test_a_lost_update_shows_as_a_jump():
    """Long before the gap is large in itself."""
    calm = [{"sampling/kl": 1e-5}] * 10
    (sentence,) = health_warnings({"step": 11, "sampling/kl": 5e-3}, calm)
    assert sentence.startswith("sampler-kl: jumped to 0.005") and "500 times" in sentence
    assert health_warnings({"step": 11, "sampling/kl": 5e-5}, calm) == []
    assert health_warnings({"step": 11, "sampling/kl": 5e-3}, [{"sampling/kl": 2e-3}] * 10) == []


# -- in a run --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"{i}+{i}=", "solution": str(2 * i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held = [{"prompt": f"{i}-{i}=", "solution": "0"} for i in range(4)]
    (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    return folder


def settings(inputs: Path, output_dir: Path, **changes):
    reward = f"{inputs / 'reward.py'}:share_of_a"
    base = run_settings(inputs / "model", inputs / "rows.jsonl", reward, output_dir)
    return base | changes


def make_run(inputs: Path, **changes) -> GRPORun:
    config = build_config(settings(inputs, Path("unused"), **changes))
    policy = Policy.load(config.model, device="cpu")
    reference = policy.frozen_copy() if config.beta else None
    ids = [policy.tokenizer(f"{i}=")["input_ids"] for i in range(8)]
    prompts = [Prompt({"prompt": f"{i}="}, f"{i}=", ids[i]) for i in range(8)]
    pool = RewardPool([RewardSpec.named(config.reward_funcs[0])], num_workers=1)
    return GRPORun(config, policy, reference, HFGenerator(policy), pool, prompts)


def forwards(run: GRPORun, monkeypatch) -> dict[str, list[int]]:
    """The tokens of every packed forward pass from now on, by whose it was."""
    seen = {"policy": [], "reference": []}
    plain = Policy.hidden_states

    def counted(self, token_ids, *arguments, **options):
        whose = "policy" if self is run.policy else "reference"
        seen[whose].append(len(token_ids))
        return plain(self, token_ids, *arguments, **options)

    monkeypatch.setattr(Policy, "hidden_states", counted)
    return seen


@pytest.mark.parametrize("beta", [0.0, 0.01])
def test_on_policy_every_token_passes_the_policy_once(inputs, monkeypatch, beta):
    """One update a rollout: no pass for old log-probs, and none for the mismatch figures."""
    run = make_run(inputs, beta=beta, steps_per_generation=1, is_correction="token_truncate")
    seen = forwards(run, monkeypatch)
    try:
        _, arrays, rows = run.rollout()
        assert seen["policy"] == [] and arrays.old_logprobs is None
        run.begin(arrays, rows)
        row = run.update()
    finally:
        run.close()
        run.pool.close()
    live = int(arrays.lengths[arrays.live].sum())
    assert sum(seen["policy"]) == live > 0
    assert sum(seen["reference"]) == (live if beta else 0)
    assert 0 <= row["sampling/kl"] < 1e-9 and row["sampling/ess_sequence"] == pytest.approx(1)
    assert row["sampling/importance_sampling_ratio_mean"] == pytest.approx(1, abs=1e-5)


def test_off_policy_the_old_logprobs_serve_for_the_figures(inputs, monkeypatch):
    run = make_run(inputs, beta=0.0, steps_per_generation=2)
    seen = forwards(run, monkeypatch)
    try:
        _, arrays, rows = run.rollout()
    finally:
        run.close()
        run.pool.close()
    assert sum(seen["policy"]) == int(arrays.lengths[arrays.live].sum())
    gap = (arrays.old_logprobs - arrays.sampler_logprobs).abs().max()
    assert rows["sampling/logp_difference_max"] == pytest.approx(float(gap), abs=1e-7)
    run.begin(arrays, rows)
    first, second = run.update(), run.update()
    assert "sampling/kl" in first and "sampling/kl" not in second
    assert [row["sampling/staleness"] for row in (first, second)] == [0, 1]


# -- an engine beside the trainer ------------------------------------------------------------------


class CopiedEngine:
    """A sampler with weights of its own, as vLLM has: a copy of the policy at the last sync."""

    def __init__(self, policy: Policy) -> None:
        self.source, self.policy = policy, copy.deepcopy(policy)
        self.inner = HFGenerator(self.policy)
        self.version: int | None = None
        self.calls: list[tuple[str, int | None, str]] = []  # what, weights, thread
        self.closed = threading.Event()
        self.busy = threading.Lock()
        self.before = lambda number: None
        self.skip_sync = False

    def generate(self, requests, sampling, *, on_batch=None):
        assert self.version is not None, "sampled before the first sync"
        with self.busy:
            thread = threading.current_thread().name
            self.calls.append(("generate", self.version, thread))
            self.before(len([c for c in self.calls if c[0] == "generate"]))
            return self.inner.generate(requests, sampling, on_batch=on_batch)

    def sync_weights(self, version):
        assert not self.busy.locked(), "synced in the middle of sampling"
        if version == self.version:
            return {}
        if not self.skip_sync:
            self.policy.model.load_state_dict(self.source.model.state_dict())
        self.version = version
        self.calls.append(("sync", version, threading.current_thread().name))
        return {"sync/seconds": 0.25}

    def close(self):
        self.closed.set()


@pytest.fixture
def engine(monkeypatch):
    """The engines that runs with ``generator: vllm`` get."""
    made: list[CopiedEngine] = []

    @contextmanager
    def open_generator(config, policy):
        one = CopiedEngine(policy)
        made.append(one)
        engine.prepare(one)
        yield one
        one.close()

    def engine():
        return made[-1]

    engine.prepare = lambda one: None
    monkeypatch.setattr("grpo_engine.prepare.open_generator", open_generator)
    monkeypatch.setattr("grpo_engine.prepare.check_generator", lambda config, policy: None)
    monkeypatch.setattr("grpo_engine.prepare.generator_inputs", lambda config: {"engine": "copy"})
    return engine


AHEAD = {"generator": "vllm", "rollouts_ahead": 1, "is_correction": "token_truncate"}


def test_each_rollout_is_sampled_with_the_weights_of_its_step(inputs, tmp_path, engine):
    changes = {"generator": "vllm", "eval_dataset": str(inputs / "held.jsonl"), "eval_steps": 3}
    changes["eval_reward"] = f"{inputs / 'reward.py'}:share_of_a"
    assert train_grpo(build_config(settings(inputs, tmp_path, **changes))) == 0
    sampled = [version for what, version, _ in engine().calls if what == "generate"]
    assert sampled == [0, 0, 2, 3, 4, 6]  # evaluations at 0, 3 and 6, rollouts at 0, 2 and 4
    rows = read_metrics(tmp_path)
    assert [row.get("sampling/staleness") for row in rows] == [None, 0, 1, 0, 1, 0, 1]
    assert all(row["sampling/kl"] < 1e-9 for row in rows if "sampling/kl" in row)
    assert ["sync/seconds" in row for row in rows] == [False, True, False, True, True, True, False]
    assert engine().closed.is_set()
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["inputs"]["generator"] == {"engine": "copy"}
    assert "Sampler against trainer" in write_report(tmp_path).read_text()


def test_a_sync_that_is_lost_is_seen_by_the_figures(inputs, tmp_path, engine):
    """Weights that stay as they were: the canary's last line of defence."""

    def lose(one):
        one.skip_sync = True

    engine.prepare = lose
    changes = {"generator": "vllm", "learning_rate": 3e-2, "max_steps": 4}
    assert train_grpo(build_config(settings(inputs, tmp_path, **changes))) == 0
    first, third = (read_metrics(tmp_path)[i] for i in (0, 2))
    assert first["sampling/kl"] < 1e-9 and third["sampling/kl"] > 0.02
    assert any(warning.startswith("sampler-kl") for warning in third["warnings"])


def test_ahead_every_rollout_but_the_first_is_one_behind(inputs, tmp_path, engine):
    assert train_grpo(build_config(settings(inputs, tmp_path, **AHEAD))) == 0
    rows = read_metrics(tmp_path)
    assert [row["sampling/staleness"] for row in rows] == [0, 1, 2, 3, 2, 3]
    ratio = "sampling/importance_sampling_ratio_mean"  # of the bounded weights in the loss
    assert abs(rows[0][ratio] - 1) < 1e-6 < abs(rows[2][ratio] - 1)
    assert rows[0]["sampling/kl"] < 1e-9 and rows[2]["sampling/kl"] > 1e-6
    sampled = [(version, thread) for what, version, thread in engine().calls if what == "generate"]
    assert sampled == [(0, "MainThread"), (0, "rollout-ahead"), (2, "rollout-ahead")]


def test_ahead_samples_while_the_policy_is_trained(inputs, tmp_path, engine, monkeypatch):
    """The sampling of rollout 2 does not end before an update on rollout 1 has been made."""
    updated, plain = threading.Event(), GRPORun.update
    seen = []

    def update(self):
        row = plain(self)
        updated.set()
        return row

    def prepare(one):
        def before(number):
            if number == 2:
                seen.append(updated.wait(60))

        one.before = before

    monkeypatch.setattr(GRPORun, "update", update)
    engine.prepare = prepare
    assert train_grpo(build_config(settings(inputs, tmp_path, **AHEAD))) == 0
    assert seen == [True]


def test_ahead_the_evaluation_waits_and_has_the_present_weights(inputs, tmp_path, engine):
    changes = AHEAD | {"eval_dataset": str(inputs / "held.jsonl"), "eval_steps": 1}
    changes["eval_reward"] = f"{inputs / 'reward.py'}:share_of_a"
    assert train_grpo(build_config(settings(inputs, tmp_path, **changes))) == 0
    of_main = [
        version
        for what, version, thread in engine().calls
        if what == "generate" and thread == "MainThread"
    ]
    assert of_main == [0, 0, 1, 2, 3, 4, 5, 6]  # the first rollout, else evaluations
    ahead = [c[1] for c in engine().calls if c[0] == "generate" and c[2] == "rollout-ahead"]
    assert ahead == [0, 2]


@pytest.mark.parametrize("stop", [3, 4])  # in the middle of a rollout, and between two
def test_ahead_a_resumed_run_says_how_old_its_rollouts_are(inputs, tmp_path, engine, stop):
    """What was being sampled is not in the checkpoint: it is drawn anew, from its weights."""
    first = settings(inputs, tmp_path, **AHEAD, max_steps=stop)
    assert train_grpo(build_config(first)) == 0
    assert (
        train_grpo(
            build_config(settings(inputs, tmp_path, **AHEAD, max_steps=8)), resume=str(tmp_path)
        )
        == 0
    )
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    expected = {3: [0, 1, 2, 3, 1, 2, 2, 3], 4: [0, 1, 2, 3, 0, 1, 2, 3]}[stop]
    assert [row["sampling/staleness"] for row in rows] == expected


@pytest.mark.parametrize("number", [1, 2, 3])  # in the main thread; ahead; ahead, later
def test_an_engine_that_dies_ends_the_run_with_the_last_step_saved(
    inputs, tmp_path, engine, capsys, number
):
    def prepare(one):
        def before(count):
            if count == number:
                raise GeneratorError("the engine died: no space left on device")

        one.before = before

    engine.prepare = prepare
    changes = AHEAD | {"max_steps": 20, "save_steps": 20}
    assert train_grpo(build_config(settings(inputs, tmp_path, **changes))) == 1
    out = capsys.readouterr().out
    done = 2 * (number - 1)
    assert f"stopped: after step {done}: the engine died: no space left on device" in out
    assert [p.name for p in list_checkpoints(tmp_path)] == [f"checkpoint-{done}"][: number > 1]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "failed" and manifest["steps"] == done
    assert engine().closed.is_set()


def test_ahead_an_evaluation_tells_why_the_engine_died(inputs, tmp_path, engine, capsys):
    """Of what was sampled ahead, and not that the engine is gone by now."""

    def prepare(one):
        plain, dead = one.sync_weights, []

        def before(count):
            if count == 3:  # after an evaluation and the first rollout: the one ahead
                dead.append("died")
                raise GeneratorError("the engine died\n  the last line of its log")

        def sync(version):
            if dead:
                raise GeneratorError("the engine is gone")
            return plain(version)

        one.before, one.sync_weights = before, sync

    engine.prepare = prepare
    changes = AHEAD | {"eval_dataset": str(inputs / "held.jsonl"), "eval_steps": 1}
    changes |= {"eval_reward": f"{inputs / 'reward.py'}:share_of_a"}
    assert train_grpo(build_config(settings(inputs, tmp_path, **changes))) == 1
    out = capsys.readouterr().out
    assert "stopped: after step 1: the engine died" in out and "is gone" not in out
    assert "the last line of its log" in out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rollouts_ahead": 1}, "rollouts_ahead=1: generator 'hf'"),
        ({**AHEAD, "rollouts_ahead": 2}, "--rollouts_ahead 2"),
        ({**AHEAD, "vllm_enable_sleep_mode": True}, "cannot sleep"),
        ({**AHEAD, "is_correction": None}, "is_correction or old_logprobs='sampler'"),
        ({"vllm_mode": "server"}, "vllm_mode='server': has no meaning without generator 'vllm'"),
        (
            {"generator": "vllm", "vllm_mode": "server"},
            "vllm_mode='server': needs --vllm_server_base_url",
        ),
        (
            {"generator": "vllm", "vllm_server_base_url": "http://localhost:8000"},
            "has no meaning without vllm_mode 'server'",
        ),
        (
            {
                "generator": "vllm",
                "vllm_mode": "server",
                "vllm_server_base_url": "http://localhost:8000",
                "vllm_gpu_memory_utilization": 0.5,
            },
            "vllm_gpu_memory_utilization=0.5: has no meaning without vllm_mode 'colocate'",
        ),
    ],
)
def test_settings_that_contradict_each_other(changes, words):
    with pytest.raises(UserError) as caught:
        build_config(changes)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_ahead_with_the_samplers_logprobs_as_old_ones(inputs, tmp_path, engine):
    """The ratio itself then carries the age of the tokens, also with one update a rollout."""
    changes = {**AHEAD, "is_correction": None, "old_logprobs": "sampler"}
    changes |= {"steps_per_generation": 1, "learning_rate": 3e-2, "max_steps": 4}
    assert train_grpo(build_config(settings(inputs, tmp_path, **changes))) == 0
    rows = read_metrics(tmp_path)
    assert [row["sampling/staleness"] for row in rows] == [0, 1, 1, 1]
    assert rows[0]["clip_ratio/region_mean"] == 0 < rows[1]["clip_ratio/region_mean"]
