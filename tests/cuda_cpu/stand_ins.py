"""Stand-ins for a GPU and for cupy: they record what would be compiled and launched."""

from contextlib import nullcontext
from importlib.machinery import ModuleSpec
from types import SimpleNamespace

import torch


class OnDevice(torch.Tensor):
    """A CPU tensor that says it is on the CUDA device `index`."""

    is_cuda = True
    index = 0

    def get_device(self):
        return self.index

    @property
    def device(self):
        return torch.device("cuda", self.index)


def on_device(x, index=0):
    x = x.as_subclass(OnDevice)
    x.index = index
    return x


class Cupy:
    """The parts of cupy that are used; `launched` lists what the driver would get."""

    __version__ = "14.0"
    __spec__ = ModuleSpec("cupy", None)

    def __init__(self, error=None):
        self.launched, self.compiled, self.devices, self.error = [], [], [], error
        nvrtc, runtime = SimpleNamespace(getVersion=lambda: (13, 0)), SimpleNamespace(driverGetVersion=lambda: 13010)
        self.cuda = SimpleNamespace(nvrtc=nvrtc, runtime=runtime, Device=self.device)

    def device(self, index):
        self.devices.append(index)
        return nullcontext()

    def RawModule(self, *, code, options):
        if self.error is not None:
            raise self.error
        self.compiled.append((code, options))
        return SimpleNamespace(get_function=self.function)

    def function(self, name):
        def launch(grid, block, args, shared_mem=0, stream=None):
            self.launched.append((name, grid, block, args, shared_mem, stream.ptr))

        self.raw = SimpleNamespace(kernel=launch, shared_size_bytes=1024, max_dynamic_shared_size_bytes=0)
        return self.raw
