import pytest

from jaxgpt.report.looks import look
from tests.monitor.conftest import HOSTILE, trained

__all__ = ["HOSTILE", "trained"]


@pytest.fixture(scope="session")
def seen(trained):
    """Everything that its weights show."""
    return look(*trained)
