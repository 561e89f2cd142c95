"""The training loop: what it learns, that splits and drops do not change it, and that it resumes
bit for bit."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_tiny_model, run_settings

from grpo_engine.checkpoint import list_checkpoints, verify_checkpoint
from grpo_engine.config import build_config
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.grpo import GRPORun, linear_grpo_loss
from grpo_engine.learner import RunAborted
from grpo_engine.metrics import read_metrics
from grpo_engine.policy import Policy
from grpo_engine.rewards import RewardPool, RewardSpec
from grpo_engine.rollouts import (
    Prompt,
    RolloutArrays,
    assign_advantages,
    derive_seed,
    split_mini_batches,
)
from grpo_engine.train import train_grpo
from grpo_engine.types import Rollout

# The share of one letter: a reward that a random model can climb, and that differs within a group.
REWARD = """
def share_of_a(prompts, completions, **columns):
    return [completion.count("a") / max(1, len(completion)) for completion in completions]
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    (folder / "reward.py").write_text(REWARD)
    rows = [{"prompt": f"{i}+{i}=", "solution": str(2 * i)} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(inputs: Path, output_dir: Path, **changes):
    reward = f"{inputs / 'reward.py'}:share_of_a"
    base = run_settings(inputs / "model", inputs / "rows.jsonl", reward, output_dir)
    return base | changes


def make_run(inputs: Path, **changes) -> GRPORun:
    config = build_config(settings(inputs, Path("unused"), **changes))
    policy = Policy.load(config.model, device="cpu")
    reference = policy.frozen_copy() if config.beta else None
    prompts = [
        Prompt({"prompt": f"{i}="}, f"{i}=", policy.tokenizer(f"{i}=")["input_ids"])
        for i in range(8)
    ]
    return GRPORun(config, policy, reference, HFGenerator(policy), None, prompts)


def fake_rollouts(run: GRPORun, rewards: list[float | None]) -> list[Rollout]:
    """Random completions of random lengths with the given rewards, in groups of
    ``num_generations``."""
    dice = np.random.default_rng(0)
    rollouts = []
    for index, reward in enumerate(rewards):
        group = index // run.config.num_generations
        prompt = run.prompts[group]
        ids = dice.integers(3, 40, size=dice.integers(2, 12)).tolist()
        rollouts.append(
            Rollout(
                row={},
                prompt=prompt.text,
                prompt_ids=prompt.token_ids,
                completion="",
                completion_ids=ids,
                sampler_logprobs=[-1.0] * len(ids),
                finish_reason="stop",
                group=group,
                reward=reward,
            )
        )
    assign_advantages(rollouts, run.config.num_generations, run.config.scale_rewards)
    return rollouts


def arrays_of(run: GRPORun, rollouts: list[Rollout], **changes) -> RolloutArrays:
    options = {"drop_dead": False, "mask_truncated": False, "max_completion_length": 12}
    return RolloutArrays.from_rollouts(rollouts, device=run.policy.device, **(options | changes))


def gradients(
    run: GRPORun, rollouts: list[Rollout], drop_dead: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    arrays = arrays_of(run, rollouts, drop_dead=drop_dead)
    run._fill_fixed_logprobs(arrays)
    loss, _ = run._gradients(arrays, np.arange(len(rollouts)))
    found = {
        n: p.grad.clone() for n, p in run.policy.model.named_parameters() if p.grad is not None
    }
    run.optimizer.zero_grad(set_to_none=True)
    return loss, found


def assert_same_gradients(one, other, tolerance=2e-6):
    assert one.keys() == other.keys()
    for name in one:
        scale = one[name].abs().max().clamp_min(1e-8)
        assert (one[name] - other[name]).abs().max() / scale < tolerance, name


LOSSES = ["grpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo", "gspo"]
MIXED = (
    [1.0, 0.0, 0.0, 1.0] + [1.0] * 4 + [0.0, 1.0, 1.0, 1.0] + [0.0] * 4
)  # groups 1 and 3 are dead


@pytest.mark.parametrize("loss_type", LOSSES)
def test_gradients_do_not_depend_on_the_micro_batches(inputs, loss_type):
    whole = make_run(inputs, loss_type=loss_type, max_tokens_per_microbatch=4096)
    cut = make_run(inputs, loss_type=loss_type, max_tokens_per_microbatch=30)
    loss, expected = gradients(whole, fake_rollouts(whole, MIXED), False)
    cut_loss, found = gradients(cut, fake_rollouts(cut, MIXED), False)
    assert cut_loss == pytest.approx(loss, rel=1e-5, abs=1e-7)
    assert_same_gradients(expected, found)


@pytest.mark.parametrize("loss_type", LOSSES)
def test_dropping_dead_groups_does_not_change_the_gradient(inputs, loss_type):
    run = make_run(inputs, loss_type=loss_type, beta=0.0)
    rollouts = fake_rollouts(run, MIXED)
    kept_loss, kept = gradients(run, rollouts, drop_dead=False)
    dropped_loss, dropped = gradients(run, rollouts, drop_dead=True)
    assert dropped_loss == pytest.approx(kept_loss, rel=1e-5, abs=1e-7)
    assert_same_gradients(kept, dropped)
    arrays = arrays_of(run, rollouts, drop_dead=True)
    assert arrays.live.reshape(4, 4).any(axis=1).tolist() == [True, False, True, False]


def test_an_unscorable_rollout_is_left_out_of_baseline_and_denominator(inputs):
    run = make_run(inputs, beta=0.0)
    rollouts = fake_rollouts(run, [1.0, 0.0, None, 1.0])
    scored = torch.tensor([1.0, 0.0, 1.0])
    expected = (1.0 - scored.mean()) / (scored.std() + 1e-4)
    assert rollouts[0].advantage == pytest.approx(float(expected), rel=1e-5)
    assert rollouts[2].advantage == 0.0
    arrays = arrays_of(run, rollouts, drop_dead=True)
    assert run._denominator(arrays, np.arange(4)) == 3.0


@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        *(("grpo", 3), ("luspo", 3), ("dr_grpo", 3 * 12)),
        *(("dapo", "kept"), ("cispo", "kept"), ("vespo", "kept")),
    ],
)
def test_denominators_with_unscorable_and_truncated_rollouts(inputs, loss_type, expected):
    """Of four, one is unscorable (counts nowhere) and one was cut by the cap (its tokens carry no
    loss and are not counted; its sequence is, as in TRL)."""
    run = make_run(inputs, beta=0.0, loss_type=loss_type, mask_truncated_completions=True)
    rollouts = fake_rollouts(run, [1.0, 0.0, None, 1.0])
    rollouts[0].finish_reason = "length"
    arrays = arrays_of(run, rollouts, mask_truncated=True)
    assert arrays.live.tolist() == [False, True, False, True]
    if expected == "kept":
        expected = len(rollouts[1].completion_ids) + len(rollouts[3].completion_ids)
    assert run._denominator(arrays, np.arange(4)) == expected
    again = RolloutArrays.from_tensors(arrays.to_tensors(), run.policy.device)
    assert run._denominator(again, np.arange(4)) == expected


def test_old_logprobs_may_be_the_samplers(inputs):
    run = make_run(inputs, beta=0.0, old_logprobs="sampler")
    arrays = arrays_of(run, fake_rollouts(run, MIXED))
    run._fill_fixed_logprobs(arrays)
    assert torch.equal(arrays.old_logprobs, arrays.sampler_logprobs)
    once = make_run(inputs, beta=0.0, steps_per_generation=1)
    arrays = arrays_of(once, fake_rollouts(once, MIXED))
    once._fill_fixed_logprobs(arrays)
    assert arrays.old_logprobs is None  # on-policy: no forward pass is spent


def test_a_dead_mini_batch_still_takes_its_optimiser_step(inputs):
    run = make_run(inputs, beta=0.0, prompts_per_generation=1, steps_per_generation=1)
    rollouts = fake_rollouts(run, [1.0] * 4)
    arrays = arrays_of(run, rollouts, drop_dead=True)
    arrays.order = split_mini_batches(4, 1, 1, 0)
    run.begin(arrays, {})
    row = run.update()
    assert run.step == 1 and row["loss"] == 0.0 and row["grad_norm"] == 0.0 and run.arrays is None


def test_training_logprobs_equal_the_samplers(inputs, tmp_path):
    """Packed training rows, the fused head and the cached sampler see the same distribution."""
    run = make_run(inputs, temperature=0.7)
    run.pool = RewardPool([RewardSpec.named(run.config.reward_funcs[0])], num_workers=1)
    try:
        rollouts, arrays, rows = run.rollout()
    finally:
        run.pool.close()
    assert torch.allclose(arrays.old_logprobs, arrays.sampler_logprobs, atol=2e-5)
    assert torch.equal(arrays.ref_logprobs, arrays.old_logprobs)  # same weights: not computed twice
    run.begin(arrays, rows)
    row = run.update()
    assert row["clip_ratio/region_mean"] == 0.0 and row["kl"] == pytest.approx(0.0, abs=1e-6)
    assert row["sampling/logp_difference_mean"] < 2e-5
    assert len(rollouts) == 16


def test_not_finite_updates_are_skipped_then_stop_the_run(inputs):
    run = make_run(inputs, steps_per_generation=4)
    rollouts = fake_rollouts(run, MIXED)
    arrays = arrays_of(run, rollouts, drop_dead=False)
    run._fill_fixed_logprobs(arrays)
    arrays.advantages[:] = math.nan
    arrays.order = split_mini_batches(16, 4, 1, 0)
    before = copy.deepcopy(run.policy.model.state_dict())
    run.begin(arrays, {})
    assert run.update()["skipped_update"] == 1
    assert run.update()["skipped_update"] == 1
    with pytest.raises(RunAborted, match="not finite 3 times in a row"):
        run.update()
    for name, value in run.policy.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_mini_batches_are_a_random_partition():
    parts = split_mini_batches(32, 4, 2, seed=5)
    assert len(parts) == 8
    for epoch in (parts[:4], parts[4:]):
        assert sorted(np.concatenate(epoch).tolist()) == list(range(32))
    assert [p.tolist() for p in parts[:4]] != [p.tolist() for p in parts[4:]]
    assert all(
        np.array_equal(a, b)
        for a, b in zip(parts, split_mini_batches(32, 4, 2, seed=5), strict=True)
    )


def test_seeds_depend_on_every_part():
    seeds = {derive_seed(a, "rollout", b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125 and derive_seed(1, "x") == derive_seed(1, "x")
    assert all(0 <= s < 2**63 for s in seeds)


# -- whole runs
# --------------------------------------------------------------------------------------


def curve(folder: Path) -> list[dict]:
    """The rows without what the clock decides."""
    timed = ("time/", "wall", "tokens_per_second", "update_tokens_per_second")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(folder)
    ]


def test_training_raises_the_reward(inputs, tmp_path):
    config = build_config(
        settings(inputs, tmp_path, max_steps=16, steps_per_generation=1, learning_rate=1e-2)
    )
    assert train_grpo(config) == 0
    rewards = [row["reward"] for row in read_metrics(tmp_path)]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.05
    assert (tmp_path / "report.html").stat().st_size > 5000
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["status"] == "finished" and len(manifest["inputs"]["dataset"]["sha256"]) == 64
    policy = Policy.load(
        str(list_checkpoints(tmp_path)[-1]), device="cpu"
    )  # a Hugging Face folder as is
    assert policy.tokenizer.decode(policy.tokenizer("1+1=")["input_ids"]) == "1+1="


@pytest.mark.parametrize("stop", [3, 4])  # in the middle of a rollout, and between two
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(inputs, tmp_path, stop):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    changes = {
        "eval_dataset": str(inputs / "rows.jsonl"),
        "eval_steps": 2,
        "eval_reward": "share_of_a",
    }
    changes["dataset"] = str(inputs / "more.jsonl")
    rows = [{"prompt": f"{i}-{i}=", "solution": "0"} for i in range(8)]
    (inputs / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changes["reward_funcs"] = settings(inputs, whole)["reward_funcs"]
    assert train_grpo(build_config(settings(inputs, whole, **changes))) == 0
    assert train_grpo(build_config(settings(inputs, cut, **changes, max_steps=stop))) == 0
    resumed = build_config(settings(inputs, cut, **changes))
    assert train_grpo(resumed, resume=str(cut)) == 0
    expected, found = curve(whole), curve(cut)
    # A run that was to end at `stop` evaluated there; the uninterrupted one may not have.
    for row in found:
        if row["step"] == stop and stop % 2:
            row = [row.pop(k) for k in list(row) if k.startswith("eval/")]
    assert found == expected
    for name in (
        "model.safetensors",
        "trainer/optimizer.safetensors",
        "trainer/reference.safetensors",
    ):
        one, other = (load_file(folder / "checkpoint-6" / name) for folder in (whole, cut))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_rest_of_a_resumed_rollout_keeps_the_time_it_took_to_sample(inputs, tmp_path):
    """Steps 3 and 4 share a rollout, and the run is cut between them."""
    assert train_grpo(build_config(settings(inputs, tmp_path, max_steps=3))) == 0
    path = tmp_path / "checkpoint-3" / "trainer" / "state.json"
    seconds = json.loads(path.read_text())["sampling_seconds"]
    again = build_config(settings(inputs, tmp_path, max_steps=4))
    assert train_grpo(again, resume=str(tmp_path)) == 0
    *_, third, fourth = read_metrics(tmp_path)
    phases = ("sync_weights", "generate", "reward", "old_logprobs", "ref_logprobs")
    assert seconds == pytest.approx(sum(third.get(f"time/{p}", 0) for p in phases) / 2, rel=1e-6)
    for before, row in ((read_metrics(tmp_path)[1], third), (third, fourth)):
        tokens = row["num_tokens"] - before["num_tokens"]
        expected = tokens / (row["time/update"] + seconds)
        assert row["tokens_per_second"] == pytest.approx(expected, rel=1e-6)


def test_a_checkpoint_that_does_not_know_its_sampling_time_claims_no_rate(inputs, tmp_path):
    assert train_grpo(build_config(settings(inputs, tmp_path, max_steps=3))) == 0
    run = make_run(inputs)
    folder = tmp_path / "checkpoint-3"
    path = folder / "trainer" / "state.json"
    state = json.loads(path.read_text())
    del state["sampling_seconds"]
    path.write_text(json.dumps(state))
    run.read_checkpoint(folder)
    assert "tokens_per_second" not in run.update()


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_signals_save_and_exit_and_the_run_can_be_continued(inputs, tmp_path, signum):
    flags = []
    for name, value in settings(inputs, tmp_path, max_steps=5000, save_steps=5000).items():
        flags += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
    command = [sys.executable, "-m", "grpo_engine.cli", "grpo"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    child = subprocess.Popen(
        [*command, *flags], env=environment, cwd="/", stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "metrics.jsonl"
    for _ in range(1200):
        if metrics.exists() and metrics.read_text().count("\n") >= 3 or child.poll() is not None:
            break
        time.sleep(0.1)
    child.send_signal(signum)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signum, err
    assert "Traceback" not in err
    newest = list_checkpoints(tmp_path)[-1]
    verify_checkpoint(newest)
    step = read_metrics(tmp_path)[-1]["step"]
    assert newest.name == f"checkpoint-{step}" and step >= 3
    done = subprocess.run(
        [*command, "--resume", str(tmp_path), "--max_steps", str(step + 2)],
        env=environment, cwd="/", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in read_metrics(tmp_path)] == list(range(1, step + 3))


# -- what goes wrong in the middle -----------------------------------------------------------------

FAILING = """
calls = 0

def fails_later(prompts, completions, **columns):
    global calls
    calls += len(completions)
    if calls > 40:
        raise RuntimeError("the judge is gone")
    return [completion.count("a") / max(1, len(completion)) for completion in completions]
"""


def test_a_reward_that_fails_later_loses_no_finished_step(inputs, tmp_path, capsys):
    (inputs / "failing.py").write_text(FAILING)
    functions = [f"{inputs / 'failing.py'}:fails_later"]
    changes = {"reward_funcs": functions, "steps_per_generation": 1, "save_steps": 100}
    config = build_config(settings(inputs, tmp_path, **changes))
    assert train_grpo(config) == 1
    last = read_metrics(tmp_path)[-1]["step"]
    assert last > 1 and [p.name for p in list_checkpoints(tmp_path)] == [f"checkpoint-{last}"]
    assert json.loads((tmp_path / "manifest.json").read_text())["status"] == "failed"
    assert "the judge is gone" in capsys.readouterr().out
    assert (tmp_path / "report.html").exists()


def test_a_held_out_reward_that_fails_loses_no_row(inputs, tmp_path):
    (inputs / "failing_eval.py").write_text(
        "calls = 0\n\ndef judge(prompts, completions, **columns):\n    global calls\n"
        "    calls += 1\n    if calls > 1:\n        raise RuntimeError('gone')\n    return [1.0]\n"
    )
    (inputs / "one.jsonl").write_text(json.dumps({"prompt": "9*9=", "solution": "81"}) + "\n")
    changes = {"eval_dataset": str(inputs / "one.jsonl"), "eval_steps": 2}
    changes["eval_reward"] = f"{inputs / 'failing_eval.py'}:judge"
    config = build_config(settings(inputs, tmp_path, **changes))
    assert train_grpo(config) == 1
    assert [row["step"] for row in read_metrics(tmp_path)] == [0, 1, 2]
    assert list_checkpoints(tmp_path)[-1].name == "checkpoint-2"


def test_weights_that_are_not_finite_never_replace_a_good_checkpoint(inputs, tmp_path, capsys):
    """A huge step makes weights whose logits are NaN."""
    changes = {"steps_per_generation": 1, "save_steps": 1, "save_total_limit": 1, "beta": 0.0}
    config = build_config(settings(inputs, tmp_path, **changes, max_steps=2))
    assert train_grpo(config) == 0
    run = build_config(settings(inputs, tmp_path, **changes, max_steps=6))

    def poison(self):
        row = update(self)
        if self.step == 3:
            self.policy.model.lm_head.weight.data[5] = math.nan
        return row

    update = GRPORun.update
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GRPORun, "update", poison)
        assert train_grpo(run, resume=str(tmp_path)) == 1
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2"]
    assert "not finite" in capsys.readouterr().out


def test_resuming_an_older_checkpoint_sets_the_later_ones_aside(inputs, tmp_path):
    changes = {"save_steps": 2, "save_total_limit": 5}
    assert train_grpo(build_config(settings(inputs, tmp_path, **changes))) == 0
    started = json.loads((tmp_path / "manifest.json").read_text())["started"]
    again = build_config(settings(inputs, tmp_path, **changes, max_steps=3))
    assert train_grpo(again, resume=str(tmp_path / "checkpoint-2")) == 0
    assert [p.name for p in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]
    assert (tmp_path / "checkpoint-6.superseded").is_dir()
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["started"] == started and manifest["resumed"][0]["from"] == "checkpoint-2"


def test_bf16_and_gradient_checkpointing_run_and_the_head_gets_bf16(inputs, tmp_path, monkeypatch):
    seen = set()

    def spy(hidden, **arguments):
        seen.add((hidden.dtype, arguments["weight"].dtype))
        return linear_grpo_loss(hidden, **arguments)

    monkeypatch.setattr("grpo_engine.grpo.linear_grpo_loss", spy)
    changes = {"bf16": True, "gradient_checkpointing": True, "max_steps": 2}
    assert train_grpo(build_config(settings(inputs, tmp_path, **changes))) == 0
    assert seen == {(torch.bfloat16, torch.bfloat16)}
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.mark.gpu
@pytest.mark.parametrize("bf16", [False, True])
def test_trains_and_resumes_on_a_gpu(inputs, tmp_path, bf16):
    changes = {"device": "cuda", "bf16": bf16, "steps_per_generation": 1, "learning_rate": 1e-2}
    config = build_config(settings(inputs, tmp_path, **changes, max_steps=16))
    assert train_grpo(config) == 0
    rewards = [row["reward"] for row in read_metrics(tmp_path)]
    assert np.mean(rewards[-4:]) > np.mean(rewards[:4]) + 0.05
    longer = build_config(settings(inputs, tmp_path, **changes, max_steps=18))
    assert train_grpo(longer, resume=str(tmp_path)) == 0


def test_an_eval_reward_from_a_file(inputs, tmp_path):
    (inputs / "other.py").write_text(REWARD.replace("share_of_a", "other"))
    (inputs / "held.jsonl").write_text(json.dumps({"prompt": "9*9=", "solution": "81"}) + "\n")
    changes = {"eval_dataset": str(inputs / "held.jsonl"), "max_steps": 2}
    changes["eval_reward"] = f"{inputs / 'other.py'}:other"
    assert train_grpo(build_config(settings(inputs, tmp_path, **changes))) == 0
    assert "eval/accuracy" in read_metrics(tmp_path)[-1]
