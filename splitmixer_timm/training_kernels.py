""" Triton kernels of a SplitMixer in training, beside those of `kernels`.

What is cheap to compute again from the input of the spatial mixing (the first convolution, the activations, the norms)
is never stored. BatchNorm in training is an affine whose scale and shift follow from sums over the batch: a kernel
leaves the sums of each of its programs in a row of its own, to be added up in one order, whatever ran first.
"""
import triton
import triton.language as tl

from .kernels import (
    INTERPRETED,
    _activate,
    _dot,
    _in_channels,
    _load_kernel,
    _load_neighbours,
    _normal_cdf,
    _place,
    _row,
    _store_sums,
)

__all__ = []

# Rows, columns and channels of a program of the spatial kernels, how many channels a thread takes at once, and warps;
# positions and channels of a tile of the pointwise kernels' steps, tiles of a program at most, and warps. Those for a
# GPU were chosen on an H200, for the sizes of CIFAR's networks.
_SPATIAL, _POINTWISE = ('BH', 'BW', 'BC', 'VEC', 'num_warps'), ('BM', 'BC', 'TILES', 'num_warps')
FORWARD = dict(zip(_SPATIAL, (4, 8, 16, 2, 1) if INTERPRETED else (16, 2, 128, 4, 1)))
BACKWARD = dict(zip(_SPATIAL, (4, 8, 16, 2, 1) if INTERPRETED else (16, 2, 128, 2, 2)))
POINTWISE = {step: dict(zip(_POINTWISE, (16, 16, 2, 1) if INTERPRETED else blocks)) for step, blocks in {
    'sums': (64, 64, 16, 8),
    'norm': (32, 128, 1, 4),
    'grad sums': (64, 64, 16, 4),
    'grad': (16, 64, 16, 4),
}.items()}
# Places and channels of a tile of the kernels that add the sums up.
NORM = dict(BP=4, BC=16) if INTERPRETED else dict(BP=256, BC=16)
# Programs of a pointwise kernel that keep a large GPU busy; where there are fewer, each takes fewer tiles.
PROGRAMS = 1 if INTERPRETED else 1024


@triton.jit
def _activate_grad(x, ACT: tl.constexpr):
    if ACT == 'relu':
        grad = tl.where(x > 0, 1., 0.).to(x.dtype)
    else:
        grad = _normal_cdf(x, ACT) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return grad


@triton.jit(do_not_specialize=['N', 'C'])
def row_sums_kernel(
        x_ptr, params_ptr, sums_ptr, N, H, W, C,
        K: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
        BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
):
    """ Sums of the activations of the first convolution, and of their squares."""
    LEFT: tl.constexpr = (K - 1) // 2
    ALIGNED: tl.constexpr = VEC if VEC < ALIGN else ALIGN
    c, w, top, image, place = _place(H, W, C, BH, BW, BC)
    in_channels = _in_channels(c, C, ALIGNED)
    conv1 = _load_kernel(params_ptr, 0, c, C, in_channels, K, ACC)
    bias1, = _load_kernel(params_ptr, K, c, C, in_channels, 1, ACC)
    total = tl.zeros((BW, BC), ACC)
    squares = tl.zeros((BW, BC), ACC)
    for i in range(BH):
        h = top + i
        if h < H:
            row_ptr = _row(x_ptr, image, h, W, C, ALIGNED)
            tiles = _load_neighbours(row_ptr, w, c, W, C, in_channels, LEFT, K, ALIGNED, ACC)
            a = tl.where(w < W, _activate(_dot(conv1, tiles, bias1, K), ACT), 0)
            total += a
            squares += a * a
    _store_sums(sums_ptr, place, 0, 2, c, C, total, in_channels)
    _store_sums(sums_ptr, place, 1, 2, c, C, squares, in_channels)


@triton.jit(do_not_specialize=['N', 'C'])
def spatial_grad_kernel(
        x_ptr, grad_ptr, out_ptr, params_ptr, coefficients_ptr, sums_ptr, N, H, W, C,
        K: tl.constexpr, ACT: tl.constexpr, FIRST: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
        BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
):
    """ From the gradient of the second convolution's output back to that of the first one's.

    The first run makes the sums: K of the second kernel's gradient, then of the gradient of the first norm's output and
    of its product with the activation. The second, with the coefficients of the norm's gradient that follow from them,
    stores the gradient of the first convolution's output, and K sums of its kernel's gradient, then of its bias's.
    """
    LEFT: tl.constexpr = (K - 1) // 2
    SUMS: tl.constexpr = K + 2 if FIRST else K + 1
    ALIGNED: tl.constexpr = VEC if VEC < ALIGN else ALIGN
    c, w, top, image, place = _place(H, W, C, BH, BW, BC)
    in_channels = _in_channels(c, C, ALIGNED)
    conv1 = _load_kernel(params_ptr, 0, c, C, in_channels, K, ACC)
    bias1, scale1, shift1 = _load_kernel(params_ptr, K, c, C, in_channels, 3, ACC)
    conv2 = _load_kernel(params_ptr, K + 3, c, C, in_channels, K, ACC)
    if not FIRST:
        of_grad, constant, of_activation = _load_kernel(coefficients_ptr, 0, c, C, in_channels, 3, ACC)
    inside = in_channels & (w < W)
    offset = tl.multiple_of(w * C + c, (1, ALIGNED))
    sums = ()
    for _ in tl.static_range(SUMS):
        sums = sums + (tl.zeros((BW, BC), ACC),)
    for i in range(BH):
        h = top + i
        if h < H:
            row_ptr = _row(x_ptr, image, h, W, C, ALIGNED)
            tiles = _load_neighbours(row_ptr, w, c, W, C, in_channels, LEFT, K, ALIGNED, ACC)
            u = _dot(conv1, tiles, bias1, K)
            a = _activate(u, ACT)
            grads = ()
            for j in tl.static_range(K):
                row_ptr = _row(grad_ptr, image, h + LEFT - j, W, C, ALIGNED)
                pixel = (h + LEFT - j) * W + w
                in_image = inside & (pixel >= 0) & (pixel < H * W)
                grads = grads + (tl.load(row_ptr + offset, in_image, other=0).to(ACC),)
            grad = _dot(conv2, grads, 0., K)
            if FIRST:
                row = a * scale1 + shift1
                factors = grads
                rest = (grad, grad * a)
            else:
                grad = (of_grad * grad + constant + of_activation * a) * _activate_grad(u, ACT)
                grad = tl.where(inside, grad, 0).to(out_ptr.dtype.element_ty)
                tl.store(_row(out_ptr, image, h, W, C, ALIGNED) + offset, grad, inside)
                row = grad.to(ACC)
                factors = tiles
                rest = (row,)
            added = ()
            for j in tl.static_range(SUMS):
                added = added + (sums[j] + (row * factors[j] if j < K else rest[j - K]),)
            sums = added
    for j in tl.static_range(SUMS):
        _store_sums(sums_ptr, place, j, SUMS, c, C, sums[j], in_channels)


@triton.jit(do_not_specialize=['N', 'C'])
def row_grad_kernel(
        grad_ptr, y_grad_ptr, x_grad_ptr, params_ptr, N, H, W, C,
        K: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, ALIGN: tl.constexpr,
        BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
):
    """ Gradient of the input: of the first convolution's output through its kernel, and of the residual."""
    RIGHT: tl.constexpr = K - 1 - (K - 1) // 2
    ALIGNED: tl.constexpr = VEC if VEC < ALIGN else ALIGN
    c, w, top, image, _ = _place(H, W, C, BH, BW, BC)
    in_channels = _in_channels(c, C, ALIGNED)
    flipped = ()
    for j in tl.static_range(K):
        flipped = flipped + (tl.load(params_ptr + (K - 1 - j) * C + c, in_channels, other=0).to(ACC),)
    for i in range(BH):
        h = top + i
        if h < H:
            row_ptr = _row(grad_ptr, image, h, W, C, ALIGNED)
            tiles = _load_neighbours(row_ptr, w, c, W, C, in_channels, RIGHT, K, ALIGNED, ACC)
            grad = _dot(flipped, tiles, 0., K)
            offset = tl.multiple_of(w * C + c, (1, ALIGNED))
            inside = in_channels & (w < W)
            if RESIDUAL:
                grad += tl.load(_row(y_grad_ptr, image, h, W, C, ALIGNED) + offset, inside, other=0).to(ACC)
            tl.store(_row(x_grad_ptr, image, h, W, C, ALIGNED) + offset, grad.to(x_grad_ptr.dtype.element_ty), inside)


@triton.jit
def pointwise_kernel(
        u_ptr, other_ptr, out_ptr, params_ptr, sums_ptr, M, C,
        STEP: tl.constexpr, ACT: tl.constexpr, ACC: tl.constexpr,
        BM: tl.constexpr, BC: tl.constexpr, TILES: tl.constexpr,
):
    """ A step of activation and norm, of their input u, and in the gradient of `other`, the gradient of their output.

    'sums': sums of the activations, and of their squares.
    'norm': the output, by scale and shift, plus `other` where there is one.
    'grad sums': sums of the output's gradient, and of its product with the activation.
    'grad': gradient of u by the coefficients of the norm's gradient, and its sums.
    """
    c_blocks = tl.cdiv(C, BC)
    pid = tl.program_id(0)
    c = (pid % c_blocks * BC + tl.arange(0, BC))[None, :]
    place = pid // c_blocks
    in_channels = c < C
    if STEP == 'norm':
        scale, shift = _load_kernel(params_ptr, 0, c, C, in_channels, 2, ACC)
    if STEP == 'grad':
        of_grad, constant, of_activation = _load_kernel(params_ptr, 0, c, C, in_channels, 3, ACC)
    total = tl.zeros((BM, BC), ACC)
    products = tl.zeros((BM, BC), ACC)
    for i in range(TILES):
        rows = ((place * TILES + i) * BM + tl.arange(0, BM))[:, None]
        offset = rows.to(tl.int64) * C + c
        inside = in_channels & (rows < M)
        u = tl.load(u_ptr + offset, inside, other=0).to(ACC)
        a = _activate(u, ACT)
        if STEP == 'sums':
            total += a  # 0 where u is: outside
            products += a * a
        elif STEP == 'norm':
            y = a * scale + shift
            if other_ptr is not None:
                y += tl.load(other_ptr + offset, inside, other=0).to(ACC)
            tl.store(out_ptr + offset, y.to(out_ptr.dtype.element_ty), inside)
        else:
            grad = tl.load(other_ptr + offset, inside, other=0).to(ACC)
            if STEP == 'grad sums':
                total += grad
                products += grad * a
            else:
                grad = (of_grad * grad + constant + of_activation * a) * _activate_grad(u, ACT)
                grad = tl.where(inside, grad, 0).to(out_ptr.dtype.element_ty)
                tl.store(out_ptr + offset, grad, inside)
                total += grad.to(ACC)
    if STEP == 'sums' or STEP == 'grad sums':
        _store_sums(sums_ptr, place, 0, 2, c, C, total, in_channels)
        _store_sums(sums_ptr, place, 1, 2, c, C, products, in_channels)
    elif STEP == 'grad':
        _store_sums(sums_ptr, place, 0, 1, c, C, total, in_channels)


@triton.jit
def _add_up(sums_ptr, row, ROWS, places, c, C, BP: tl.constexpr, BC: tl.constexpr):
    """ Row `row` of ROWS, added over all places."""
    total = tl.zeros((BP, BC), tl.float64)
    for first in range(0, places, BP):
        place = (first + tl.arange(0, BP))[:, None]
        offset = (place * ROWS + row).to(tl.int64) * C + c[None, :]
        total += tl.load(sums_ptr + offset, (place < places) & (c < C)[None, :], other=0).to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def norm_kernel(
        sums_ptr, weight_ptr, bias_ptr, mean_ptr, var_ptr, batches_ptr, affine_ptr, moments_ptr, places, count, C,
        momentum, eps, BP: tl.constexpr, BC: tl.constexpr,
):
    """ From the sums of values and squares to a norm's scale and shift, its mean and 1 / deviation, and its running
    statistics."""
    if tl.program_id(0) == 0:
        tl.store(batches_ptr, tl.load(batches_ptr) + 1)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = c < C
    mean = _add_up(sums_ptr, 0, 2, places, c, C, BP, BC) / count
    var = _add_up(sums_ptr, 1, 2, places, c, C, BP, BC) / count - mean * mean
    var = tl.where(var < 0, 0., var)  # keeps NaN, which on a GPU tl.maximum does not
    rstd = 1. / tl.sqrt(var + eps)
    scale = rstd * tl.load(weight_ptr + c, mask, other=0).to(tl.float64)
    shift = tl.load(bias_ptr + c, mask, other=0).to(tl.float64) - mean * scale
    tl.store(affine_ptr + c, scale.to(affine_ptr.dtype.element_ty), mask)
    tl.store(affine_ptr + C + c, shift.to(affine_ptr.dtype.element_ty), mask)
    tl.store(moments_ptr + c, mean.to(moments_ptr.dtype.element_ty), mask)
    tl.store(moments_ptr + C + c, rstd.to(moments_ptr.dtype.element_ty), mask)
    running = tl.load(mean_ptr + c, mask, other=0).to(tl.float64)
    tl.store(mean_ptr + c, (running + momentum * (mean - running)).to(mean_ptr.dtype.element_ty), mask)
    running = tl.load(var_ptr + c, mask, other=0).to(tl.float64)
    unbiased = var * (count / (count - 1.))
    tl.store(var_ptr + c, (running + momentum * (unbiased - running)).to(var_ptr.dtype.element_ty), mask)


@triton.jit
def norm_grad_kernel(
        sums_ptr, weight_ptr, moments_ptr, weight_grad_ptr, bias_grad_ptr, coefficients_ptr, places, count, C,
        ROW: tl.constexpr, ROWS: tl.constexpr, BP: tl.constexpr, BC: tl.constexpr,
):
    """ From the sums of a norm's output's gradient and of its product with the input, rows ROW and ROW + 1 of ROWS, to
    the gradients of weight and bias and the coefficients of the output's gradient, 1 and the input in the input's
    gradient."""
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mask = c < C
    total = _add_up(sums_ptr, ROW, ROWS, places, c, C, BP, BC)
    product = _add_up(sums_ptr, ROW + 1, ROWS, places, c, C, BP, BC)
    mean = tl.load(moments_ptr + c, mask, other=0).to(tl.float64)
    rstd = tl.load(moments_ptr + C + c, mask, other=0).to(tl.float64)
    scale = rstd * tl.load(weight_ptr + c, mask, other=0).to(tl.float64)
    weight_grad = rstd * (product - mean * total)
    of_input = -scale * rstd * weight_grad / count
    constant = -scale * total / count - of_input * mean
    tl.store(weight_grad_ptr + c, weight_grad.to(weight_grad_ptr.dtype.element_ty), mask)
    tl.store(bias_grad_ptr + c, total.to(bias_grad_ptr.dtype.element_ty), mask)
    tl.store(coefficients_ptr + c, scale.to(coefficients_ptr.dtype.element_ty), mask)
    tl.store(coefficients_ptr + C + c, constant.to(coefficients_ptr.dtype.element_ty), mask)
    tl.store(coefficients_ptr + 2 * C + c, of_input.to(coefficients_ptr.dtype.element_ty), mask)
