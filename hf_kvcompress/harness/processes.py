"""The processes of one run: one without a launcher, those of torchrun or accelerate with one."""

from __future__ import annotations

import os
from typing import Any

import torch


class Processes:
    """This process among those that `torchrun` or `accelerate launch` started.

    Raises ImportError if there are several and accelerate is not installed.
    """

    def __init__(self) -> None:
        self.state: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            try:
                from accelerate import PartialState
            except ImportError:
                raise ImportError("several processes need accelerate: pip install 'hf_kvcompress[eval]'") from None
            self.state = PartialState(cpu=not torch.cuda.is_available())

    @property
    def index(self) -> int:
        return 0 if self.state is None else int(self.state.process_index)

    @property
    def count(self) -> int:
        return 1 if self.state is None else int(self.state.num_processes)

    @property
    def is_first(self) -> bool:
        return self.index == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.state is not None:
            self.state.wait_for_everyone()

    def gather(self, items: list[Any]) -> list[Any]:
        """The items of all processes, in all processes."""
        if self.state is None:
            return items
        from accelerate.utils import gather_object

        return list(gather_object(items))
