"""By default every pass is looked at, so that nothing depends on how busy the machine is."""

import pytest

from hf_kvcompress.monitoring import session

from .helpers import Generous


@pytest.fixture
def every_pass(monkeypatch):
    monkeypatch.setattr(session, "Throttle", Generous)
