"""What the server is asked and what it answers, in JSON: the one place where fields, their ranges and defaults are said."""

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from exactivations.lit_modules.amplification.row_sampling import MIN_TEMPERATURE

MAX_SEED = 2**63 - 1
MAX_PROMPTS, MAX_IDS = 2**16, 2**20  # of one request, whatever a server's own limits are
MAX_FIELDS = 100


def _temperature(value: float) -> float:
    if 0 < value < MIN_TEMPERATURE:
        raise ValueError(f"must be 0 (greedy) or at least {MIN_TEMPERATURE}")
    return value


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"is no text: {error.reason}") from error
    return value


Text = Annotated[str, AfterValidator(_text)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, max_length=MAX_IDS, fail_fast=True)]  # else one error for each element
Prompt = Text | TokenIds
Alpha = Annotated[float, Field(allow_inf_nan=False, description="after + alpha * (after - before); 0 is the after model.")]
Temperature = Annotated[
    float, Field(ge=0, allow_inf_nan=False, description="0 is greedy."), AfterValidator(_temperature)
]  # fmt: skip
TopP = Annotated[float, Field(gt=0, le=1, description="Draw from the smallest set of tokens with at least so much probability.")]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED)]
SEED = "Of the request; the one that each completion was drawn with is in the answer. Drawn at random if it is not given."


class Strict(BaseModel):
    """Refuses fields that it does not know, and values of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _has_few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:  # else one error for each that is not known
            raise ValueError(f"{len(value)} fields, {MAX_FIELDS} may be")
        return value


class Sampling(Strict):
    """How a completion is drawn."""

    max_new_tokens: int = Field(100, ge=1, description="The most tokens of a completion.")
    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    ignore_eos: bool = Field(False, description="Generate max_new_tokens tokens always; the text still ends where it ends.")
    scores: bool = Field(False, description="Tell of each token what both models gave it, KL(after || before), and the entropy.")


class GenerateRequest(Sampling):
    """One completion by the after model."""

    prompt: Prompt
    seed: Seed | None = Field(None, description=SEED)


class GenerateLdaRequest(GenerateRequest):
    """One amplified completion."""

    alpha: Alpha = 1.0


class GenerateLdaBatchRequest(Sampling):
    """A completion of each prompt."""

    prompts: list[Prompt] = Field(min_length=1, max_length=MAX_PROMPTS, fail_fast=True)
    alpha: Alpha = 1.0
    seed: Seed | None = Field(None, description=SEED)
    seeds: Annotated[list[Seed], Field(max_length=MAX_PROMPTS, fail_fast=True)] | None = Field(
        None, description="In place of seed: one for each prompt."
    )


class Scores(BaseModel):
    """What is known of each token, in nats; see `TokenScores`."""

    after_log_probability: list[float | None]
    before_log_probability: list[float | None]
    kl: list[float | None]
    entropy: list[float | None]


class Completion(BaseModel):
    """What was generated, never the prompt.

    Attributes:
        text: Up to the end of the text.
        token_ids: All of them, what ended the text too.
        finish_reason: eos, or length.
        n_counted: Tokens that the text is made of.
        n_prompt_tokens: Tokens of the prompt.
        alpha: As asked.
        seed: With it, the same prompt alone gives the same completion.
        scores: Of each of token_ids, if asked for.
    """

    text: str
    token_ids: list[int]
    finish_reason: Literal["eos", "length"]
    n_counted: int
    n_prompt_tokens: int
    alpha: float
    seed: int
    scores: Scores | None = None


class Completions(BaseModel):
    """One of each prompt, in their order."""

    completions: list[Completion]


class Compatibility(BaseModel):
    """Whether the models' vocabularies are one."""

    verdict: Literal["identical", "compatible"]
    differences: list[str]
    n_common: int
    text: str


class Health(BaseModel):
    """How the server is, and what it serves."""

    status: Literal["ok", "dead"]
    trouble: str | None
    before: str
    after: str
    tokenizer: str
    dtype: str
    device: str
    running: int
    waiting: int


class Fault(BaseModel):
    """What is wrong with a request: `param` names the field."""

    message: str
    type: str
    param: str | None
    code: str | None


class FaultBody(BaseModel):
    """The body of every answer that is none, in the shape of OpenAI's."""

    error: Fault


def finite(value: float) -> float | None:
    """Returns what JSON can say: None for an infinite value."""
    return value if math.isfinite(value) else None
