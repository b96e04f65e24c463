import pytest

from jaxgpt.report.looks import look


@pytest.fixture(scope="session")
def seen(trained):
    """The looks at the run of `trained`."""
    return look(*trained)
