"""What a run is made of before its first step: rewards that compare completions, the sandbox."""

import json

import pytest
from tiny_model import make_tiny_model, run_settings

from grpo_engine import prepare
from grpo_engine.config import build_config
from grpo_engine.metrics import read_metrics
from grpo_engine.rewards.sandbox import RLIMITS_ONLY, Sandbox
from grpo_engine.rewards.sandbox_run import SandboxError
from grpo_engine.train import train_grpo
from grpo_engine.types import UserError

# The longest answer of each group of four gets 1. A single completion cannot be compared.
COMPARING = """
def longest_of_four(prompts, completions, **columns):
    if len(completions) < 4:
        raise RuntimeError(f"{len(completions)} completions")
    scores = []
    for start in range(0, len(completions), 4):
        group = completions[start : start + 4]
        assert len(set(prompts[start : start + 4])) == 1
        scores += [float(len(c) == max(map(len, group))) for c in group]
    return scores
"""
PROGRAM_TESTS = {"type": "stdio", "cases": [{"input": "", "output": "1"}]}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    (folder / "comparing.py").write_text(COMPARING)
    rows = [{"prompt": f"{i}+{i}=", "tests": PROGRAM_TESTS} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def config_of(inputs, output_dir, **changes):
    reward = f"{inputs / 'comparing.py'}:longest_of_four"
    base = run_settings(inputs / "model", inputs / "rows.jsonl", reward, output_dir)
    return build_config(base | {"max_steps": 2} | changes)


def test_a_reward_that_compares_completions_sees_a_whole_rollout(inputs, tmp_path):
    names = config_of(inputs, tmp_path).reward_funcs
    assert train_grpo(config_of(inputs, tmp_path, batched_reward_funcs=names)) == 0
    row = read_metrics(tmp_path)[0]
    assert 4 / 16 <= row["reward"] < 1.0  # ties share the first place
    assert row["rewards/longest_of_four/mean"] == row["reward"]


def test_the_same_reward_called_for_each_completion_fails(inputs, tmp_path, capsys):
    assert train_grpo(config_of(inputs, tmp_path)) == 1
    assert "1 completions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batched_reward_funcs": ["format"]}, "batched_reward_funcs=.*'format' is not among"),
        (
            {"reward_funcs": ["accuracy"], "batched_reward_funcs": ["accuracy"]},
            "batched needs the TRL",
        ),
    ],
)
def test_batched_rewards_that_cannot_be(inputs, tmp_path, changes, words):
    with pytest.raises(UserError, match=words):
        train_grpo(config_of(inputs, tmp_path / "new", **changes), dry_run=True)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("where", ["reward_funcs", "eval_reward"])
def test_the_sandbox_tier_is_told_and_recorded(inputs, tmp_path, monkeypatch, capsys, where):
    monkeypatch.setattr(prepare, "find_sandbox", lambda **_: Sandbox("a tier", "python", "/usr"))
    if where == "reward_funcs":
        names = config_of(inputs, tmp_path).reward_funcs
        changes = {"reward_funcs": [*names, "code"], "batched_reward_funcs": names}
        changes["max_reward_error_rate"] = 1.0
    else:
        held_out = [{"prompt": f"{i}-{i}=", "tests": PROGRAM_TESTS} for i in range(2)]
        (inputs / "held_out.jsonl").write_text("".join(json.dumps(r) + "\n" for r in held_out))
        changes = {"eval_dataset": str(inputs / "held_out.jsonl"), "eval_reward": "code"}
        changes |= {"batched_reward_funcs": config_of(inputs, tmp_path).reward_funcs}
    config = config_of(inputs, tmp_path, **changes)
    assert train_grpo(config, dry_run=True) == 0
    assert "reward 'code' runs programs in the sandbox tier 'a tier'" in capsys.readouterr().err
    assert train_grpo(config_of(inputs, tmp_path, **changes)) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["inputs"]["sandbox"] == {"tier": "a tier"}
    monkeypatch.setattr(prepare, "find_sandbox", lambda **_: Sandbox("another", "python", "/usr"))
    again = config_of(inputs, tmp_path, **changes | {"max_steps": 3})
    assert train_grpo(again, resume=str(tmp_path)) == 0
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["inputs"]["sandbox"] == {"tier": "a tier"}
    assert manifest["resumed"][0]["sandbox"] == {"tier": "another"}


def test_code_rewards_without_a_sandbox_are_refused_at_once(inputs, tmp_path, monkeypatch):
    def refuse(*, allow_rlimits_only):
        assert not allow_rlimits_only
        raise SandboxError(f"no sandbox for foreign code: {RLIMITS_ONLY}")

    monkeypatch.setattr(prepare, "find_sandbox", refuse)
    with pytest.raises(UserError, match="reward 'code': no sandbox for foreign code"):
        train_grpo(config_of(inputs, tmp_path / "new", reward_funcs=["code"]))
    assert not (tmp_path / "new").exists()


def test_the_weaker_sandbox_is_there_for_who_asks(inputs, tmp_path, monkeypatch, capsys):
    def find(*, allow_rlimits_only):
        return Sandbox(RLIMITS_ONLY if allow_rlimits_only else "strong", "python", "/usr")

    monkeypatch.setattr(prepare, "find_sandbox", find)
    for args, tier in (({}, "strong"), ({"code": {"allow_rlimits_only": True}}, RLIMITS_ONLY)):
        changes = {"reward_funcs": ["code"], "reward_args": args}
        assert train_grpo(config_of(inputs, tmp_path, **changes), dry_run=True) == 0
        assert f"in the sandbox tier {tier!r}" in capsys.readouterr().err


def test_without_a_code_reward_no_sandbox_is_looked_for(inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "find_sandbox", lambda: pytest.fail("looked for a sandbox"))
    assert train_grpo(config_of(inputs, tmp_path, reward_funcs=["format"]), dry_run=True) == 0
    assert "sandbox" not in capsys.readouterr().err
