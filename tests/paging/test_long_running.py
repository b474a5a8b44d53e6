"""An engine that serves for long: no block and no object is lost, whatever ends a request."""

from __future__ import annotations

import gc
from typing import Any

import pytest

from hf_kvcompress.paging.engine import PagedAttentionEngine
from hf_kvcompress.paging.pool import BlockPool, Run
from hf_kvcompress.paging.tables import BlockTable

from ..prefix.helpers import llama, text
from .test_engine import PROMPTS, assert_right, engine


def assert_nothing_held(served: PagedAttentionEngine) -> None:
    while served.resident.drop_oldest():
        pass
    gc.collect()
    assert served.pool.used_blocks == 0
    assert not served._batch.sequences and not served._waiting


def test_hundreds_of_requests_leave_nothing_behind() -> None:
    served = engine(pool=BlockPool("kv", 90, 8192), prefix_cache=True, max_batch=6)
    system = text(40, 7)

    def serve(start: int) -> None:
        prompts = [(system if i % 2 else []) + text(5 + i % 23, i) for i in range(start, start + 60)]
        served.generate(prompts, max_tokens=[1 + i % 5 for i in range(60)])

    serve(0)
    gc.collect()
    used = served.pool.used_blocks
    objects = sum(isinstance(x, Run | BlockTable) for x in gc.get_objects())
    for start in (60, 120, 180):
        serve(start)
        gc.collect()
        assert served.pool.used_blocks == used
        assert sum(isinstance(x, Run | BlockTable) for x in gc.get_objects()) <= objects
    assert served.stats.prompts == 240
    assert_nothing_held(served)


@pytest.mark.parametrize("after", [0, 1, 7, 20])
def test_a_stream_that_is_closed_gives_its_blocks_back(after: int) -> None:
    served = engine(prefix_cache=True)
    stream = served.stream(PROMPTS, max_tokens=24)
    for _ in range(after):
        next(stream)
    assert after < 7 or served.pool.used_blocks
    stream.close()
    assert_nothing_held(served)
    assert_right(served, [0, 1, 2])


@pytest.mark.parametrize("failing", [0, 1, 3, 9])
def test_an_error_in_the_model_gives_the_blocks_back(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, served = llama(), engine(prefix_cache=True)
    layer, calls = model.model.layers[1], iter(range(100))
    before = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == failing:
            raise ArithmeticError("from the model")
        return before(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(layer, "forward", forward)
        with pytest.raises(ArithmeticError, match="from the model"):
            served.generate(PROMPTS[:4], max_tokens=8)
    assert_nothing_held(served)
    assert model.config._attn_implementation != "kvcompress"
    assert_right(served, [0, 1, 2, 3])
