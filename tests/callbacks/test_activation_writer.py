"""The writer in one process: what it keeps is the model's, an error stops the run with its cause, and nothing is dropped."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from transformers import AutoModel

from exactivations.callbacks import ActivationWriter
from exactivations.callbacks.activation_writer import QUEUED_BATCHES, WriterThread
from exactivations.callbacks.host_copy import HostCopy
from exactivations.lit_modules.extraction.extractor import ActivationExtractor
from exactivations.store import ActivationStore
from exactivations.store.errors import IdentityError, InvalidInputError, StoreError
from exactivations.store.lock import RunLock
from exactivations.store.streamed_shard import StreamedShard
from tests.callbacks.conftest import TEXTS, content, stamps


def writer_threads():
    return [thread for thread in threading.enumerate() if thread.name == "activation-writer"]


def assert_unlocked(folder):
    lock = RunLock(folder, "another run")
    lock.acquire(lambda: None, patience=0)
    lock.release()


@pytest.fixture
def computed(monkeypatch):
    """The place of every batch that is computed from now on."""
    places, step = [], ActivationExtractor.predict_step
    monkeypatch.setattr(ActivationExtractor, "predict_step", lambda *args: (places.append(args[1].place), step(*args))[1])
    return places


def test_what_is_stored_is_what_the_untouched_model_gives_for_each_sample_alone(tmp_path, predict, model_path, reference):
    predict(tmp_path / "run")
    assert content(tmp_path / "run") == reference  # and the same bytes as from the command line
    store = ActivationStore(tmp_path / "run", allow_unverified=True, verify_checksums=True)
    assert len(store) == len(TEXTS)
    model = AutoModel.from_pretrained(model_path).eval()
    for sample, text in zip(store, TEXTS, strict=True):
        ids = [1 + int(word[1:]) for word in text.split()]  # how the fixture's vocabulary was made
        assert sample.input_ids.tolist() == ids
        assert sample.columns["text"] == text and sample.columns["n_tokens"] == len(ids)
        with torch.no_grad():
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1][0]
        # 1e-5: float32, one sample alone against a batch of several, whose kernels may sum in another order
        torch.testing.assert_close(sample.activations["resid_post.0/tokens"], states, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(sample.activations["resid_post.0/mean"], states.mean(0), rtol=1e-5, atol=1e-6)


def test_a_second_call_computes_no_batch_and_changes_no_file(tmp_path, predict, computed):
    predict(tmp_path / "run")
    assert computed
    before = stamps(tmp_path / "run")
    computed.clear()
    writer = predict(tmp_path / "run")
    assert computed == [] and stamps(tmp_path / "run") == before
    assert writer.info == writer.folder.read_info()


def test_only_the_missing_shards_are_computed(tmp_path, predict, computed, reference):
    predict(tmp_path / "run")
    computed.clear()
    for shard in (2, 5):
        (tmp_path / "run" / "shards" / f"{shard:05d}.safetensors").unlink()
    predict(tmp_path / "run")
    assert {place.shard for place in computed} == {2, 5}
    assert content(tmp_path / "run") == reference


def fail_on_the_third(error, monkeypatch):
    published, publish = [], StreamedShard.publish

    def fail(shard):
        if len(published) == 2:
            raise error
        published.append(f"{shard.plan.number:05d}.safetensors")
        publish(shard)

    monkeypatch.setattr(StreamedShard, "publish", fail)
    return published


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (StoreError("cannot write: no room"), "^cannot write: no room$"),
        (RuntimeError("boom"), "^the writer failed: RuntimeError: boom$"),
        (AssertionError("rows written twice"), "^the writer failed: AssertionError: rows written twice$"),
        (MemoryError(), "^the writer failed: MemoryError: $"),
    ],
)
def test_an_error_in_the_writer_stops_the_run_with_its_cause(tmp_path, predict, monkeypatch, computed, reference, error, message):
    written = fail_on_the_third(error, monkeypatch)
    with pytest.raises(StoreError, match=message) as stop:
        predict(tmp_path / "run")
    assert stop.value is error or stop.value.__cause__ is error
    assert len(written) == 2 and set(stamps(tmp_path / "run")) == set(written)
    assert not list((tmp_path / "run" / "shards").glob(".*"))  # nothing is left of the third
    # it stops soon: at most the queue, the batch in the thread's hands and the one being handed over lie behind the failure
    in_three_shards = sum(place.shard <= max(p.shard for p in computed[:1]) + 2 for place in computed)
    assert len(computed) <= in_three_shards + QUEUED_BATCHES + 2
    assert writer_threads() == []
    assert_unlocked(tmp_path / "run")
    monkeypatch.undo()
    predict(tmp_path / "run")
    assert content(tmp_path / "run") == reference


def test_an_error_at_the_very_end_is_not_lost(tmp_path, predict, monkeypatch, reference):
    last, publish = len(reference) - 2, StreamedShard.publish

    def fail_at_last(shard):
        if shard.plan.number == last:
            time.sleep(0.5)  # the main thread is waiting for the end by then
            raise RuntimeError("late")
        publish(shard)

    monkeypatch.setattr(StreamedShard, "publish", fail_at_last)
    with pytest.raises(StoreError, match="the writer failed: RuntimeError: late"):
        predict(tmp_path / "run")
    assert len(stamps(tmp_path / "run")) == len(reference) - 2


def test_an_error_in_the_model_ends_the_thread_and_gives_the_folder_back(tmp_path, predict, monkeypatch, reference):
    step, steps = ActivationExtractor.predict_step, []

    def fail_late(*args):
        steps.append(args)
        if len(steps) > 9:
            raise ValueError("the model broke")
        return step(*args)

    monkeypatch.setattr(ActivationExtractor, "predict_step", fail_late)
    with pytest.raises(ValueError, match="the model broke"):
        predict(tmp_path / "run")
    assert writer_threads() == []
    assert_unlocked(tmp_path / "run")
    assert content(tmp_path / "run").items() <= reference.items()
    monkeypatch.undo()
    predict(tmp_path / "run")
    assert content(tmp_path / "run") == reference


def test_a_slow_disk_holds_the_computation_back_and_nothing_is_dropped(tmp_path, predict, monkeypatch, computed, reference):
    gate, blocked, publish = threading.Event(), threading.Event(), StreamedShard.publish

    def wait(shard):
        blocked.set()
        assert gate.wait(60)
        publish(shard)

    monkeypatch.setattr(StreamedShard, "publish", wait)
    seen = []

    def look():
        assert blocked.wait(60)
        previous = -1
        while len(computed) != previous:  # until the computation has come to rest
            previous = len(computed)
            time.sleep(0.7)  # longer than a wait for the queue lasts
        seen.append(len(computed))
        gate.set()

    watcher = threading.Thread(target=look)
    watcher.start()
    predict(tmp_path / "run")
    watcher.join()
    first_shard = sum(place.shard == computed[0].shard for place in computed)
    assert seen[0] <= first_shard + QUEUED_BATCHES + 1  # the first shard's, the queue's, and one that waits to get in
    assert seen[0] < len(computed)
    assert content(tmp_path / "run") == reference


def test_another_identity_is_refused_and_overwriting_starts_anew(tmp_path, predict, parts):
    out = tmp_path / "run"
    predict(out)
    extractor, data = parts(poolings=("last",))
    with pytest.raises(IdentityError, match=r"poolings: \['tokens', 'mean'\] there, \['last'\] now"):
        predict(out, extractor=extractor, data=data)
    assert_unlocked(out)
    extractor, data = parts(poolings=("last",))
    predict(out, writer=ActivationWriter(out, overwrite=True), extractor=extractor, data=data)
    assert ActivationStore(out, allow_unverified=True).names == ["resid_post.0/last", "resid_post.1/last"]


def test_an_allowed_change_of_the_environment_goes_on_and_both_kinds_of_shards_count(tmp_path, predict, parts):
    out = tmp_path / "run"
    predict(out)
    (out / "shards" / "00001.safetensors").unlink()
    extractor, data = parts()
    extractor.cpu_threads = 2
    with pytest.raises(IdentityError, match="--allow-changed cpu_threads"):
        predict(out, extractor=extractor, data=data)
    extractor, data = parts()
    extractor.cpu_threads = 2
    writer = predict(out, writer=ActivationWriter(out, allow_changed=("cpu_threads",)), extractor=extractor, data=data)
    assert [change["fields"] for change in writer.info.changes] == [{"cpu_threads": [1, 2]}]
    assert len(ActivationStore(out, allow_unverified=True, verify_checksums=True)) == len(TEXTS)


def test_only_the_environment_may_be_allowed_to_change(tmp_path):
    with pytest.raises(InvalidInputError, match=r"only cpu_threads, .* may change within a run, not model"):
        ActivationWriter(tmp_path, allow_changed=("model", "torch"))


def test_other_modules_and_data_are_refused(tmp_path, parts):
    import lightning.pytorch as pl
    from lightning.pytorch.demos.boring_classes import BoringModel

    trainer = pl.Trainer(
        accelerator="cpu", devices=1, callbacks=[ActivationWriter(tmp_path / "run")], logger=False, enable_progress_bar=False,
        enable_checkpointing=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.raises(InvalidInputError, match="got BoringModel and TextDataModule"):
        trainer.predict(BoringModel(), datamodule=parts()[1], return_predictions=False)
    assert not (tmp_path / "run").exists()


# --- the thread --------------------------------------------------------------------------------------------------------


@pytest.fixture
def thread_and_batches(tmp_path, predict, parts):
    """A writer thread over an empty, prepared folder, and the batches of its plan on the host."""
    writer = predict(tmp_path / "run")
    for path in (tmp_path / "run" / "shards").iterdir():
        path.unlink()
    extractor, data = parts()
    data.setup()
    extractor.load()
    copies = [
        HostCopy(extractor(batch), wait=lambda: None, release=lambda: None)
        for step in data.steps_of(list(range(data.plan.n_shards)))
        for batch in step.batches()
    ]
    thread = WriterThread(writer.folder, writer.info, data.plan, extractor.specs())
    yield thread, copies
    thread.abandon()


def test_all_batches_in_order_make_the_store(tmp_path, thread_and_batches, reference):
    thread, copies = thread_and_batches
    for copy in copies:
        thread.put(copy)
    thread.finish()
    assert content(tmp_path / "run") == reference


def test_a_shard_that_misses_a_batch_is_not_published(tmp_path, thread_and_batches, reference):
    thread, copies = thread_and_batches
    last = copies[-1].batch.place.shard
    for copy in copies[:-1]:
        thread.put(copy)
    with pytest.raises(StoreError, match=f"shard {last} was not filled"):
        thread.finish()
    assert len(stamps(tmp_path / "run")) == len(reference) - 2
    assert not list((tmp_path / "run" / "shards").glob(".*"))


def test_a_batch_of_the_next_shard_before_this_one_is_full_is_refused(tmp_path, thread_and_batches):
    thread, copies = thread_and_batches
    shards = [copy.batch.place.shard for copy in copies]
    large = next(shard for shard in shards if shards.count(shard) > 1 and shard < shards[-1])
    with pytest.raises(StoreError, match=f"shard {large} was not filled"):
        for shard in (large, large + 1):
            thread.put(copies[shards.index(shard)])
        thread.finish()
    assert stamps(tmp_path / "run") == {}


def test_a_batch_that_comes_twice_is_refused(tmp_path, thread_and_batches):
    thread, copies = thread_and_batches
    with pytest.raises(StoreError, match=r"came, the next one is|came after that was full"):
        for copy in [copies[0], *copies]:
            thread.put(copy)
        thread.finish()
    assert len(stamps(tmp_path / "run")) <= 1


def test_a_batch_of_a_shard_that_was_published_is_refused(tmp_path, thread_and_batches):
    thread, copies = thread_and_batches
    with pytest.raises(StoreError, match="a batch of shard 0 came after that was full"):
        for copy in [*[copy for copy in copies if copy.batch.place.shard == 0], copies[0]]:
            thread.put(copy)
        thread.finish()
    assert list(stamps(tmp_path / "run")) == ["00000.safetensors"]


def test_whoever_waits_for_the_queue_hears_of_the_failure(thread_and_batches, monkeypatch):
    thread, copies = thread_and_batches
    waiting = threading.Event()

    def wait_and_fail():
        assert waiting.wait(60)
        raise RuntimeError("copy failed")

    thread.put(HostCopy(copies[0].batch, wait=wait_and_fail, release=lambda: None))
    with pytest.raises(StoreError, match="copy failed"):
        for copy in copies[1 : QUEUED_BATCHES + 3]:
            threading.Timer(0.2, waiting.set).start()
            thread.put(copy)
    with pytest.raises(StoreError, match="copy failed"):
        thread.finish()


def test_a_buffer_is_read_only_after_its_copy_and_given_back_only_after_it_was_read(tmp_path, thread_and_batches, reference):
    """Whoever reads too early, or holds on to a buffer for longer, finds other numbers in it."""
    thread, copies = thread_and_batches
    for copy in copies:
        there = {name: values.clone() for name, values in copy.batch.activations.items()}
        slot = {name: torch.full_like(values, 77) for name, values in there.items()}

        def fill(values=there, slot=slot):
            for name in slot:
                slot[name].copy_(values[name])

        def use_again(slot=slot):
            for values in slot.values():
                values.fill_(77)

        thread.put(HostCopy(replace(copy.batch, activations=slot), wait=fill, release=use_again))
    thread.finish()
    assert content(tmp_path / "run") == reference


def test_the_thread_that_writes_computes_alone_and_leaves_the_setting_of_others_as_it_was(thread_and_batches, monkeypatch):
    """With helpers of its own there would be more OpenMP threads than cores, and the model's would sleep between operations."""
    thread, copies = thread_and_batches
    found, take = [], thread._take
    monkeypatch.setattr(thread, "_take", lambda copy: (found.append(torch.get_num_threads()), take(copy)))
    before = torch.get_num_threads()
    for copy in copies:
        thread.put(copy)
    thread.finish()
    assert set(found) == {1} and torch.get_num_threads() == before


def test_starting_a_writer_changes_no_other_threads_setting(tmp_path, predict):
    torch.set_num_threads(3)
    try:
        predict(tmp_path / "run", extractor=None)
        inside = []
        other = threading.Thread(target=lambda: inside.append(torch.get_num_threads()))
        other.start()
        other.join()
    finally:
        torch.set_num_threads(1)
    assert inside == [1]  # the extractor's own cpu_threads
