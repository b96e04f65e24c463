import pytest

from jaxgpt.report.looks import look


@pytest.fixture(scope="session")
def seen(trained):
    """Everything that its weights show."""
    return look(*trained)
