"""Fresh memory is of the dtype and shape that were asked for, lies as torch's own does, and is nobody else's."""

import pytest
import torch

from exactivations.store.host_memory import ALIGNMENT, empty_on, empty_on_host
from exactivations.store.tensor_file import DTYPES


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0), (1,), (7, 3), (2, 3, 5), (1000, 33)])
def test_fresh_memory_can_be_written_and_read(dtype, shape):
    first, second = empty_on_host(*shape, dtype=dtype), empty_on(torch.device("cpu"), *shape, dtype=dtype)
    for tensor in (first, second):
        assert tensor.dtype == dtype and tensor.shape == shape and tensor.is_contiguous() and tensor.device.type == "cpu"
        assert tensor.data_ptr() % ALIGNMENT == 0 or not tensor.numel()
    first.fill_(1)
    second.fill_(0)
    assert (first == 1).all() and (second == 0).all()
