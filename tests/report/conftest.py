import pytest

from jaxgpt.report.looks import look


@pytest.fixture(scope="session")
def trained_looks(trained):
    """The looks at the run of `trained`."""
    return look(*trained)
