"""`exactivations verify-alignment`: whether another run's masks belong to a store's samples."""

from typing import Literal


def verify_alignment(
    store: str,
    masks: str,
    *,
    mask_name: str | None = None,
    padding_side: Literal["right", "left"] | None = None,
    rows: Literal["dataset", "store"] = "dataset",
    more_rows: bool = False,
    batch_size: int | None = None,
    divisor: int = 64,
) -> None:
    """Tells whether masks that are kept apart from activations belong to the samples they would be laid over.

    Compares lengths and marks, and by token hash the tokens themselves if the masks' input_ids were saved too; then shows which
    samples would have got a wrong mask from code that finds masks by batch number. Fails if anything is misaligned by sample index.

    Args:
        store: The run folder with the activations.
        masks: Another run: a folder of batch_<i> folders (or batch_<i>.safetensors or .pt files), or a run folder of ours.
        mask_name: Name of the mask in each batch. Default: attention_mask, attention_masks, token_mask, mask, or the only one.
        padding_side: The side on which masks are padded. Default: found out, by input_ids or by what is marked.
        rows: What the masks count: all samples of the dataset as given, or those that the store kept of it.
        more_rows: Allow masks after the store's last sample, which may hold only the first ones of the dataset.
        batch_size: Size of the batches in which code that goes by batch numbers reads activations. Default: those of the masks.
        divisor: The batch size that is written into such code.
    """
    from exactivations.store.alignment import compare
    from exactivations.store.alignment_text import render
    from exactivations.store.errors import InvalidInputError

    report = compare(
        store, masks, mask_name=mask_name, padding_side=padding_side, rows=rows, more_rows=more_rows,
        batch_size=batch_size, divisor=divisor,
    )  # fmt: skip
    print(render(report), flush=True)
    if report.faults:
        raise InvalidInputError(f"{masks} is not aligned with {store}: {'; '.join(report.faults)}")
