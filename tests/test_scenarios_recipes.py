"""The recipes of reasoning RL and of RL for all scenarios: the paper's numbers, and a few steps of
each on the miniature."""

import pytest

from grpo_engine.config import build_config
from grpo_engine.metrics import read_metrics
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.rewards.model import ScoreCard
from grpo_engine.scenarios import Mixture
from grpo_engine.settings import load_recipe
from grpo_engine.train import train_grpo

MINIATURE = {
    "model": "miniature",
    "dataset": "reasoning_gym:chain_sum",
    "dataset_args": {"size": 64, "min_terms": 4, "max_terms": 6, "min_digits": 1, "max_digits": 1},
    "dataset_domain": "math",
    "prompt_template": "r1-zero",
    "prompts_per_generation": 4,
    "num_generations": 4,
    "max_prompt_length": 64,
    "max_completion_length": 160,
    "max_tokens_per_microbatch": 2048,
    "steps_per_generation": 2,
    "ref_model_sync_steps": 4,
    "max_steps": 6,
    "save_steps": 6,
    "bf16": False,
    "gradient_checkpointing": False,
    "reward_workers": 1,
    "device": "cpu",
}


def test_reasoning_rl_runs_on_the_miniature(tmp_path):
    """Accuracy + language consistency, clip ratio 10; the reference is replaced after step 4."""
    pytest.importorskip("reasoning_gym")
    recipe = load_recipe("r1-reasoning-rl") | MINIATURE
    changes = {"reward_funcs": ["accuracy", "language"], "reward_domains": {"accuracy": ["math"]}}
    config = build_config(recipe | changes | {"output_dir": str(tmp_path), "learning_rate": 1e-3})
    assert (config.epsilon, config.beta, config.temperature) == (10, 0.001, 1.0)
    assert train_grpo(config) == 0
    rows = read_metrics(tmp_path)
    for row in rows[::2]:  # the first step of each rollout
        # Some chains of the miniature are English, some Chinese, some both: an English share.
        assert 0.2 < row["rewards/language/mean"] < 0.95
        assert row["language/off_script_characters/thinking"] > 0.5
        assert row["language/off_script_characters/answer"] >= 0
        total = row["rewards/accuracy/mean"] + row["rewards/language/mean"]
        judged = 1 - row["rewards/language/none_rate"] if "rewards/language/none_rate" in row else 1
        assert row["reward"] == pytest.approx(total, abs=1.01 - judged + 1e-6)
    assert all(row["clip_ratio/region_mean"] == 0.0 for row in rows)  # of a range of [-9, 11]
    assert rows[3]["kl"] > rows[4]["kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is new


def test_all_scenarios_run_on_the_miniature(tmp_path):
    pytest.importorskip("reasoning_gym")
    recipe = load_recipe("r1-all-scenarios") | MINIATURE
    for kind, scope in (("helpful", "summary"), ("safety", "response")):
        RewardNetwork.from_model("miniature", device="cpu").save_pretrained(tmp_path / kind)
        ScoreCard(kind, scope, "none", std=2.0, score_scale="standardised").write(tmp_path / kind)
    for verb, field in (("Say", "general_dataset"), ("Tell", "general_eval_dataset")):
        for source in recipe[field]:
            path = tmp_path / source["source"]
            path.write_text("".join(f'{{"prompt": "{verb} {i}"}}\n' for i in range(4)))
            source["source"] = str(path)
    changes = {
        "reward_funcs": ["accuracy", "format_r1", "language", "helpful", "safety"],
        "reward_domains": {"accuracy": ["math"], "helpful": ["helpful"], "safety": ["safety"]},
        "eval_dataset": "reasoning_gym:chain_sum",
        "eval_dataset_args": MINIATURE["dataset_args"] | {"seed": 1_000_512, "size": 4},
        "helpful_model": str(tmp_path / "helpful"),
        "safety_model": str(tmp_path / "safety"),
        "preference_steps": 4,
        "output_dir": str(tmp_path / "run"),
    }
    config = build_config(recipe | changes)
    assert (config.temperature, config.epsilon, config.general_share) == (0.7, 10, 0.5)
    assert train_grpo(config) == 0
    rows = read_metrics(tmp_path / "run")
    preferences = {"rewards/helpful/mean", "rewards/safety/mean"}
    assert not preferences & rows[1].keys()
    assert preferences & rows[3].keys() and preferences & rows[5].keys()
    before, *steps, last = rows
    for row in (before, last):  # what the reward models say of held-out prompts
        assert {"eval/accuracy", "eval/helpful", "eval/safety"} <= row.keys()
    for row in [*steps, last][::2]:
        assert {"rewards/format_r1/mean", "rewards/language/mean"} <= row.keys()
        shares = [value for key, value in row.items() if key.endswith("/share")]
        assert sum(shares) == pytest.approx(1.0)


def test_the_paper_s_numbers_are_in_the_recipe():
    config = build_config(load_recipe("r1-all-scenarios"))
    assert (config.max_steps, config.preference_steps, config.temperature) == (1700, 400, 0.7)
    assert config.prompts_per_generation * config.num_generations == 8192
    mixture = Mixture.of(config, True)
    assert mixture.counts(81) == (512, 0) and mixture.counts(82) == (256, 256)
