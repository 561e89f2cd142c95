"""``--dry-run`` of a single stage: tokens and memory come before anything is loaded, and so do
mistakes in the rows."""

import json
from pathlib import Path

import pytest
import transformers
from tiny_model import make_tiny_model
from torch.utils._device import _device_constructors
from transformers import DeepseekV3Config, T5Config

from grpo_engine.cli import STAGES, main
from grpo_engine.config import GRPOConfig
from grpo_engine.pipeline.budget import Budgets
from grpo_engine.pipeline.memory import model_shape, training_memory
from grpo_engine.pipeline.plan import count, print_estimate, size
from grpo_engine.pipeline.stages import STAGES as KINDS
from grpo_engine.pipeline.stages import Stage
from grpo_engine.settings import build_config, load_recipe, recipe_names

ROWS = [{"prompt": f"{n}+1=", "solution": str(n + 1), "completion": str(n + 1)} for n in range(6)]
PAIRS = [{"prompt": f"{n}+1=", "chosen": str(n + 1), "rejected": "0"} for n in range(6)]


class Loaded(BaseException):
    """Not an Exception: nobody turns it into another error."""


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """None here, in place of conftest's: see test_pipeline_plan."""
    _device_constructors.cache_clear()


@pytest.fixture
def no_loading(monkeypatch):
    """Whoever reads weights or a tokenizer ends the test."""

    def loaded(*args, **kwargs):
        raise Loaded

    for name in ("AutoModelForCausalLM", "AutoModelForSequenceClassification", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", loaded)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    write(folder / "rows.jsonl", ROWS)
    write(folder / "pairs.jsonl", PAIRS)
    (folder / "judge.py").write_text("def judge(conversations, **_):\n    return ['']\n")
    return folder


def flags(verb, inputs, run, **changes):
    """A dry run of ``verb`` that goes through."""
    rows = "pairs.jsonl" if verb == "reward-model" else "rows.jsonl"
    source = "data" if verb == "eval" else "dataset"
    values = {"model": inputs / "model", "output_dir": run, source: inputs / rows}
    samples = {"max_prompt_length": 16, "max_completion_length": 16, "prompt_template": "none"}
    trains = {"max_tokens_per_microbatch": 256}
    values |= {
        "grpo": samples | trains
        | {"prompts_per_generation": 2, "num_generations": 4, "steps_per_generation": 2}
        | {"max_steps": 6, "ref_model_sync_steps": 2, "reward_funcs": ["accuracy"]},
        "sft": trains | {"prompt_template": "none", "max_length": 64, "sequences_per_step": 4},
        "distill": trains | {"prompt_template": "none", "max_length": 64, "sequences_per_step": 4},
        "reward-model": trains
        | {"kind": "helpful", "scope": "response", "prompt_template": "none", "max_length": 64}
        | {"batch_size": 4, "eval_share": 0.0},
        "sample": samples | {"num_samples": 3},
        "preferences": samples
        | {"kind": "safety", "num_samples": 3, "judge": f"{inputs / 'judge.py'}:judge"},
        "eval": samples | {"num_samples": 3},
    }[verb] | changes  # fmt: skip
    words = [verb, "--dry-run"]
    for name, value in values.items():
        words += [f"--{name}", json.dumps(value) if isinstance(value, list) else str(value)]
    return words


BUDGETS = {
    # 3 rollouts of 8 outputs; with 16 tokens of prompt where they are trained on
    "grpo": f"at most {3 * 8 * 16} tokens generated and {3 * 8 * 32} tokens trained on, in 6 steps",
    # twice 6 rows in steps of 4, each as long as max_length
    "sft": f"at most {3 * 4 * 64} tokens trained on, in 3 steps",
    "distill": f"at most {3 * 4 * 64} tokens trained on, in 3 steps",
    # 6 pairs in steps of 4
    "reward-model": f"at most {count(2 * 4 * 64 * 2)} tokens trained on, in 2 steps",
    "sample": f"at most {6 * 3 * 16} tokens generated",
    "preferences": f"at most {6 * 3 * 16} tokens generated",
    "eval": f"at most {6 * 3 * 16} tokens generated",
}


@pytest.mark.parametrize("verb", STAGES)
def test_tokens_and_memory_come_before_anything_is_loaded(
    verb, inputs, tmp_path, capsys, no_loading
):
    with pytest.raises(Loaded):
        main(flags(verb, inputs, tmp_path / "run", device="cpu"))
    budget, memory = capsys.readouterr().out.splitlines()[:2]
    assert budget == f"budget     {BUDGETS[verb]}"
    shape = model_shape(str(inputs / "model"))
    weights = size(4 * shape.parameters)
    assert memory.startswith("memory     about ")
    assert f" on a CPU, of {count(shape.parameters)} weights: weights {weights}, " in memory
    trained = verb in ("grpo", "sft", "distill", "reward-model")
    assert ("optimiser" in memory and "activations" in memory) == trained
    assert ("KV cache" in memory) == (verb not in ("sft", "distill", "reward-model"))
    assert memory.endswith("; without the judge") == (verb == "preferences")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("verb", STAGES)
def test_then_everything_is_loaded_and_checked(verb, inputs, tmp_path, capsys):
    assert main(flags(verb, inputs, tmp_path / "run")) == 0
    budget, memory, *plan = capsys.readouterr().out.splitlines()
    assert (budget[:7], memory[:7]) == ("budget ", "memory ") and len(plan) > 3
    assert not (tmp_path / "run").exists()


def test_a_run_prints_no_estimate(inputs, tmp_path, capsys, no_loading):
    words = flags("grpo", inputs, tmp_path / "run")
    with pytest.raises(Loaded):
        main([word for word in words if word != "--dry-run"])
    assert capsys.readouterr().out == ""


SINGLE = [(verb, name) for verb in STAGES for name in recipe_names(verb)]


@pytest.mark.parametrize(("verb", "name"), SINGLE, ids=lambda value: value)
def test_recipes_dry_run_without_their_files(verb, name, tmp_path, monkeypatch, capsys, no_loading):
    """Budget and memory, or why they are unknown; then the rows are missed before a model is."""
    monkeypatch.chdir(tmp_path)
    words = [verb, "--recipe", name, "--dry-run"]
    recipe = load_recipe(name)
    if ":" in recipe["dataset"]:  # these rows are in the package
        with pytest.raises(Loaded):
            main(words)
    else:
        assert main(words) == 2
        error = capsys.readouterr()
        assert error.err.count("\n") == 1 and recipe["dataset"] in error.err
        budget, memory = error.out.splitlines()
        assert budget.startswith("budget     ")
        assert memory.startswith(f"memory     unknown: {recipe['model']}: ")
        if verb == "grpo":  # its tokens depend on no file
            config = build_config(recipe, GRPOConfig)
            stage = Stage("", verb, KINDS[verb], config, Path("run"))
            assert f"at most {count(Budgets([stage]).found[''].generated)} tokens" in budget
        else:
            assert budget == f"budget     unknown until the rows of {recipe['dataset']} are loaded"
    assert list(tmp_path.iterdir()) == []


def test_the_paper_s_run_on_the_paper_s_model(tmp_path, monkeypatch, capsys, no_loading):
    monkeypatch.chdir(tmp_path)
    DeepseekV3Config().save_pretrained("v3")
    words = ["--recipe", "r1-zero", "--model", "v3", "--device", "cuda", "--dry-run"]
    assert main(["grpo", *words]) == 2
    budget, memory = capsys.readouterr().out.splitlines()
    # 650 rollouts of 8,192; the 513 that begin before step 8,200 have the shorter cap
    generated = 8192 * (513 * 32_768 + 137 * 65_536)
    assert f"at most {count(generated)} tokens generated" in budget and "10,400 steps" in budget
    assert "on a GPU, of 671 B weights: weights 2.68 TB, bf16 copies 1.34 TB" in memory


def test_held_out_answers_are_in_the_tokens(inputs, tmp_path, capsys, no_loading):
    held_out = write(tmp_path / "held-out.jsonl", [{"prompt": "7+2=", "solution": "9"}] * 3)
    with pytest.raises(Loaded):
        main(flags("grpo", inputs, tmp_path / "run", eval_dataset=held_out, eval_steps=4))
    drawn = 3 * 3 * 16  # three rows before step 1, after steps 4 and 6
    words = f"at most {3 * 8 * 16 + drawn} tokens generated ({drawn} of them held-out answers) and "
    assert words in capsys.readouterr().out


def test_held_out_answers_of_unknown_number_are_said_to_come_on_top(inputs, capsys):
    config = GRPOConfig(model=str(inputs / "model"), eval_dataset="hub/x", eval_limit=None)
    print_estimate("grpo", config)
    assert "in 10,400 steps; held-out answers come on top\n" in capsys.readouterr().out
    print_estimate("grpo", config.model_copy(update={"eval_limit": 200}))
    assert "come on top" not in capsys.readouterr().out


def test_given_answers_cost_nothing(inputs, tmp_path, capsys):
    given = write(tmp_path / "given.jsonl", [{"prompt": "1+1=", "answers": ["2", "3"]}])
    changes = {"dataset": given, "answer_columns": ["answers"], "model": "nobody/nothing"}
    assert main(flags("preferences", inputs, tmp_path / "run", **changes)) == 0
    assert capsys.readouterr().out.startswith(
        "budget     no tokens: the answers are given\nmemory     no model answers\n"
    )


# -- what cannot be known ----------------------------------------------------------------------


def memory_line(capsys, config):
    print_estimate(config.stage, config)
    return capsys.readouterr().out.splitlines()[1]


def rewarded(inputs, helpful, **changes):
    return GRPOConfig(
        model=str(inputs / "model"),
        reward_funcs=["accuracy", "helpful"],
        helpful_model=str(helpful),
        **changes,
    )


def test_saved_reward_models_are_in_the_memory(inputs, tmp_path, capsys):
    (tmp_path / "rm").mkdir()
    newest = make_tiny_model(tmp_path / "rm" / "checkpoint-2", tokenizer=False)
    shape = model_shape(str(newest))
    for folder in (newest, tmp_path / "rm"):  # a run's folder stands for its newest checkpoint
        line = memory_line(capsys, rewarded(inputs, folder))
        assert f"reward models {size(4 * shape.parameters)}" in line
    plain = training_memory(GRPOConfig(model=str(inputs / "model")), shape)
    assert size(plain.peak + 4 * shape.parameters) in line
    half = memory_line(capsys, rewarded(inputs, newest, bf16=True))
    assert f"reward models {size(2 * shape.parameters)}" in half


def test_a_reward_model_that_is_not_there(inputs, tmp_path, capsys):
    line = memory_line(capsys, rewarded(inputs, tmp_path / "rm"))
    assert line == f"memory     unknown: {tmp_path / 'rm'}: no config: there is no such folder"


@pytest.mark.parametrize("name", ["{grpo}", "{}", "{r1-zero}/checkpoint-3"])
def test_braces_refer_to_nothing_outside_a_pipeline(name, inputs, tmp_path, capsys):
    words = flags("grpo", inputs, tmp_path / "run", model=name, dataset=str(inputs / "rows.jsonl"))
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert f"memory     unknown: {name}: no config" in out
    assert err.count("\n") == 1 and name in err
    assert main(flags("sft", inputs, tmp_path / "run", dataset="{sft}")) == 2
    assert "unknown until the rows of {sft} are loaded" in capsys.readouterr().out


def test_configs_of_other_kinds_of_models(tmp_path):
    T5Config().save_pretrained(tmp_path / "t5")
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"hidden_size": 8}')
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "config.json").write_text('{"hidden_size"')
    for name in ("t5", "bare", "torn"):
        assert model_shape(str(tmp_path / name)).startswith("no config: ")


# -- rows are missed before a model is loaded ----------------------------------------------------


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("verb", "field"),
    [*((verb, "dataset") for verb in STAGES if verb != "eval"), ("eval", "data")]
    + [(verb, "eval_dataset") for verb in ("grpo", "sft", "distill", "reward-model")]
    + [("sample", "general_dataset"), ("sample", "decontaminate")],
)
def test_files_are_missed_first(verb, field, dry_run, inputs, tmp_path, capsys, no_loading):
    words = flags(verb, inputs, tmp_path / "run", **{field: tmp_path / "nothing.jsonl"})
    assert main([word for word in words if dry_run or word != "--dry-run"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "nothing.jsonl" in error and "does not exist" in error
    assert list(tmp_path.iterdir()) == []


def test_general_prompts_are_missed_first(inputs, tmp_path, capsys, no_loading):
    changes = {"general_dataset": [{"source": str(tmp_path / "nothing.jsonl"), "domain": "x"}]}
    changes |= {"reward_funcs": ["accuracy", "helpful"], "helpful_model": tmp_path / "rm"}
    words = flags("grpo", inputs, tmp_path / "run", **changes)
    words += ["--reward_domains", '{"accuracy": ["math"], "helpful": ["x"]}']
    assert main(words) == 2
    assert "nothing.jsonl does not exist" in capsys.readouterr().err
