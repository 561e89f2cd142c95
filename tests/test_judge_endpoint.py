"""The judge behind an OpenAI-compatible endpoint: what is tried again, what ends the run, what is
kept, and that the key goes nowhere else."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from fake_endpoint import KEY, endpoint
from judge_rules import answer

from grpo_engine.rewards.judge import correctness, load_chat_model
from grpo_engine.types import UserError

QUICK = {"model": "judge-1", "backoff": 0.01, "max_backoff": 0.05, "timeout": 5.0}


@pytest.fixture(autouse=True)
def _no_key(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def judged(body):
    return answer(body["messages"])


def echo(body):
    return body["messages"][-1]["content"]


def hello(count=1):
    return [[{"role": "user", "content": f"hello {number}"}] for number in range(count)]


def test_replies_come_in_order_whatever_takes_long():
    def slow_first(body):
        time.sleep(0.2 if body["messages"][0]["content"] == "hello 0" else 0)
        return echo(body)

    with endpoint(slow_first) as fake:
        model = load_chat_model(fake.url, **QUICK, max_concurrency=4)
        model.check()
        replies = model.complete(hello(12), seed=3, temperature=0.5, max_tokens=7)
    assert replies == [f"hello {number}" for number in range(12)]
    assert {(b["model"], b["temperature"], b["max_tokens"]) for b in fake.bodies} == {
        ("judge-1", 0.5, 7)
    }
    assert len({body["seed"] for body in fake.bodies}) == 12
    assert all(0 <= body["seed"] < 2**31 for body in fake.bodies)
    assert "Authorization" not in fake.headers[0]


def test_a_reply_cut_at_max_tokens_is_a_failure_where_all_of_it_is_needed(tmp_path):
    """Half a chain of thought must not pass for one; a judge's reply is read from its end."""
    with endpoint(echo, faults=["length"] * 3) as fake:
        model = load_chat_model(fake.url, **QUICK, max_concurrency=1, cache=tmp_path / "replies")
        assert model.complete(hello(2), max_tokens=9, whole=True) == [None, None]
        assert fake.answered() == 2 and model.failed == {"cut": 2}
        assert model.first_failure == "cut: the reply does not end within max_tokens=9"
        assert model.complete(hello(2), max_tokens=9) == ["hello 0", "hello 1"]
        assert model.complete(hello(2), max_tokens=9, whole=True) == ["hello 0", "hello 1"]
        assert fake.answered() == 6, "what was kept of replies that may be cut does not count"
        model.close()


def test_an_endpoint_that_fails_now_and_then_is_not_down():
    with endpoint(echo, faults=[500, None] * 4) as fake:
        model = load_chat_model(fake.url, **QUICK, max_concurrency=1, max_retries=0)
        replies = model.complete(hello(8))
    assert [reply is None for reply in replies] == [True, False] * 4
    assert model.failed == {"HTTP 500": 4}


def test_fields_that_a_server_refuses_are_left_out():
    with endpoint(echo) as fake:
        options = {"max_tokens_field": "max_completion_tokens", "omit": ["temperature", "seed"]}
        load_chat_model(fake.url, **QUICK, **options).complete(hello(), max_tokens=5)
    assert set(fake.bodies[0]) == {"model", "messages", "max_completion_tokens"}


def test_no_more_requests_at_once_than_allowed():
    def slowly(body):
        time.sleep(0.05)
        return "x"

    with endpoint(slowly) as fake:
        load_chat_model(fake.url, **QUICK, max_concurrency=3).complete(hello(12))
    assert fake.most_at_once == 3


@pytest.mark.parametrize(
    "fault", [429, 500, 502, 503, 408, "garbage", "drop", "cut", (429, {"Retry-After": "0"})]
)
def test_what_passes_is_tried_again(fault):
    with endpoint(judged, faults=[fault, fault]) as fake:
        model = load_chat_model(fake.url, **QUICK, max_concurrency=1)
        verdicts = correctness(model, ["q"] * 3, ["1"] * 3, ["1", "2", "3"])
    assert verdicts == [True, False, False]
    assert fake.answered() == 5
    assert not model.failed


@pytest.mark.parametrize("fault", ["slow", "drip"])
def test_a_slow_answer_is_given_up_and_tried_again(fault):
    with endpoint(echo, faults=[fault]) as fake:
        model = load_chat_model(fake.url, **{**QUICK, "timeout": 0.3})
        started = time.monotonic()
        assert model.complete(hello()) == ["hello 0"]
        assert time.monotonic() - started < 4
    assert fake.answered() == 2


def test_retry_after_holds_back_every_request():
    with endpoint(echo, faults=[(429, {"Retry-After": "0.6"})]) as fake:
        model = load_chat_model(fake.url, **QUICK, max_concurrency=2)
        assert model.complete(hello(8)) == [f"hello {number}" for number in range(8)]
    started = fake.times[0]
    late = [when - started for when in fake.times if when - started > 0.55]
    assert len(late) >= 1  # the refused one itself
    assert not [when - started for when in fake.times if 0.2 < when - started < 0.55]


def test_retry_after_may_be_a_date_or_nonsense():
    from grpo_engine.chat.endpoint import _retry_after

    assert _retry_after(None) is None
    assert _retry_after("soon") is None
    assert _retry_after("-3") == 0
    assert _retry_after("nan") == 0
    assert _retry_after("Wed, 21 Oct 2015 07:28:00 GMT") == 0
    later = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 30))
    assert 25 < _retry_after(later) <= 31


def test_a_wait_beyond_reason_is_a_failure():
    with endpoint(echo, faults=[(429, {"Retry-After": "86400"})]) as fake:
        model = load_chat_model(fake.url, **QUICK)
        assert model.complete(hello()) == [None]
    assert model.failed == {"HTTP 429": 1} and "wait" in model.first_failure
    assert fake.answered() == 1


def test_a_refused_conversation_is_a_failure_of_its_own():
    with endpoint(echo, faults=[400]) as fake:
        model = load_chat_model(fake.url, **QUICK, max_concurrency=1)
        assert model.complete(hello(3)) == [None, "hello 1", "hello 2"]
    assert model.failed == {"HTTP 400": 1} and "status 400" in model.first_failure
    assert fake.answered() == 3


def test_an_endpoint_that_is_down_does_not_cost_hours():
    with endpoint(echo, faults=[500] * 10_000) as fake:
        model = load_chat_model(fake.url, **QUICK, max_retries=2, max_concurrency=2)
        assert model.complete(hello(200)) == [None] * 200
    assert sum(model.failed.values()) == 200 and model.failed["down"] > 190
    assert "HTTP 500" in model.first_failure
    assert fake.answered() <= 5 * 3


def test_an_empty_reply_is_a_reply_that_says_nothing():
    with endpoint(judged, faults=["empty"]) as fake:
        model = load_chat_model(fake.url, **QUICK)
        assert correctness(model, ["q"], ["1"], ["1"]) == [True]  # the second attempt
    assert fake.bodies[0]["temperature"] == 0 and fake.bodies[1]["temperature"] > 0
    assert fake.bodies[0]["seed"] != fake.bodies[1]["seed"]


# -- the start ------------------------------------------------------------------------------------


def start(url, **options):
    load_chat_model(url, **{**QUICK, "max_retries": 1, **options}).check()


def test_a_wrong_model_is_named_with_a_near_one():
    with endpoint(echo) as fake, pytest.raises(UserError, match="did you mean 'judge-1'"):
        start(fake.url, model="jugde-1")


def test_the_only_model_needs_no_name():
    with endpoint(echo) as fake:
        assert load_chat_model(fake.url).model == "judge-1"
    with endpoint(echo, models=("a", "b")) as fake, pytest.raises(UserError, match="2: a, b"):
        load_chat_model(fake.url)


def test_a_server_without_a_list_is_asked_for_one_token():
    with endpoint(echo, models=None) as fake:
        start(fake.url)
        assert [body["max_tokens"] for body in fake.bodies] == [1]
        fake.faults.append(404)
        with pytest.raises(UserError, match="status 404"):
            start(fake.url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1/v1", "refused"),
        ("http://", "not an address"),
        ("http://a..b/v1", "not an address"),
        ("http://localhost:99999/v1", "not an address"),
    ],
)
def test_an_address_that_leads_nowhere(url, message):
    with pytest.raises(UserError, match=message):
        start(url)


def test_a_redirect_is_refused():
    with endpoint(echo, faults=[(302, {"Location": "http://127.0.0.1:1/"})]) as fake:
        model = load_chat_model(fake.url, **QUICK)
        with pytest.raises(UserError, match="HTTP 302"):
            model.complete(hello())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modle": "x"}, "no option 'modle'"),
        ({"timeout": 0}, "timeout 0: .*greater than 0"),
        ({"timeout": "soon"}, "timeout 'soon': .*number"),
        ({"backoff": float("nan")}, "backoff nan"),
        ({"max_concurrency": 0}, "max_concurrency 0"),
        ({"max_retries": -1}, "max_retries -1"),
        ({"extra_body": "top_p"}, "extra_body 'top_p'"),
        ({"extra_body": {"messages": []}}, "must not set 'messages'"),
        ({"omit": ["messages"]}, "omit must not hold 'messages'"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "NOT_SET_ANYWHERE .* is not set"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(UserError, match=message):
        load_chat_model("http://localhost:8000/v1", **{"model": "m", **options})


# -- the key --------------------------------------------------------------------------------------


def test_the_key_opens_the_endpoint_and_is_never_repeated(monkeypatch, tmp_path):
    cache = tmp_path / "replies.jsonl"
    with endpoint(echo, key=KEY) as fake:
        with pytest.raises(UserError, match="OPENAI_API_KEY is not set"):
            start(fake.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        model = load_chat_model(fake.url, **QUICK, cache=cache)
        model.check()
        assert model.complete(hello()) == ["hello 0"]
        assert KEY not in cache.read_text() and KEY not in json.dumps([model.identity, model.place])
        monkeypatch.setenv("MY_KEY", KEY + "-stale")
        with pytest.raises(UserError, match="HTTP 401.*MY_KEY was refused") as caught:
            start(fake.url, api_key_env="MY_KEY")
        assert KEY not in str(caught.value) and "***" in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"http://user:{KEY}@localhost/v1",
        f"http://localhost/v1?api_key={KEY}",
        f"http://{KEY}@localhost/v1",
    ],
)
def test_an_address_with_a_secret_is_refused_unrepeated(url):
    with pytest.raises(UserError, match="environment variable") as caught:
        load_chat_model(url, model="m")
    assert KEY not in str(caught.value)


def test_a_key_in_place_of_its_variable_is_refused_unrepeated():
    with pytest.raises(UserError, match="must be the name") as caught:
        load_chat_model("http://localhost/v1", model="m", api_key_env=KEY)
    assert KEY not in str(caught.value)


# -- the cache ------------------------------------------------------------------------------------


def test_nothing_is_asked_twice(tmp_path):
    cache = tmp_path / "deep" / "replies.jsonl"
    with endpoint(echo) as fake:
        first = load_chat_model(fake.url, **QUICK, cache=cache)
        assert first.complete(hello(4) + hello(4)) == [f"hello {n}" for n in range(4)] * 2
        assert (fake.answered(), first.asked, first.recalled) == (4, 4, 0)
        first.close()
        again = load_chat_model(fake.url, **QUICK, cache=cache)
        assert again.complete(hello(6)) == [f"hello {n}" for n in range(6)]
        assert (fake.answered(), again.asked, again.recalled) == (6, 2, 4)
        for changed in ({"seed": 1}, {"temperature": 0.1}, {"max_tokens": 9}):
            again.complete(hello(1), **changed)
        assert fake.answered() == 9
        other = load_chat_model(fake.url, **{**QUICK, "extra_body": {"top_p": 0.5}}, cache=cache)
        other.complete(hello(1))
        assert fake.answered() == 10 and fake.bodies[-1]["top_p"] == 0.5


def test_the_same_model_at_another_address_is_the_same(tmp_path):
    cache = tmp_path / "replies.jsonl"
    with endpoint(echo) as fake:
        load_chat_model(fake.url, **QUICK, cache=cache).complete(hello())
    with endpoint(echo) as fake:
        assert load_chat_model(fake.url, **QUICK, cache=cache).complete(hello()) == ["hello 0"]
        assert fake.answered() == 0


def test_a_failure_is_not_kept(tmp_path):
    with endpoint(echo, faults=[400]) as fake:
        model = load_chat_model(fake.url, **QUICK, cache=tmp_path / "replies.jsonl")
        assert model.complete(hello()) == [None]
        assert model.complete(hello()) == ["hello 0"]


def test_a_line_cut_short_is_dropped_and_a_foreign_file_refused(tmp_path):
    cache = tmp_path / "replies.jsonl"
    with endpoint(echo) as fake:
        model = load_chat_model(fake.url, **QUICK, max_concurrency=1, cache=cache)
        model.complete(hello(2))
        model.close()
        whole = cache.read_bytes()
        cache.write_bytes(whole[:-5])
        model = load_chat_model(fake.url, **QUICK, cache=cache)
        model.complete(hello(2))
        assert fake.answered() == 3
        assert cache.read_bytes() == whole
    cache.write_text('{"prompt": "x"}\n')
    with pytest.raises(UserError, match=r"replies\.jsonl:1: no replies"):
        load_chat_model("http://localhost/v1", model="m", cache=cache)


def test_stopping_waits_for_what_is_on_its_way_and_keeps_it(tmp_path):
    """Ctrl-C in the middle: the replies that had been asked for are in the cache."""
    program = (
        "import sys\n"
        "from grpo_engine.interrupt import Interrupt, StopRequested\n"
        "from grpo_engine.rewards.judge import load_chat_model\n"
        "model = load_chat_model(sys.argv[1], model='judge-1', max_concurrency=2,"
        " cache=sys.argv[2])\n"
        "talks = [[{'role': 'user', 'content': f'hello {n}'}] for n in range(100)]\n"
        "with Interrupt() as interrupt:\n"
        "    try:\n"
        "        with interrupt.abortable():\n"
        "            model.complete(talks)\n"
        "    except StopRequested:\n"
        "        sys.exit(interrupt.exit_code)\n"
    )

    def slowly(body):
        time.sleep(0.15)
        return echo(body)

    cache = tmp_path / "replies.jsonl"
    with endpoint(slowly) as fake:
        child = subprocess.Popen([sys.executable, "-c", program, fake.url, str(cache)])
        while fake.answered() < 6:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
        assert fake.answered() < 20
        assert len(cache.read_text().splitlines()) == fake.answered()


def test_two_processes_may_share_a_cache(tmp_path):
    cache = tmp_path / "replies.jsonl"
    with endpoint(echo) as fake:
        models = [load_chat_model(fake.url, **QUICK, cache=cache) for _ in range(2)]
        threads = [threading.Thread(target=model.complete, args=(hello(20),)) for model in models]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        fresh = load_chat_model(fake.url, **QUICK, cache=cache)
        asked = fake.answered()
        assert fresh.complete(hello(20)) == [f"hello {number}" for number in range(20)]
        assert fake.answered() == asked <= 40


def test_no_torch_is_loaded():
    code = (
        "import sys; from grpo_engine.rewards.judge import load_chat_model; "
        "load_chat_model('http://localhost/v1', model='m'); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.split() == ["False", "False"]
