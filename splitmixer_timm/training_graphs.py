""" A training step through blocks as two CUDA graphs, one forward and one backward: no Python launches its kernels."""
import weakref
from collections import OrderedDict
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .cuda_graphs import capture, warm_up
from .layers import is_everything_watched, is_watched

__all__ = ['Graphs', 'state_of']

SETTINGS = {bool, int, float, str, tuple, type(None)}

# torch has no public way to ask this: whether what is stored for the backward pass goes elsewhere, or to a checkpoint
_saved_tensors_hooks = getattr(torch._C._autograd, '_top_saved_tensors_default_hooks', lambda ignore_is_tracing: None)


def state_of(blocks: Iterable[nn.Module]) -> Optional[List[Any]]:
    """ What graphs of blocks are captured with: modules and their settings, where their tensors lie, which of these are
    trained, and how exact products are. None where somebody looks on, whom graphs would leave out."""
    if is_everything_watched() or _saved_tensors_hooks(False) is not None or torch.is_anomaly_enabled():
        return None
    # read apart: torch.get_float32_matmul_precision fails where these were set apart
    exactness = [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]
    state = [*exactness, torch.are_deterministic_algorithms_enabled()]
    waiting = list(blocks)
    while waiting:
        module = waiting.pop()
        if is_watched(module):
            return None
        state += [id(module), type(module)]
        state += [value for value in vars(module).values() if type(value) in SETTINGS]
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                state += [id(tensor), tensor.data_ptr(), tensor.requires_grad]
        waiting += [child for child in module._modules.values() if child is not None]
    return state


class _Step:
    """ A forward pass whose backward pass is still to come."""


class _Replay(Function):
    """ Blocks as their graphs have them, for autograd."""

    @staticmethod
    def forward(ctx, graphs: 'Graphs', x: torch.Tensor, *params: torch.Tensor) -> torch.Tensor:
        ctx.graphs, ctx.step = graphs, _Step()
        ctx.save_for_backward(*params)
        return graphs.forward(ctx.step, x)

    @staticmethod
    @once_differentiable
    def backward(ctx, y_grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], ...]:
        if ctx.graphs is None or not ctx.graphs.is_pending(ctx.step):
            raise RuntimeError('A CUDA graph of blocks runs backward once, before the next forward pass.')
        params = ctx.saved_tensors  # an error if they were changed since
        x_grad, param_grads = ctx.graphs.backward(y_grad)
        ctx.graphs = None  # a loss that is kept does not keep their memory
        return None, x_grad, *(grad.view_as(param) for grad, param in zip(param_grads, params))


class Graphs:
    """ Forward and backward pass of blocks in train mode, as CUDA graphs.

    They keep what the forward pass stores for the backward pass where it is: between the two there is no other forward
    pass by the same graphs.

    Args:
        blocks: Blocks that draw no random numbers and never wait for the GPU, with parameters of one data type.
        x: Features of the size, data type and memory format that the graphs are for.
    """

    def __init__(self, blocks: nn.Sequential, x: torch.Tensor):
        self._x = x.detach().clone().requires_grad_(x.requires_grad)
        trained = {name: param for name, param in blocks.named_parameters() if param.requires_grad}
        self.params = list(trained.values())
        # The parameters themselves have hooks, and nodes of the steps before, that belong to another stream.
        aliases = {name: param.detach().requires_grad_() for name, param in trained.items()}
        inputs = [*([self._x] if x.requires_grad else []), *aliases.values()]
        plain = nn.Sequential(OrderedDict(blocks.named_children()))
        self._sizes = [param.numel() for param in self.params]
        self._y_grad: Optional[torch.Tensor] = None
        self._pending: Callable[[], Optional[_Step]] = lambda: None
        device = x.device.type
        autocast = dict(dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))
        held: Dict[str, torch.Tensor] = {}  # from forward to backward pass

        def forward() -> torch.Tensor:
            # weights that autocast keeps for later would lie in the graphs' memory
            with torch.enable_grad(), torch.autocast(device, **autocast, cache_enabled=False):
                held['y'] = functional_call(plain, aliases, (self._x,))
            return held['y']

        def backward() -> List[torch.Tensor]:
            with torch.autocast(device, enabled=False):
                grads = list(torch.autograd.grad(held.pop('y'), inputs, self._y_grad))
            x_grad = [grads.pop(0)] if self._x.requires_grad else []
            return [*x_grad, torch.cat([grad.flatten() for grad in grads])] if grads else x_grad

        def step() -> None:
            self._y_grad = torch.zeros_like(forward().detach())
            backward()

        stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        before = [buffer.clone() for buffer in blocks.buffers()]
        try:
            warm_up(step, stream)
        finally:
            for buffer, value in zip(blocks.buffers(), before):
                buffer.data.copy_(value)  # running statistics, which the warm-up added to, unseen by autograd as this
        self._forward, y = capture(forward, stream, pool)
        self._y = y.detach()
        self._backward, self._grads = capture(backward, stream, pool)

    def is_pending(self, step: Optional[_Step] = None) -> bool:
        """ Whether a backward pass may still come: of this forward pass, or of any."""
        pending = self._pending()
        return pending is not None and (step is None or pending is step)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return _Replay.apply(self, x, *self.params)

    def forward(self, step: _Step, x: torch.Tensor) -> torch.Tensor:
        self._pending = weakref.ref(step)
        self._x.copy_(x)
        self._forward.replay()
        return self._y.clone()

    def backward(self, y_grad: torch.Tensor) -> Tuple[Optional[torch.Tensor], Sequence[torch.Tensor]]:
        """ Gradients of the features and, flat, of the parameters, of the last forward pass."""
        self._pending = lambda: None
        self._y_grad.copy_(y_grad)
        self._backward.replay()
        grads = [grad.clone() for grad in self._grads]  # the next step overwrites them
        x_grad = grads.pop(0) if self._x.requires_grad else None
        return x_grad, grads[0].split(self._sizes) if grads else ()
