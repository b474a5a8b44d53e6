"""One thread, no network, reproducible Hypothesis runs: set before torch and transformers are imported."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

settings.register_profile(
    "kvcompress",
    deadline=None,  # the first example of a codec builds its tables
    derandomize=True,
    max_examples=int(os.environ.get("HF_KVCOMPRESS_TEST_EXAMPLES", "30")),
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("kvcompress")


@pytest.fixture(autouse=True)
def seeded_without_gradients():
    """Every test starts from the same random state and records no gradients."""
    torch.manual_seed(0)
    with torch.no_grad():
        yield
