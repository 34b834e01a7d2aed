"""The lecture's models are tested on compiled code, one thread; the kernels have a test of their own in each file."""

import pytest
import torch

import fastattn


@pytest.fixture(autouse=True)
def _compiled_code():
    """Triton's interpreter would take minutes over the models."""
    with fastattn.use_backend("torch"):
        yield


@pytest.fixture(autouse=True)
def _one_thread():
    """Many tiny steps: threads would spend their time waiting for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
