""" The paper's networks of benchmarks/plain.py, and weights that tell them apart. """
import torch
from plain import Package, Package3d, flat, plain_model  # noqa: F401


@torch.no_grad()
def randomize(model, seed=0):
    """ Give every weight and statistic a value of its own, so that none can be mistaken for another."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if not tensor.is_floating_point():
            continue
        noise = torch.rand(tensor.shape, generator=generator)
        if name.endswith('running_var') or tensor.ndim == 1 and name.endswith('weight'):
            tensor.copy_(0.5 + noise)
        else:
            tensor.copy_((noise - 0.5) * (2 / max(tensor[0].numel(), 1) ** 0.5 if tensor.ndim > 1 else 0.5))
    return model.eval()
