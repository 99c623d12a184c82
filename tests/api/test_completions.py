"""What /v1/completions answers, whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from serve.api.schemas import CompletionResponse
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
