"""All scenarios in whole runs: general prompts join at the boundary, it resumes bit for bit, and
what a user can get wrong is one line."""

import json
import shutil
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_model import make_tiny_model, run_settings

import grpo_engine.session
from grpo_engine.cli import main
from grpo_engine.config import build_config
from grpo_engine.generation.hf import HFGenerator
from grpo_engine.grpo import GRPORun
from grpo_engine.metrics import read_jsonl, read_metrics
from grpo_engine.pipeline.budget import Budgets
from grpo_engine.pipeline.stages import STAGES as KINDS
from grpo_engine.pipeline.stages import Stage
from grpo_engine.policy import Policy
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.rewards import BackgroundScoring, RewardPool, RewardSpec
from grpo_engine.rewards.model import ScalarModel, ScoreCard
from grpo_engine.rollouts import Prompt, assign_advantages, sample_rollouts, score_rollouts
from grpo_engine.train import train_grpo
from grpo_engine.types import Rollout, SamplingParams, UserError

REWARDS = """
import time

def share_of_a(prompts, completions, **columns):
    return [completion.count("a") / max(1, len(completion)) for completion in completions]

def share_of_b(prompts, completions, **columns):
    return [completion.count("b") / max(1, len(completion)) for completion in completions]

def broken(prompts, completions, **columns):
    raise ValueError("no such thing")
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    (folder / "reward.py").write_text(REWARDS)
    for kind, scope in (("helpful", "summary"), ("safety", "response")):
        seed = len(kind)
        network = RewardNetwork.from_model(str(folder / "model"), device="cpu", seed=seed)
        network.save_pretrained(folder / kind)
        ScoreCard(kind, scope, lowest=-3.0).write(folder / kind)
    files = {
        "maths": [{"prompt": f"{i}+{i}=", "solution": str(2 * i)} for i in range(8)],
        "mixed": [{"prompt": f"{i}+{i}=", "domain": "math" if i else "logic"} for i in range(8)],
        "held": [{"prompt": f"{i}*{i}=", "solution": str(i * i)} for i in range(4)],
        "kind": [{"prompt": f"hi {i}?"} for i in range(5)],
        "held-kind": [{"prompt": f"hi {i}!"} for i in range(3)] + [{"prompt": "hi 4?"}],
        "held-harm": [{"prompt": f"bad {i}!"} for i in range(2)],
        "harm": [{"prompt": f"bad {i}?", "domain": "general", "kind": "safety"} for i in range(3)],
    }
    for name, rows in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(inputs, output_dir, **changes):
    """Eight steps, two a rollout; the last two rollouts have general prompts."""
    reward = f"{inputs / 'reward.py'}:share_of_a"
    base = run_settings(inputs / "model", inputs / "maths.jsonl", reward, output_dir)
    return (
        base
        | {
            "reward_funcs": [reward, f"{inputs / 'reward.py'}:share_of_b", "helpful", "safety"],
            "reward_domains": {
                "share_of_a": ["math"],
                "helpful": ["helpful"],
                "safety": ["safety"],
            },
            "dataset_domain": "math",
            "general_dataset": [
                {"source": str(inputs / "kind.jsonl"), "domain": "helpful"},
                {"source": str(inputs / "harm.jsonl"), "domain_column": "kind"},
            ],
            "general_eval_dataset": [
                {"source": str(inputs / "held-kind.jsonl"), "domain": "helpful"},
                {"source": str(inputs / "held-harm.jsonl"), "domain": "safety"},
            ],
            "general_share": 0.5,
            "preference_steps": 4,
            "helpful_model": str(inputs / "helpful"),
            "safety_model": str(inputs / "safety"),
            "eval_dataset": str(inputs / "held.jsonl"),
            "eval_reward": "share_of_a",
            "eval_steps": 2,
            "max_steps": 8,
            "save_steps": 1,
            "save_total_limit": 20,
            "log_completions_steps": 1,
        }
        | changes
    )


NO_DOMAINS = {
    "reward_domains": {},
    "dataset_domain": None,
    "general_dataset": [],
    "general_eval_dataset": [],
    "preference_steps": None,
}


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train_grpo(build_config(settings(inputs, folder))) == 0
    return folder


def test_general_prompts_and_their_rewards_come_in_the_last_steps_only(whole):
    rows = {row["step"]: row for row in read_metrics(whole)}
    for step in (1, 3):
        assert rows[step]["domains/math/share"] == 1.0
        assert not [key for key in rows[step] if "helpful" in key or "safety" in key]
    for step in (5, 7):
        row = rows[step]
        assert row["domains/math/share"] == 0.5 and row["time/reward_model"] > 0
        general = [f"domains/{kind}/share" for kind in ("helpful", "safety")]
        assert sum(row.get(name, 0.0) for name in general) == 0.5
    for step in (2, 4, 6, 8):  # the second update of a rollout
        assert "reward" not in rows[step] and "eval/accuracy" in rows[step]
    seen = {d for row in rows.values() for d in ("helpful", "safety") if f"rewards/{d}/mean" in row}
    assert seen == {"helpful", "safety"}


def test_every_completion_gets_the_rewards_of_its_row(whole, inputs):
    prompts = {"helpful": "hi", "safety": "bad"}
    for step in (1, 3, 5, 7):
        samples = read_jsonl(whole / "completions" / f"step-{step:06d}.jsonl")
        assert len(samples) == 16
        for sample in samples:
            word = sample["prompt"].split()[0]
            expected = {
                "share_of_a": word not in prompts.values(),
                "share_of_b": True,  # not limited: every row
                "helpful": word == "hi",
                "safety": word == "bad",
            }
            given = {name: score is not None for name, score in sample["rewards"].items()}
            assert given == expected
            scores = [score for score in sample["rewards"].values() if score is not None]
            assert sample["reward"] == pytest.approx(sum(scores), rel=1e-6)
        general = [s["prompt"] for s in samples if s["prompt"].split()[0] in prompts.values()]
        assert len(general) == (8 if step >= 5 else 0)


def test_the_manifest_names_the_reward_models_and_all_rows(whole, inputs):
    made_from = json.loads((whole / "manifest.json").read_text())["inputs"]
    assert made_from["helpful_model"]["path"] == str(inputs / "helpful")
    hashes = [made_from[f"{kind}_model"]["weights_sha256"] for kind in ("helpful", "safety")]
    assert all(len(h) == 64 for h in hashes) and hashes[0] != hashes[1]
    rows = {name: made_from[name].get("rows") for name in made_from if "dataset" in name}
    # One of the eight general prompts is a held-out one and is left out.
    assert rows == {
        "dataset": 8,
        "general_dataset": 7,
        "eval_dataset": 4,
        "general_eval_dataset": 6,
    }


def test_held_out_general_prompts_are_scored_from_the_start(whole, inputs):
    """The reward models' verdict of the policy before they take part, and after."""
    rows = [row for row in read_metrics(whole) if "eval/accuracy" in row]
    assert [row["step"] for row in rows] == [0, 2, 4, 6, 8]
    assert all({"eval/helpful", "eval/safety"} <= row.keys() for row in rows)
    assert len({row["eval/helpful"] for row in rows}) > 1
    for row in rows:  # what the token account of a pipeline counts
        assert (row["eval/num_answers"], row["eval/general/num_answers"]) == (4, 6)
        assert row["eval/mean_length"] > 0 and row["eval/general/mean_length"] > 0
    stage = Stage("", "grpo", KINDS["grpo"], build_config(settings(inputs, whole)), whole)
    drawn = sum(row["eval/num_answers"] + row["eval/general/num_answers"] for row in rows)
    assert Budgets([stage]).found[""].held_out == drawn * 12  # what a plan says before it runs
    first = read_jsonl(whole / "completions" / "eval-000000.jsonl")
    assert len(first) == 4  # the problems that accuracy is the share of
    policy = Policy.load(str(inputs / "model"), device="cpu")
    drawn = sample_rollouts(
        HFGenerator(policy),
        policy.tokenizer,
        [
            Prompt({"prompt": text}, text, policy.tokenizer(text)["input_ids"])
            for text in ("hi 0!", "hi 1!", "hi 2!", "hi 4?", "bad 0!", "bad 1!")
        ],
        1,
        SamplingParams(max_completion_length=12),
        (0, "general eval"),
    )
    for name, part in (("helpful", drawn[:4]), ("safety", drawn[4:])):
        model = ScalarModel.load(inputs / name, device="cpu")
        scores = model.score([r.prompt for r in part], [r.completion for r in part])
        assert rows[0][f"eval/{name}"] == pytest.approx(np.mean(scores), abs=1e-5)
    report = (whole / "report.html").read_text()
    assert "Scoring by reward models" in report and "helpful, held-out prompts" in report


def test_the_reference_is_the_policy_of_every_fourth_step(whole):
    """pi_ref <- pi_theta every K steps, and not in between; until then it is the base."""
    for step in range(1, 9):
        checkpoint = whole / f"checkpoint-{step}"
        reference = checkpoint / "trainer" / "reference.safetensors"
        assert reference.exists() == (step >= 4)
        if step >= 4:
            there = load_file(whole / f"checkpoint-{step - step % 4}" / "model.safetensors")
            kept = load_file(reference)
            assert kept.keys() >= there.keys()
            assert all(torch.equal(kept[name], there[name]) for name in there)


def curve(folder):
    """The rows without what the clock decides."""
    timed = ("time/", "wall", "tokens_per_second", "update_tokens_per_second")
    return [
        {k: v for k, v in row.items() if not k.startswith(timed)} for row in read_metrics(folder)
    ]


@pytest.mark.parametrize("stop", [3, 4, 5])  # before the boundary, at it, and within what follows
def test_a_run_resumed_across_the_boundary_is_the_same_bit_for_bit(inputs, whole, tmp_path, stop):
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    config = build_config(settings(inputs, cut))
    assert train_grpo(config, resume=str(cut / f"checkpoint-{stop}")) == 0
    assert curve(cut) == curve(whole)
    for name in ("model.safetensors", "trainer/optimizer.safetensors"):
        one, other = (load_file(folder / "checkpoint-8" / name) for folder in (whole, cut))
        assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    for step in (5, 7):
        name = f"completions/step-{step:06d}.jsonl"
        assert (cut / name).read_text() == (whole / name).read_text()


def test_what_a_resumed_run_may_not_change(inputs, whole, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for changes, word in (
        ({"max_steps": 10}, "max_steps"),  # the last steps are counted from there
        ({"preference_steps": 2}, "preference_steps"),
        ({"general_share": 0.25}, "general_share"),
        ({"reward_domains": {"share_of_a": ["math"]}}, "reward_domains"),
    ):
        with pytest.raises(UserError, match=word):
            train_grpo(build_config(settings(inputs, cut, **changes)), resume=str(cut))


def test_a_reward_model_that_changed_is_noticed_on_resume(inputs, whole, tmp_path):
    cut, model = tmp_path / "cut", tmp_path / "model"
    shutil.copytree(whole, cut)
    network = RewardNetwork.from_model(str(inputs / "model"), device="cpu", seed=99)
    network.save_pretrained(model)
    ScoreCard("helpful", "summary").write(model)
    for path in (inputs / "helpful").iterdir():
        shutil.copy(path, tmp_path / path.name)
    try:
        for path in model.iterdir():
            shutil.copy(path, inputs / "helpful" / path.name)
        with pytest.raises(UserError, match="helpful_model.*changed"):
            train_grpo(build_config(settings(inputs, cut)), resume=str(cut))
    finally:
        for path in (inputs / "helpful").iterdir():
            shutil.copy(tmp_path / path.name, path)


def test_a_reward_model_with_a_weight_that_is_not_finite_is_refused_at_the_start(inputs, tmp_path):
    """Only prompts that come late may meet that weight."""
    shutil.copytree(inputs / "helpful", tmp_path / "helpful")
    weights = load_file(tmp_path / "helpful" / "model.safetensors")
    weights["model.embed_tokens.weight"][-1, 3] = torch.nan
    save_file(weights, tmp_path / "helpful" / "model.safetensors", {"format": "pt"})
    changes = {"helpful_model": str(tmp_path / "helpful")}
    with pytest.raises(UserError, match="--helpful_model .*embed_tokens.* is not finite"):
        train_grpo(build_config(settings(inputs, tmp_path / "run", **changes)))
    assert not (tmp_path / "run").exists()


def test_held_out_rows_need_nothing_of_rewards_for_other_rows(inputs, tmp_path):
    """The judge is the pool of all rewards by rule; its accuracy is for the training rows of a
    domain that no held-out row has."""
    rows = [{"prompt": "1+1=", "solution": "2", "domain": "math"}, {"prompt": "hi", "domain": "x"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "held.jsonl").write_text(json.dumps({"prompt": "2+2="}) + "\n")
    changes = NO_DOMAINS | {
        "dataset": str(tmp_path / "rows.jsonl"),
        "eval_dataset": str(tmp_path / "held.jsonl"),
        "reward_funcs": [f"{inputs / 'reward.py'}:share_of_a", "accuracy", "format"],
        "reward_domains": {"accuracy": ["math"], "format": ["x"]},
        "helpful_model": None,
        "safety_model": None,
        "max_steps": 2,
    }
    assert train_grpo(build_config(settings(inputs, tmp_path / "run", **changes))) == 0
    assert read_metrics(tmp_path / "run")[0]["eval/num_samples"] == 1


def test_a_run_by_reward_models_alone(inputs, tmp_path):
    changes = NO_DOMAINS | {
        "dataset": str(inputs / "kind.jsonl"),
        "reward_funcs": ["helpful"],
        "eval_reward": "format",
        "safety_model": None,
        "max_steps": 2,
    }
    assert train_grpo(build_config(settings(inputs, tmp_path / "run", **changes))) == 0
    row = read_metrics(tmp_path / "run")[1]
    assert row["reward"] == pytest.approx(row["rewards/helpful/mean"])


# -- rules beside sampling and log-probs -----------------------------------------------------------


def make_run(inputs, pool, **changes):
    values = {name: changes[name] for name in changes}
    reward = f"{inputs / 'reward.py'}:share_of_a"
    base = run_settings(inputs / "model", inputs / "maths.jsonl", reward, "unused")
    config = build_config(base | values)
    policy = Policy.load(config.model, device="cpu")
    reference = policy.frozen_copy() if config.beta else None
    prompts = [
        Prompt({"prompt": f"{i}="}, f"{i}=", policy.tokenizer(f"{i}=")["input_ids"])
        for i in range(8)
    ]
    generator = HFGenerator(policy, max_batch_size=5)  # four batches a rollout
    return GRPORun(config, policy, reference, generator, pool, prompts)


@pytest.mark.parametrize("beta", [0.01, 0.0])  # with beta 0 dead groups get no log-probs
def test_the_rewards_are_those_of_scoring_when_all_is_sampled(inputs, beta):
    specs = [RewardSpec.named(f"{inputs / 'reward.py'}:share_of_{letter}") for letter in "ab"]
    with RewardPool(specs, num_workers=2) as pool:
        run = make_run(inputs, pool, beta=beta)
        rollouts, arrays, rows = run.rollout()
        again = [
            Rollout(**{**vars(r), "rewards": {}, "reward": None, "advantage": 0.0})
            for r in rollouts
        ]
        report = score_rollouts(pool, again)
    assert [r.rewards for r in again] == [r.rewards for r in rollouts]
    assert [r.reward for r in again] == [r.reward for r in rollouts]
    assign_advantages(again, run.config.num_generations, run.config.scale_rewards)
    assert arrays.advantages.tolist() == torch.tensor([r.advantage for r in again]).tolist()
    assert rows["reward"] == pytest.approx(np.mean([r.reward for r in again]), rel=1e-6)
    assert rows["rewards/share_of_b/mean"] == np.mean(report.scores["share_of_b"])
    expected = run.logprobs(run.policy, arrays)
    assert torch.equal(arrays.old_logprobs, expected)


def test_rules_are_scored_while_the_sampler_draws_the_next_batch(inputs, monkeypatch):
    """When the last batch begins, the scores of the first are there."""
    seen = []
    add = BackgroundScoring.add

    def waiting_add(self, members, completions, completion_ids):
        if seen:
            end = time.monotonic() + 20
            while not set(seen[0]) <= {item for _, item in self._batch.results}:
                assert time.monotonic() < end, "nothing was scored while sampling went on"
                time.sleep(0.01)
        seen.append(list(members))
        add(self, members, completions, completion_ids)

    monkeypatch.setattr(BackgroundScoring, "add", waiting_add)
    reward = RewardSpec.named(f"{inputs / 'reward.py'}:share_of_a")
    with RewardPool([reward], num_workers=1) as pool:
        rollouts, _, _ = make_run(inputs, pool).rollout()
    assert len(seen) == 4 and sorted(i for members in seen for i in members) == list(range(16))
    assert all(r.reward is not None for r in rollouts)


def test_a_spent_error_budget_ends_the_run_loudly(inputs, tmp_path, capsys):
    changes = NO_DOMAINS | {"helpful_model": None, "safety_model": None, "eval_dataset": None}
    changes["reward_funcs"] = [f"{inputs / 'reward.py'}:broken"]
    assert train_grpo(build_config(settings(inputs, tmp_path / "run", **changes))) == 1
    printed = capsys.readouterr().out
    assert "reward 'broken' failed on" in printed and "no such thing" in printed
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["status"] == "failed"


def test_a_hacking_warning_reaches_the_row_the_screen_and_the_report(
    inputs, tmp_path, monkeypatch, capsys
):
    def at_step_2(row, history):
        return ["reward-hacking: made up"] if row["step"] == 2 else []

    monkeypatch.setattr(grpo_engine.session, "hacking_warnings", at_step_2)
    folder = tmp_path / "run"
    config = settings(inputs, folder, max_steps=2, preference_steps=None)
    assert train_grpo(build_config(config)) == 0
    rows = {row["step"]: row.get("warnings", []) for row in read_metrics(folder)}
    assert "reward-hacking: made up" in rows[2] and "reward-hacking: made up" not in rows[1]
    assert "reward-hacking: made up" in (folder / "report.html").read_text()
    assert "reward-hacking: made up" in capsys.readouterr().out


def test_reward_functions_get_their_arguments(inputs, tmp_path):
    (tmp_path / "reward.py").write_text(
        "def constant(completions, value=0.0, **columns):\n    return [value] * len(completions)\n"
    )
    reward = f"{tmp_path / 'reward.py'}:constant"
    for key in (reward, "constant"):
        changes = NO_DOMAINS | {"helpful_model": None, "safety_model": None, "max_steps": 2}
        changes |= {"reward_funcs": [reward], "reward_args": {key: {"value": 0.25}}}
        changes |= {"eval_reward": "constant"}
        folder = tmp_path / key.rpartition("/")[2]
        assert train_grpo(build_config(settings(inputs, folder, **changes))) == 0
        first = read_metrics(folder)[:2]
        assert (first[0]["eval/accuracy"], first[1]["reward"]) == (0.25, 0.25)


# -- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"helpful_model": None}, ["reward_funcs", "'helpful' needs --helpful_model"]),
        ({"helpful_model": "{}/safety"}, ["--helpful_model", "kind 'safety'"]),
        ({"helpful_model": "{}/model"}, ["--helpful_model", "reward_model.json"]),
        ({"helpful_model": "absent"}, ["--helpful_model 'absent'"]),
        ({"helpful_scale": "percent"}, ["helpful_scale", "percent"]),
        ({"reward_funcs": ["format"]}, ["helpful_model", "'helpful' is not in reward_funcs"]),
        ({"eval_reward": "helpful"}, ["eval_reward='helpful'"]),
        ({"reward_domains": {}}, ["general_dataset", "reward_domains"]),
        ({"reward_domains": {"share_of_a": []}}, ["reward_domains", "share_of_a"]),
        ({"reward_domains": {"share_of_c": ["math"]}}, ["reward_domains", "'share_of_c'"]),
        ({"reward_domains": {"share_of_a": ["math"]}}, ["no reward is for", "'helpful'"]),
        ({"dataset_domain": None}, ["maths.jsonl", "row 1", "'domain'"]),
        ({"dataset": "{}/mixed.jsonl"}, ["no reward is for the domain 'logic' of 1 rows"]),
        ({"general_share": 0.05}, ["general_share=0.05"]),
        ({"general_share": 1.5}, ["general_share", "1.5"]),
        ({"preference_steps": 9}, ["preference_steps=9", "max_steps=8"]),
        ({"preference_steps": 1}, ["preference_steps=1", "no rollout begins that late"]),
        ({"general_dataset": [], "general_eval_dataset": []}, ["without general_dataset"]),
        ({"general_dataset": []}, ["general_eval_dataset: needs"]),
        ({"eval_dataset": None}, ["general_eval_dataset: needs"]),
        (
            {"general_eval_dataset": [{"source": "{}/held.jsonl", "domain": "math"}]},
            ["general_eval_dataset", "'math'", "row 1"],
        ),
        ({"general_dataset": [{"domain": "x"}]}, ["general_dataset[0].source", "required"]),
        (
            {"general_dataset": [{"source": "a.jsonl", "domian": "x"}]},
            ["general_dataset[0].domian"],
        ),
        ({"general_dataset": [{"source": "absent.jsonl", "domain": "x"}]}, ["absent.jsonl"]),
        ({"general_dataset": [{"source": "{}/kind.jsonl"}]}, ["kind.jsonl", "row 1", "'domain'"]),
        ({"reward_args": {"nobody": {}}}, ["reward_args", "'nobody'"]),
        ({"reward_args": {"share_of_a": {"x": 1}}}, ["'share_of_a' has no argument 'x'"]),
        ({"reward_args": {"safety": {"x": 1}}}, ["reward_args", "'safety'"]),
        (
            {"reward_args": {"share_of_a": {}, "{}/reward.py:share_of_a": {}}},
            ["reward_args", "are the same reward"],
        ),
        (
            {"reward_domains": {"share_of_a": ["math"], "{}/reward.py:share_of_a": ["safety"]}},
            ["reward_domains", "are the same reward"],
        ),
        (
            {"reward_funcs": ["{}/reward.py:helpful", "helpful", "safety"]},
            ["reward_funcs: names must differ", "helpful, helpful, safety"],
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_with_one_line_and_nothing_written(inputs, tmp_path, capsys, changes, words):
    values = settings(inputs, tmp_path / "run", **changes)
    text = json.dumps(values).replace("{}/", f"{inputs}/")
    (tmp_path / "run.yaml").write_text(text)
    assert main(["grpo", "--config", str(tmp_path / "run.yaml")]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert out == "" and "Traceback" not in err and last.startswith("grpo-engine: error: ")
    for word in words:
        assert word in last, last
    assert not (tmp_path / "run").exists()


def test_the_plan_says_when_general_prompts_join(inputs, tmp_path, capsys):
    config = build_config(settings(inputs, tmp_path / "run"))
    assert train_grpo(config, dry_run=True) == 0
    line = "7 prompts, 2 of the 4 of a rollout from step 5 of 8 on"
    printed = capsys.readouterr().out
    assert line in printed and not (tmp_path / "run").exists()
    assert "share_of_a (math), share_of_b, helpful (helpful), safety (safety)" in printed


def test_overwriting_does_not_delete_a_reward_model(inputs, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoint-1").mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("")
    config = build_config(settings(inputs, folder, helpful_model=str(folder / "checkpoint-1")))
    with pytest.raises(UserError, match="would delete --helpful_model"):
        train_grpo(config, overwrite=True)
    rows = folder / "completions" / "rows.jsonl"
    rows.parent.mkdir()
    source = {"source": str(rows), "domain": "helpful"}
    config = build_config(settings(inputs, folder, general_dataset=[source]))
    with pytest.raises(UserError, match="would delete --general_dataset"):
        train_grpo(config, overwrite=True)
