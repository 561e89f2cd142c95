import subprocess
import sys

import pytest
import yaml

from grpo_engine.cli import main, parse_flags
from grpo_engine.config import GRPOConfig, build_config
from grpo_engine.kernels import make_loss_options
from grpo_engine.settings import apply_overrides, config_text, load_recipe, recipe_names
from grpo_engine.types import UserError


@pytest.mark.parametrize("name", recipe_names("grpo"))
def test_every_recipe_is_valid(name):
    build_config(load_recipe(name))


def test_the_paper_preset_has_the_papers_numbers():
    config = build_config(load_recipe("r1-zero"))
    assert config.prompts_per_generation * config.num_generations == 8192
    assert (config.steps_per_generation, config.num_iterations) == (16, 1)
    assert (config.learning_rate, config.beta, config.temperature) == (3e-6, 0.001, 1.0)
    assert config.ref_model_sync_steps == 400 and config.max_steps == 10_400
    assert config.completion_cap(8199) == 32_768 and config.completion_cap(8200) == 65_536


@pytest.mark.parametrize("prefix", ["vespo_", "sapo_"])
def test_the_parameters_of_a_loss_reach_it_under_trls_names(prefix):
    config = pytest.importorskip("trl").GRPOConfig
    names = [name for name in config.__dataclass_fields__ if name.startswith(prefix)]
    assert names
    for name in names:
        assert GRPOConfig.model_fields[name].default == config.__dataclass_fields__[name].default
        assert build_config({name: 0.7}).loss_options()[name] == 0.7
        make_loss_options(**build_config({name: 0.7, "loss_type": prefix[:-1]}).loss_options())


def test_saved_config_reads_back_the_same(tmp_path):
    config = build_config(load_recipe("r1-zero"))
    (tmp_path / "config.yaml").write_text(config_text(config))
    assert build_config(yaml.safe_load((tmp_path / "config.yaml").read_text())) == config


def test_overrides_reach_into_mappings_and_parse_yaml():
    values = apply_overrides(
        {"dataset_args": {"seed": 1}},
        [
            ("dataset_args.size", "50"),
            ("epsilon_high", "0.28"),
            ("reward_funcs", "[accuracy]"),
            ("delta", "null"),
        ],
        GRPOConfig,
    )
    assert values["dataset_args"] == {"seed": 1, "size": 50}
    assert values["reward_funcs"] == ["accuracy"] and values["delta"] is None


def test_flags():
    pairs, special = parse_flags(
        ["--learning-rate", "1e-6", "--seed=3", "--resume", "--entropy_coef", "-0.1"],
        optional=("resume",),
    )
    assert pairs == [("learning_rate", "1e-6"), ("seed", "3"), ("entropy_coef", "-0.1")]
    assert special == {"resume": True}
    assert build_config(apply_overrides({}, pairs, GRPOConfig)).learning_rate == 1e-6


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"num_generations": 1}, ["num_generations", "1"]),
        ({"temperature": 0}, ["temperature", "0"]),
        ({"temperature": "hot"}, ["temperature", "hot"]),
        ({"loss_type": "ppo"}, ["loss_type", "ppo", "grpo"]),
        ({"vespo_k_pos": -1}, ["vespo_k_pos", "-1"]),
        ({"vespo_lambda_neg": 0}, ["vespo_lambda_neg", "0"]),
        ({"max_step": 5}, ["max_step", "5", "max_steps"]),
        ({"steps_per_generation": 7}, ["steps_per_generation", "7", "8192"]),
        ({"reward_weights": [1.0]}, ["reward_weights", "1.0", "2 reward_funcs"]),
        ({"ref_model_sync_steps": 10}, ["ref_model_sync_steps", "10", "16"]),
        ({"max_completion_length": {5: 100}}, ["max_completion_length", "step 0"]),
        ({"max_tokens_per_microbatch": 100}, ["max_tokens_per_microbatch", "100"]),
        ({"top_p": 0}, ["top_p", "0"]),
        ({"learning_rate": -1}, ["learning_rate", "-1"]),
        (
            {"is_correction": "token_mask", "old_logprobs": "sampler"},
            ["is_correction", "token_mask"],
        ),
    ],
)
def test_bad_values_name_the_field_and_the_value(overrides, words):
    with pytest.raises(UserError) as caught:
        build_config(overrides)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["grop"], ["grop", "grpo"]),
        (["grpo"], ["--recipe"]),
        (["grpo", "--recipe", "nope"], ["nope", "r1-zero"]),
        (["grpo", "--config", "/does/not/exist.yaml"], ["/does/not/exist.yaml"]),
        (["grpo", "--recipe", "r1-zero", "--lerning_rate", "1"], ["lerning_rate", "learning_rate"]),
        (["grpo", "--recipe", "r1-zero", "--seed"], ["--seed", "value"]),
        (["grpo", "--recipe", "r1-zero", "loose"], ["loose"]),
        (["grpo", "--recipe", "r1-zero", "--config", "x.yaml"], ["--recipe", "--config"]),
        (["grpo", "--resume", "x", "--overwrite"], ["--resume", "--overwrite"]),
        (["report"], ["report", "folder"]),
        (["doctor", "--verbose", "1"], ["verbose"]),
    ],
)
def test_wrong_command_lines_exit_2_with_one_line(argv, words, capsys):
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err, err


def test_config_that_is_not_yaml_or_not_a_mapping(tmp_path, capsys):
    for text in ("a: [1, 2", "- 1\n- 2\n"):
        path = tmp_path / "bad.yaml"
        path.write_text(text)
        assert main(["grpo", "--config", str(path)]) == 2
        err = capsys.readouterr().err
        assert "bad.yaml" in err and err.count("\n") == 1


def test_help_lists_every_field(capsys):
    assert main(["grpo", "--help"]) == 0
    out = capsys.readouterr().out
    for name in GRPOConfig.model_fields:
        assert f"--{name} " in out


@pytest.mark.parametrize("verb", ["report", "doctor"])
def test_help_of_the_small_verbs(verb, capsys):
    assert main([verb, "--help"]) == 0
    assert f"grpo-engine {verb}" in capsys.readouterr().out


def test_a_closed_pipe_is_no_traceback():
    command = f"{sys.executable} -m grpo_engine.cli grpo --help | true"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, cwd="/")
    assert done.stderr == ""
