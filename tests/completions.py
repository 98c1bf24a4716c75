"""A small server with OpenAI's completions API, which answers from its seed and misbehaves on request."""

import contextlib
import json
import random
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import tiny

from dail_jax import config as config_lib
from dail_jax.text import load_tokenizer

MODEL = "mine"


def reply(tokenizer, body: dict) -> list[int]:
    """The token ids of a response: a row of digits and an answer, whose length and content follow from the seed."""
    draw = random.Random(f"{body['prompt']}/{body['seed']}")
    text = " ".join(str(draw.randrange(10)) for _ in range(draw.randrange(3, 25)))
    answer = draw.choice(["", f"\\boxed{{{draw.randrange(1000):03d}}}"])
    ids = [*tokenizer.encode(f"{text} {answer}" if answer else text), tokenizer.eos_id]
    return ids[: body["max_tokens"]]


class StandIn:
    """A running server. `faults` maps the number of a request, from 0, to what is done instead of answering it:

    a status, a status with headers, `drop`, `slow`, text for a body that is no JSON, `truncate`, or a function that
    changes the response. With `sends_ids` false, responses are text; with `scores`, they have log-probabilities.
    """

    def __init__(self, sends_ids: bool = True, scores: bool = True, pause: float = 0.0, context: int = 4096):
        self.tokenizer = load_tokenizer(tiny.ASSETS / "model")
        self.sends_ids, self.scores, self.pause, self.context = sends_ids, scores, pause, context
        self.bodies: list[dict] = []
        self.faults: dict = {}
        self.headers: list[dict] = []
        self.open = self.most = self.connections = 0
        self.lock = threading.Lock()
        self.models = [MODEL]
        self.reply = reply

    def __enter__(self):
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                stand_in.connections += 1

            def do_GET(self):
                found = [{"id": name, "max_model_len": stand_in.context} for name in stand_in.models]
                self.send(200, {"object": "list", "data": found})

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stand_in.lock:
                    fault = stand_in.faults.get(len(stand_in.bodies))
                    stand_in.bodies.append(body)
                    stand_in.headers.append(dict(self.headers))
                    stand_in.open += 1
                    stand_in.most = max(stand_in.most, stand_in.open)
                if not isinstance(fault, int):
                    time.sleep(stand_in.pause)
                try:
                    self.answer(body, fault)
                finally:
                    with stand_in.lock:
                        stand_in.open -= 1

            def answer(self, body, fault):
                tree = stand_in.completion(body)
                if fault == "drop":
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif fault == "slow":
                    time.sleep(5.0)
                    self.send(200, tree)
                elif fault == "truncate":
                    self.send(200, tree, cut=20)
                elif isinstance(fault, int):
                    self.send(fault, {"error": {"message": f"this is a {fault}"}})
                elif isinstance(fault, tuple):
                    self.send(fault[0], {"detail": "later"}, **fault[1])
                elif isinstance(fault, str):
                    self.send(200, fault)
                else:
                    self.send(200, fault(tree) if fault else tree)

            def send(self, status, content, cut=None, **headers):
                data = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name.replace("_", "-"), value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has left
                    self.wfile.write(data[:cut])
                if cut:
                    self.close_connection = True

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05})
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def completion(self, body: dict) -> dict:
        ids = self.reply(self.tokenizer, body)
        stopped = ids[-1] == self.tokenizer.eos_id
        prompt = body["prompt"]
        prompt = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        choice = {
            "index": 0,
            "text": self.tokenizer.decode(ids[:-1] if stopped else ids, not body.get("skip_special_tokens", True)),
            "finish_reason": "stop" if stopped else "length",
        }
        if self.sends_ids and body.get("return_token_ids"):
            choice |= {"token_ids": ids, "prompt_token_ids": prompt}
        if self.scores and "logprobs" in body:
            choice["logprobs"] = {
                "tokens": [f"token_id:{i}" for i in ids],
                "token_logprobs": [-round(0.5 + i / 64, 4) for i in ids],
            }
        usage = {"prompt_tokens": len(prompt), "completion_tokens": len(ids)}
        return {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}

    def section(self, **more) -> dict:
        """The server as a section of a configuration."""
        return {"url": self.url, "model": MODEL, "concurrency": 3, "timeout": 30, **more}

    def config(self, **more) -> config_lib.Server:
        return config_lib.Server.model_validate(self.section(**more))
