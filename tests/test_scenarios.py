"""All scenarios, piece by piece: which reward a row gets, when general prompts join, the sum."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_model import make_tiny_model

from grpo_engine.data import PromptOrder
from grpo_engine.reward_network import RewardNetwork
from grpo_engine.rewards import RewardPool, RewardSpec
from grpo_engine.rewards.model import ScalarModel, ScoreCard
from grpo_engine.rollouts import Prompt, domain_metrics
from grpo_engine.scenarios import (
    Mixture,
    PromptStream,
    check_domains,
    with_domains,
    with_reward_domains,
)
from grpo_engine.scoring import ModelReward, RolloutScoring
from grpo_engine.types import Rollout, UserError

# -- domains ---------------------------------------------------------------------------------------


def test_a_row_has_the_domain_of_its_column_else_that_of_its_source():
    rows = [{"domain": "code"}, {"prompt": "p"}, {"domain": None}]
    found = with_domains(rows, "rows.jsonl", default="math")
    assert [row["domain"] for row in found] == ["code", "math", "math"]
    assert rows[1] == {"prompt": "p"}  # not changed in place
    other = with_domains([{"domain": "general", "preference": "safety"}], "x", column="preference")
    assert other == [{"domain": "safety", "preference": "safety"}]


@pytest.mark.parametrize(
    ("row", "column", "words"),
    [
        ({"prompt": "p"}, "domain", ["rows.jsonl", "row 2", "'domain'"]),
        ({"domain": 3}, "domain", ["row 2", "3"]),
        ({"domain": ""}, "domain", ["row 2", "''"]),
        ({"domain": "math"}, "kind", ["row 2", "'kind'"]),
    ],
)
def test_a_row_without_a_usable_domain_is_named(row, column, words):
    with pytest.raises(UserError) as caught:
        with_domains([{"domain": "math", "kind": "math"}, row], "rows.jsonl", column=column)
    assert all(word in str(caught.value) for word in words), caught.value


SPECS = [RewardSpec.named(name) for name in ("accuracy", "format_r1", "language", "helpful")]
DOMAINS = {"accuracy": ["math", "code"], "helpful": ["helpful"]}


@pytest.mark.parametrize(
    ("domain", "rewards"),
    [
        ("math", ["accuracy", "format_r1", "language"]),
        ("code", ["accuracy", "format_r1", "language"]),
        ("helpful", ["format_r1", "language", "helpful"]),
        ("safety", ["format_r1", "language"]),
    ],
)
def test_which_rewards_apply_to_which_row(domain, rewards):
    specs = with_reward_domains(SPECS, DOMAINS)
    assert [spec.name for spec in specs if spec.applies({"domain": domain})] == rewards


def test_without_reward_domains_every_reward_applies_to_every_row():
    assert with_reward_domains(SPECS, {}) == SPECS
    assert all(spec.applies({}) and spec.applies({"domain": "x"}) for spec in SPECS)
    check_domains(SPECS, [{"prompt": "no domain anywhere"}])


def test_a_reward_may_be_called_by_its_place_or_its_name():
    spec = RewardSpec.named("my/file.py:polite")
    for key in ("my/file.py:polite", "polite"):
        assert with_reward_domains([spec], {key: ["chat"]})[0].domains == ("chat",)


@pytest.mark.parametrize(
    ("reward_domains", "words"),
    [
        ({"acuracy": ["math"]}, ["acuracy", "accuracy, format_r1, language, helpful"]),
        ({"accuracy": ["maths"], "helpful": ["helpful"]}, ["'accuracy'", "'maths'", "no row has"]),
        ({"accuracy": ["math"]}, ["no reward", "'helpful'", "2 rows"]),
    ],
)
def test_a_domain_that_nobody_has_or_nobody_rewards_is_named(reward_domains, words):
    rows = [{"domain": d} for d in ("math", "helpful", "helpful")]
    with pytest.raises(UserError) as caught:
        check_domains(with_reward_domains(SPECS, reward_domains), rows)
    assert all(word in str(caught.value) for word in words), caught.value


# -- the mixture -----------------------------------------------------------------------------------


def planned(**changes):
    values = {"prompts": 8, "share": 0.25, "max_steps": 12, "updates_per_rollout": 2}
    return Mixture.planned(**(values | {"preference_steps": 4} | changes))


def test_general_prompts_join_exactly_at_the_boundary():
    """Twelve steps, two a rollout: steps 9 to 12 are the last four, of rollouts 4 and 5."""
    mixture = planned()
    assert [mixture.counts(n) for n in range(6)] == [(8, 0)] * 4 + [(6, 2)] * 2
    assert [mixture.starts(n) for n in range(7)] == [
        *((0, 0), (8, 0), (16, 0), (24, 0), (32, 0)),
        *((38, 2), (44, 4)),
    ]


@pytest.mark.parametrize(
    ("changes", "first_general"),
    [
        ({"preference_steps": 12}, 0),
        ({"preference_steps": None}, 0),
        ({"preference_steps": 2}, 5),
        # A rollout that straddles the boundary has steps before it, so it stays reasoning only.
        ({"preference_steps": 5}, 4),
        ({"preference_steps": 3}, 5),
        # As the paper has it: 16 steps a rollout. Step 1,301 lies within rollout 81.
        ({"max_steps": 1700, "preference_steps": 400, "updates_per_rollout": 16}, 82),
    ],
)
def test_the_first_rollout_with_general_prompts(changes, first_general):
    mixture = planned(**changes)
    assert mixture.first_general == first_general
    updates = changes.get("updates_per_rollout", 2)
    last = changes.get("preference_steps") or 12
    steps = changes.get("max_steps", 12)
    assert first_general * updates >= steps - last > (first_general - 1) * updates


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"share": 0.05}, ["general_share=0.05", "8 prompts"]),
        ({"preference_steps": 13}, ["preference_steps=13", "max_steps=12"]),
        ({"preference_steps": 1}, ["preference_steps=1", "no rollout begins that late"]),
    ],
)
def test_a_mixture_that_mixes_nothing_is_refused(changes, words):
    with pytest.raises(UserError) as caught:
        planned(**changes)
    assert all(word in str(caught.value) for word in words), caught.value


def stream_of(mixture):
    return PromptStream(
        mixture, [f"r{i}" for i in range(10)], [f"g{i}" for i in range(3)], (11, 22)
    )


def test_each_kind_of_prompt_goes_on_in_its_own_order():
    mixture = planned()
    rollouts = [stream_of(mixture).rollout(n) for n in range(6)]
    assert [len(r) for r in rollouts] == [8] * 6
    reasoning = [p for r in rollouts for p in r if p[0] == "r"]
    general = [p for r in rollouts for p in r if p[0] == "g"]
    assert reasoning == [f"r{i}" for i in PromptOrder(10, 11).take(0, 44)]
    assert general == [f"g{i}" for i in PromptOrder(3, 22).take(0, 4)]
    assert sorted(general[:3]) == ["g0", "g1", "g2"]
    # A pure function of the number: a resumed run asks for the fifth rollout first.
    again = stream_of(mixture)
    assert [again.rollout(n) for n in (5, 1, 4)] == [rollouts[n] for n in (5, 1, 4)]
    assert again.epochs(6) == 4.4


def test_without_general_prompts_the_order_is_what_it_was():
    stream = PromptStream(Mixture(4), list(range(10)), [], (11, 22))
    assert [stream.rollout(n) for n in range(3)] == [
        PromptOrder(10, 11).take(start, 4) for start in (0, 4, 8)
    ]
    with pytest.raises(UserError, match="general_dataset"):
        PromptStream(planned(), list(range(10)), [], (11, 22))


def test_a_run_may_be_all_general_from_some_step_on():
    assert planned(share=1.0).counts(5) == (0, 8)
    rollouts = [stream_of(planned(share=1.0)).rollout(n) for n in (3, 4)]
    assert {p[0] for p in rollouts[0]} == {"r"} and {p[0] for p in rollouts[1]} == {"g"}


# -- the sum of the rewards ------------------------------------------------------------------------


def rollout(completion, **row):
    return Rollout(
        row=row,
        prompt=row["prompt"],
        prompt_ids=[1],
        completion=completion,
        completion_ids=[1, 2],
        sampler_logprobs=[0.0, 0.0],
        finish_reason="stop",
        group=0,
    )


class FixedScores:
    """A reward model that knows its answers, and remembers what it was asked."""

    def __init__(self, scores):
        self.scores, self.asked = scores, []

    def score(self, prompts, completions, *, thinking_prefilled):
        self.asked.append((prompts, completions, thinking_prefilled))
        return [self.scores[completion] for completion in completions]


def score_all(rollouts, specs, models, max_error_rate=0.5):
    """The report of RolloutScoring, fed in two pieces."""
    prompts = [Prompt(r.row, r.prompt, r.prompt_ids) for r in rollouts]
    with (
        RewardPool(specs, num_workers=1, max_error_rate=max_error_rate) as pool,
        RolloutScoring(pool, models, prompts, 1) as scoring,
    ):
        half = len(rollouts) // 2
        scoring.add(range(half, len(rollouts)), rollouts[half:])
        scoring.add(range(half), rollouts[:half])
        scoring.ask_models(rollouts)
        return scoring.result(rollouts)


MIXED = "<think>first 你 好 吗</think> \\boxed{4}"  # one English word of four
ROLLOUTS = [
    (MIXED, {"prompt": "What is two and two?", "domain": "math", "solution": "4"}),
    (
        "<think>well then</think> \\boxed{5}",
        {"prompt": "And so?", "domain": "math", "solution": "4"},
    ),
    ("<think>be kind</think> Hello!", {"prompt": "Say hello", "domain": "helpful"}),
    ("no tags at all", {"prompt": "Say hello", "domain": "helpful"}),
    ("<think>plan 计 划 好</think> No.", {"prompt": "Break in", "domain": "safety"}),
]


def test_the_reward_is_the_plain_sum_of_equations_8_to_10():
    pytest.importorskip("math_verify")
    helpful = FixedScores({ROLLOUTS[2][0]: 1.25, ROLLOUTS[3][0]: -0.5})
    safety = FixedScores({ROLLOUTS[4][0]: 0.875})
    specs = with_reward_domains(
        [RewardSpec.named(n) for n in ("accuracy", "format_r1", "language", "helpful", "safety")],
        {"accuracy": ["math"], "helpful": ["helpful"], "safety": ["safety"]},
    )
    models = [
        ModelReward(specs[3], helpful, False),
        ModelReward(specs[4], safety, False),
    ]
    rollouts = [rollout(completion, **row) for completion, row in ROLLOUTS]
    report = score_all(rollouts, specs[:3], models)
    assert [r.reward for r in rollouts] == [
        # rule: accuracy + format, eq. 4   + language, eq. 7
        1.0 + 1.0 + 0.25,
        0.0 + 1.0 + 1.0,
        # reward model + format, eq. 10    + language
        1.25 + 1.0 + 1.0,
        -0.5 + 0.0 + 1.0,
        0.875 + 1.0 + 0.25,
    ]
    assert rollouts[0].rewards == {
        "accuracy": 1.0,
        "format_r1": 1.0,
        "language": 0.25,
        "helpful": None,
        "safety": None,
    }
    assert rollouts[4].rewards["accuracy"] is None and rollouts[4].rewards["safety"] == 0.875
    assert report.outcomes["accuracy"] == {"ok": 2} and report.outcomes["helpful"] == {"ok": 2}
    # Each model was asked once, about the rows of its own data set and by their own prompts.
    assert helpful.asked == [(["Say hello"] * 2, [ROLLOUTS[2][0], ROLLOUTS[3][0]], False)]
    assert safety.asked == [(["Break in"], [ROLLOUTS[4][0]], False)]
    assert domain_metrics(rollouts) == {
        "domains/math/share": 0.4,
        "domains/math/reward": 2.125,
        "domains/helpful/share": 0.4,
        "domains/helpful/reward": 1.875,
        "domains/safety/share": 0.2,
        "domains/safety/reward": 2.125,
    }


def test_weights_count_for_reward_models_too():
    model = ModelReward(RewardSpec("helpful", "helpful", 2.0), FixedScores({"a": 3.0}), True)
    answers = [rollout("a", prompt="p")]
    score_all(answers, [RewardSpec.named("format_r1", 0.5)], [model])
    assert answers[0].reward == 2.0 * 3.0
    assert model.model.asked == [(["p"], ["a"], True)]


def test_reward_models_alone_need_no_pool():
    model = ModelReward(RewardSpec.named("helpful"), FixedScores({"a": 3.0, "b": 1.0}), False)
    answers = [rollout("a", prompt="p"), rollout("b", prompt="q")]
    with RolloutScoring(None, [model], [Prompt(r.row, "", []) for r in answers], 1) as scoring:
        scoring.add([0, 1], answers)
        scoring.ask_models(answers)
        report = scoring.result(answers)
    assert [r.reward for r in answers] == [3.0, 1.0] == report.totals


# -- saved reward models ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    return RewardNetwork.from_model(make_tiny_model(tmp_path_factory.mktemp("model")), device="cpu")


def scored_by(network, kind, scope, completions):
    card = ScoreCard(kind, scope, lowest=-7.0)
    reward = ModelReward(RewardSpec.named(kind), ScalarModel(network, card), False)
    return reward.report([rollout(text, prompt="3+4?") for text in completions]).scores[kind]


def test_helpfulness_ignores_the_reasoning_and_safety_does_not(network):
    answers = ["<think>3+4</think>it is 7", "<think>go away</think>it is 7", "<think>3+4 it is 7"]
    one, other, unfinished = scored_by(network, "helpful", "summary", answers)
    assert one == pytest.approx(other, abs=1e-6) and unfinished == -7.0
    one, other, unfinished = scored_by(network, "safety", "response", answers)
    assert abs(one - other) > 1e-3 and unfinished != -7.0


def test_a_network_that_gives_nan_stops_the_rollout(network):
    weight = network.model.score.weight.data
    before = weight.clone()
    try:
        weight.fill_(math.nan)
        with pytest.raises(FloatingPointError, match="score 0 is nan"):
            scored_by(network, "safety", "response", ["a"])
    finally:
        weight.copy_(before)
    assert np.isfinite(scored_by(network, "safety", "response", ["a"])).all()


def test_a_mixture_is_read_off_the_config():
    config = SimpleNamespace(
        prompts_per_generation=8,
        general_share=0.25,
        max_steps=12,
        updates_per_rollout=2,
        preference_steps=4,
    )
    assert Mixture.of(config, True) == Mixture(8, 2, 4)
    assert Mixture.of(config, False) == Mixture(8)
