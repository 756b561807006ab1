"""LogitDiffAmplifier: completions of planned prompts, with what one model has over another amplified."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import lightning.pytorch as pl
import torch
import xxhash
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.amplification.completions_run import completions_info
from exactivations.lit_modules.amplification.decoding import Generated, Prompts, Rows, generate_in_parts
from exactivations.lit_modules.amplification.model_pair import ModelPair
from exactivations.lit_modules.amplification.row_sampling import RowSampling, row_seed
from exactivations.lit_modules.extraction.extractor import check_lengths
from exactivations.lit_modules.models.language_model import ModelOptions, load_causal_model
from exactivations.store.batches import Place, TokenBatch, TokenStep
from exactivations.store.errors import InvalidInputError
from exactivations.store.run_folder import RunInfo


@dataclass(frozen=True)
class AmplifyOptions:
    """How prompts are completed.

    Attributes:
        alphas: after + alpha * (after - before): 0 is the after model, -1 the before model.
        rollouts: Completions of each prompt at each alpha.
        max_new_tokens: The most tokens of a completion.
        temperature: 0 is greedy.
        top_p: The smallest set of tokens with at least so much probability is drawn from.
        seed: Of the run. A completion's own seed depends on it, its sample, its alpha and its rollout: which other alphas are asked
            for, and how many rollouts, changes nothing.
        ignore_eos: Whether all completions get max_new_tokens tokens.
        scores: Whether each token is scored by both models, which then both run at every alpha.
        max_rows: The most completions that are generated at once, from one reading of their prompts: what bounds the memory.
    """

    alphas: Sequence[float] = (0.0, 1.0, 2.0)
    rollouts: int = 1
    max_new_tokens: int = 100
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    ignore_eos: bool = False
    scores: bool = False
    max_rows: int = 128

    def __post_init__(self) -> None:
        if not self.alphas or len(set(self.alphas)) != len(self.alphas) or not all(map(math.isfinite, self.alphas)):
            raise InvalidInputError(f"alphas must be finite numbers, each given once, got {list(self.alphas)}")
        for name in ("rollouts", "max_new_tokens", "max_rows"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.seed < 1 << 63:
            raise InvalidInputError(f"seed must be at least 0 and below 2^63, got {self.seed}")
        if self.temperature == 0 and self.rollouts > 1:
            raise InvalidInputError(f"temperature 0 is greedy, so that all {self.rollouts} rollouts would be the same: ask for one")
        RowSampling.alike(self.temperature, self.top_p, torch.zeros(1, dtype=torch.int64))  # says what is out of range


@dataclass(frozen=True)
class Completions(Generated):
    """Completions and whose they are: R = B * alphas * rollouts rows, those of a sample together, then those of an alpha.

    Attributes:
        sample_index: int64 [R], the prompts' positions in the dataset as given.
        alpha: float64 [R].
        rollout: int64 [R].
        seed: int64 [R]: with it, any of these rows can be generated again alone.
        place: Where the prompts belong in the plan.
    """

    sample_index: Tensor
    alpha: Tensor
    rollout: Tensor
    seed: Tensor
    place: Place | None = None


class LogitDiffAmplifier(pl.LightningModule):
    """Completes prompts with two models' amplified difference.

    With a Trainer: `trainer.predict(amplifier, datamodule=TextDataModule(…), return_predictions=False)`, and a callback that keeps
    what `on_predict_batch_end` is given. Without: `amplifier(batch) -> Completions`. All prompts of a batch have one length, so
    that nothing is padded. The memory for keys and values is that of B prompts and of `max_rows` rows, for each model.

    The models are deliberately not submodules; see `ActivationExtractor`.

    Args:
        before: What the other was made from: a hub id, a local path, "demo", or a model that the caller holds (which is neither
            moved nor changed).
        after: The model that was changed, likewise. Both are given by name: swapped, nothing would fail, and every difference would
            change its sign.
        options: How prompts are completed.
        common: As in `ModelPair`; None says that both have the same vocabulary, which is the caller's to check
            (`tokenizer_compatibility`).
        before_options: How a named model is loaded.
        after_options: Likewise.
        cpu_threads: Threads of each process on a CPU. They decide the last bits; None leaves torch's setting alone.

    Raises:
        InvalidInputError: When loaded, if the models do not fit each other; in `setup`, if they do not fit the data.
    """

    def __init__(
        self,
        *,
        before: str | PreTrainedModel,
        after: str | PreTrainedModel,
        options: AmplifyOptions | None = None,
        common: Bool[Tensor, " c"] | None = None,
        before_options: ModelOptions | None = None,
        after_options: ModelOptions | None = None,
        cpu_threads: int | None = None,
    ) -> None:
        super().__init__()
        self.options = options or AmplifyOptions()
        self._common, self._cpu_threads = common, cpu_threads
        # In tuples, out of the module tree.
        self._given = {"before": (before, before_options or ModelOptions()), "after": (after, after_options or ModelOptions())}
        self._loaded: ModelPair | None = None

    def load(self, device: torch.device | str = "cpu") -> ModelPair:
        """Loads both models onto the device; the second call returns the same.

        Raises:
            InvalidInputError: If one cannot be loaded, lacks weights, was loaded onto another device before, or they do not fit
                each other; if texts are to end by themselves, and the after model does not say with what.
        """
        device = torch.device(device)
        if self._loaded is None:
            if self._cpu_threads is not None:
                torch.set_num_threads(self._cpu_threads)
            models = {
                name: load_causal_model(model, options, device) if isinstance(model, str) else model
                for name, (model, options) in self._given.items()
            }
            pair = ModelPair(**models, common=self._common)
            if not self.options.ignore_eos and not pair.eos_token_ids:
                raise InvalidInputError(
                    f"the generation settings of {type(pair.after).__name__} name no EOS token (generation_config.eos_token_id), "
                    "so that no text would end by itself: set it, or ask for texts of fixed length (ignore_eos)"
                )
            self._loaded = pair
        is_on = self._loaded.after.device
        if device.type not in ("cpu", is_on.type) or device.index not in (None, is_on.index):
            raise InvalidInputError(f"the models are on {is_on}: move them, or make a new amplifier for {device}")
        return self._loaded

    def setup(self, stage: str) -> None:
        """Loads the models onto this rank's device and holds the data against them.

        Raises:
            InvalidInputError: If the Trainer would change dtypes, or a prompt and its completion are too long for a model, or an id
                is outside its vocabulary.
        """
        if str(self.trainer.precision) != "32-true":
            raise InvalidInputError(
                f"Trainer(precision={self.trainer.precision!r}) does nothing to these models: leave it at '32-true' and give both "
                "their dtype, ModelOptions(dtype='bfloat16')"
            )
        self.load(self.device)
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, TextDataModule):
            self.check_fits(data)

    def check_fits(self, data: TextDataModule) -> None:
        """Refuses data that these models cannot continue: see `setup`."""
        pair = self.load(self.device)
        for model in (pair.before, pair.after):
            check_lengths(model, data)
        pair.check_length(int(data.tokens.n_tokens.max()) + self.options.max_new_tokens - 1)

    def run_info(self, data: TextDataModule) -> RunInfo:
        """Returns the content of run.json for a run of these models over this data: all that decides the completions."""
        pair = self.load(self.device)
        return completions_info(
            {"before": pair.before, "after": pair.after},
            data,
            {
                "kind": "amplified completions",
                "common": None if pair.common is None else xxhash.xxh3_128(pair.common.numpy().tobytes()).hexdigest(),
                "eos_token_ids": sorted(pair.eos_token_ids),
                **{name: list(value) if name == "alphas" else value for name, value in asdict(self.options).items()},
            },
            {name: (model, options.revision) for name, (model, options) in self._given.items()},
        )

    def predict_step(self, step: TokenStep, batch_idx: int = 0) -> list[Completions]:
        """Completes the batches of a step, one after the other."""
        return [self(batch) for batch in step.batches()]

    @torch.no_grad()
    def forward(self, batch: TokenBatch) -> Completions:
        """Completes each prompt of the batch at each alpha, in all rollouts.

        Raises:
            InvalidInputError: If the batch is padded, or its prompts do not fit the models.
        """
        pair, options, host = self.load(self.device), self.options, batch.on_host
        if host.is_padded:
            raise InvalidInputError("a batch with padding on the right cannot be continued: plan prompts with padding='none'")
        pair.check_ids(host.input_ids, host.sample_index)  # before `Prompts` does: it knows no sample's name
        alphas, n_rows = (
            torch.tensor(options.alphas, dtype=torch.float64),
            (len(host.sample_index), len(options.alphas), options.rollouts),
        )
        prompt, alpha_index, rollout = torch.cartesian_prod(*map(torch.arange, n_rows)).unbind(dim=1)
        sample_index, alpha = host.sample_index[prompt], alphas[alpha_index]
        seed = row_seed(options.seed, sample_index, alpha, rollout)
        sampling = RowSampling.alike(options.temperature, options.top_p, seed)
        rows = Rows(prompt, alpha, sampling, torch.full_like(prompt, options.max_new_tokens))
        eos = frozenset() if options.ignore_eos else pair.eos_token_ids
        prompts = Prompts(pair, host.input_ids)
        generated = generate_in_parts(prompts, rows, options.max_rows, eos_token_ids=eos, scores=options.scores)
        return Completions(**vars(generated), sample_index=sample_index, alpha=alpha, rollout=rollout, seed=seed, place=host.place)
