"""The server as its users meet it: through the official client, over the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import openai
import pytest
import torch

import spikellm

KEY = "a-secret"
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MODEL = "spiking"


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path, *options: str, port: int = 0) -> None:
        command = [sys.executable, "-m", "spikellm", "serve", str(folder), "--name", MODEL]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), "--threads", "1", *options],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SPIKELLM_API_KEY": KEY},
        )
        assert self.process.stderr
        self.lines: list[str] = []
        for line in self.process.stderr:
            self.lines.append(line)
            if found := re.search(r"at (http://\S+)/v1", line):
                self.address = found[1]
                return
        raise AssertionError("".join(self.lines))

    headers: ClassVar = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}

    @property
    def port(self) -> int:
        return int(self.address.rpartition(":")[2])

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=KEY, max_retries=0)

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str]:
        """Status and text of an answer, without a client's help."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        given = {**self.headers, **headers}
        with contextlib.closing(connection):
            connection.request("GET" if body is None else "POST", path, body, given)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def get(self, path: str) -> str:
        status, text = self.ask(path)
        assert status == 200, text
        return text

    def figure(self, name: str) -> float:
        found = re.search(rf"^{re.escape(name)} (\S+)$", self.get("/metrics"), re.MULTILINE)
        return float(found[1]) if found else 0.0

    def until(self, name: str, value: float) -> None:
        """Wait until a figure has reached a value."""
        for _ in range(600):
            if self.figure(name) >= value:
                return
            time.sleep(0.1)
        raise AssertionError(f"{name} is {self.figure(name)}, never {value}")

    def end(self, by: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(by)
        assert self.process.stderr
        self.lines += self.process.stderr.readlines()
        return self.process.wait(60)


@contextlib.contextmanager
def serving(folder: Path, *options: str) -> Iterator[Server]:
    server = Server(folder, *options)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.process.kill()
            server.process.wait()
        assert server.process.stderr
        server.process.stderr.close()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "chat.jinja"
    path.write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def server(converted_folder: Path, template: Path) -> Iterator[Server]:
    options = ("--chat-template", str(template), "--spike-interval", "0.1", "--parallel", "8")
    with serving(converted_folder, *options, "--max-new-tokens", "200") as found:
        yield found


@pytest.fixture(scope="module")
def model(converted_folder: Path) -> tuple[Any, Any]:
    return spikellm.load(converted_folder)


def greedy(model: tuple[Any, Any], prompt: str, tokens: int) -> str:
    """What the library generates."""
    return spikellm.generate(*model, prompt, max_new_tokens=tokens)[len(prompt) :]


def complete(server: Server, prompt: Any, **options: Any) -> Any:
    given = {"max_tokens": 12, "temperature": 0, **options}
    return server.client().completions.create(model=MODEL, prompt=prompt, **given)


def test_models_and_health(server: Server) -> None:
    assert [one.id for one in server.client().models.list()] == [MODEL]
    assert server.client().models.retrieve(MODEL).owned_by == "spikellm"
    assert json.loads(server.get("/health"))["status"] == "ok"


def test_greedy_completion_is_the_librarys(server: Server, model: tuple[Any, Any]) -> None:
    prompt = "Return the number of"
    found = complete(server, prompt)
    assert found.choices[0].text == greedy(model, prompt, 12)
    assert found.choices[0].finish_reason == "length"
    length = len(model[1](prompt)["input_ids"])
    assert (found.usage.prompt_tokens, found.usage.completion_tokens) == (length, 12)


def test_stream_is_the_same_text_in_pieces(server: Server) -> None:
    whole = complete(server, "Return a list of", max_tokens=30)
    events = list(
        complete(
            server,
            "Return a list of",
            max_tokens=30,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    texts = [event.choices[0].text for event in events if event.choices]
    assert "".join(texts) == whole.choices[0].text
    assert len(texts) > 5
    assert events[-1].usage == whole.usage
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"


def test_stop_ends_in_front_of_itself(server: Server) -> None:
    text = complete(server, "Return a list of", max_tokens=30).choices[0].text
    stop = text[10:13]
    for stream in (False, True):
        found = complete(
            server, "Return a list of", max_tokens=30, stop=["@@@@", stop], stream=stream
        )
        choices = [event.choices[0] for event in found] if stream else [found.choices[0]]
        assert "".join(one.text for one in choices) == text[: text.find(stop)]
        assert choices[-1].finish_reason == "stop"


def test_end_of_text_ends_it_unless_it_is_ignored(server: Server, model: tuple[Any, Any]) -> None:
    end = model[1].eos_token_id
    given: dict[str, Any] = {"logit_bias": {str(end): 100}, "max_tokens": 5}
    found = complete(server, "Return", **given)
    assert (found.choices[0].text, found.choices[0].finish_reason) == ("", "stop")
    found = complete(server, "Return", **given, extra_body={"ignore_eos": True})
    assert (found.choices[0].finish_reason, found.usage.completion_tokens) == ("length", 5)


def test_seed_decides_what_is_sampled(server: Server) -> None:
    def some(seed: int) -> list[str]:
        found = complete(server, "Return", temperature=1, seed=seed, n=3)
        return [choice.text for choice in found.choices]

    assert some(5) == some(5)
    assert some(5) != some(6)
    assert len(set(some(5))) == 3, "answers to one prompt differ"


def test_logprobs_are_the_models(server: Server, model: tuple[Any, Any]) -> None:
    prompt = "Return the number of"
    found = complete(server, prompt, max_tokens=3, logprobs=2, echo=True).choices[0]
    tokens = model[1](prompt + greedy(model, prompt, 3), return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = model[0](tokens).logits[0].float().log_softmax(-1)
    each = wanted[:-1].gather(1, tokens[0, 1:, None])[:, 0]
    assert found.logprobs.token_logprobs[0] is None
    assert found.logprobs.token_logprobs[1:] == pytest.approx(each.tolist(), abs=0.05)
    assert found.text.startswith(prompt)
    assert "".join(found.logprobs.tokens) == found.text
    assert all(len(top) == 2 for top in found.logprobs.top_logprobs[1:])
    assert [found.text[place] for place in found.logprobs.text_offset] == [
        token[0] for token in found.logprobs.tokens
    ]


def test_several_prompts_and_tokens(server: Server, model: tuple[Any, Any]) -> None:
    prompts = ["Return the", "Raise an error if"]
    found = complete(server, prompts)
    assert [one.text for one in found.choices] == [greedy(model, one, 12) for one in prompts]
    same = complete(server, [model[1](one)["input_ids"] for one in prompts])
    assert [one.text for one in same.choices] == [one.text for one in found.choices]


def test_chat_goes_through_the_template(server: Server) -> None:
    client = server.client()
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Return the number of"}]},
    ]
    given: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0}
    found = client.chat.completions.create(**given, max_completion_tokens=10)
    plain = complete(
        server, "system: Be brief.\nuser: Return the number of\nassistant:", max_tokens=10
    )
    assert found.choices[0].message.content == plain.choices[0].text
    assert found.choices[0].message.role == "assistant"
    stream = client.chat.completions.create(**given, max_tokens=10, stream=True)
    deltas = [event.choices[0].delta for event in stream]
    assert deltas[0].role == "assistant"
    assert "".join(one.content or "" for one in deltas) == plain.choices[0].text
    messages += [found.choices[0].message, {"role": "user", "content": "Go on"}]
    assert client.chat.completions.create(**given, max_tokens=3).usage.completion_tokens == 3
    messages[2:] = []
    known = client.chat.completions.create(**given, max_tokens=4, logprobs=True, top_logprobs=3)
    assert [len(one.top_logprobs) for one in known.choices[0].logprobs.content] == [3] * 4


@pytest.mark.parametrize(
    ("change", "status", "words"),
    [
        ({"model": "another"}, 404, "not served here"),
        ({"prompt": ""}, 200, ""),
        ({"prompt": []}, 400, "prompt is empty"),
        ({"prompt": [10**9]}, 400, "token 1000000000"),
        ({"prompt": ["a"] * 30_000, "n": 16}, 400, "480000 answers are asked for"),
        ({"prompt": "word " * 5000}, 400, "the model attends to"),
        ({"max_tokens": 201}, 400, "200 at most"),
        ({"logit_bias": {"99999": 1}}, 400, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, 400, "without stream"),
    ],
)
def test_what_cannot_be_served_is_refused(
    server: Server, change: dict[str, Any], status: int, words: str
) -> None:
    given: dict[str, Any] = {"model": MODEL, "prompt": "a", "max_tokens": 1, **change}
    if status == 200:
        assert server.client().completions.create(**given).usage.completion_tokens == 1
        return
    with pytest.raises(openai.APIStatusError, match=words) as found:
        server.client().completions.create(**given)
    assert found.value.status_code == status


def test_strangers_are_turned_away(server: Server) -> None:
    body = json.dumps({"model": MODEL, "prompt": "a"}).encode()
    path = "/v1/completions"
    assert server.ask(path, body, authorization="Bearer wrong")[0] == 401
    assert server.ask(path, body, authorization="")[0] == 401
    assert server.ask("/metrics", authorization="")[0] == 401
    assert server.ask("/health", authorization="")[0] == 200, "health needs no key"
    assert server.ask(path, body, **{"content-type": "text/plain"})[0] == 415
    assert server.ask(path, body, host="evil.example")[0] == 400
    assert server.ask(path, body, authorization=f"bearer {KEY}")[0] == 200
    assert server.ask(path, body, authorization=KEY)[0] == 401
    assert server.ask(path, b" " * (5 << 20))[0] == 413
    assert json.loads(server.ask(path, b"{")[1])["error"]["type"] == "invalid_request_error"
    assert server.ask("/nowhere", b"{}")[0] == 404
    assert server.ask(path)[0] == 405
    with pytest.raises(openai.BadRequestError, match="the chat template refuses"):
        server.client().chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "bad"}]
        )


def test_thirty_two_clients_get_what_one_gets(server: Server, model: tuple[Any, Any]) -> None:
    """More than are decoded together; each gets what it would alone, and nothing is lost."""
    prompts = ["Return the", "Raise an error if", "A class that", "Open the file and"]
    wanted = {prompt: greedy(model, prompt, 20) for prompt in prompts}
    before = server.figure("spikellm_generated_tokens_total")

    async def all_at_once() -> list[str]:
        address = f"{server.address}/v1"
        async with openai.AsyncOpenAI(base_url=address, api_key=KEY, max_retries=0) as client:

            async def one(number: int) -> str:
                stream = await client.completions.create(
                    model=MODEL,
                    prompt=prompts[number % 4],
                    max_tokens=20,
                    temperature=0,
                    stream=True,
                )
                return "".join([event.choices[0].text async for event in stream])

            return list(await asyncio.gather(*(one(number) for number in range(32))))

    found = asyncio.run(all_at_once())
    assert found == [wanted[prompts[number % 4]] for number in range(32)]
    server.until("spikellm_generated_tokens_total", before + 32 * 20)
    assert server.figure('spikellm_step_generations_bucket{le="4.0"}') < server.figure(
        "spikellm_step_generations_count"
    ), "some steps were of more than four"


@pytest.mark.parametrize("stream", [True, False])
def test_who_leaves_is_not_waited_for(server: Server, stream: bool) -> None:
    before = server.figure("spikellm_generations_cancelled_total")
    body = {"model": MODEL, "prompt": "Return", "max_tokens": 200, "stream": stream, "n": 16}
    text = json.dumps({**body, "ignore_eos": True})
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        lines = (
            "POST /v1/completions HTTP/1.1",
            "host: localhost",
            f"authorization: Bearer {KEY}",
            "content-type: application/json",
            f"content-length: {len(text)}",
        )
        connection.sendall("\r\n".join([*lines, "", text]).encode())
        if stream:
            assert connection.recv(10)
        else:
            while json.loads(server.get("/health"))["running"] == 0:
                time.sleep(0.01)
    server.until("spikellm_generations_cancelled_total", before + 1)
    assert json.loads(server.get("/health"))["running"] == 0


def test_spikes_and_energy_are_counted(server: Server) -> None:
    complete(server, "Return the number of")
    server.until("spikellm_sampled_tokens_total", 1)
    tokens = server.figure("spikellm_sampled_tokens_total")
    binary = server.figure('spikellm_sampled_spikes_total{execution="binary"}')
    assert binary > tokens
    labels = '{execution="merged",table="horowitz-45nm"}'
    dense = '{execution="dense",table="horowitz-45nm"}'
    assert (
        0
        < server.figure(f"spikellm_estimated_joules_per_token{labels}")
        < server.figure(f"spikellm_estimated_joules_per_token{dense}")
    )


def test_others_are_answered_while_a_long_text_is_read(server: Server) -> None:
    import threading

    text = json.dumps({"model": MODEL, "prompt": "word " * 700_000}).encode()
    answers: list[tuple[int, str]] = []
    asking = threading.Thread(target=lambda: answers.append(server.ask("/v1/completions", text)))
    asking.start()
    meanwhile = 0
    while asking.is_alive():
        assert server.ask("/health")[0] == 200
        meanwhile += 1
        time.sleep(0.05)
    assert answers[0][0] == 400
    assert meanwhile > 3


@pytest.mark.slow  # three servers
def test_ends_when_asked_and_begins_again(converted_folder: Path) -> None:
    """What is under way is finished; after a kill the port is free and the answer the same."""
    with serving(converted_folder, "--spike-interval", "0") as first:
        assert first.figure("spikellm_sampled_tokens_total") == 0
        wanted = complete(first, "Return", max_tokens=40).choices[0].text
        stream = complete(first, "Return", max_tokens=40, stream=True)
        begun = next(stream).choices[0].text
        first.process.send_signal(signal.SIGTERM)
        assert begun + "".join(event.choices[0].text for event in stream) == wanted
        assert first.end() == 0
        assert "error" not in "".join(first.lines)
        port = first.port
    with serving(converted_folder, "--grace", "0") as hasty:
        body = {"model": MODEL, "prompt": "Return", "n": 16, "max_tokens": 250, "ignore_eos": True}
        text = json.dumps({**body, "stream": True}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", hasty.port, timeout=60)
        connection.request("POST", "/v1/completions", text, hasty.headers)
        answer = connection.getresponse()
        assert answer.readline().startswith(b"data: {")
        hasty.process.send_signal(signal.SIGTERM)
        assert b"the server is being stopped" in answer.read()
        connection.close()
        assert hasty.end() == 0
        assert "Traceback" not in "".join(hasty.lines)
    with serving(converted_folder, "--port", str(port)) as second:
        stream = complete(second, "Return", max_tokens=200, stream=True)
        next(stream)
        second.process.kill()
        with pytest.raises(Exception, match=r"peer closed|incomplete|Connection"):
            list(stream)
        stream.close()
        second.process.wait()
    with serving(converted_folder, "--port", str(port)) as third:
        assert complete(third, "Return", max_tokens=40).choices[0].text == wanted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--parallel", "0"), "--parallel 0"),
        (("--timeout", "0"), "--timeout 0"),
        (("--grace", "-1"), "--grace -1"),
        (("--port", "70000"), "port 70000"),
        (("--host", "192.0.2.1"), "cannot listen at 192.0.2.1"),
        (("--api-key-file", "nowhere"), "nowhere"),
    ],
)
def test_options_that_make_no_sense(
    options: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from conftest import BUNDLED
    from spikellm.__main__ import main

    assert main(["serve", str(BUNDLED), *options]) == 2
    assert words in capsys.readouterr().err


def test_port_that_is_taken(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    from conftest import BUNDLED
    from spikellm.__main__ import main

    assert main(["serve", str(BUNDLED), "--port", str(server.port)]) == 2
    assert "choose another --port" in capsys.readouterr().err
