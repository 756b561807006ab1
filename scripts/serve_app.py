"""The server's own endpoints, and the app that holds all of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST

from exactivations.lit_modules.amplification.tokenizer_compatibility import TokenizerCompatibility
from exactivations.scripts.serve_faults import documented, handle_faults
from exactivations.scripts.serve_flight import Row, ServeError
from exactivations.scripts.serve_gate import Gate
from exactivations.scripts.serve_metrics import Metrics
from exactivations.scripts.serve_openai import openai_routes
from exactivations.scripts.serve_schemas import (
    Compatibility,
    Completion,
    Completions,
    GenerateLdaBatchRequest,
    GenerateLdaRequest,
    GenerateRequest,
    Health,
    Sampling,
    Scores,
    finite,
)
from exactivations.scripts.serve_work import Service

REFUSALS = documented(400, 401, 408, 413, 422, 429, 500, 503, 504)


@dataclass(frozen=True, kw_only=True)
class About:
    """What is served: the models' names as given, the tokenizer's hash, dtype and device."""

    before: str
    after: str
    tokenizer: str
    dtype: str
    device: str


def serving_app(
    service: Service,
    about: About,
    compatibility: TokenizerCompatibility,
    metrics: Metrics,
    *,
    api_key: str | None = None,
    max_body_bytes: int = 2**20,
) -> FastAPI:
    """Returns the app. It starts the engine when it is started, and closes it when it ends.

    Args:
        service: Of the engine that is served, which was not started yet.
        about: What is served.
        compatibility: Of the two tokenizers.
        metrics: That the engine tells of its steps.
        api_key: What requests must bear, but for /health; None asks for none.
        max_body_bytes: The most bytes of a request's body.
    """

    @asynccontextmanager
    async def engine_runs(app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        service.engine.close()

    app = FastAPI(title="exactivations", description="Logit diff amplification.", lifespan=engine_runs)
    app.add_middleware(
        Gate, api_key=api_key, max_body_bytes=max_body_bytes, seconds=service.limits.seconds, metrics=metrics
    )  # fmt: skip
    metrics.watch(service.engine)
    handle_faults(app)
    openai_routes(app, service, about.after, REFUSALS)

    async def completed(
        request: Request, asked: Sampling, prompts: list[Any], name: str, seeds: Any, alpha: float
    ) -> list[Completion]:
        sampling = asked.model_dump(include={"max_new_tokens", "temperature", "top_p", "ignore_eos", "scores"})
        flight = await service.flight(request, prompts, seeds, name=name, alpha=alpha, **sampling)
        return [_completion(row) for row in await flight.complete(request)]

    @app.post("/generate", responses=REFUSALS)
    async def generate(asked: GenerateRequest, request: Request) -> Completion:
        """Completes a prompt with the after model."""
        return (await completed(request, asked, [asked.prompt], "prompt", asked.seed, 0.0))[0]

    @app.post("/generate_lda", responses=REFUSALS)
    async def generate_lda(asked: GenerateLdaRequest, request: Request) -> Completion:
        """Completes a prompt with logits after + alpha * (after - before)."""
        return (await completed(request, asked, [asked.prompt], "prompt", asked.seed, asked.alpha))[0]

    @app.post("/generate_lda_batch", responses=REFUSALS)
    async def generate_lda_batch(asked: GenerateLdaBatchRequest, request: Request) -> Completions:
        """Completes several prompts, each once."""
        if asked.seeds is not None and (asked.seed is not None or len(asked.seeds) != len(asked.prompts)):
            raise ServeError(422, f"seeds: expected one for each of {len(asked.prompts)} prompts, and no seed beside them", "seeds")
        seeds = asked.seed if asked.seeds is None else asked.seeds
        return Completions(completions=await completed(request, asked, asked.prompts, "prompts", seeds, asked.alpha))

    @app.get("/tokenizer_compatibility", responses=documented(401))
    async def tokenizer_compatibility() -> Compatibility:
        """Tells what the two models' vocabularies have in common."""
        assert compatibility.verdict != "incompatible"
        n_common = int(compatibility.common.sum())
        return Compatibility(
            verdict=compatibility.verdict, differences=list(compatibility.differences), n_common=n_common, text=compatibility.text
        )

    @app.get("/health", responses={503: {"model": Health, "description": "The engine has stopped."}})
    async def health(response: Response) -> Health:
        """Tells how the server is; needs no API key."""
        engine = service.engine
        response.status_code = 200 if engine.trouble is None else 503
        return Health(
            status="ok" if engine.trouble is None else "dead", trouble=engine.trouble, running=engine.n_running,
            waiting=engine.n_waiting, **asdict(about),
        )  # fmt: skip

    @app.get("/metrics", response_class=Response, responses={200: {"content": {CONTENT_TYPE_LATEST: {}}}, **documented(401)})
    async def measured() -> Response:
        """Tells what was counted, in Prometheus' format."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


def _completion(row: Row) -> Completion:
    scores = None
    if row.ask.scores:
        scores = Scores(**{name: [finite(score[name]) for score in row.scores] for name in Scores.model_fields})
    assert row.finish_reason in ("eos", "length")
    return Completion(
        text=row.text.text, token_ids=row.token_ids, finish_reason=row.finish_reason, n_counted=len(row.text.token_ids),
        n_prompt_tokens=len(row.ask.prompt_ids), alpha=row.ask.alpha, seed=row.ask.seed, scores=scores,
    )  # fmt: skip
