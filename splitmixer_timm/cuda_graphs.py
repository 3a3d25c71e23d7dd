""" Functions as CUDA graphs. """
from typing import Any, Callable, Tuple

import torch

__all__ = ['capture', 'warm_up']


def warm_up(function: Callable[[], Any], stream: torch.cuda.Stream) -> Any:
    """ Run a function on a stream, where it compiles, measures and allocates all that a capture cannot; its result."""
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            return function()
    finally:
        torch.cuda.current_stream().wait_stream(stream)


def capture(
        function: Callable[[], Any],
        stream: torch.cuda.Stream,
        pool: Tuple[int, int],
) -> Tuple[torch.cuda.CUDAGraph, Any]:
    """ A graph that replays a function, and what the function returned, which each replay fills anew.

    Args:
        function: A function that was warmed up.
        stream: Stream of the warm-up.
        pool: Memory, as `torch.cuda.graph_pool_handle` names it, shared by graphs that are replayed in turn.

    As torch's own graph trees do, this drops cuBLAS's workspaces of all streams: a graph of somebody else's keeps its
    own only if that was allocated as it was captured.
    """
    graph = torch.cuda.CUDAGraph()
    # As torch's own graph trees do: the workspace of cuBLAS, whose address the graph keeps, comes from the graphs'
    # pool. The one of the warm-up, which this frees, would go when torch drops any graph of this stream.
    torch._C._cuda_clearCublasWorkspaces()
    try:
        # the outer context since a capture that fails leaves this thread on its stream; thread_local: what a data
        # loader's thread does meanwhile is not part of it, and no error
        with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode='thread_local'):
            return graph, function()
    finally:
        torch._C._cuda_clearCublasWorkspaces()
