"""The model that something saved was made with, put to work again on other samples."""

from collections.abc import Mapping, Sequence
from typing import Any

from exactivations.datamodules.text import TextDataModule
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.lit_modules.extraction.origin import Described, Samples, data_for, model_of
from exactivations.store.means_file import at_points, origin_of, refuse_another_origin


class LiveModel:
    """An extractor of chosen vectors of something saved: only as deep into the model as these need.

    Args:
        described: Says what it was made with.
        places: Of each vector, its "hook_point" and "pooling".
        model: How the model is called or lies now, if otherwise than then.
        tokenizer: Its tokenizer, likewise.
        device: Where the model is put.
        title: What messages call it.

    Raises:
        InvalidInputError: If there is no such model.
    """

    def __init__(
        self, described: Described, places: Sequence[Mapping[str, Any]], *, model: str | None, tokenizer: str | None, device: str,
        title: str,
    ) -> None:  # fmt: skip
        self.device, self._tokenizer, self._title = device, tokenizer, title
        name, options = model_of(described, model)
        self._points = list(dict.fromkeys(place["hook_point"] for place in places))
        poolings = list(dict.fromkeys(place["pooling"] for place in places))
        store_dtype = described.identity["store_dtype"]
        self.extractor = ActivationExtractor(name, self._points, poolings, options=options, store_dtype=store_dtype)

    def described_data(self, described: Described, samples: Samples, keep_columns: list[str] | None = None) -> TextDataModule:
        """Returns samples, tokenized as described.

        Raises:
            IdentityError: If model, tokenizer or dtype are others; every field that differs is named.
        """
        data = data_for(described, samples, self._tokenizer, keep_columns)
        self.extractor.load(self.device)
        now = origin_of({**self.extractor.identity(), **data.identity()}, self._points)
        refuse_another_origin(at_points(described.identity, self._points), now, "what is there now", self._title)
        return data
