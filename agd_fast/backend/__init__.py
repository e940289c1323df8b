"""`torch.compile(model, backend="agd_fast")`: inductor, with pieces of the graph on kernels of this library."""

from agd_fast.backend.compile import agd_fast, graphs_info

__all__ = ["agd_fast", "graphs_info"]
