"""The server as the real `openai` client sees it, with many clients at once, some of which go away or talk nonsense."""

import asyncio
import dataclasses
import http.client
import itertools
import json
import socket
import threading
import time

import jax
import openai
import pytest
import uvicorn

from MaxText.inference import api, batcher, runs, server
from tests import generation, support

PROMPT = "def f(x):"


@pytest.fixture(scope="module")
def served():
    """(port, server) of a small model with random weights."""
    made = generation.make_batcher(num_rows=8, vocab_padding=100)
    config = support.small_config(vocab_size=256, vocab_padding=100, temperature=0.7, top_p=1.0, serve_max_queue=200)
    made.warm_up()
    loaded = runs.LoadedModel(config, made.program, made.weights, made.tokenizer, step=3)
    listener = socket.create_server((server.HOST, 0))
    application = server.Server(loaded, made, "small")
    uvicorn_server = uvicorn.Server(uvicorn.Config(application.app, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=uvicorn_server.run, args=([listener],))
    thread.start()
    yield listener.getsockname()[1], application
    uvicorn_server.should_exit = True
    thread.join()
    application.writer.close()


@pytest.fixture
def client(served):
    with openai.OpenAI(base_url=f"http://127.0.0.1:{served[0]}/v1", api_key="none", max_retries=0) as made:
        yield made


def write(client, **keys):
    return client.completions.create(**({"model": "small", "prompt": PROMPT, "max_tokens": 12, "seed": 5} | keys))


def post(port, body, content_type="application/json", host="127.0.0.1", path="/v1/completions", method="POST"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request(method, path, body, {"Content-Type": content_type, "Host": host})
    answer = connection.getresponse()
    status, text = answer.status, answer.read().decode()
    connection.close()
    return status, text


def test_a_completion_is_the_models(client, served):
    answer = write(client, logprobs=2)
    direct = batcher.Completion(5)
    made = generation.make_batcher(num_rows=8, vocab_padding=100)
    sampling = batcher.Sampling(0.7, 0, 1.0, 0.0)
    made.submit(batcher.Request(list(PROMPT.encode()), 12, sampling, (), [direct]))
    made.run()
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason) == (direct.text, direct.finish_reason)
    assert choice.logprobs.token_logprobs == pytest.approx(direct.log_probabilities, abs=1e-5)
    assert [len(likeliest) <= 2 for likeliest in choice.logprobs.top_logprobs] == [True] * len(direct.tokens)
    assert len(choice.logprobs.text_offset) == len(choice.logprobs.tokens) == len(direct.tokens)
    assert answer.usage.prompt_tokens == len(PROMPT)
    assert answer.usage.completion_tokens == len(direct.tokens)


def test_several_prompts_samples_and_the_best(client):
    answer = write(client, prompt=["ab", [97, 98]], n=2, temperature=1.0)
    texts = [choice.text for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert texts[:2] == texts[2:] and texts[0] != texts[1]
    best = write(client, prompt="ab", n=1, best_of=6, temperature=1.0).choices[0].text
    assert best in [choice.text for choice in write(client, prompt="ab", n=6, temperature=1.0).choices]
    assert (
        write(client, suffix="return", extra_body={"top_k": 1}).choices[0].text
        == write(client, suffix="return", temperature=0).choices[0].text
    )


def test_a_stream_is_the_same_text(client):
    whole = write(client, max_tokens=60, n=2, logprobs=0)
    texts, tokens, reasons, usage = {0: "", 1: ""}, {0: [], 1: []}, {}, None
    for piece in write(client, max_tokens=60, n=2, logprobs=0, stream=True, stream_options={"include_usage": True}):
        usage = piece.usage or usage
        for choice in piece.choices:
            texts[choice.index] += choice.text
            tokens[choice.index] += choice.logprobs.tokens
            reasons[choice.index] = choice.finish_reason
    assert [texts[i] for i in (0, 1)] == [choice.text for choice in whole.choices]
    assert [tokens[i] for i in (0, 1)] == [choice.logprobs.tokens for choice in whole.choices]
    assert [reasons[i] for i in (0, 1)] == [choice.finish_reason for choice in whole.choices]
    assert usage.completion_tokens == whole.usage.completion_tokens


def test_stop_strings_end_the_text(client):
    texts = {seed: write(client, max_tokens=40, seed=seed).choices[0].text for seed in range(8)}
    seed, text = max(texts.items(), key=lambda item: len(item[1]))
    answer = write(client, max_tokens=40, seed=seed, stop=[text[6:9]]).choices[0]
    assert (answer.text, answer.finish_reason) == (text[: text.index(text[6:9])], "stop")


def test_models_and_health(client, served):
    assert [model.id for model in client.models.list()] == ["small"]
    assert client.models.retrieve("small").id == "small"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")
    connection = http.client.HTTPConnection("127.0.0.1", served[0], timeout=30)
    connection.request("GET", "/health")
    answer = connection.getresponse()
    assert answer.status == 200 and json.loads(answer.read())["status"] == "ok"
    connection.close()


def test_64_clients_at_once_get_what_each_would_get_alone(client, served):
    async def all_at_once():
        made = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{served[0]}/v1", api_key="none", max_retries=0)
        keys = {"model": "small", "max_tokens": 20, "temperature": 1.0}
        tasks = [made.completions.create(prompt=f"client {i % 16}", seed=i % 16, **keys) for i in range(64)]
        answers = await asyncio.gather(*tasks)
        await made.close()
        return [answer.choices[0].text for answer in answers]

    texts = asyncio.run(all_at_once())
    alone = [
        write(client, prompt=f"client {i}", seed=i, max_tokens=20, temperature=1.0).choices[0].text for i in range(16)
    ]
    assert texts == alone * 4
    assert len(set(alone)) == 16


def test_clients_that_go_away_take_their_requests_with_them(client, served):
    port, application = served
    for stream in (True, False):
        body = json.dumps({"prompt": PROMPT, "max_tokens": 90, "n": 60, "stream": stream, "temperature": 50})
        connections = []
        for _ in range(3):
            connection = socket.create_connection(("127.0.0.1", port))
            head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
            connections.append(connection)
        while application.batcher.is_idle:
            time.sleep(0.001)
        before = application.batcher.counts.tokens
        for connection in connections:
            connection.close()
        assert write(client, max_tokens=3).choices[0].finish_reason
        deadline = time.monotonic() + 20
        while not application.batcher.is_idle and time.monotonic() < deadline:
            time.sleep(0.01)
        assert application.batcher.is_idle
        assert application.batcher.counts.tokens - before < 90 * 180 / 2


BAD = {
    "no JSON": (b"{", 400, "not JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', 400, "not JSON"),
    "deep": (b"[" * 9000, 400, "not JSON"),
    "a list": (b"[]", 400, "must be a JSON object"),
    "no prompt": ({}, 400, "prompt=None: must be text"),
    "half a character": ({"prompt": "a\ud800b"}, 400, "'\\ud800' is no character"),
    "half a character in a suffix": ({"prompt": "a", "suffix": "\udfff"}, 400, "'\\udfff' is no character"),
    "an unknown field that is no text": ({"prompt": "a", "\ud800": 1}, 400, "unknown field '\\ud800'"),
    "empty prompt": ({"prompt": ""}, 400, "the prompt is empty"),
    "tokens that are none": ({"prompt": [3, 156]}, 400, "tokens below 156"),
    "unknown field": ({"prompt": "a", "tools": []}, 400, "unknown field 'tools'"),
    "another model": ({"prompt": "a", "model": "large"}, 404, "there is small"),
    "words for numbers": ({"prompt": "a", "temperature": "hot"}, 400, "temperature='hot': must be from 0 to 100"),
    "true for a number": ({"prompt": "a", "max_tokens": True}, 400, "max_tokens=True: must be a whole number"),
    "not a number": (b'{"prompt": "a", "temperature": NaN}', 400, "temperature=nan: must be"),
    "too hot": ({"prompt": "a", "temperature": -1}, 400, "temperature=-1: must be from 0"),
    "too many": ({"prompt": "a", "n": 1000}, 400, "n=1000: must be from 1 to 128"),
    "too long": ({"prompt": "a", "max_tokens": 10**6}, 400, "together at most 100"),
    "not supported": ({"prompt": "a", "presence_penalty": 1}, 400, "presence_penalty is not supported"),
    "stop of nothing": ({"prompt": "a", "stop": ""}, 400, "stop: must be text"),
    "tokens and a suffix": ({"prompt": [97], "suffix": "b"}, 400, "suffix goes with a prompt of text"),
    "best of a stream": ({"prompt": "a", "best_of": 3, "stream": True}, 400, "cannot be streamed"),
    "a body too large": ({"prompt": "a" * 1_100_000}, 413, "longer than 1,000,000 bytes"),
}


@pytest.mark.parametrize("name", BAD)
def test_nonsense_is_refused_in_words(client, served, name):
    body, status, message = BAD[name]
    got, text = post(served[0], body if isinstance(body, bytes) else json.dumps(body))
    assert got == status, text
    assert message in json.loads(text)["error"]["message"]
    assert write(client, max_tokens=1).choices  # and it goes on


def test_other_hosts_and_forms_are_refused(served):
    body = json.dumps({"prompt": "a"})
    for keys, status, message in (
        ({"content_type": "text/plain"}, 415, "must be application/json"),
        ({"host": "evil.example"}, 400, "must be for 127.0.0.1 or localhost"),
        ({"path": "/v1/chat/completions"}, 404, "Not Found"),
        ({"method": "GET"}, 405, "Method Not Allowed"),
    ):
        got, text = post(served[0], body, **keys)
        assert got == status and message in json.loads(text)["error"]["message"], text


def test_a_defect_of_the_server_is_an_error_object(served, monkeypatch, caplog):
    monkeypatch.setattr(api, "parse", lambda *_: 1 / 0)
    status, text = post(served[0], json.dumps({"prompt": "a"}))
    assert status == 500 and json.loads(text)["error"]["type"] == "server_error"


def test_a_full_queue_is_told(served, monkeypatch):
    port, application = served
    narrow = application.config.to_dict() | {"serve_max_queue": 3}
    monkeypatch.setattr(application, "config", type(application.config)(narrow))
    status, text = post(port, json.dumps({"prompt": "a", "n": 4}))
    assert status == 429 and "waiting already" in text


def test_a_writer_that_fails_is_told_and_nobody_waits_for_ever():
    made = generation.make_batcher(num_rows=2, context=40)
    made._hand_out = lambda _: (_ for _ in ()).throw(RuntimeError("no memory"))
    request = batcher.Request([5], 9, generation.GREEDY, (), [batcher.Completion(0), batcher.Completion(1)] * 2)
    request = dataclasses.replace(request, completions=[batcher.Completion(i) for i in range(5)])
    made.submit(request)
    writer = server.Writer(made)
    writer.wake()
    writer._thread.join(30)
    assert str(writer.failure) == "no memory"
    assert {completion.finish_reason for completion in request.completions} == {"cancelled"}


def test_a_writer_that_fails_in_the_middle_of_a_stream_is_told():
    made = generation.make_batcher(num_rows=2, context=60)
    hand_out, calls = made._hand_out, itertools.count()

    def fails_later(written):
        if next(calls) == 2:
            raise RuntimeError("no memory")
        hand_out(written)

    made._hand_out = fails_later
    config = support.small_config(vocab_size=256, temperature=0.7, top_p=1.0)
    loaded = runs.LoadedModel(config, made.program, made.weights, made.tokenizer, step=3)
    application = server.Server(loaded, made, "small")
    body = {"prompt": PROMPT, "max_tokens": 40, "seed": 1, "n": 2, "stream": True}
    asked = api.parse(body, config, made.tokenizer, "small")

    async def events():
        pieces = application._submit(asked)
        return [event async for event in application._stream(api.Answers.to(asked, "small", made.tokenizer), pieces)]

    *told, last = (json.loads(event.removeprefix("data: ")) for event in asyncio.run(events()))
    assert told and {choice["finish_reason"] for each in told for choice in each["choices"]} <= {None, "stop"}
    assert last["error"]["message"] == "nothing can be written any more: no memory"
    assert last["error"]["type"] == "server_error"


def test_equal_prompts_without_a_seed_get_seeds_of_their_own():
    config = support.small_config(vocab_size=256)

    def seeds(**keys):
        asked = api.parse({"prompt": ["ab"] * 3, "n": 2} | keys, config, generation.ByteTokenizer(), "m")
        return [[completion.seed for completion in request.completions] for request in asked.requests]

    assert seeds(seed=5) == [[5, 6]] * 3
    assert len({first for first, _ in seeds()}) == 3


def test_a_body_is_read_with_the_configs_defaults():
    config = support.small_config(vocab_size=256, temperature=0.3, top_k=7)
    asked = api.parse({"prompt": "ab"}, config, generation.ByteTokenizer(), "m")
    (request,) = asked.requests
    assert (request.sampling.temperature, request.sampling.top_k, request.max_tokens) == (0.3, 7, 16)
    assert jax.tree.leaves(request.prompt) == [97, 98]
