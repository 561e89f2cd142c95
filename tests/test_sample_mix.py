"""grpo-engine sample with scripted answers: the rows that are mixed in, the tables, and the
generators."""

import pytest
import scripted_samples
from sample_cases import (
    manifest_of,
    rows_of,
    statistics_of,
    write,
)
from sample_chat import LEAK
from scripted_samples import PROSE, ROW, chain
from tiny_model import make_tiny_model

from grpo_engine.rejection import SampleConfig, run_sample
from grpo_engine.rejection.config import GeneratorConfig
from grpo_engine.rejection.generators import few_shot_text
from grpo_engine.rejection.select import EDIT, FAULTS, REASONS, REWRITE
from grpo_engine.rejection.statistics import domain_table, solve_rates
from grpo_engine.settings import build_config
from grpo_engine.types import UserError

tiny, scripted = scripted_samples.tiny, scripted_samples.scripted

TALK = {
    "messages": [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "cheers"},
    ]
}


@pytest.mark.parametrize(("share", "taken"), [(None, 6), (0.25, 1), (0.5, 3), (0.9, 6)])
def test_other_rows_are_mixed_in(scripted, tmp_path, capsys, share, taken):
    rows = [{"prompt": f"say {n}", "completion": str(n), "kind": "echo"} for n in range(4)]
    leaked = {"prompt": "say this", "completion": LEAK, "domain": "writing"}
    rows[0]["messages"] = None  # as a Parquet file has it that holds both kinds
    general = write(tmp_path / "general.jsonl", *rows, leaked, {**TALK, "domain": "chat"}, TALK)
    tests = write(tmp_path / "tests.jsonl", {"problem": LEAK, "answer": "1"})
    answers = {
        (1, n): chain(f"I add, says {word}.") for n, word in enumerate(["one", "two", "six"])
    }
    folder = scripted(
        [ROW], answers, general_dataset=str(general), general_share=share, decontaminate=str(tests)
    )
    data = rows_of(folder)
    others = [row for row in data if row["source"] == "general_dataset"]
    assert [row["source"] for row in data[:3]] == ["sampled"] * 3 and len(others) == taken
    assert [row["row"] for row in others] == sorted(row["row"] for row in others)
    assert 5 not in [row["row"] for row in others], "it shares words with the evaluation"
    found = statistics_of(folder)
    assert found["general"]["taken"] == taken and found["general"]["contaminated"] == 1
    assert found["table"]["total"]["samples"] == 3 + taken
    if share is None:
        domains = {one["domain"]: one for one in found["table"]["domains"]}
        assert list(domains) == ["math", "general", "chat"] and others[0]["kind"] == "echo"
        assert domains["chat"]["average_rounds"] == 2.0
        assert domains["general"]["average_rounds"] == pytest.approx(6 / 5)
    assert ("would be 0.9 of the mix" in capsys.readouterr().err) == (share == 0.9)


def test_tables_of_nothing():
    assert domain_table([], None)["total"]["average_tokens"] is None
    assert solve_rates({})["mean"] is None


def test_solve_rates_fall_into_their_bins():
    right = {n: [True] * n + [False] * (8 - n) for n in range(9)}
    found = [one["prompts"] for one in solve_rates(right)["histogram"]]
    assert found == [1, 1, 2, 2, 2, 1]


def test_average_tokens_are_the_tokenizers(tiny):
    from transformers import AutoTokenizer

    rows = [
        {"domain": "math", "prompt": "a", "completion": "12345"},
        {"domain": "math", "prompt": "a", "completion": "123"},
        {"domain": "chat", **TALK},
    ]
    table = domain_table(rows, AutoTokenizer.from_pretrained(tiny))
    assert [(one["samples"], one["average_tokens"]) for one in table["domains"]] == [(2, 4), (1, 8)]
    assert table["total"]["average_tokens"] == pytest.approx(16 / 3)


# --- generators -----------------------------------------------------------------------------------


def test_answers_of_several_generators(scripted):
    answers = {
        ("r1-zero", 1, 0): "<think>I add.</think><answer>5</answer>",
        ("r1-zero", 1, 1): "<think>I add.</think><answer>6</answer>",
        ("few-shot", 1, 0): "I take two, then three. Answer: 5",
        ("asked", 1, 0): "I add two and three with great care. \\boxed{5}",
    }
    folder = scripted(
        [ROW],
        answers,
        generators=[
            {"method": "r1-zero", "num_samples": 2},
            {"method": "few-shot", "num_samples": 1},
            {"method": "direct", "name": "asked", "num_samples": 1},
        ],
        few_shot=[{"prompt": "1+1?", "completion": "One and one. Answer: 2"}],
        model="miniature",
        answer_format="none",
        max_prompt_length=2000,
        max_completion_length=4,
    )
    assert [row["generator"] for row in rows_of(folder)] == ["r1-zero", "few-shot", "asked"]
    accepted = statistics_of(folder)["acceptance"]
    assert accepted["by_generator"]["r1-zero"]["samples"] == 2
    assert accepted["by_generator"]["asked"]["kept"] == 1
    shown = manifest_of(folder)["inputs"]
    assert shown["generator r1-zero"]["temperature"] == 1.0
    assert shown["generator few-shot"]["stop"] == "### Question"
    names = ("r1-zero", "few-shot", "asked")
    assert len({shown[f"generator {name}"]["prompts_sha256"] for name in names}) == 3


def test_generators_with_models_of_their_own(tmp_path, tiny):
    other = make_tiny_model(tmp_path / "other", seed=1)
    generators = [{"name": "one", "model": str(tiny)}, {"name": "other", "model": str(other)}]
    settings = {
        "dataset": str(write(tmp_path / "rows.jsonl", ROW, PROSE)),
        "prompt_template": "none",
        "num_samples": 2,
        "max_completion_length": 8,
        "reward_workers": 1,
        "device": "cpu",
    }

    def samples(name, generators):
        folder = tmp_path / name
        values = {**settings, "generators": generators, "output_dir": str(folder)}
        assert run_sample(build_config(values, SampleConfig)) == 1  # random: no answer is right
        return {
            (one["generator"], one["row"], one["sample"]): (one["completion"], one["key"])
            for one in rows_of(folder, "samples.jsonl")
        }

    both = samples("both", generators)
    assert len(both) == 8
    assert samples("one", generators[:1]) | samples("other", generators[1:]) == both
    texts = [
        {text for (name, *_), (text, _) in both.items() if name == one} for one in ("one", "other")
    ]
    assert not texts[0] & texts[1]
    inputs = manifest_of(tmp_path / "both")["inputs"]
    hashes = {inputs[f"generator {one}"]["weights_sha256"] for one in ("one", "other")}
    assert len(hashes) == 2


def test_one_model_is_in_memory_at_a_time(tmp_path, tiny, monkeypatch):
    import gc
    import weakref

    from grpo_engine.policy import Policy

    loaded, load = [], Policy.load

    def watched(source, **options):
        gc.collect()
        assert [one for one in loaded if one() is not None] == []
        policy = load(source, **options)
        loaded.append(weakref.ref(policy))
        return policy

    monkeypatch.setattr(Policy, "load", watched)
    other = make_tiny_model(tmp_path / "other", seed=1)
    settings = {
        "dataset": str(write(tmp_path / "rows.jsonl", ROW)),
        "prompt_template": "none",
        "num_samples": 1,
        "max_completion_length": 4,
        "reward_workers": 1,
        "device": "cpu",
        "generators": [{"name": "one", "model": str(tiny)}, {"name": "two", "model": str(other)}],
        "output_dir": str(tmp_path / "run"),
    }
    assert run_sample(build_config(settings, SampleConfig)) == 1  # two random models: none is right
    assert len(loaded) == 4


def test_methods_set_what_they_stand_for():
    config = build_config(
        {
            "dataset": "x.jsonl",
            "temperature": 0.7,
            "prompt_template": "chat",
            "few_shot": [{"prompt": "p", "completion": "c"}],
            "generators": [
                {"method": "r1-zero"},
                {"method": "r1-zero", "name": "cold", "temperature": 0.5, "model": "other"},
                {"method": "direct", "num_samples": 3},
                {"method": "few-shot"},
            ],
        },
        SampleConfig,
    )
    zero, cold, direct, few = (settings for _, settings in config.resolved_generators())
    assert (zero.temperature, zero.prompt_template) == (1.0, "r1-zero")
    assert zero.few_shot == direct.few_shot == [], "they are for the few-shot generator"
    assert (cold.temperature, cold.model) == (0.5, "other")
    assert direct.num_samples == 3 and "verify" in direct.prompt_suffix
    assert few.temperature == 0.7 and few.prompt_suffix is None and few.few_shot
    [(one, alone)] = config.model_copy(update={"generators": []}).resolved_generators()
    assert one.label == "sample" and alone == config.model_copy(update={"generators": []})


def test_a_base_model_is_shown_examples_as_text(tmp_path, capsys):
    config = build_config({"dataset": "x.jsonl", "prompt_suffix": "Think."}, SampleConfig)
    text = few_shot_text([{"prompt": "1+1?", "completion": "2"}], "2+2?", config)
    assert text == (
        "### Question\n1+1?\nThink.\n### Answer\n2\n\n### Question\n2+2?\nThink.\n### Answer\n"
    )
    with pytest.raises(UserError, match="few_shot example 1"):
        few_shot_text([{"prompt": "1+1?"}], "2+2?", config)


def test_an_answer_ends_where_the_next_question_begins(tmp_path, monkeypatch):
    from grpo_engine.generation.hf import HFGenerator
    from grpo_engine.types import Generation

    texts = iter(["5\n\n### Question\nmore", "6 and on and on"])

    def generate(self, requests, sampling):
        tokenizer = self.policy.tokenizer
        made = []
        for _ in requests:
            ids = tokenizer(next(texts))["input_ids"]
            made.append(Generation(ids, [0.0] * len(ids), "length"))
        return made

    monkeypatch.setattr(HFGenerator, "generate", generate)
    settings = {
        "dataset": str(write(tmp_path / "rows.jsonl", ROW)),
        "prompt_template": "none",
        "generators": [{"method": "few-shot", "few_shot": [{"prompt": "1+1?", "completion": "2"}]}],
        "response_prefix": "<think>I see. </think>",
        "num_samples": 2,
        "generation_batch_size": 1,
        "max_completion_length": 50,
        "reward_workers": 1,
        "device": "cpu",
        "output_dir": str(tmp_path / "run"),
    }
    assert run_sample(build_config(settings, SampleConfig)) == 1  # no answer is marked
    one, other = rows_of(tmp_path / "run", "samples.jsonl")
    assert (one["completion"], one["finish_reason"]) == ("<think>I see. </think>5", "stop")
    assert other["completion"] == "<think>I see. </think>6 and on and on"
    assert other["finish_reason"] == "length"


def test_a_generator_field_that_does_not_exist():
    with pytest.raises(ValueError, match="temprature"):
        GeneratorConfig(temprature=1.0)
    assert {EDIT + fault for fault in FAULTS} < set(REASONS)
    assert {REWRITE + fault for fault in FAULTS} < set(REASONS)
