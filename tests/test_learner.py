"""What every training stage shares: the schedule, the guarded step, and the optimiser's state."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_model import make_tiny_model

from grpo_engine.learner import MAX_SKIPPED_UPDATES, Learner, RunAborted, load_policy
from grpo_engine.settings import build_config
from grpo_engine.sft_config import SFTConfig

BASE = {"dataset": "unused", "device": "cpu", "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def make_learner(model: Path, total_steps: int = 10, cls=Learner, **changes) -> Learner:
    config = build_config({**BASE, "model": str(model), **changes}, SFTConfig)
    return cls(config, load_policy(config, None), total_steps)


def push(learner: Learner, size: float = 1.0) -> None:
    """Gradients that depend on the step, as a stage's ``update`` would leave them."""
    drawn = torch.Generator().manual_seed(learner.step)
    for parameter in learner.optimizer.param_groups[0]["params"]:
        parameter.grad = size * torch.randn(parameter.shape, generator=drawn)


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in learner.policy.weights().items()}


# -- the schedule ----------------------------------------------------------------------------------


def rates(learner: Learner) -> list[float]:
    found = []
    for step in range(learner.total_steps):
        learner.step = step
        found.append(learner.learning_rate())
    return found


@pytest.mark.parametrize("warmup", [0, 3])
@pytest.mark.parametrize(
    ("kind", "theirs", "options"),
    [
        ("constant", "constant_with_warmup", {}),
        ("linear", "linear", {}),
        ("cosine", "cosine_with_min_lr", {"min_lr": 1e-3}),
    ],
)
def test_schedules_are_those_of_transformers(model, kind, theirs, options, warmup):
    from transformers import get_scheduler

    floor = options.get("min_lr", 0.0)
    ours = make_learner(
        model, 12, lr_scheduler_type=kind, min_learning_rate=floor, warmup_steps=warmup
    )
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-2)
    schedule = get_scheduler(theirs, optimizer, warmup, 12, scheduler_specific_kwargs=options)
    expected = []
    for _ in range(12):
        expected.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    found = rates(ours)
    # Theirs begins its warm-up at a rate of 0, which would waste the first step.
    assert found[warmup:] == pytest.approx(expected[warmup:], rel=1e-12)
    assert found[:warmup] == pytest.approx([1e-2 * (k + 1) / 3 for k in range(warmup)])


def test_a_linear_schedule_ends_at_its_floor(model):
    found = make_learner(model, 10, lr_scheduler_type="linear", min_learning_rate=1e-3)
    assert rates(found)[0] == pytest.approx(1e-2)
    found.step = 10
    assert found.learning_rate() == pytest.approx(1e-3)
    found.step = 99  # a run that was made longer
    assert found.learning_rate() == pytest.approx(1e-3)


# -- the step --------------------------------------------------------------------------------------


def test_a_step_is_adamw_on_the_clipped_gradient(model):
    changes = {"lr_scheduler_type": "constant", "max_grad_norm": 0.5, "weight_decay": 0.1}
    learner = make_learner(model, **changes)
    twin = make_learner(model, **changes)
    parameters = list(twin.policy.model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        push(learner)
        push(twin)
        row = learner.descend(1.5)
        norm = torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        twin.step += 1
        expected = {"step": step + 1, "loss": 1.5, "learning_rate": 1e-2, "skipped_update": 0}
        assert row == expected | {"grad_norm": float(norm)}
    for name, value in weights(learner).items():
        assert torch.equal(value, twin.policy.weights()[name])
    assert all(p.grad is None for p in learner.policy.model.parameters())


def test_no_gradient_is_a_step_with_a_zero_gradient(model):
    learner = make_learner(model)
    before = weights(learner)
    assert learner.descend(0.0)["grad_norm"] == 0.0
    assert learner.step == 1 and len(learner.optimizer.state) == len(before)
    assert all(torch.equal(value, before[name]) for name, value in weights(learner).items())


@pytest.mark.parametrize(("loss", "size"), [(math.nan, 1.0), (1.0, math.inf), (math.inf, math.nan)])
def test_steps_that_are_not_finite_change_nothing_and_then_end_the_run(model, loss, size):
    learner = make_learner(model)
    before = weights(learner)
    for count in range(1, MAX_SKIPPED_UPDATES):
        push(learner, size)
        assert learner.descend(loss)["skipped_update"] == 1
        assert learner.skipped_in_a_row == count
    assert not learner.optimizer.state
    push(learner)
    assert learner.descend(1.0)["skipped_update"] == 0 and learner.skipped_in_a_row == 0
    after = weights(learner)
    assert not all(torch.equal(after[name], before[name]) for name in before)
    with pytest.raises(RunAborted, match="not finite 3 times in a row"):
        for _ in range(MAX_SKIPPED_UPDATES):
            push(learner, size)
            learner.descend(loss)
    assert all(torch.equal(value, after[name]) for name, value in weights(learner).items())


# -- checkpoints -----------------------------------------------------------------------------------


class Counting(Learner):
    COUNTERS = (*Learner.COUNTERS, "apples")
    apples = 0


@pytest.mark.parametrize("lora", [None, 4])
def test_a_saved_learner_goes_on_bit_for_bit(model, tmp_path, lora):
    if lora:
        pytest.importorskip("peft")
    learner = make_learner(model, cls=Counting, lora_r=lora)
    for _ in range(3):
        push(learner)
        learner.descend(1.0)
    learner.tokens_done, learner.apples = 77, 5
    learner.write_checkpoint(tmp_path)
    policy = load_policy(learner.config, tmp_path)
    again = Counting(learner.config, policy, 10)
    again.read_checkpoint(tmp_path)
    assert (again.step, again.tokens_done, again.apples) == (3, 77, 5)
    for one in (learner, again):
        push(one)
        one.descend(1.0)
    ours, theirs = weights(learner), weights(again)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_files_of_a_checkpoint(model, tmp_path):
    learner = make_learner(model)
    push(learner)
    learner.descend(1.0)
    learner.write_checkpoint(tmp_path)
    assert sorted(path.name for path in (tmp_path / "trainer").iterdir()) == [
        "optimizer.safetensors",
        "state.json",
    ]
    state = json.loads((tmp_path / "trainer" / "state.json").read_text())
    assert state == {"step": 1, "tokens_done": 0, "skipped_in_a_row": 0}
    names = {name.partition(".")[::2] for name in load_file(tmp_path / "trainer" /
                                                            "optimizer.safetensors")}  # fmt: skip
    parameters = {name for name, _ in learner.policy.model.named_parameters()}
    assert {name for _, name in names} == parameters
    assert {key for key, _ in names} == {"step", "exp_avg", "exp_avg_sq"}


def test_a_counter_that_an_older_version_did_not_write_is_unknown(model, tmp_path):
    learner = make_learner(model)
    push(learner)
    learner.descend(1.0)
    learner.write_checkpoint(tmp_path)
    again = make_learner(model, cls=Counting)
    again.read_checkpoint(tmp_path)
    assert again.apples is None and again.step == 1
