"""What /v1/completions answers, whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serve.api.limits import Limits
from serve.api.responses import CompletionResponse
from serve.engine import EngineConfig
from tests.api.conftest import SPEECH, TOKENIZER, Server, encode, running, speaking, until
from tests.fakes import LIMITS, FakeRunner, Paced

pytestmark = pytest.mark.api

EOS = TOKENIZER.eos_token_id
SPEECH_IDS = encode(SPEECH)


def test_every_field_of_the_answer(server: Server) -> None:
    answer = server.post(prompt="Four", max_tokens=3).json()
    CompletionResponse.model_validate(answer, strict=True)
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": 0, "text": " score and seven", "logprobs": None, "finish_reason": "length"}
    ]
    assert answer["usage"]["prompt_tokens"] == 1
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["usage"]["total_tokens"] == 4
    assert set(answer["usage"]["prompt_tokens_details"]) == {"cached_tokens"}
    assert set(answer["timings"]) == {
        "queue_seconds",
        "prefill_seconds",
        "decode_seconds",
        "prefill_tokens_per_second",
        "decode_tokens_per_second",
    }
    assert all(value >= 0 for value in answer["timings"].values())


def test_timings_are_rates_over_the_same_seconds(server: Server) -> None:
    timings = server.post(prompt="Four", max_tokens=5).json()["timings"]
    tokens = timings["decode_tokens_per_second"] * timings["decode_seconds"]
    assert tokens == pytest.approx(4)  # the first token is prefill's
    single = server.post(prompt="Four", max_tokens=1).json()["timings"]
    assert single["decode_tokens_per_second"] == 0


def test_defaults_and_null_are_the_same(server: Server) -> None:
    fields = ("temperature", "max_tokens", "stop", "seed", "logit_bias", "n", "stream", "user")
    plain = server.post(top_k=1).json()["choices"]
    nulls = server.post(top_k=1, **dict.fromkeys(fields, None)).json()["choices"]
    assert plain == nulls
    assert plain[0]["finish_reason"] == "stop"  # 16 tokens are enough for SPEECH


def test_the_end_of_the_text_has_no_text_but_counts(server: Server) -> None:
    answer = server.post(prompt=SPEECH, return_token_ids=True).json()
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert choice["token_ids"] == [EOS]
    assert choice["prompt_token_ids"] == SPEECH_IDS
    assert answer["usage"]["completion_tokens"] == 1


def test_ignore_eos_goes_on_and_hides_its_text(server: Server) -> None:
    answer = server.post(prompt=SPEECH, ignore_eos=True, max_tokens=4, return_token_ids=True).json()
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "length")
    assert choice["token_ids"] == [EOS] * 4


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        (["Four", "Four score", "nothing"], [" score", " and", ""]),
        ([SPEECH_IDS[:1], SPEECH_IDS[:3]], [" score", " seven"]),
        (SPEECH_IDS[:2], [" and"]),
        (["Four"], [" score"]),
    ],
)
def test_several_prompts(server: Server, prompt: object, texts: list[str]) -> None:
    answer = server.post(prompt=prompt, max_tokens=1).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(texts)))
    assert [choice["text"] for choice in answer["choices"]] == texts
    assert answer["usage"]["completion_tokens"] == len(texts)


def test_several_prompts_run_together() -> None:
    runner = speaking(SPEECH)
    with running(runner) as server:
        runner.gate.clear()
        answer = server.post_later(prompt=["Four", "Four score", "Four score and"], max_tokens=4)
        until(lambda: server.engine.gauges().num_waiting == 3)
        runner.gate.set()
        assert answer.result().status_code == 200
    assert ("decode", 3) in runner.calls


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        ("seven", " score and "),
        ("score and seven", " "),  # over three tokens
        (["fathers", "d sev"], " score an"),  # the middle of two tokens
        (["never", "new nation"], SPEECH.removeprefix("Four").removesuffix("new nation")),
        (["new nation."], SPEECH.removeprefix("Four")),  # begins and never ends
        ("forth a ", SPEECH.removeprefix("Four").partition("forth")[0]),
        ([], SPEECH.removeprefix("Four")),
    ],
)
def test_stop_strings(server: Server, stop: object, text: str) -> None:
    [choice] = server.post(max_tokens=30, stop=stop).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (text, "stop")


def test_a_stop_string_ends_the_count(server: Server) -> None:
    answer = server.post(max_tokens=30, stop="and seven", return_token_ids=True).json()
    assert answer["usage"]["completion_tokens"] == 3
    assert answer["choices"][0]["token_ids"] == SPEECH_IDS[1:4]


def test_a_stop_string_cancels_the_sequence(cancels: Callable[[], None]) -> None:
    pace = Paced(SPEECH_IDS)
    with running(FakeRunner(next_token=pace)) as server:
        answer = server.post_later(max_tokens=12, stop=" score")
        pace.step()
        cancels()
        pace.step()  # the one that was under way
        assert answer.result().json()["usage"]["completion_tokens"] == 1
        finish = server.finishes.next()
        assert (finish.reason, finish.num_generated_tokens) == ("stop", 1)


def test_a_stop_string_on_the_last_token_is_a_stop(server: Server) -> None:
    [choice] = server.post(max_tokens=3, stop="seven").json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" score and ", "stop")


def test_min_tokens_puts_stop_strings_off(server: Server) -> None:
    [choice] = server.post(max_tokens=30, min_tokens=2, stop=["score", "years"]).json()["choices"]
    assert choice["text"] == " score and seven "


def test_stop_token_ids(server: Server) -> None:
    answer = server.post(max_tokens=30, stop_token_ids=[SPEECH_IDS[3]]).json()
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" score and", "stop")
    assert answer["usage"]["completion_tokens"] == 3


def test_logit_bias(server: Server) -> None:
    [choice] = server.post(max_tokens=1, logit_bias={str(SPEECH_IDS[1]): -100, "0": 1}).json()[
        "choices"
    ]
    assert choice["text"] == TOKENIZER.decode([0])


def test_text_that_is_no_utf8_ends_in_a_replacement() -> None:
    emoji = encode("a😀")
    assert len(emoji) > 2
    with running(speaking("a😀")) as server:
        [cut] = server.post(prompt="a", max_tokens=len(emoji) - 2).json()["choices"]
        [whole] = server.post(prompt="a", max_tokens=len(emoji) - 1).json()["choices"]
    assert (cut["text"], whole["text"]) == ("�", "😀")


def test_seeds() -> None:
    with running(FakeRunner(peak=0)) as server:  # every token is as likely as any other

        def draw(**fields: object) -> list[int]:
            asked = {"temperature": 1, "max_tokens": 8, "return_token_ids": True, **fields}
            ids: list[int] = server.post(**asked).json()["choices"][0]["token_ids"]
            return ids

        assert draw(seed=7) == draw(seed=7) != draw(seed=8)
        assert draw(seed=-1) == draw(seed=-1) != draw(seed=1)
        assert draw(seed=-(2**63)) != draw(seed=2**63 - 1)
        assert draw() != draw()
        assert draw(temperature=1e-9) == [0] * 8  # as good as 0


def test_salted_prompts_share_nothing() -> None:
    prompt = SPEECH_IDS[:9]  # two pages of 4, and one more
    with running(speaking(SPEECH)) as server:

        def cached(**fields: object) -> int:
            usage = server.post(prompt=prompt, max_tokens=1, **fields).json()["usage"]
            count: int = usage["prompt_tokens_details"]["cached_tokens"]
            return count

        assert cached(cache_salt="a") == 0
        assert cached() == 0
        assert cached(cache_salt="b") == 0
        assert cached(cache_salt="a") == 8
        assert cached() == 8


def test_a_long_prompt_is_tokenized_beside_the_loop(server: Server) -> None:
    answer = server.post(prompt="word " * 10_000)
    assert answer.json()["error"]["code"] == "context_length_exceeded"


def test_context_is_used_to_the_last_token(server: Server) -> None:
    prompt = [1] * (LIMITS.max_context - 2)
    assert server.post(prompt=prompt, max_tokens=2).status_code == 200
    error = server.post(prompt=prompt, max_tokens=3).json()["error"]
    assert error["code"] == "context_length_exceeded"
    assert str(LIMITS.max_context) in error["message"]
    assert str(LIMITS.max_context + 1) in error["message"]


def test_a_stop_string_completed_by_the_last_token(server: Server) -> None:
    answer = server.post(max_tokens=3, stop=" seven").json()
    [choice] = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == (" score and", "stop")
    assert answer["usage"]["completion_tokens"] == 3


def test_n_choices_of_each_prompt(server: Server) -> None:
    answer = server.post(prompt=["Four", "Four score"], n=3, max_tokens=1).json()
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    texts = [choice["text"] for choice in answer["choices"]]
    assert texts == [" score"] * 3 + [" and"] * 3
    assert answer["usage"]["prompt_tokens"] == 3  # each prompt once
    assert answer["usage"]["completion_tokens"] == 6
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] <= 3


def test_a_seed_gives_each_choice_its_own() -> None:
    with running(FakeRunner(peak=0)) as server:

        def draw(**fields: object) -> list[list[int]]:
            asked = {"temperature": 1, "max_tokens": 8, "return_token_ids": True, **fields}
            return [choice["token_ids"] for choice in server.post(**asked).json()["choices"]]

        [one] = draw(seed=7)
        three = draw(seed=7, n=3)
        assert three[0] == one
        assert three == draw(seed=7, n=3)
        assert len({*map(tuple, three)}) == 3
        assert three[1] not in draw(seed=8, n=3) + draw(seed=6, n=3)


def test_the_best_are_told_first() -> None:
    with running(FakeRunner(peak=10)) as server:
        asked: dict[str, object] = {"temperature": 1, "max_tokens": 4, "seed": 1}
        every = server.post(n=8, logprobs=0, **asked).json()["choices"]
        answer = server.post(n=3, best_of=8, logprobs=0, **asked).json()
        untold = server.post(n=3, best_of=8, **asked).json()["choices"]
    means = [sum(c["logprobs"]["token_logprobs"]) / 4 for c in every]
    ranked = [c["text"] for _, c in sorted(zip(means, every, strict=True), key=lambda x: -x[0])]
    assert len({*means}) > 3
    assert [choice["text"] for choice in answer["choices"]] == ranked[:3]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["completion_tokens"] == 32  # all that were generated
    assert [(c["text"], c["logprobs"]) for c in untold] == [(text, None) for text in ranked[:3]]


def test_the_best_of_each_prompt(server: Server) -> None:
    answer = server.post(prompt=["Four", "Four score"], best_of=2, max_tokens=1).json()
    assert [(c["index"], c["text"]) for c in answer["choices"]] == [(0, " score"), (1, " and")]
    assert answer["usage"]["completion_tokens"] == 4


@pytest.mark.parametrize("prompt", ["Four score", SPEECH_IDS[:2], "<|endoftext|>Four"])
def test_echo(server: Server, prompt: str | list[int]) -> None:
    text = prompt if isinstance(prompt, str) else TOKENIZER.decode(prompt)
    [choice] = server.post(prompt=prompt, echo=True, max_tokens=2).json()["choices"]
    [plain] = server.post(prompt=prompt, max_tokens=2).json()["choices"]
    assert choice["text"] == text + plain["text"]
    [alone] = server.post(prompt=prompt, echo=True, max_tokens=0).json()["choices"]
    assert (alone["text"], alone["finish_reason"]) == (text, "length")


def test_a_stop_string_in_the_prompt_ends_nothing(server: Server) -> None:
    [choice] = server.post(prompt="Four score", echo=True, stop="score", max_tokens=1).json()[
        "choices"
    ]
    assert (choice["text"], choice["finish_reason"]) == ("Four score and", "length")


def test_nothing_is_generated_of_0_tokens(server: Server) -> None:
    answer = server.post(prompt=["Four", "Four score"], echo=True, max_tokens=0).json()
    assert [choice["text"] for choice in answer["choices"]] == ["Four", "Four score"]
    assert answer["usage"]["completion_tokens"] == 0
    assert answer["usage"]["total_tokens"] == 3


def test_the_last_tokens_of_a_prompt_are_kept(server: Server) -> None:
    asked = {"echo": True, "max_tokens": 1, "return_token_ids": True}
    answer = server.post(
        prompt=["nothing, Four score", "Four"], truncate_prompt_tokens=2, **asked
    ).json()
    assert [choice["text"] for choice in answer["choices"]] == [" Four score", "Four score"]
    assert answer["choices"][0]["prompt_token_ids"] == encode(" Four score")
    assert answer["usage"]["prompt_tokens"] == 3
    too_long = [1] * LIMITS.max_context
    assert server.post(prompt=too_long, truncate_prompt_tokens=8).status_code == 200


def test_the_user_is_logged_and_not_told(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="serve.access"):
        answer = server.post(user="somebody@example.org")
        until(lambda: bool(caplog.records))
    [record] = caplog.records
    fields = vars(record)["fields"]
    assert fields["user"] == "somebody@example.org"
    assert (fields["prompt_tokens"], fields["completion_tokens"]) == (1, len(SPEECH_IDS))
    assert "somebody" not in answer.text


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long(stream: bool) -> None:
    runner = speaking(SPEECH)
    with running(runner) as server:
        runner.gate.clear()
        answer = server.post(timeout=0.01, stream=stream)
        runner.gate.set()
        assert server.finishes.next().reason == "timeout"
    assert answer.status_code == 504
    error = answer.json()["error"]
    assert (error["type"], error["code"]) == ("timeout_error", "deadline_exceeded")
    assert "0.01 seconds" in error["message"]


def test_the_servers_own_limit_of_time() -> None:
    runner = speaking(SPEECH)
    limits = Limits(default_timeout_seconds=0.01, max_timeout_seconds=60)
    with running(runner, limits=limits) as server:
        assert server.post(timeout=61).json()["error"]["param"] == "timeout"
        assert server.post(timeout=60).status_code == 200
        runner.gate.clear()
        assert server.post().status_code == 504


def test_unknown_fields_may_be_ignored() -> None:
    with running(speaking(SPEECH), limits=Limits(unknown_fields="ignore")) as server:
        answer = server.post(tempreature=1, nothing=None, max_tokens=1)
        assert answer.json()["choices"][0]["text"] == " score"
        options = {"include_usage": True, "include_obfuscation": True}
        assert server.stream(stream_options=options)[-1]["usage"]["prompt_tokens"] == 1
        assert server.chat("hi", tools=[{"type": "function"}]).status_code == 400


def test_choices_are_all_taken_or_none() -> None:
    with running(speaking(SPEECH), EngineConfig(max_running=1, max_waiting=1)) as server:
        server.runner.gate.clear()
        first = server.post_later()
        until(lambda: server.engine.gauges().num_waiting + server.engine.gauges().num_running == 1)
        answer = server.post(n=2)
        assert answer.status_code == 429
        assert server.rejections == 1
        assert server.engine.gauges().num_waiting + server.engine.gauges().num_running == 1
        server.runner.gate.set()
        assert first.result().status_code == 200
        assert server.post(n=2).status_code == 200


def test_more_choices_than_the_server_ever_takes_are_no_matter_of_time() -> None:
    with running(speaking(SPEECH), EngineConfig(max_running=1, max_waiting=1)) as server:
        for _ in range(5):
            answer = server.post(n=3)
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (400, "too_many_sequences")
            assert "2 at most" in error["message"]
            assert server.post().status_code == 200  # nothing of it was left in the queue
