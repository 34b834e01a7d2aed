"""The name ``"fastattn"`` for tests that ask for it, and families that an older transformers has in another form."""

import pytest

import fastattn


@pytest.fixture(scope="module")
def registered():
    """On the torch backend, unless a test says another."""
    from fastattn.integrations.transformers import register

    with register(), fastattn.use_backend("torch"):
        yield


@pytest.fixture
def family(request):
    """Skips a test whose parameter ``name`` is a family that computes attention itself in this transformers."""
    import transformers

    from tests.integrations.transformers.families import BY_NAME

    found = BY_NAME[request.node.callspec.params["name"]] if hasattr(request.node, "callspec") else None
    version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if found is not None and version < found.since:
        pytest.skip(f"{found.name} computes attention itself in transformers {transformers.__version__}")
