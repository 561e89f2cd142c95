"""How sampled answers begin and end, and that no two draws of grpo-engine sample are the same."""

import json
import shutil
from pathlib import Path

import pytest
from sample_cases import rows_of, write
from tiny_model import make_tiny_model
from transformers import AutoTokenizer

from grpo_engine.generation.hf import HFGenerator
from grpo_engine.preferences.config import PreferencesConfig
from grpo_engine.preferences.run import run_preferences
from grpo_engine.rejection import SampleConfig, run_sample
from grpo_engine.settings import build_config
from grpo_engine.types import Generation

OPENING = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant><think>\n{% endif %}"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Its chat template opens the think tag."""
    folder = make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = OPENING
    tokenizer.save_pretrained(folder)
    return folder


def settings_of(tmp_path, model, name="run", **changes):
    rows = [{"prompt": f"{n}+{n}=", "solution": f"{2 * n}"} for n in range(4)]
    return {
        "model": str(model),
        "dataset": str(write(tmp_path / "rows.jsonl", *rows)),
        "prompt_template": "none",
        "num_samples": 2,
        "max_completion_length": 16,
        "device": "cpu",
        "output_dir": str(tmp_path / name),
        **changes,
    }


def drawn(settings):
    """The completions, by generator, row and sample; random models are never right."""
    config = build_config({"reward_workers": 1, **settings}, SampleConfig)
    assert run_sample(config) in (0, 1)
    return {
        (one["generator"], one["row"], one["sample"]): one["completion"]
        for one in rows_of(settings["output_dir"], "samples.jsonl")
    }


@pytest.fixture
def scripted(monkeypatch):
    """Every answer is "well</think>4" and its end."""

    def generate(self, requests, sampling):
        ids = [*self.policy.tokenizer("well</think>4")["input_ids"], self.policy.eos_ids[0]]
        return [Generation(ids, [0.0] * len(ids), "stop") for _ in requests]

    monkeypatch.setattr(HFGenerator, "generate", generate)


def test_an_answer_is_whole_where_the_template_opens_its_reasoning(tmp_path, model, scripted):
    """And without the token that ended it."""
    for name, changes, begun in (
        ("opened", {"prompt_template": "chat"}, "<think>"),
        ("prefixed", {"response_prefix": "<think>so, "}, "<think>so, "),
        ("plain", {}, ""),
    ):
        found = drawn(settings_of(tmp_path, model, name, **changes))
        assert set(found.values()) == {f"{begun}well</think>4"}, name


def test_an_answer_to_be_judged_is_whole_too(tmp_path, model, scripted):
    judge = tmp_path / "judge.py"
    judge.write_text(
        "import json\n"
        "def safe(conversations):\n"
        "    reply = json.dumps({'analysis': '', 'safety': 'safe'})\n"
        "    return [reply for _ in conversations]\n"
    )
    values = settings_of(tmp_path, model, prompt_template="chat", num_samples=1)
    values |= {"kind": "safety", "judge": f"{judge}:safe"}
    assert run_preferences(build_config(values, PreferencesConfig)) == 0
    rows = rows_of(tmp_path / "run", "safety.jsonl")
    assert [row["completion"] for row in rows] == ["<think>well</think>4"] * 4


def test_generators_prompts_and_samples_draw_by_seeds_of_their_own(tmp_path, model):
    generators = [{"name": "one"}, {"name": "two"}]
    settings = settings_of(tmp_path, model, generators=generators)
    same = write(tmp_path / "rows.jsonl", *[{"prompt": "1+1=", "solution": "2"}] * 4)
    found = drawn(settings | {"dataset": str(same)})
    assert len(found) == 16 and len(set(found.values())) == 16


def test_which_answer_is_kept_is_drawn_for_each_prompt(tmp_path, model, monkeypatch):
    def generate(self, requests, sampling):
        made = []
        for request in requests:
            text = f"I add {request.seed % 99991}<think></think>4"
            ids = [*self.policy.tokenizer(text)["input_ids"], self.policy.eos_ids[0]]
            made.append(Generation(ids, [0.0] * len(ids), "stop"))
        return made

    monkeypatch.setattr(HFGenerator, "generate", generate)
    right = tmp_path / "right.py"
    right.write_text("def right(completions, **_):\n    return [1.0] * len(completions)\n")
    settings = settings_of(tmp_path, model, num_samples=8, max_completion_length=99)
    settings |= {"reward_funcs": [f"{right}:right"], "keep": "random", "max_per_prompt": 1}
    settings |= {"answer_format": "none", "min_language_share": None}
    rows = [{"prompt": f"{n}+1=", "solution": "2"} for n in range(12)]
    write(tmp_path / "rows.jsonl", *rows)
    drawn(settings)
    kept = [row["sample"] for row in rows_of(tmp_path / "run")]
    assert len(kept) == 12 and len(set(kept)) > 3


@pytest.mark.parametrize(("kind", "order"), [("safety", "balanced"), ("helpful", "random")])
def test_every_judgement_has_a_seed_of_its_own(tmp_path, kind, order):
    """A judge that goes by the seed alone says different things; the order is drawn as well."""
    judge = Path(tmp_path / "judge.py")
    judge.write_text(
        "import json, pathlib\n"
        "def judge(conversations, *, seed):\n"
        "    with pathlib.Path(__file__).with_name('seeds').open('a') as log:\n"
        "        log.write(f'{seed}\\n')\n"
        "    safe = json.dumps({'analysis': '', 'safety': 'safe'})\n"
        f"    reply = safe if {kind == 'safety'} else '[[A>>B]]'\n"
        "    return [reply for _ in conversations]\n"
    )
    rows = [{"prompt": f"question {n}", "answers": [f"yes {n}", f"no {n}"]} for n in range(20)]
    values = {
        "kind": kind,
        "dataset": str(write(tmp_path / "rows.jsonl", *rows)),
        "answer_columns": ["answers"],
        "judge": f"{judge}:judge",
        "judgements": 4,
        "output_dir": str(tmp_path / "run"),
        **({"answer_order": order} if kind == "helpful" else {}),
    }
    run_preferences(build_config(values, PreferencesConfig))
    assert len(set((tmp_path / "seeds").read_text().split())) == 4
    if order == "random":  # a balanced order leaves nothing of a judge that only likes the first
        found = json.loads((tmp_path / "run" / "statistics.json").read_text())
        assert 0 < found["kept"] < 20 and found["position_bias"]["first_position_rate"] == 1.0
        shutil.rmtree(tmp_path / "run")
        run_preferences(build_config(values | {"answer_order": "balanced"}, PreferencesConfig))
        found = json.loads((tmp_path / "run" / "statistics.json").read_text())
        assert found["kept"] == 0
