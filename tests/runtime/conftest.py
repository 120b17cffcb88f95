"""What tests of kernels share: a CPU that stands in for a GPU."""

import ptx
import pytest


@pytest.fixture(scope="module")
def on_cpu(strict_int_mm):
    """Launches of `runtime.cuda` go to the interpreter of PTX; `_int_mm` is as strict as Hopper's."""
    with ptx.interpreted():
        yield
