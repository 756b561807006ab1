"""StandardGeneration: completions by Hugging Face's own `generate` of the after model alone, the baseline of an experiment."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.amplification.amplifier import Completions, LogitDiffAmplifier
from exactivations.lit_modules.amplification.decoding import TokenScores, token_scores
from exactivations.lit_modules.amplification.model_pair import restricted
from exactivations.lit_modules.amplification.row_sampling import RowSampling, row_seed
from exactivations.lit_modules.models.language_model import evaluating
from exactivations.store.batches import TokenBatch
from exactivations.store.errors import InvalidInputError
from exactivations.store.run_folder import RunInfo

SCORED_AT_ONCE = 8  # rows whose logits at all positions are in memory together


class StandardGeneration(LogitDiffAmplifier):
    """Completes prompts with the after model's own `generate`: nothing of this package draws a token.

    What it gives must be distributed as a `LogitDiffAmplifier`'s completions at alpha 0 are; token by token they differ, since
    `generate` draws from one generator for a whole batch. The seed of a completion is that of its batch. Arguments are those of
    `LogitDiffAmplifier`, with alphas (0,); the before model only scores.
    """

    def check_fits(self, data: TextDataModule) -> None:
        """Refuses other alphas than 0, and what `LogitDiffAmplifier` refuses."""
        if list(self.options.alphas) != [0.0]:
            raise InvalidInputError(f"plain generation is alpha 0, got alphas {list(self.options.alphas)}")
        super().check_fits(data)

    def run_info(self, data: TextDataModule) -> RunInfo:
        """Returns the content of run.json."""
        info = super().run_info(data)
        info.identity["kind"] = "standard completions"
        return info

    @torch.no_grad()
    def forward(self, batch: TokenBatch) -> Completions:
        """Completes each prompt of the batch in all rollouts."""
        pair, options, host = self.load(self.device), self.options, batch.on_host
        pair.check_ids(host.input_ids, host.sample_index)
        prompts_at_once = max(1, options.max_rows // options.rollouts)
        parts = [self._complete(part, index) for part, index in zip(
            torch.split(host.input_ids, prompts_at_once), torch.split(host.sample_index, prompts_at_once), strict=True
        )]  # fmt: skip
        rows = [row for part, _ in parts for row in part]
        seed = torch.cat([torch.full((len(part),), seed) for part, seed in parts])
        index = torch.cartesian_prod(torch.arange(len(host.sample_index)), torch.arange(options.rollouts))
        prompt, rollout = index.reshape(-1, 2).unbind(dim=1)
        eos = torch.tensor(self._eos)
        return Completions(
            n_tokens=torch.tensor([len(row) for row in rows]),
            token_ids=torch.cat(rows),
            finished=tuple("eos" if torch.isin(row[-1], eos) and len(eos) else "length" for row in rows),
            scores=self._score(host.input_ids[prompt], rows) if options.scores else None,
            sample_index=host.sample_index[prompt],
            alpha=torch.zeros(len(rows), dtype=torch.float64),
            rollout=rollout,
            seed=seed,
            place=host.place,
        )

    @property
    def _eos(self) -> list[int]:
        return [] if self.options.ignore_eos else sorted(self.load(self.device).eos_token_ids)

    def _complete(self, input_ids: Int64[Tensor, "b l"], sample_index: Int64[Tensor, " b"]) -> tuple[list[Tensor], int]:
        """Returns the completions of these prompts, and the seed that they were drawn with."""
        options, model = self.options, self.load(self.device).after
        zero = torch.zeros(1, dtype=torch.int64)
        seed = int(row_seed(options.seed, sample_index[:1], zero.double(), zero))
        sampled: dict[str, Any] = {"do_sample": False}
        if options.temperature:
            sampled = {"do_sample": True, "temperature": options.temperature, "top_p": options.top_p, "top_k": 0}
        config = GenerationConfig(  # type: ignore[no-untyped-call]  # transformers has no annotation there
            max_new_tokens=options.max_new_tokens, num_return_sequences=options.rollouts, eos_token_id=self._eos or None,
            pad_token_id=0, **sampled,
        )  # fmt: skip
        ids = input_ids.to(model.device)
        devices = [model.device] if model.device.type == "cuda" else []
        with evaluating(model), generating_by(model, config), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            out = model.generate(ids, attention_mask=torch.ones_like(ids))[:, ids.shape[1] :].cpu()  # type: ignore[operator]
        return [self._until_end(row) for row in out], seed

    def _until_end(self, row: Int64[Tensor, " n"]) -> Int64[Tensor, " m"]:
        """Returns a row up to and with what ended it; `generate` puts padding behind that."""
        ends = torch.isin(row, torch.tensor(self._eos, dtype=row.dtype)).nonzero()[:, 0].tolist()
        return row[: ends[0] + 1] if ends else row

    def _score(self, prompts: Int64[Tensor, "r l"], rows: list[Tensor]) -> TokenScores:
        """Returns the scores of all tokens, from one forward pass over prompts and completions."""
        pair, found = self.load(self.device), []
        for start in range(0, len(rows), SCORED_AT_ONCE):
            part = rows[start : start + SCORED_AT_ONCE]
            longest = max(map(len, part))
            padded = torch.stack([torch.cat([row, row.new_zeros(longest - len(row))]) for row in part])
            ids = torch.cat([prompts[start : start + SCORED_AT_ONCE], padded], dim=1)[:, :-1].to(pair.after.device)
            is_real = torch.arange(longest) < torch.tensor([len(row) for row in part])[:, None]
            token = padded[is_real].to(ids.device)
            logits = []
            for model in (pair.before, pair.after):
                with evaluating(model):  # padded on the right, where a causal model's real tokens see nothing
                    predicted = model(input_ids=ids, use_cache=False).logits[:, -longest:]
                logits.append(restricted(predicted[is_real.to(ids.device)].double(), pair.common))
            sampling = RowSampling.alike(self.options.temperature, self.options.top_p, torch.zeros(len(token), dtype=torch.int64))
            before, after = logits
            found.append(token_scores(before=before, after=after, distribution=sampling.distribution(after), token=token))
        return TokenScores.joined(found)


@contextmanager
def generating_by(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Gives a model other generation settings inside the `with` block: those given to `generate` are filled up from its own."""
    own = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own
