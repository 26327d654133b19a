"""What tests of kernels under Triton's interpreter share; `make test-triton` runs them."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from spikellm.kernels.triton.presence import interpreting


def skip_unless_interpreted() -> None:
    """Skip the module that is being imported where there is no interpreter."""
    if not interpreting() or find_spec("triton") is None:
        pytest.skip("needs triton and TRITON_INTERPRET=1", allow_module_level=True)


QUIET = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.*")
"""numpy, which the interpreter computes with, warns of what GPUs do not."""


@pytest.fixture(autouse=True, scope="module")
def triton_kernels() -> Iterator[None]:
    """Triton's kernels or an error."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPIKELLM_KERNELS", "triton")
        yield
