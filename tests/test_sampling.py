"""What eval, sample and preferences have in common: when their sampler is opened and closed, what
its failure leaves, and how much may fail."""

import json
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_vllm_server import vllm_server
from tiny_model import make_tiny_model

from grpo_engine.cli import main
from grpo_engine.generation.build import open_generator
from grpo_engine.rewards import RewardError
from grpo_engine.sampling import model as model_module
from grpo_engine.sampling import series as series_module
from grpo_engine.sampling.run import ErrorBudget
from grpo_engine.types import GeneratorError

RULE = f"{Path(__file__).with_name('judge_rules.py')}:rule"
VERBS = ("eval", "sample", "preferences")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_tiny_model(folder / "model")
    make_tiny_model(folder / "other", seed=1)
    rows = [{"prompt": f"{n}+{n}=", "solution": f"{2 * n}"} for n in range(3)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(verb, inputs, folder, *switches, **changes):
    """12 answers in 4 batches; the model is random, so none of them is right."""
    values = {
        "model": str(inputs / "model"),
        "data" if verb == "eval" else "dataset": str(inputs / "rows.jsonl"),
        "prompt_template": "none",
        "num_samples": 4,
        "max_completion_length": 8,
        "generation_batch_size": 4,
        "device": "cpu",
        "output_dir": str(folder),
    }
    if verb == "preferences":
        values |= {"judge": RULE, "drop_truncated": False, "max_length_ratio": 10}
    else:
        values["reward_workers"] = 1
    words = [(f"--{k}", v if isinstance(v, str) else json.dumps(v))
             for k, v in {**values, **changes}.items()]  # fmt: skip
    return main([verb, *(word for pair in words for word in pair), *switches])


def samples_of(folder):
    return (Path(folder) / "samples.jsonl").read_text().splitlines()


class Watched:
    """A sampler that notes what is asked of it, and fails at the ``last``-th draw."""

    notes = ["it cannot sleep"]

    def __init__(self, generator, seen, last):
        self.generator, self.seen, self.last = generator, seen, last

    def sync_weights(self, version):
        self.seen.append(f"sync {version}")
        return self.generator.sync_weights(version)

    def generate(self, requests, sampling):
        if self.seen.count("draw") == self.last:
            raise GeneratorError("the engine is gone")
        self.seen.append("draw")
        return self.generator.generate(requests, sampling)


@pytest.fixture
def watch(monkeypatch):
    """Begin to note what happens to samplers."""

    def start(last=None):
        seen = []

        @contextmanager
        def opened(config, policy):
            seen.append(f"open {config.max_completion_length}")
            with open_generator(config, policy) as generator:
                yield Watched(generator, seen, last)
            seen.append("close")

        monkeypatch.setattr(model_module, "open_generator", opened)
        return seen

    return start


@pytest.mark.parametrize("verb", VERBS)
def test_a_sampler_is_opened_by_the_first_draw_and_closed(verb, inputs, tmp_path, watch, capsys):
    seen = watch()
    assert run(verb, inputs, tmp_path / "run", "--dry-run") == 0
    assert seen == [], "a dry run starts no engine"
    run(verb, inputs, tmp_path / "run")
    assert capsys.readouterr().err.count("grpo-engine: it cannot sleep\n") == 1
    batches = {json.loads(line)["batch"] for line in samples_of(tmp_path / "run")}
    assert seen == ["open 8", "sync 0", *["draw"] * len(batches), "close"] and len(batches) == 4
    seen.clear()
    run(verb, inputs, tmp_path / "run")
    assert seen == [], "nothing is missing"


def test_models_are_sampled_one_after_the_other_for_their_longest_answers(inputs, tmp_path, watch):
    seen, generators = watch(), [
        {"name": "one", "num_samples": 1},
        {"name": "two", "num_samples": 1, "max_completion_length": 12},
        {"name": "three", "num_samples": 1, "model": str(inputs / "other")},
    ]  # fmt: skip
    run("sample", inputs, tmp_path / "run", generators=generators)
    first = ["open 12", "sync 0", "draw", "draw", "close"]
    assert seen == [*first, "open 8", "sync 0", "draw", "close"]


@pytest.mark.parametrize("verb", VERBS)
def test_a_sampler_that_fails_ends_the_run_and_keeps_the_samples(
    verb, inputs, tmp_path, watch, capsys
):
    whole, folder = tmp_path / "whole", tmp_path / "run"
    code = run(verb, inputs, whole)
    seen = watch(last=2)
    capsys.readouterr()
    assert run(verb, inputs, folder) == 1
    err = capsys.readouterr().err
    assert "stopped: the engine is gone" in err and "the same command goes on from there" in err
    assert seen[-1] == "close" and 0 < len(samples_of(folder)) < 12
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["status"] == "failed" and set(manifest["outputs"]) == {"samples.jsonl"}
    watch()
    assert run(verb, inputs, folder) == code
    names = {path.name for path in whole.iterdir()} - {"manifest.json", "config.yaml"}
    assert {"samples.jsonl"} < names
    for name in names - {"results.json"}:  # which holds nothing but figures, and where the data was
        assert (folder / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize("verb", VERBS)
def test_samples_of_another_sampler_are_not_taken_over(verb, inputs, tmp_path, monkeypatch, capsys):
    run(verb, inputs, tmp_path / "run")
    monkeypatch.setattr(series_module, "generator_inputs", lambda config: {"engine": "vllm"})
    assert run(verb, inputs, tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert "engine None, now it is 'vllm'" in err and "--overwrite" in err


@pytest.mark.parametrize("verb", VERBS)
def test_the_plan_names_another_sampler(verb, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(model_module, "check_generator", lambda config, policy: None)
    with vllm_server() as fake:  # its version is among the inputs, so a dry run asks for it too
        server = {"vllm_mode": "server", "vllm_server_base_url": fake.url}
        for changes, named in (({}, False), ({"generator": "vllm", **server}, True)):
            assert run(verb, inputs, tmp_path / "run", "--dry-run", **changes) == 0
            out = capsys.readouterr().out
            assert (f"sampler      vLLM server at {fake.url}" in out) == named, out
        assert "/version" in fake.paths()


@pytest.mark.parametrize("verb", VERBS)
def test_a_temperature_that_vllm_would_raise_is_refused(verb, inputs, tmp_path, capsys):
    server = {"vllm_mode": "server", "vllm_server_base_url": "http://there:1"}
    changes = {"temperature": 0.005}
    if verb == "sample":
        changes = {"generators": [{"name": "cold", "temperature": 0.005}]}
    sampler = {"generator": "vllm", **server}
    assert run(verb, inputs, tmp_path / "run", "--dry-run", **sampler, **changes) == 2
    assert "temperature 0.005: vLLM would draw at 0.01" in capsys.readouterr().err
    assert run(verb, inputs, tmp_path / "run", "--dry-run", **changes) == 0


@pytest.mark.parametrize("verb", VERBS)
def test_a_sampler_that_is_not_there_is_found_before_anything_is_written(
    verb, inputs, tmp_path, capsys
):
    code = run(verb, inputs, tmp_path / "run", generator="vllm", vllm_mode="server")
    assert code == 2 and "vllm_server_base_url" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# --- how much may fail ----------------------------------------------------------------------------


def test_the_first_failures_do_not_end_a_run():
    errors = ErrorBudget("max_errors", 0.25, "answers failed")
    errors.add(31, 31, "no verdict")
    errors.check(1000)
    errors.check()
    errors.add(1, 0, "another reason")
    with pytest.raises(RewardError) as error:
        errors.check(1000)
    assert str(error.value) == (
        "31 of 32 answers failed, more than max_errors=0.25 allows; the first failure: no verdict"
    )
    errors.add(92, 0)
    errors.check(1000)  # 31 of 124 are a quarter
    with pytest.raises(RewardError):
        errors.add(0, 1)
        errors.check(1000)


def test_where_there_is_less_to_do_the_first_failures_count():
    errors = ErrorBudget("max_errors", 0.5, "answers failed", default="nobody knows")
    errors.add(1, 1)
    errors.check(2)
    errors.add(1, 1)
    with pytest.raises(RewardError, match="the first failure: nobody knows"):
        errors.check(2)
