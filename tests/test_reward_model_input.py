"""What a user of reward-model can get wrong: one line naming field and value, exit code 2, nothing
written. And its recipes, fields and page."""

import json
import shutil

import pytest
import yaml
from test_report import page, text_of, write_jsonl
from tiny_model import make_tiny_model

from grpo_engine.cli import main
from grpo_engine.report import headline
from grpo_engine.report.record import load_run
from grpo_engine.reward_model import run_reward_model
from grpo_engine.reward_model_config import RewardModelConfig
from grpo_engine.settings import build_config, config_text, load_recipe
from grpo_engine.types import UserError

PAIR = {"prompt": "1+1?", "chosen": "it is 2", "rejected": "no idea"}
LABELLED = {"prompt": "1+1?", "completion": "it is 2", "label": 1}
OTHER = {"prompt": "2+2?", "completion": "go away", "label": 0}


def rows(folder, name, *content):
    write_jsonl(folder / f"{name}.jsonl", content)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    make_tiny_model(folder / "mute", tokenizer=False)
    second = PAIR | {"prompt": "2+2?"}
    rows(folder, "good", PAIR, second)
    rows(folder, "labels", LABELLED, OTHER)
    rows(folder, "one_prompt", PAIR, PAIR)
    rows(folder, "unchosen", PAIR, {"prompt": "2+2?", "rejected": "no"})
    rows(folder, "blank", PAIR, second | {"chosen": "  "})
    rows(folder, "number", PAIR, second | {"rejected": 4})
    rows(folder, "promptless", {"question": "1", "chosen": "a", "rejected": "b"})
    rows(folder, "same", PAIR, second | {"chosen": "<think>x</think>no idea"})
    rows(folder, "long", PAIR, second | {"chosen": "so" * 300})
    rows(folder, "unlabelled", LABELLED, {"prompt": "2+2?", "completion": "4"})
    rows(folder, "mislabelled", LABELLED, OTHER | {"label": 2})
    rows(folder, "worded", LABELLED, OTHER | {"label": "fine"})
    rows(folder, "safe_only", LABELLED, OTHER | {"label": "safe"})
    (folder / "broken.jsonl").write_text('{"prompt": \n')
    return folder


def flags(inputs, output_dir, **changes):
    values = {
        "kind": "helpful",
        "model": inputs / "model",
        "dataset": inputs / "good.jsonl",
        "prompt_template": "none",
        "max_length": 100,
        "max_tokens_per_microbatch": 256,
        "eval_share": 0,
        "device": "cpu",
        "output_dir": output_dir,
        **changes,
    }
    return [word for name, v in values.items() if v is not None for word in (f"--{name}", str(v))]


SAFETY = {"kind": "safety"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dataset": None}, ["--dataset", "needs a value"]),
        ({"kind": None}, ["--kind", "needs a value"]),
        ({"kind": "kind"}, ["kind", "'kind'", "helpful"]),
        ({"dataset": "absent.jsonl"}, ["absent.jsonl"]),
        ({"dataset": "{}/broken.jsonl"}, ["broken.jsonl:1"]),
        ({"dataset": "{}/unchosen.jsonl"}, ["row 2", "'chosen'", "no such column"]),
        ({"dataset": "{}/blank.jsonl"}, ["row 2", "'chosen'", "'  '"]),
        ({"dataset": "{}/number.jsonl"}, ["row 2", "'rejected'", "4"]),
        ({"dataset": "{}/promptless.jsonl"}, ["row 1", "'prompt'", "question"]),
        ({"dataset": "{}/same.jsonl"}, ["row 2", "the same", "summary", "unusable_rows"]),
        ({"dataset": "{}/long.jsonl"}, ["row 2", "tokens", "max_length=100", "long_rows"]),
        (
            {"dataset": "{}/long.jsonl", "max_length": 700, "max_tokens_per_microbatch": 2000},
            ["row 2", "512 positions"],
        ),
        ({"dataset": "{}/one_prompt.jsonl", "eval_share": 0.5}, ["eval_share=0.5", "one prompt"]),
        ({"eval_dataset": "{}/good.jsonl"}, ["held-out prompts"]),
        ({"dataset": "{}/labels.jsonl"}, ["row 1", "'chosen'"]),
        (SAFETY, ["row 1", "'completion'"]),
        (SAFETY | {"dataset": "{}/unlabelled.jsonl"}, ["row 2", "'label'", "no such column"]),
        (SAFETY | {"dataset": "{}/mislabelled.jsonl"}, ["row 2", "'label'", "2"]),
        (SAFETY | {"dataset": "{}/worded.jsonl"}, ["row 2", "'label'", "'fine'"]),
        (SAFETY | {"dataset": "{}/safe_only.jsonl"}, ["all 2 rows", "safe"]),
        (SAFETY | {"margin": 1.0}, ["margin=1.0", "safety"]),
        ({"scope": "reasoning"}, ["scope", "'reasoning'"]),
        ({"lora_r": 8}, ["lora_r=8", "all its weights"]),
        ({"max_length": 200}, ["max_tokens_per_microbatch=256", "400 tokens"]),
        ({"eval_share": 1}, ["eval_share", "1"]),
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"prompt_template": "chat"}, ["chat template"]),
        ({"system_prompt": "be kind"}, ["system_prompt", "'chat'"]),
        ({"pad_token": "<eos>"}, ["pad_token='<eos>'"]),
        ({"model": "{}/absent"}, ["absent"]),
        ({"model": "{}/mute"}, ["mute", "tokenizer"]),
        ({"batch_sise": 3}, ["batch_sise", "batch_size"]),
        ({"recipe": "r1-zero"}, ["r1-zero"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refused_with_one_line_and_nothing_written(inputs, tmp_path, capsys, changes, words):
    changes = {
        name: value if value is None else str(value).replace("{}/", f"{inputs}/")
        for name, value in changes.items()
    }
    assert main(["reward-model", *flags(inputs, tmp_path / "run", **changes)]) == 2
    out, err = capsys.readouterr()
    last = err.strip().splitlines()[-1]
    assert out == "" and "Traceback" not in err and last.startswith("grpo-engine: error: ")
    for word in words:
        assert word in last, last
    assert not (tmp_path / "run").exists()


def test_resume_refuses_other_rows_and_fields(inputs, tmp_path):
    shutil.copy(inputs / "labels.jsonl", tmp_path / "rows.jsonl")
    values = {"kind": "safety", "model": str(inputs / "model"), "prompt_template": "none"}
    values |= {"dataset": str(tmp_path / "rows.jsonl"), "output_dir": str(tmp_path / "run")}
    values |= {"eval_share": 0.0, "device": "cpu", "num_train_epochs": 2}
    assert run_reward_model(build_config(values | {"max_steps": 1}, RewardModelConfig)) == 0
    resume = str(tmp_path / "run")
    with pytest.raises(UserError, match="--scope 'summary'.*started with None"):
        run_reward_model(
            build_config(values | {"scope": "summary"}, RewardModelConfig), resume=resume
        )
    write_jsonl(tmp_path / "rows.jsonl", [LABELLED, OTHER | {"completion": "other"}])
    with pytest.raises(UserError, match="--dataset.*content has changed"):
        run_reward_model(build_config(values, RewardModelConfig), resume=resume)


# -- recipes and fields ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "scope", "scale"),
    [
        ("reward-model-helpful", "helpful", "summary", "standardised"),
        ("reward-model-safety", "safety", "response", "probability"),
    ],
)
def test_recipes_have_the_papers_numbers(name, kind, scope, scale):
    config = build_config(load_recipe(name), RewardModelConfig)
    assert (config.kind, config.judged_scope, config.saved_scale) == (kind, scope, scale)
    assert (config.batch_size, config.learning_rate, config.num_train_epochs) == (256, 6e-6, 1)
    assert config.max_length == 8192


def test_defaults_by_kind_and_the_saved_copy():
    for kind, scope, scale in (
        ("helpful", "summary", "standardised"),
        ("safety", "response", "probability"),
    ):
        config = build_config({"kind": kind, "dataset": "x.jsonl"}, RewardModelConfig)
        assert (config.judged_scope, config.saved_scale) == (scope, scale)
        assert (config.batch_size, config.learning_rate) == (256, 6e-6)
        saved = yaml.safe_load(config_text(config))
        assert build_config(saved, RewardModelConfig) == config


def test_help_names_every_field(capsys):
    assert main(["reward-model", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"--{name} " in out for name in RewardModelConfig.model_fields)


# -- the page --------------------------------------------------------------------------------------


@pytest.fixture
def run_of(tmp_path):
    """A finished run of one kind, written by hand."""

    def make(kind, **results):
        folder = tmp_path / kind
        folder.mkdir()
        sides = ("chosen", "rejected") if kind == "helpful" else ("safe", "unsafe")
        logged = [
            {
                "step": step,
                "loss": 0.7 - step / 100,
                "accuracy": 0.5 + step / 50,
                "margin": step / 10,
                f"{sides[0]}_reward": 1.0,
                f"{sides[1]}_reward": -1.0,
                "tokens_per_second": 100.0,
            }
            for step in range(1, 11)
        ]
        first = {"step": 0, "eval/loss": 0.7, "eval/accuracy": 0.5, "eval/margin": 0.0}
        logged[-1] |= {"eval/loss": 0.4, "eval/accuracy": 0.9, "eval/margin": 1.0}
        write_jsonl(folder / "metrics.jsonl", [first, *logged])
        for step, right in ((0, 20), (10, 36)):
            samples = [
                {"step": step, "index": i, "correct": float(i < right), "scores": [1.0, 0.0]}
                for i in range(40)
            ]
            write_jsonl(folder / "completions" / f"eval-{step:06d}.jsonl", samples)
        (folder / "config.yaml").write_text(yaml.safe_dump({"kind": kind, "max_steps": 10}))
        manifest = {"stage": "reward-model", "status": "finished", "name": kind}
        (folder / "manifest.json").write_text(json.dumps(manifest))
        counts = [[1, 3, 36]] if kind == "helpful" else [[0, 2, 18], [17, 3, 0]]
        table = [
            {"from": 0.5, "to": 0.75, "count": 10, "predicted": 0.66, "observed": 0.8},
            {"from": 0.75, "to": 1.0, "count": 0, "predicted": None, "observed": None},
        ]
        whole = {
            "kind": kind,
            "scope": "summary" if kind == "helpful" else "response",
            "step": 10,
            "rows": 40,
            "prompts": 33,
            "accuracy": {"value": 0.9, "ci95": [0.81, 0.97]},
            "margin": {"histogram": {"edges": [-3.0, -1.0, 1.0, 3.0], "counts": counts}},
            "calibration": {
                "predicted": "what it says",
                "observed": "what it is",
                "error": 0.14,
                "table": table,
            },
            "length": {
                "mean_tokens": 12.5,
                "score_correlation": {"pearson": 0.1, "spearman": -0.2},
            },
        }
        (folder / "results.json").write_text(json.dumps(whole | results))
        return folder

    return make


def test_the_page_of_a_helpful_model(run_of):
    length = {
        "mean_tokens": 12.5,
        "score_correlation": {"pearson": 0.1, "spearman": -0.2},
        "margin_correlation": {"pearson": 0.6, "spearman": 0.7},
        "accuracy_of_the_longer": 0.65,
        "accuracy_where_chosen_is_longer": 0.95,
        "accuracy_where_chosen_is_shorter": None,
    }
    folder = run_of("helpful", length=length)
    assert headline(load_run(folder)).startswith("Held-out accuracy rose from 50.0")
    words = text_of(folder)
    for fact in (
        "40 held-out pairs",
        "81.0 % – 97.0 %",
        "40 of 33 prompts",
        "the final summary only",
        "Expected calibration error: 14.0 %",
        "rank correlation is +0.70: longer answers score higher",
        "65.0 %",
        "95.0 %",
        "Margin",
    ):
        assert fact in words, fact
    assert "where it is shorter" not in words  # there is no such pair
    assert "Answers, early and late" not in words


def test_the_page_of_a_safety_model(run_of):
    folder = run_of("safety", auc={"value": 0.93, "ci95": [0.85, 0.98]})
    words = text_of(folder)
    for fact in (
        "40 held-out answers",
        "the whole response",
        "Area under the ROC curve",
        "0.93",
        "0.85 – 0.98",
        "Scores by label",
        "rank correlation is −0.20",
    ):
        assert fact in words, fact


def test_drawings_are_described_and_in_their_frame(run_of):
    found = page(run_of("safety"))
    drawn = [(t, n, v) for t, n, v in found.attributes if t in ("circle", "line") and v]
    for _, name, value in drawn:
        if name in ("cx", "x1", "x2"):
            assert 0 <= float(value) <= 500
        if name in ("cy", "y1", "y2"):
            assert 0 <= float(value) <= 300
    assert found.tags.count("svg") == found.tags.count("desc")
    assert "predicted 66.0 %, observed 80.0 %, 10 rows." in found.text.replace("\u202f", " ")


def test_a_run_without_held_out_rows_and_one_with_damaged_results(run_of):
    folder = run_of("helpful")
    (folder / "results.json").unlink()
    words = text_of(folder)
    assert "Agreement with" not in words and "Scores during training" in words
    for text in ("{", "[]"):
        (folder / "results.json").write_text(text)
        with pytest.raises(UserError, match="results.json"):
            page(folder)
