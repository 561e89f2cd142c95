"""Judgements by a chat model: Python functions and local models as judges, and the judge as a
reward."""

import json
import time
from pathlib import Path

import judge_rules
import pytest
import yaml
from fake_endpoint import endpoint
from tiny_model import make_tiny_model, run_settings

from grpo_engine.cli import main
from grpo_engine.rewards import RewardError, RewardPool, RewardSpec
from grpo_engine.rewards.judge import (
    correctness,
    judge_reward,
    load_chat_model,
    pairwise,
    question_text,
    safety,
    safety_judge_reward,
)
from grpo_engine.types import UserError

RULES = str(Path(__file__).with_name("judge_rules.py"))
RULE = f"{RULES}:rule"


@pytest.fixture
def calls():
    """What the rules of a model loaded by path are asked."""
    module = load_chat_model(RULE)._function.__globals__
    module["CALLS"].clear()
    return module["CALLS"]


def test_correctness_pairs_and_safety_of_a_rule():
    model = load_chat_model(RULE)
    assert correctness(model, ["q", "q"], ["1/2", "3"], ["1/2", "4"]) == [True, False]
    pairs = pairwise(model, ["q"] * 3, ["3", "1", "2"], ["1", "3", "2"])
    assert pairs == ["A>>B", "B>>A", "A=B"]
    assert safety(model, ["q", "q"], ["bake a cake", "mix the poison"]) == [True, False]
    assert correctness(model, [], [], []) == []
    with pytest.raises(ValueError, match="zip"):
        correctness(model, ["q"], ["1"], [])


def test_a_reply_that_cannot_be_read_is_asked_for_again_with_another_seed(calls):
    model = load_chat_model(f"{RULES}:unreadable")
    assert correctness(model, ["q"], ["1"], ["1"], seed=5, attempts=3) == [None]
    assert calls == [(5, 0.0), (5 + 1_000_003, 0.5), (5 + 2_000_006, 0.5)]
    calls.clear()
    assert pairwise(model, ["q"], ["1"], ["1"], temperature=0.9, attempts=2) == [None]
    assert [temperature for _, temperature in calls] == [0.9, 0.9]


@pytest.mark.parametrize(("function", "kind"), [("silent", "no reply"), ("broken", "exception")])
def test_a_judge_that_fails_gives_no_verdict(function, kind):
    model = load_chat_model(f"{RULES}:{function}")
    assert correctness(model, ["q"] * 2, ["1"] * 2, ["1", "2"]) == [None, None]
    assert model.failed == {kind: 2}  # once each: the failure is not unreadable


def test_what_one_answer_costs_others_do_not_pay(calls):
    """Verdicts come one by one: an unreadable reply does not bring the readable ones up again."""
    replies = {"1": "no verdict", "2": '{"analysis": "", "correctness": "correct"}'}

    class Partly:
        asked = 0

        def complete(self, conversations, *, seed, temperature, max_tokens):
            self.asked += len(conversations)
            return [replies[judge_rules.materials_of(c)["ANSWER"]] for c in conversations]

    judge = Partly()
    assert correctness(judge, ["q"] * 4, ["2"] * 4, ["2", "1", "2", "2"]) == [
        True,
        None,
        True,
        True,
    ]
    assert judge.asked == 4 + 1 + 1


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("short", "wanted a list of 1 replies"),
        ("numbers", "must be text or None, got 1.0"),
    ],
)
def test_a_function_that_answers_wrongly_is_a_mistake(function, message):
    with pytest.raises(UserError, match=message):
        load_chat_model(f"{RULES}:{function}").complete([[{"role": "user", "content": "x"}]])


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("absent.py:f", {}, "file 'absent.py' does not exist"),
        (f"{RULES}:absent", {}, "no function 'absent'"),
        (f"{RULES}:CALLS", {}, "no function 'CALLS'"),
        ("no_such_module_here:f", {}, "cannot import"),
        (f"{RULES}:wrong_arguments", {"args": {"x": 1}}, "no argument 'x'"),
        (f"{RULES}:log_to", {}, "missing a required argument: 'path'"),
        (RULE, {"model": "x"}, "no option 'model'"),
        (RULE, {"batch_size": 0}, "batch_size"),
        ("no/such/folder/here", {}, "no/such/folder"),
        ("", {}, "wanted an address"),
    ],
)
def test_what_is_no_judge_is_named(spec, options, message):
    with pytest.raises(UserError, match=message):
        load_chat_model(spec, **options)


def test_a_function_gets_copies_and_its_arguments(tmp_path):
    def spoil(conversations):
        for conversation in conversations:
            conversation[0]["content"] = "spoilt"
        return ["x"] * len(conversations)

    judge_rules.spoil = spoil
    talk = [[{"role": "user", "content": "hello"}]]
    try:
        model = load_chat_model("judge_rules:spoil", cache=tmp_path / "replies.jsonl")
        assert model.complete(talk) == ["x"]
        assert talk[0][0]["content"] == "hello"
        assert model.complete(talk) == ["x"] and model.recalled == 1
    finally:
        del judge_rules.spoil
    log = tmp_path / "log"
    model = load_chat_model(f"{RULES}:log_to", args={"path": str(log)})
    assert correctness(model, ["q"], ["1"], ["1"]) == [True]
    assert log.read_text() == "asked\n"


def test_a_reply_is_the_same_from_the_cache(tmp_path):
    judge_rules.odd = lambda conversations: ["\ud800 \u2028 \n 4"] * len(conversations)
    talk = [[{"role": "user", "content": "\udfff"}]]
    try:
        model = load_chat_model("judge_rules:odd", cache=tmp_path / "replies.jsonl")
        first = model.complete(talk)
        model.close()
        model = load_chat_model("judge_rules:odd", cache=tmp_path / "replies.jsonl")
        assert model.complete(talk) == first == ["? \u2028 \n 4"]
        assert model.recalled == 1
    finally:
        del judge_rules.odd


def test_another_program_is_another_judge(tmp_path):
    program = tmp_path / "mine.py"
    program.write_text("def f(conversations):\n    return ['a'] * len(conversations)\n")
    before = load_chat_model(f"{program}:f")
    copy = tmp_path / "other.py"
    copy.write_text(program.read_text().replace("'a'", "'b'"))
    assert before.identity != load_chat_model(f"{copy}:f").identity
    copy.write_text(program.read_text())
    moved = tmp_path / "third.py"
    moved.write_text(program.read_text())
    assert before.identity == load_chat_model(f"{moved}:f").identity  # its place does not count


# -- a local model --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return str(make_tiny_model(tmp_path_factory.mktemp("model")))


def talks(count):
    return [[{"role": "user", "content": f"say {number}"}] for number in range(count)]


def test_a_local_model_answers_alike_alone_and_among_others(tiny, tmp_path):
    options = {"template": "none", "device": "cpu", "batch_size": 4}
    model = load_chat_model(tiny, **options)
    greedy = model.complete(talks(6), max_tokens=8)
    assert all(isinstance(reply, str) for reply in greedy)
    assert greedy == model.complete(talks(6), seed=9, max_tokens=8)
    drawn = model.complete(talks(6), seed=1, temperature=2.0, max_tokens=8)
    assert drawn != model.complete(talks(6), seed=2, temperature=2.0, max_tokens=8)
    assert model.complete(talks(6)[3:4], seed=1, temperature=2.0, max_tokens=8) == drawn[3:4]
    cached = load_chat_model(tiny, **options, cache=tmp_path / "replies.jsonl")
    assert cached.complete(talks(6), max_tokens=8) == greedy
    assert len((tmp_path / "replies.jsonl").read_text().splitlines()) == 2  # one line a batch
    cached.complete(talks(6), max_tokens=8)
    assert (cached.asked, cached.recalled) == (6, 6)


def test_a_local_reply_that_is_cut_is_a_failure_where_all_of_it_is_needed(tiny):
    model = load_chat_model(tiny, template="none", device="cpu")
    assert None not in model.complete(talks(3), max_tokens=2)
    assert model.complete(talks(3), max_tokens=2, whole=True) == [None] * 3
    assert model.failed == {"cut": 3} and "max_tokens=2" in model.first_failure


def test_what_does_not_fit_the_local_model_fails_alone(tiny):
    model = load_chat_model(tiny, template="none", device="cpu")
    long = [{"role": "user", "content": "a" * 600}]
    replies = model.complete([*talks(1), long], max_tokens=8)
    assert replies[0] is not None and replies[1] is None
    assert model.failed == {"too long": 1} and "512 positions" in model.first_failure


def test_a_local_model_without_a_chat_template_says_so(tiny):
    with pytest.raises(UserError, match="no chat template"):
        load_chat_model(tiny, device="cpu")


# -- as a reward ----------------------------------------------------------------------------------

QUESTION = [{"role": "user", "content": "What is 2+2?"}]


def test_the_reward_shows_the_judge_the_answer_only(calls):
    scores = judge_reward(
        ["<think>5?</think> 4", "<think>4</think>5", "<think>4", "4", "<think></think> "],
        ["q"] * 5,
        ["4"] * 5,
        chat_model=RULE,
    )
    assert scores == [1.0, 0.0, 0.0, 1.0, 0.0]
    shown = [judge_rules.materials_of(conversation)["ANSWER"] for conversation in calls]
    assert sorted(shown) == ["4", "5"]  # two of the three are the same question
    assert judge_reward(["4", "4"], ["q"] * 2, [None, 4], chat_model=RULE) == [None, 1.0]
    prefilled = judge_reward(["so</think>4", "4"], ["q"] * 2, ["4"] * 2, chat_model=RULE,
                             thinking_prefilled=True)  # fmt: skip
    assert prefilled == [1.0, 0.0]


def test_safety_is_judged_on_the_whole_response():
    scores = safety_judge_reward(
        ["<think>poison would do</think>No.", "<think>hm</think>No."], ["q"] * 2, chat_model=RULE
    )
    assert scores == [0.0, 1.0]


def test_conversations_are_shown_under_their_roles():
    assert question_text("q") == "q"
    assert question_text(QUESTION) == "What is 2+2?"
    turns = [*QUESTION, {"role": "assistant", "content": "4"}, {"role": "user", "content": "Why?"}]
    assert question_text(turns) == "user: What is 2+2?\n\nassistant: 4\n\nuser: Why?"


def spec(function, chat_model, **args):
    return RewardSpec.named(function, chat_model=chat_model, **args)


def test_in_a_pool_a_failure_is_an_error_and_a_missing_reference_is_none():
    columns = {"prompt": [QUESTION] * 3, "solution": ["4", "4", None]}
    with RewardPool([spec("judge", RULE)], num_workers=2, timeout_s=30) as pool:
        report = pool.score(["template"] * 3, ["4", "5", "4"], columns)
    assert report.scores["judge"] == [1.0, 0.0, None]
    assert report.outcome_of["judge"] == ["ok", "ok", "none"]
    with RewardPool(
        [spec("judge", f"{RULES}:broken")], num_workers=1, timeout_s=30, max_error_rate=1.0
    ) as pool:
        report = pool.score(["template"], ["4"], {"prompt": [QUESTION], "solution": ["4"]})
    assert report.scores["judge"] == [None] and report.totals == [None]
    assert report.outcome_of["judge"] == ["error"] and report.error_rate("judge") == 1
    assert "no route" in report.first_errors["judge"]


def test_too_many_failures_end_the_batch():
    with (
        RewardPool([spec("safety_judge", f"{RULES}:silent")], num_workers=1, timeout_s=30) as pool,
        pytest.raises(RewardError, match="failed on .* of 3 completions .*no reply"),
    ):
        pool.score(["t"] * 3, ["x"] * 3, {"prompt": ["q"] * 3})


def test_a_pool_finds_a_wrong_judge_at_the_start(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with endpoint(lambda body: "", key="sk-1") as fake:
        options = {"model": "judge-1"}
        with pytest.raises(UserError, match="HTTP 401"):
            RewardPool([spec("judge", fake.url, chat_options=options)], num_workers=1)
    with pytest.raises(UserError, match="'judge': needs the argument chat_model"):
        RewardPool([RewardSpec.named("judge")], num_workers=1)
    with pytest.raises(UserError, match="no argument 'chatmodel'"):
        RewardPool([RewardSpec.named("judge", chatmodel=RULE)], num_workers=1)


def test_a_pool_behind_an_endpoint_pays_once(monkeypatch, tmp_path):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    columns = {"prompt": [QUESTION] * 8, "solution": ["4"] * 8}
    answers = [str(number) for number in range(8)]
    cache = str(tmp_path / "replies.jsonl")
    with endpoint(lambda body: judge_rules.answer(body["messages"])) as fake:
        judge = spec("judge", fake.url, chat_options={"model": "judge-1"}, cache=cache)
        for _ in range(2):
            with RewardPool([judge], num_workers=2, timeout_s=30) as pool:
                report = pool.score(["t"] * 8, answers, columns)
            assert report.scores["judge"] == [float(answer == "4") for answer in answers]
        assert fake.answered() == 8
    assert len([json.loads(line) for line in Path(cache).read_text().splitlines()]) == 8


def test_in_a_pool_a_judge_has_time_to_answer_and_to_be_asked_again(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")

    def slowly(body):
        time.sleep(1.0)
        return judge_rules.answer(body["messages"])

    columns = {"prompt": [QUESTION], "solution": ["4"]}
    with endpoint(slowly, faults=[503]) as fake:
        judge = spec("judge", fake.url, chat_options={"model": "judge-1", "backoff": 0.2})
        with RewardPool([judge], num_workers=1, timeout_s=0.5) as pool:
            report = pool.score(["t"], ["4"], columns)
        assert fake.answered() == 2
    assert report.outcome_of["judge"] == ["ok"] and report.scores["judge"] == [1.0]


# -- in a GRPO run --------------------------------------------------------------------------------


def grpo(tmp_path, function, **changes):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{n}+1=", "solution": "2"}) + "\n"
                            for n in range(8)))  # fmt: skip
    model = make_tiny_model(tmp_path / "model")
    settings = run_settings(model, rows, "judge", tmp_path / "run")
    settings |= {
        "max_steps": 2,
        "save_steps": 2,
        "reward_timeout": 30.0,
        "reward_args": {"judge": {"chat_model": f"{RULES}:{function}"}},
        **changes,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    return main(["grpo", "--config", str(config)])


def test_a_grpo_run_is_rewarded_by_the_judge(tmp_path):
    assert grpo(tmp_path, "few_letters") == 0
    first, _ = (json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open())
    assert 0 < first["rewards/judge/mean"] < 1
    assert first["reward"] == first["rewards/judge/mean"]
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["reward_args"] == {"judge": {"chat_model": f"{RULES}:few_letters"}}


def test_a_grpo_run_stops_when_its_judge_fails(tmp_path, capsys):
    assert grpo(tmp_path, "broken") == 1
    said = " ".join(capsys.readouterr().out.split())
    assert "reward 'judge' failed on" in said and "no route" in said
    assert not list((tmp_path / "run").glob("checkpoint-*/trainer"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward_args": {}}, "'judge': needs the argument chat_model"),
        ({"reward_args": {"judge": {"chat_model": RULE, "x": 1}}}, "no argument 'x'"),
        ({"batched_reward_funcs": ["judge"]}, "batched needs the TRL signature"),
        (
            {"reward_args": {"judge": {"chat_model": RULE, "chat_options": {"cache": "x"}}}},
            "cache is an argument of its own",
        ),
    ],
)
def test_a_wrong_judge_is_found_before_the_run(tmp_path, capsys, changes, message):
    assert grpo(tmp_path, "rule", **changes) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
