"""Copies to the host: passed through on a CPU; on a GPU through a fixed number of reused buffers, none of them lost or shared."""

import contextlib
import threading
import time
from dataclasses import replace

import pytest
import torch

from exactivations.callbacks import host_copy as host_copy_module
from exactivations.callbacks.host_copy import HostCopier
from exactivations.store.batches import ActivationBatch


def batch(n, value=1.0, device="cpu", dtype=torch.float32):
    activations = {"a": torch.full((n, 4), value, device=device, dtype=dtype), "b": torch.full((2 * n, 4), -value, device=device)}
    return ActivationBatch(torch.arange(n), torch.ones(n), torch.arange(n), torch.ones(n, dtype=torch.bool), activations)


def no_check():
    pass


def test_on_a_cpu_batches_pass_through_as_they_are():
    copier = HostCopier(torch.device("cpu"), n_slots=1)
    first, second = batch(3), batch(2)
    copies = [copier.start(first, no_check), copier.start(second, no_check)]  # no slot is taken
    assert copies[0].batch is first and copies[1].batch is second
    copies[0].wait()
    copies[0].release()


def test_from_a_device_that_is_neither_cpu_nor_cuda_a_batch_is_copied_at_once():
    class Elsewhere:
        def __init__(self, values):
            self.values = values

        def cpu(self):
            return self.values

    there = batch(3)
    away = replace(there, activations={name: Elsewhere(values) for name, values in there.activations.items()})
    copy = HostCopier(torch.device("mps"), n_slots=1).start(away, no_check)
    assert all(copy.batch.activations[name] is values for name, values in there.activations.items())


class FakeEvent:
    def __init__(self, log):
        self.log = log

    def record(self, stream):
        self.log.append("record")

    def synchronize(self):
        self.log.append("synchronize")


class FakeStream:
    device = torch.device("cpu")

    def __init__(self, log):
        self.log = log

    def wait_stream(self, other):
        self.log.append("wait for the computation")


@pytest.fixture
def log(monkeypatch):
    """Stands in for CUDA: what is asked of it is noted, copies happen at once."""
    log = []
    empty, copy = torch.empty, torch.Tensor.copy_

    def fake_empty(*args, pin_memory=False, **kwargs):
        assert pin_memory
        log.append("pin")
        return empty(*args, **kwargs)

    def fake_copy(target, source, non_blocking=False):
        assert non_blocking
        log.append("copy")
        return copy(target, source)

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: FakeStream(log))
    monkeypatch.setattr(torch.cuda, "Event", lambda blocking: FakeEvent(log))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: log.append("keep memory"))
    monkeypatch.setattr(torch.Tensor, "copy_", fake_copy)
    monkeypatch.setattr(host_copy_module.torch, "empty", fake_empty)
    return log


def test_a_copy_waits_for_the_computation_and_its_reader_for_the_copy(log):
    copy = HostCopier(torch.device("cuda"), 2).start(batch(3), no_check)
    assert log == ["wait for the computation", *(["keep memory", "pin", "copy"] * 2), "record"]
    copy.wait()
    assert log[-1] == "synchronize"
    assert copy.batch.activations["a"].tolist() == batch(3).activations["a"].tolist()
    assert copy.batch.sample_index.tolist() == [0, 1, 2]


def test_copies_under_way_never_share_memory_and_released_buffers_are_reused(log):
    copier = HostCopier(torch.device("cuda"), 2)
    first, second = copier.start(batch(3, 1.0), no_check), copier.start(batch(3, 2.0), no_check)
    pointers = {copy.batch.activations[name].data_ptr() for copy in (first, second) for name in "ab"}
    assert len(pointers) == 4
    assert (first.batch.activations["a"] == 1).all() and (second.batch.activations["a"] == 2).all()
    first.release()
    third = copier.start(batch(2, 3.0), no_check)
    assert third.batch.activations["a"].data_ptr() == first.batch.activations["a"].data_ptr()
    assert third.batch.activations["a"].shape == (2, 4) and (third.batch.activations["a"] == 3).all()
    assert (second.batch.activations["a"] == 2).all()
    assert log.count("pin") == 4


def test_a_buffer_grows_for_a_larger_batch_and_changes_with_the_dtype(log):
    copier = HostCopier(torch.device("cuda"), 1)
    for n, dtype, pinned in ((2, torch.float32, 2), (5, torch.float32, 4), (3, torch.float32, 4), (3, torch.bfloat16, 5)):
        copy = copier.start(batch(n, 1.5, dtype=dtype), no_check)
        assert copy.batch.activations["a"].dtype == dtype and (copy.batch.activations["a"] == 1.5).all()
        copy.release()
        assert log.count("pin") == pinned


def test_when_all_buffers_are_in_use_the_next_copy_waits_and_hears_of_errors(log):
    copier = HostCopier(torch.device("cuda"), 2)
    held = [copier.start(batch(1), no_check) for _ in range(2)]
    checks, started = [], []
    waiting = threading.Thread(target=lambda: started.append(copier.start(batch(1, 7.0), lambda: checks.append(1))))
    waiting.start()
    time.sleep(0.8)
    assert waiting.is_alive() and not started and len(checks) >= 2
    held[0].release()
    waiting.join(10)
    assert (started[0].batch.activations["a"] == 7).all()

    def fail():
        raise RuntimeError("the writer failed")

    with pytest.raises(RuntimeError, match="the writer failed"):
        copier.start(batch(1), fail)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_every_batch_arrives_whole_while_the_computation_goes_on():
    device = torch.device("cuda")
    copier, weight = HostCopier(device, 2), torch.randn(512, 512, device=device)
    for number in range(50):
        rows = torch.full((1000 + number, 512), float(number), device=device)
        copy = copier.start(ActivationBatch(*[torch.zeros(1)] * 4, {"a": rows}), no_check)
        expected = float(number)
        rows = rows @ weight  # the next computation may reuse the memory of what is being copied
        copy.wait()
        assert copy.batch.activations["a"].is_pinned() and (copy.batch.activations["a"] == expected).all()
        copy.release()
