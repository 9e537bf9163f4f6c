"""A GPU on two clocks, for instruments: the host needs time to launch, the device runs launches in order and no earlier."""

import contextlib
from types import SimpleNamespace

import torch


class SimulatedGpu:
    """Microseconds. host: the host's clock.  free: when the device will be idle.  captured: nodes of a graph being recorded.

    `install` puts it under torch.cuda's events, graphs, streams and `_sleep`, and under a module's `time.perf_counter`.
    """

    def __init__(self):
        self.host, self.free, self.captured, self.launches = 0.0, 0.0, None, 0

    def launch(self, device_us, host_us=5.0):
        """A kernel: recorded while a graph is captured, run otherwise."""
        self.host += host_us
        self.launches += 1
        if self.captured is not None:
            self.captured.append(device_us)
        else:
            self.free = max(self.free, self.host) + device_us

    def synchronize(self):
        self.host = max(self.host, self.free)

    def install(self, monkeypatch, *modules):
        gpu = self

        class Event:
            def __init__(self, enable_timing=False):
                self.at = None

            def record(self):
                self.at = max(gpu.free, gpu.host)

            def synchronize(self):
                gpu.host = max(gpu.host, self.at)

            def elapsed_time(self, later):
                return (later.at - self.at) / 1e3

        class Graph(list):
            def replay(self):
                gpu.launch(sum(self), 10.0)

        @contextlib.contextmanager
        def graph(nodes):
            gpu.captured = nodes
            yield
            gpu.captured = None

        stream = SimpleNamespace(wait_stream=lambda other: None)
        replaced = {"Event": Event, "CUDAGraph": Graph, "graph": graph, "synchronize": self.synchronize, "Stream": lambda: stream}
        replaced |= {"_sleep": lambda cycles: gpu.launch(cycles / 1980), "current_stream": lambda: stream}
        replaced |= {"stream": lambda stream: contextlib.nullcontext()}
        for name, value in replaced.items():
            monkeypatch.setattr(torch.cuda, name, value)
        for module in modules:
            monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: gpu.host / 1e6))
        return self
