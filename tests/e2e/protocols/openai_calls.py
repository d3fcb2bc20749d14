"""What OpenAI's client may ask and see: `openai_calls.py ADDRESS SCENARIO [ARGUMENT...]`. It ends with an error where something isn't as it should be."""

import asyncio
import sys
import time

import openai

ADDRESS, SCENARIO, *ARGUMENTS = sys.argv[1:]


def client(key="none", **options):
    return openai.OpenAI(base_url=f"http://{ADDRESS}/v1", api_key=key, **options)


def expect(found, expected):
    assert found == expected, f"expected {expected!r}, found {found!r}"


def refused(kind, call):
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, found an answer")


def embeddings():
    asked = client()
    # The client asks for base64 by itself and turns it into numbers.
    whole = asked.embeddings.create(model="embed", input=["one", "two words"])
    expect([one.index for one in whole.data], [0, 1])
    expect(whole.usage.prompt_tokens, len("one") + len("two words"))
    for at, text in enumerate(["one", "two words"]):
        alone = asked.embeddings.create(model="embed", input=text, encoding_format="float")
        expect(len(alone.data[0].embedding), 16)
        for found, expected in zip(whole.data[at].embedding, alone.data[0].embedding, strict=True):
            assert abs(found - expected) < 1e-4, (found, expected)
    tokens = asked.embeddings.create(model="embed", input=[[1, 2], [3]])
    expect(len(tokens.data), 2)
    expect(asked.embeddings.create(model="embed", input=[1, 2]).data[0].embedding, tokens.data[0].embedding)
    many = asked.embeddings.create(model="embed", input=[f"text {number}" for number in range(300)])
    expect(len(many.data), 300)


def models():
    found = client().models.list().data
    expect({model.id: model.task for model in found}, {"embed": "embedding", "complete": "completion", "talk": "chat"})
    expect(client().models.retrieve("talk").object, "model")
    expect(refused(openai.NotFoundError, lambda: client().models.retrieve("plain")).code, "model_not_found")


def completions():
    asked = client()
    whole = asked.completions.create(model="complete", prompt="one two three", max_tokens=2)
    expect((whole.object, whole.choices[0].text, whole.choices[0].finish_reason), ("text_completion", "one two ", "length"))
    expect((whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens), (3, 2, 5))
    several = asked.completions.create(model="complete", prompt=["a", "b"], n=2)
    expect([(choice.index, choice.text) for choice in several.choices], [(0, "a"), (1, "a"), (2, "b"), (3, "b")])
    expect(asked.completions.create(model="complete", prompt=[5, 6, 7]).choices[0].text, "3 tokens")
    events = list(asked.completions.create(model="complete", prompt="one two three", stream=True))
    expect([event.choices[0].text for event in events], ["one ", "two ", "three", ""])
    expect(events[-1].choices[0].finish_reason, "stop")


def chats():
    asked = client()
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "good day"}]
    whole = asked.chat.completions.create(model="talk", messages=messages)
    expect((whole.object, whole.choices[0].message.content), ("chat.completion", "user: good day"))
    expect(whole.choices[0].message.role, "assistant")
    options = {"include_usage": True}
    events = list(asked.chat.completions.create(model="talk", messages=messages, stream=True, stream_options=options))
    expect(events[0].choices[0].delta.role, "assistant")
    pieces = [event.choices[0].delta.content or "" for event in events if event.choices]
    expect("".join(pieces), "user: good day")
    assert len([piece for piece in pieces if piece]) > 1, pieces
    expect(events[-1].usage.total_tokens, 6)
    expect({event.id for event in events}, {events[0].id})
    tool = [{"role": "user", "content": "call a tool"}]
    called = asked.chat.completions.create(model="talk", messages=tool)
    expect(called.choices[0].message.tool_calls[0].function.name, "weather")
    expect(called.choices[0].finish_reason, "tool_calls")
    with asked.chat.completions.stream(model="talk", messages=tool) as stream:
        call = stream.get_final_completion().choices[0].message.tool_calls[0]
        expect((call.id, call.function.name, call.function.arguments), ("call-1", "weather", '{"place":"here"}'))
    with asked.chat.completions.stream(model="talk", messages=messages) as stream:
        expect(stream.get_final_completion().choices[0].message.content, "user: good day")

    async def at_once():
        asked = openai.AsyncOpenAI(base_url=f"http://{ADDRESS}/v1", api_key="none")
        calls = [asked.chat.completions.create(model="talk", messages=messages) for _ in range(16)]
        answers = await asyncio.gather(*calls)
        expect({answer.choices[0].message.content for answer in answers}, {"user: good day"})

    asyncio.run(at_once())


def cancels():
    """One that leaves in the middle of a stream that would never end, and one that has had enough of waiting."""
    messages = [{"role": "user", "content": "on and on"}]
    stream = client().chat.completions.create(model="talk", messages=messages, stream=True)
    for event in stream:
        if event.choices[0].delta.content:
            break
    stream.close()
    impatient = client(timeout=0.5, max_retries=0)
    refused(openai.APITimeoutError, lambda: impatient.chat.completions.create(model="talk", messages=messages))
    # Its one replica has stopped talking to those who left.
    next_one = [{"role": "user", "content": "good day"}]
    answer = client(timeout=30, max_retries=0).chat.completions.create(model="talk", messages=next_one)
    expect(answer.choices[0].message.content, "user: good day")


def errors():
    asked = client(max_retries=0)
    user = [{"role": "user", "content": "hello"}]
    missing = refused(openai.NotFoundError, lambda: asked.chat.completions.create(model="nobody", messages=user))
    expect((missing.code, missing.param, missing.type), ("model_not_found", "model", "invalid_request_error"))
    other = refused(openai.BadRequestError, lambda: asked.chat.completions.create(model="embed", messages=user))
    expect(other.param, "model")
    assert 'whose task is "embedding"' in other.message, other.message
    wrong = refused(openai.BadRequestError, lambda: asked.completions.create(model="complete", prompt="a", n=0))
    expect(wrong.param, "n")
    # What the pipeline says of its input.
    of_model = refused(
        openai.BadRequestError, lambda: asked.completions.create(model="complete", prompt="a", extra_body={"max_tokens": -1})
    )
    expect(of_model.param, "max_tokens")
    failed = refused(openai.InternalServerError, lambda: asked.completions.create(model="complete", prompt="fail"))
    expect((failed.type, failed.status_code), ("server_error", 500))
    assert "told to fail" in failed.message, failed.message
    # One of several texts.
    second = refused(openai.BadRequestError, lambda: asked.completions.create(model="complete", prompt=["a", {}]))
    expect(second.param, "prompt")
    nowhere = refused(openai.NotFoundError, lambda: asked.responses.create(model="talk", input="a"))
    expect((nowhere.code, nowhere.param), (None, None))
    # In a stream, before its first event and behind it.
    early = refused(
        openai.APIError, lambda: list(asked.completions.create(model="complete", prompt="fail", stream=True))
    )
    assert "told to fail" in early.message, early.message
    late = {"x-request-timeout-ms": "400"}
    ended = refused(
        openai.APIError,
        lambda: list(asked.completions.create(model="complete", prompt="on and on", stream=True, extra_headers=late)),
    )
    assert "deadline" in ended.message, ended.message


def retries():
    """What may pass is tried again by the client itself, and what can't isn't."""
    key, limited = ARGUMENTS
    trying = client(key)
    expect(trying.completions.create(model="complete", prompt="fail once").choices[0].text, "fail once")
    failed = refused(openai.InternalServerError, lambda: trying.completions.create(model="complete", prompt="fail"))
    expect(failed.response.headers["x-should-retry"], "false")
    wrong = refused(openai.AuthenticationError, lambda: client("wrong").models.list())
    expect(wrong.code, "invalid_api_key")
    # One request a second: the client waits as it is told to.
    slow = client(limited, max_retries=5)
    begun = time.monotonic()
    for _ in range(3):
        slow.completions.create(model="complete", prompt="a")
    assert time.monotonic() - begun > 1, "expected the client to be held back"
    hasty = client(limited, max_retries=0)

    def at_once():
        for _ in range(4):
            hasty.completions.create(model="complete", prompt="a")

    busy = refused(openai.RateLimitError, at_once)
    expect((busy.code, busy.type), ("rate_limit_exceeded", "rate_limit_error"))
    assert int(busy.response.headers["retry-after"]) >= 1


globals()[SCENARIO]()
