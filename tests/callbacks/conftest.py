"""A tiny model, ragged texts, and a quick way to run the command line in processes of its own."""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import socket
import time
from dataclasses import dataclass, field

import datasets
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2Model, PreTrainedTokenizerFast

from exactivations.callbacks import ActivationWriter
from exactivations.datamodules.plan import PlanOptions
from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.extractor import ActivationExtractor

WORDS = [f"w{i}" for i in range(97)]
TEXTS = [
    " ".join(random.Random(i).choices(WORDS, k=random.Random(i + 1000).choice([1, 2, 3, 5, 5, 5, 8, 13, 40]))) for i in range(90)
]
# A worker keeps one server, which has imported everything; each rank is forked from it and so starts in a moment.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["exactivations.scripts.main", "exactivations.callbacks", "lightning.pytorch", "transformers.models.gpt2.modeling_gpt2"]
)
RANK = """
import os, sys, time
os.setsid()
os.environ.update({environment!r})
for descriptor, path in ((1, {out!r}), (2, {err!r})):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), descriptor)
import datasets
datasets.config.HF_DATASETS_CACHE = os.environ["HF_DATASETS_CACHE"]
import exactivations.scripts.main as program
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.store.lock import RunLock
RunLock.acquire.__defaults__ = ({patience!r},)
if {seconds_per_batch!r}:
    step = ActivationExtractor.predict_step
    ActivationExtractor.predict_step = lambda *args: (time.sleep({seconds_per_batch!r}), step(*args))[1]
{before}
program.main({arguments!r})
"""


@dataclass
class Ranks:
    """The running processes of one command, and what they say."""

    processes: list
    logs: list
    errors: list = field(default_factory=list)

    def wait(self, seconds=120):
        """Returns the exit status of each rank; negative for a signal."""
        deadline = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
            pytest.fail(f"still running after {seconds} s: {codes}\n{self.stderr}")
        return codes

    def succeed(self):
        """Waits, and requires that every rank ended well."""
        codes = self.wait()
        assert codes == [0] * len(codes), self.stderr
        return self

    def kill(self, *ranks):
        """SIGKILLs these ranks, or all of them."""
        for rank in ranks or range(len(self.processes)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGKILL)
            self.processes[rank].join()

    @property
    def stdout(self):
        return "".join(log.with_suffix(".out").read_text() for log in self.logs if log.with_suffix(".out").exists())

    @property
    def stderr(self):
        return "".join(log.read_text() for log in self.logs if log.exists())


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="session")
def model_path(tmp_path_factory):
    """A GPT-2 of two layers with random weights and a tokenizer of one id a word."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    GPT2Model(GPT2Config(vocab_size=100, n_embd=16, n_layer=2, n_head=2, n_positions=64)).save_pretrained(path)
    vocabulary = {word: i for i, word in enumerate(["[UNK]", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_cache(cache, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)


@pytest.fixture(scope="session")
def texts_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text, "number": i}) + "\n" for i, text in enumerate(TEXTS)))
    return path


@pytest.fixture(scope="session")
def arguments(model_path, texts_path):
    """The command line of the run that most tests make, without --out and --devices."""
    return [
        "extract", str(model_path), "--dataset", str(texts_path), "--layers", "0", "1", "--pooling", "tokens", "mean",
        "--token-budget", "48", "--shard-tokens", "48", "--accelerator", "cpu", "--cpu-threads", "1",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def start(arguments, cache, tmp_path_factory):
    """Starts that command line on some ranks, each a process of its own session, as torchrun would."""
    started = []

    def start(out, ranks=1, *more, environments=None, seconds_per_batch=0.0, patience=10.0, before="", arguments=arguments):
        logs = tmp_path_factory.mktemp("log")
        port = str(free_port())
        run = Ranks([], [])
        for rank in range(ranks if environments is None else len(environments)):
            environment = {"HF_DATASETS_CACHE": str(cache), "TRANSFORMERS_VERBOSITY": "error"}
            folder = out
            if environments is not None:
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | environments[rank]
                folder = environment.pop("OUT", out)
            elif ranks > 1:
                environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(ranks)}
                environment |= {"NODE_RANK": "0", "LOCAL_RANK": str(rank)}
            log = logs / f"rank{rank}.err"
            program = RANK.format(
                environment=environment, out=str(log.with_suffix(".out")), err=str(log), before=before,
                seconds_per_batch=seconds_per_batch, patience=patience,
                arguments=[*arguments, "--out", str(folder), *(() if environments else ("--devices", str(ranks))), *more],
            )  # fmt: skip
            process = SERVER.Process(target=exec, args=(program, {"__name__": "rank"}), daemon=True)
            process.start()
            run.processes.append(process)
            run.logs.append(log)
        started.append(run)
        return run

    yield start
    for run in started:
        run.kill()


@pytest.fixture(scope="session")
def reference(start, tmp_path_factory):
    """The bytes of an uninterrupted run on one rank."""
    out = tmp_path_factory.mktemp("reference") / "run"
    start(out).succeed()
    found = content(out)
    assert len(found) > 12  # enough shards for kills to fall between
    return found


def content(out):
    """Name -> bytes of samples.parquet and everything in shards/, left-over temporary files included."""
    return {str(p.relative_to(out)): p.read_bytes() for p in (out / "samples.parquet", *(out / "shards").iterdir())}


def stamps(out):
    """Name -> inode and time of writing of every published shard."""
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (out / "shards").glob("*.safetensors")}


def wait_for_shards(out, n, run):
    """Waits until n shards are published, or the run has ended."""
    deadline = time.monotonic() + 120
    while len(stamps(out)) < n and any(p.is_alive() for p in run.processes):
        assert time.monotonic() < deadline, run.stderr
        time.sleep(0.005)


@pytest.fixture
def parts(model_path, texts_path):
    """Makes an extractor and its data for use in this process."""

    def parts(poolings=("tokens", "mean"), **changes):
        options = {"plan_options": PlanOptions(48, 48)} | changes
        data = TextDataModule(str(texts_path), str(model_path), **options)
        return ActivationExtractor(str(model_path), ["resid_post.0", "resid_post.1"], list(poolings), cpu_threads=1), data

    return parts


@pytest.fixture
def predict(parts):
    """Runs a whole extraction in this process and returns its writer."""
    import lightning.pytorch as pl

    def predict(out, *callbacks, before=(), writer=None, extractor=None, data=None):
        default_extractor, default_data = parts()
        writer = writer or ActivationWriter(out)
        trainer = pl.Trainer(
            accelerator="cpu", devices=1, callbacks=[*before, writer, *callbacks], logger=False, use_distributed_sampler=False,
            enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        )  # fmt: skip
        trainer.predict(extractor or default_extractor, datamodule=data or default_data, return_predictions=False)
        return writer

    threads = torch.get_num_threads()
    yield predict
    torch.set_num_threads(threads)
