"""reasoning_gym's own scorers as a reward."""

import pytest

from grpo_engine.rewards import reasoning_gym_reward
from grpo_engine.rewards import tasks as task_rewards


@pytest.fixture(scope="module")
def gym():
    return pytest.importorskip("reasoning_gym")


def test_the_tasks_own_scorer_decides(gym):
    problem = gym.create_dataset("chain_sum", seed=1, size=1)[0]
    answer = problem["answer"]
    texts = [
        f"<think>a</think> <answer>{answer}</answer>",
        rf"\boxed{{{answer}}}",
        f"<answer>{int(answer) + 1}</answer>",
        f"<answer>{answer} or so</answer>",  # the scorers give part marks for mentioning it
        answer,
        f"<answer>{answer}</answer> <answer>1</answer>",
        f"<think><answer>{answer}</answer>",
    ]
    scores = reasoning_gym_reward(texts, task=["chain_sum"] * 7, entry=[problem] * 7)
    assert scores == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_a_scorer_that_raises_on_text_means_a_wrong_answer(gym):
    problem = gym.create_dataset("prime_factorization", seed=1, size=1)[0]
    for answer, score in (("zzz", 0.0), (problem["answer"], 1.0)):
        assert reasoning_gym_reward(
            [f"<answer>{answer}</answer>"], task=["prime_factorization"], entry=[problem]
        ) == [score]


def test_a_broken_entry_is_not_a_wrong_answer(gym):
    with pytest.raises(ValueError, match="invalid literal"):
        task_rewards.score_answer("zzz", "prime_factorization", {"answer": "also text"})


@pytest.mark.parametrize(
    ("task", "attack"),
    [
        ("n_queens", "__import__('os').mkdir({path!r})"),
        ("binary_matrix", "[__import__('os').mkdir({path!r})]"),
        ("spiral_matrix", "[x for x in [__import__('os').mkdir({path!r})]]"),
        ("string_insertion", "(lambda: __import__('os').mkdir({path!r}))()"),
        ("countdown", "__import__('os').mkdir({path!r})"),
        ("simple_integration", "x + __import__('os').mkdir({path!r})"),
    ],
)
def test_scorers_that_evaluate_the_answer_never_see_code(gym, tmp_path, task, attack):
    path = tmp_path / "owned"
    problem = gym.create_dataset(task, seed=1, size=1)[0]
    code = attack.format(path=str(path))
    assert reasoning_gym_reward([f"<answer>{code}</answer>"], task=[task], entry=[problem]) == [0.0]
    assert not path.exists()


EVALUATING_TASKS = """n_queens binary_matrix spiral_matrix string_insertion countdown puzzle24
    simple_integration intermediate_integration polynomial_multiplication""".split()  # noqa: SIM905


@pytest.mark.parametrize("task", EVALUATING_TASKS)
def test_those_scorers_still_see_right_answers(gym, task):
    problem = gym.create_dataset(task, seed=1, size=1)[0]
    texts = [f"<answer>{problem['answer']}</answer>"]
    assert reasoning_gym_reward(texts, task=[task], entry=[problem]) == [1.0]


def test_the_tasks_options_reach_its_scorer(gym):
    options = {"min_num_decimal_places": 1, "max_num_decimal_places": 1}
    problem = gym.create_dataset("decimal_arithmetic", seed=1, size=1, **options)[0]
    near = f"<answer>{float(problem['answer']) + 0.01:.2f}</answer>"
    loose = reasoning_gym_reward(
        [near], task=["decimal_arithmetic"], entry=[problem], task_args=[options]
    )
    strict = reasoning_gym_reward([near], task=["decimal_arithmetic"], entry=[problem])
    assert (loose, strict) == ([1.0], [0.0])
