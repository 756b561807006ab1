"""What is measured: which model, which texts, and what is wanted of them."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

BLOCKS = {"demo": (1, 3), "neox-256": (2, 5)}
"""Which blocks' outputs are read: one in the middle, and the last."""

LONGEST = {"ragged": 1024, "equal": 128}
Outputs = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
        model: "demo", the embedded model (160 wide, 4 blocks), or "neox-256", random weights (256 wide, 6 blocks).
        texts: "ragged", demo functions cut at 1,024 tokens, or "equal", the first 128 tokens of functions that have so many.
        n: How many; beyond those that there are, they repeat.
        wanted: "pooled", mean and last of two blocks; "tokens", every token of two blocks; "tokens-all", of all blocks.
        threads: torch's threads.
        folder: Where model and texts lie.
    """

    model: str
    texts: Literal["ragged", "equal"]
    n: int
    wanted: Literal["pooled", "tokens", "tokens-all"]
    threads: int
    folder: str

    @property
    def blocks(self) -> tuple[int, ...]:
        """The blocks whose outputs are wanted."""
        return tuple(range(max(BLOCKS[self.model]) + 1)) if self.wanted == "tokens-all" else BLOCKS[self.model]

    @property
    def poolings(self) -> list[str]:
        """What is wanted of each."""
        return ["mean", "last"] if self.wanted == "pooled" else ["tokens"]

    @property
    def max_length(self) -> int:
        """Tokens at which texts are cut."""
        return LONGEST[self.texts]

    @property
    def model_path(self) -> str:
        """Where the model and its tokenizer lie."""
        return f"{self.folder}/{self.model}"

    @property
    def title(self) -> str:
        """The row's title."""
        return f"{self.model}, {self.n:,} {self.texts} texts, {self.wanted}"

    def activation_bytes(self) -> int:
        """Returns how many bytes of activations are wanted."""
        n_rows = self.n * len(self.poolings) if self.wanted == "pooled" else sum(len(row) for row in self.token_ids())
        width: int = json.loads(Path(self.model_path, "config.json").read_text())["hidden_size"]
        return n_rows * len(self.blocks) * width * 4

    def read_texts(self) -> list[str]:
        """Returns the texts."""
        texts: list[str] = json.loads(Path(self.folder, f"{self.texts}.json").read_text())
        return [texts[i % len(texts)] for i in range(self.n)]

    def tokenizer(self) -> Any:
        """Loads the tokenizer; it pads on the right."""
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.model_path)

    def load(self) -> Any:
        """Loads the untouched model without its head, in float32."""
        from transformers import AutoModel

        return AutoModel.from_pretrained(self.model_path, dtype=torch.float32).eval()

    def token_ids(self) -> list[list[int]]:
        """Tokenizes all texts, as they are cut."""
        ids: list[list[int]] = self.tokenizer()(self.read_texts(), truncation=True, max_length=self.max_length)["input_ids"]
        return ids


@dataclass(frozen=True)
class Round:
    """A system that is ready.

    Attributes:
        run: One round over all samples; what it returns is turned into Outputs by `outputs`.
        outputs: Makes {"<block>/<pooling>": float32 [n, d]} (or [tokens, d]) in dataset order of what `run` returned, untimed.
        inside: Of the last round: seconds in the model's own forward pass, and of the whole loop around it.
    """

    run: Callable[[], Any]
    outputs: Callable[[Any], Outputs]
    inside: Callable[[], dict[str, float]] = dict


def make_folder(folder: Path) -> None:
    """Writes models and texts."""
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    from exactivations.datamodules.demo import demo_functions
    from exactivations.datamodules.embedded import resolve_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_model("demo"))
    torch.manual_seed(0)
    neox = GPTNeoXConfig(
        hidden_size=256,
        num_hidden_layers=6,
        num_attention_heads=8,
        intermediate_size=1024,
        vocab_size=4096,
        max_position_embeddings=1024,
    )
    GPTNeoXForCausalLM(neox).save_pretrained(folder / "neox-256")
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(resolve_model("demo"), dtype=torch.float32).save_pretrained(folder / "demo")
    for model in BLOCKS:
        tokenizer.save_pretrained(folder / model)
    functions: list[str] = list(demo_functions()["text"])
    shuffled = [functions[i] for i in torch.randperm(len(functions), generator=torch.Generator().manual_seed(0)).tolist()]
    (folder / "ragged.json").write_text(json.dumps(shuffled))
    long = [text for text, ids in zip(shuffled, tokenizer(shuffled)["input_ids"], strict=True) if len(ids) >= LONGEST["equal"]]
    (folder / "equal.json").write_text(json.dumps(long))


def to_json(case: Case) -> str:
    """Writes a case for another process."""
    return json.dumps(asdict(case))


def by_length(ids: list[list[int]]) -> list[int]:
    """Returns the samples' numbers, the longest first."""
    return sorted(range(len(ids)), key=lambda i: -len(ids[i]))


def padded_batches(tokenizer: Any, ids: list[list[int]], order: list[int], size: int) -> Iterator[tuple[list[int], Any]]:
    """Yields samples' numbers and their batch, ids and mask [b, length], padded as the tokenizer does."""
    for start in range(0, len(order), size):
        samples = order[start : start + size]
        yield samples, tokenizer.pad({"input_ids": [ids[i] for i in samples]}, return_tensors="pt")


def pooled_states(states: dict[str, Tensor], mask: Tensor) -> dict[str, Tensor]:
    """Pools states [B, L, D] by name over the tokens of a mask [B, L], padded on either side: their mean and the last one."""
    last = mask.shape[1] - 1 - mask.int().flip(1).argmax(dim=1)
    out = {}
    for name, state in states.items():
        out[f"{name}/mean"] = (state * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        out[f"{name}/last"] = state[torch.arange(len(state)), last]
    return out


def gathered(batches: list[tuple[list[int], dict[str, Tensor]]], n: int) -> Outputs:
    """Puts rows of batches, given with their samples' numbers, into dataset order."""
    first = batches[0][1]
    out = {name: torch.empty(n, values.shape[1]) for name, values in first.items()}
    for samples, values in batches:
        for name, rows in values.items():
            out[name][samples] = rows
    return out


def tokens_gathered(batches: list[tuple[list[int], dict[str, Tensor]]], lengths: list[int]) -> Outputs:
    """The same for rows of tokens [b, length, d], of which each sample's first are real."""
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    out = {name: torch.empty(starts[-1], values.shape[2]) for name, values in batches[0][1].items()}
    for samples, values in batches:
        for name, states in values.items():
            for row, sample in enumerate(samples):
                out[name][starts[sample] : starts[sample + 1]] = states[row, : lengths[sample]]
    return out
