"""Finding reward functions by name, and calling them with the columns they want."""

import pytest

from grpo_engine.rewards import load_reward
from grpo_engine.types import UserError


def reward_file(tmp_path, source):
    path = tmp_path / "my_rewards.py"
    path.write_text(source)
    return f"{path}:reward"


def call(function, **row):
    return load_reward(function).call("q", "text", row)


def test_trl_functions_get_the_columns_they_name(tmp_path):
    source = (
        "def reward(completions, solution, scale=2, **kwargs):\n"
        "    assert kwargs['prompts'] == ['q'] and kwargs['level'] == [3]\n"
        "    return [scale * len(c) + len(s) for c, s in zip(completions, solution)]\n"
    )
    function = reward_file(tmp_path, source)
    assert call(function, solution="ab", level=3, prompt="not passed") == (10, "ok")
    assert load_reward(function).required_columns == ("solution",)


def test_trl_functions_without_kwargs_and_async_functions(tmp_path):
    source = "async def reward(prompts, completions):\n    return [0.5 for _ in completions]\n"
    assert call(reward_file(tmp_path, source), solution="ab") == (0.5, "ok")


def test_conversational_prompts_give_conversational_completions(tmp_path):
    source = (
        "def reward(prompts, completions):\n    return [completions[0][0]['content'] == 'text']\n"
    )
    reward = load_reward(reward_file(tmp_path, source))
    assert reward.call([{"role": "user", "content": "q"}], "text", {}) == (True, "ok")


def test_verl_functions(tmp_path):
    source = (
        "def reward(data_source, solution_str, ground_truth, extra_info=None):\n"
        "    return {'score': float((data_source, solution_str, ground_truth, extra_info)\n"
        "                           == ('gsm8k', 'text', '4', {'i': 1}))}\n"
    )
    function = reward_file(tmp_path, source)
    assert call(function, data_source="gsm8k", solution="4", extra_info={"i": 1}) == (1.0, "ok")
    assert call(
        function, data_source="gsm8k", reward_model={"ground_truth": "4"}, extra_info={"i": 1}
    ) == (1.0, "ok")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("acuracy", "unknown reward 'acuracy': wanted one of accuracy, choice, code, format, "),
        ("no_such_module_here:fn", "cannot import 'no_such_module_here'"),
        ("json:no_such_function", "has no function 'no_such_function'"),
        ("absent.py:fn", "reward 'fn': file 'absent.py' does not exist"),
        ("json:dumps", "wanted TRL's"),
    ],
)
def test_what_cannot_be_loaded_is_named(function, message):
    with pytest.raises(UserError) as caught:
        load_reward(function)
    assert message in str(caught.value)
