""" Triton kernels of a SplitMixer on CUDA, with the functions that launch them.

Features are (N, H, W, C), contiguous: all channels of a position lie side by side. The arithmetic is fp32 (fp64 for
fp64 features) whatever the features are stored in.
"""
import functools
import math
from typing import Any, Dict, List, Tuple

import torch
import triton
import triton.language as tl
from torch import nn
from triton import knobs
from triton.testing import do_bench

from .fused import Product, Unsupported

__all__ = ['channel_mixing', 'check_launches', 'pack_channels', 'pack_patches', 'patch_embedding', 'spatial_mixing']

# Outputs of a tile of a product, and the step of the channels that it reads; the packing of the weights fixes both.
BLOCK_N = {torch.float16: 128, torch.bfloat16: 128, torch.float32: 64, torch.float64: 64}
BLOCK_K = 32

# Under TRITON_INTERPRET=1 the kernels run on the CPU.
INTERPRETED = tl.constexpr(knobs.runtime.interpret)


def _configs(names: Tuple[str, ...], *configs: Tuple[int, ...]) -> List[triton.Config]:
    """ Configurations to measure at the first call with new sizes: values of `names`, warps, stages."""
    if INTERPRETED:
        configs = ((4, 8, 16, 2, 1, 1) if len(names) > 1 else (16, 1, 1),)
    return [
        triton.Config(dict(zip(names, values)), num_warps=warps, num_stages=stages)
        for *values, warps, stages in configs
    ]


# Triton by itself would warm up each configuration for 25 ms and measure it for 100.
_tuned = functools.partial(triton.autotune, do_bench=functools.partial(do_bench, warmup=5, rep=20))


@triton.jit
def _normal_cdf_half(x):
    """ Normal distribution function by a clamped polynomial, in fewer instructions than by erf: x times it is within
    7e-5 of GELU, or of |x| where that is large, which is less than half precision rounds off x by."""
    t = tl.minimum(tl.maximum(x, -4.25), 4.25)
    s = t * t
    p = 6.74458997e-11 * s - 6.31731498e-09
    p = p * s + 2.60238234e-07
    p = p * s - 6.28470558e-06
    p = p * s + 0.000100723303
    p = p * s - 0.00115630482
    p = p * s + 0.00999114655
    p = p * s - 0.0666618783
    p = p * s + 0.399105375
    return p * t + 0.5


@triton.jit
def _activate(x, ACT: tl.constexpr):
    if ACT == 'gelu':
        x = 0.5 * x * (1 + tl.math.erf(x * 0.7071067811865476))
    elif ACT == 'gelu_half':
        x = x * _normal_cdf_half(x)
    elif ACT == 'relu':
        x = tl.where(x < 0, 0., x).to(x.dtype)  # keeps NaN, which on a GPU tl.maximum does not
    return x


@triton.jit
def _place(H, W, C, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr):
    """ Channels, columns and first row that a program works on, offset of its image, number of its (row, column)."""
    pid = tl.program_id(0)
    c_blocks = tl.cdiv(C, BC)
    w_blocks = tl.cdiv(W, BW)
    h_blocks = tl.cdiv(H, BH)
    c = pid % c_blocks * BC + tl.arange(0, BC)[None, :]
    pid //= c_blocks
    w = pid % w_blocks * BW + tl.arange(0, BW)[:, None]
    top = pid // w_blocks % h_blocks * BH
    image = (pid // (w_blocks * h_blocks)).to(tl.int64) * (H * W * C)
    return c, w, top, image, pid


@triton.jit
def _in_channels(c, C, ALIGNED: tl.constexpr):
    # The compiler is not told that C is a multiple of 16, so that a thread takes ALIGNED channels at once and no more:
    # it keeps the kernels of each of its channels in registers. For such loads their mask must be one as well.
    return c // ALIGNED < C // ALIGNED


@triton.jit
def _row(ptr, image, h, W, C, ALIGNED: tl.constexpr):
    """ Pointer to a row: offsets from it fit 32 bits."""
    return ptr + tl.multiple_of(image + h * W * C, ALIGNED)


@triton.jit
def _load_kernel(params_ptr, first, c, C, in_channels, K: tl.constexpr, ACC: tl.constexpr):
    kernel = ()
    for j in tl.static_range(K):
        kernel = kernel + (tl.load(params_ptr + (first + j) * C + c, in_channels, other=0).to(ACC),)
    return kernel


@triton.jit
def _load_neighbours(
        row_ptr, w, c, W, C, in_channels, LEFT: tl.constexpr, K: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr,
):
    """ The K tiles that a 1 x K convolution needs, LEFT of which begin further left."""
    tiles = ()
    for j in tl.static_range(K):
        col = w + (j - LEFT)
        offset = tl.multiple_of(col * C + c, (1, ALIGNED))
        tiles = tiles + (tl.load(row_ptr + offset, in_channels & (col >= 0) & (col < W), other=0).to(ACC),)
    return tiles


@triton.jit
def _dot(kernel, tiles, bias, K: tl.constexpr):
    y = bias + kernel[0] * tiles[0]
    for j in tl.static_range(1, K):
        y += kernel[j] * tiles[j]
    return y


@triton.jit
def _store_sums(sums_ptr, place, row, ROWS: tl.constexpr, c, C, tile, in_channels):
    """ Sum a tile over its positions into row `row` of ROWS of the sums of this place."""
    offset = (place * ROWS + row).to(tl.int64) * C + c
    tl.store(sums_ptr + offset, tl.sum(tile, axis=0)[None, :], in_channels)


@_tuned(
    _configs(
        ('BH', 'BW', 'BC', 'VEC'),
        (32, 2, 128, 2, 2, 1), (32, 2, 64, 2, 1, 1), (32, 4, 128, 2, 4, 1), (32, 8, 64, 4, 2, 1), (16, 2, 128, 2, 2, 1),
        (16, 8, 64, 2, 4, 1), (8, 8, 64, 2, 4, 1), (4, 8, 64, 2, 4, 1), (8, 8, 32, 4, 2, 1)),
    key=['SIZE', 'H', 'W', 'C', 'K'],
)
@triton.jit(do_not_specialize=['SIZE', 'C'])
def spatial_kernel(
        x_ptr, y_ptr, params_ptr, sums_ptr, SIZE, H, W, C,
        K: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr,
        ALIGN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
):
    """ A program walks down BH rows of one image, BW columns and BC channels wide; SIZE only tells batches apart.

    In training the second convolution's output is stored as it is, with the sums of its activations and their squares.
    """
    LEFT: tl.constexpr = (K - 1) // 2  # as in torch, the odd column or row of 'same' padding goes behind
    RIGHT: tl.constexpr = K - 1 - LEFT
    ALIGNED: tl.constexpr = VEC if VEC < ALIGN else ALIGN
    c, w, top, image, place = _place(H, W, C, BH, BW, BC)
    in_channels = _in_channels(c, C, ALIGNED)
    conv1 = _load_kernel(params_ptr, 0, c, C, in_channels, K, ACC)
    bias1, scale1, shift1 = _load_kernel(params_ptr, K, c, C, in_channels, 3, ACC)
    conv2 = _load_kernel(params_ptr, K + 3, c, C, in_channels, K, ACC)
    bias2, scale2, shift2 = _load_kernel(params_ptr, 2 * K + 3, c, C, in_channels, 3, ACC)

    # unfinished[j]: sum so far of the output row that needs K - 1 - j more rows
    nothing = tl.zeros((BW, BC), ACC) + bias2
    unfinished = ()
    for _ in tl.static_range(K):
        unfinished = unfinished + (nothing,)
    total = tl.zeros((BW, BC), ACC)
    squares = tl.zeros((BW, BC), ACC)
    for i in range(BH + K - 1):
        h = top - LEFT + i
        # rows outside the image are zeros to the second convolution, not what the first makes of zeros
        row = tl.zeros((BW, BC), ACC)
        if (h >= 0) & (h < H):
            row_ptr = _row(x_ptr, image, h, W, C, ALIGNED)
            tiles = _load_neighbours(row_ptr, w, c, W, C, in_channels, LEFT, K, ALIGNED, ACC)
            row = _activate(_dot(conv1, tiles, bias1, K), ACT) * scale1 + shift1
        y = unfinished[0] + conv2[K - 1] * row
        shifted = ()
        for j in tl.static_range(K - 1):
            shifted = shifted + (unfinished[j + 1] + conv2[K - 2 - j] * row,)
        unfinished = shifted + (nothing,)
        h -= RIGHT
        if (h >= top) & (h < H):
            offset = tl.multiple_of(w * C + c, (1, ALIGNED))
            inside = in_channels & (w < W)
            out_ptr = _row(y_ptr, image, h, W, C, ALIGNED) + offset
            if TRAINING:
                y = y.to(y_ptr.dtype.element_ty)
                tl.store(out_ptr, y, inside)
                y = tl.where(inside, _activate(y.to(ACC), ACT), 0)
                total += y
                squares += y * y
            else:
                y = _activate(y, ACT) * scale2 + shift2
                if RESIDUAL:
                    y += tl.load(_row(x_ptr, image, h, W, C, ALIGNED) + offset, inside, other=0).to(ACC)
                tl.store(out_ptr, y.to(y_ptr.dtype.element_ty), inside)
    if TRAINING:
        _store_sums(sums_ptr, place, 0, 2, c, C, total, in_channels)
        _store_sums(sums_ptr, place, 1, 2, c, C, squares, in_channels)


@triton.jit
def _product(x, weight, y, PRECISION: tl.constexpr):
    if INTERPRETED and x.dtype == tl.bfloat16:  # which the interpreter would multiply as the integers of its bits
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    return tl.dot(x, weight, y, input_precision=PRECISION, out_dtype=y.dtype)


@triton.jit
def _epilogue(y, x_ptr, y_ptr, params_ptr, rows, cols, M, C, ACT: tl.constexpr, RESIDUAL: tl.constexpr):
    bias = tl.load(params_ptr + cols, cols < C, other=0)[None, :].to(y.dtype)
    scale = tl.load(params_ptr + C + cols, cols < C, other=0)[None, :].to(y.dtype)
    shift = tl.load(params_ptr + 2 * C + cols, cols < C, other=0)[None, :].to(y.dtype)
    y = _activate(y + bias, ACT) * scale + shift
    offset = rows.to(tl.int64)[:, None] * C + cols[None, :]
    inside = (rows < M)[:, None] & (cols < C)[None, :]
    if RESIDUAL:
        y += tl.load(x_ptr + offset, inside, other=0).to(y.dtype)
    tl.store(y_ptr + offset, y.to(y_ptr.dtype.element_ty), inside)


@_tuned(
    _configs(
        ('BM',),
        (128, 8, 3), (64, 4, 4), (64, 8, 3), (32, 4, 4), (16, 4, 4)),
    key=['SIZE', 'C'],
)
@triton.jit(do_not_specialize=['SIZE'])
def channel_kernel(
        x_ptr, y_ptr, weight_ptr, params_ptr, tiles_ptr, SIZE, M, C,
        ACT: tl.constexpr, RESIDUAL: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):
    """ A program makes BN channels of BM positions from the channels that its row of `tiles` names."""
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(C, BN)
    tile = pid % n_blocks
    rows = pid // n_blocks * BM + tl.arange(0, BM)
    start = tl.multiple_of(tl.load(tiles_ptr + tile * 3), BK)
    stop = tl.multiple_of(tl.load(tiles_ptr + tile * 3 + 1), BK)
    weight_row = tl.multiple_of(tl.load(tiles_ptr + tile * 3 + 2), BK)
    n = tl.arange(0, BN)
    k = tl.arange(0, BK)

    x_ptrs = x_ptr + rows.to(tl.int64)[:, None] * C + k[None, :]
    weight_ptrs = weight_ptr + (weight_row + k).to(tl.int64)[:, None] * BN + n[None, :]
    y = tl.zeros((BM, BN), ACC)
    for first in range(start, stop, BK):
        x = tl.load(x_ptrs + first, (rows < M)[:, None] & (first + k < C)[None, :], other=0)
        weight = tl.load(weight_ptrs)
        y = _product(x, weight, y, PRECISION)
        weight_ptrs += BK * BN
    _epilogue(y, x_ptr, y_ptr, params_ptr, rows, tile * BN + n, M, C, ACT, RESIDUAL)


@_tuned(
    _configs(
        ('BM',),
        (128, 8, 3), (64, 4, 4), (32, 4, 4)),
    key=['SIZE', 'C', 'TAPS'],
)
@triton.jit(do_not_specialize=['SIZE'])
def patch_kernel(
        x_ptr, y_ptr, weight_ptr, params_ptr, SIZE, M, C, H, W, stride_n, stride_c, stride_h, stride_w,
        TAPS: tl.constexpr, P: tl.constexpr, STRIDE: tl.constexpr,
        ACT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
        BN: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr,
):
    """ A program makes BN channels of BM of the H x W positions of all images, each from a patch of TAPS pixels."""
    pid = tl.program_id(0)
    n_blocks = tl.cdiv(C, BN)
    cols = pid % n_blocks * BN + tl.arange(0, BN)
    rows = pid // n_blocks * BM + tl.arange(0, BM)
    corner = (rows // (H * W)).to(tl.int64) * stride_n
    corner += rows // W % H * STRIDE * stride_h + rows % W * STRIDE * stride_w
    y = tl.zeros((BM, BN), ACC)
    for first in range(0, TAPS, BK):
        k = first + tl.arange(0, BK)
        tap = k // (P * P) * stride_c + k // P % P * stride_h + k % P * stride_w
        x = tl.load(x_ptr + corner[:, None] + tap[None, :], (rows < M)[:, None] & (k < TAPS)[None, :], other=0)
        inside = (k < TAPS)[:, None] & (cols < C)[None, :]
        weight = tl.load(weight_ptr + k[:, None] * C + cols[None, :], inside, other=0)
        y = _product(x.to(weight.dtype), weight, y, PRECISION)
    _epilogue(y, x_ptr, y_ptr, params_ptr, rows, cols, M, C, ACT, False)


@triton.jit
def _store_one_kernel(y_ptr):
    tl.store(y_ptr, 1.)


def check_launches(device: torch.device) -> None:
    """ Check that kernels can be launched: Triton compiles its launcher for that, and keeps it on disk.

    Raises:
        Unsupported: If they cannot (no C compiler, no folder to write to, a driver too old); the message says why.
    """
    y = torch.zeros(1, device=device)
    try:
        with torch.cuda.device_of(y):
            _store_one_kernel[(1,)](y)
    except Exception as e:
        raise Unsupported(f'Triton that cannot launch kernels ({type(e).__name__}: {" ".join(str(e).split())})') from e


def _size(batch: int) -> int:
    """ The batch that a configuration is chosen for: all up to a power of two share it, so that few are measured."""
    return triton.next_power_of_2(batch)


def _act(name: str, dtype: torch.dtype) -> str:
    """ The activation as the kernels compute it for features of a data type."""
    return 'gelu_half' if name == 'gelu' and dtype.itemsize == 2 else name


def _accumulator(dtype: torch.dtype) -> tl.dtype:
    return tl.float64 if dtype == torch.float64 else tl.float32


def pack_channels(
        stages: List[List[Product]],
        dim: int,
        dtype: torch.dtype,
) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ Channel mixing as one matrix, of which only the part that each tile of outputs needs is kept.

    A channel that passes unchanged is a column of the unit matrix, the stages of type V are multiplied out, equal tiles
    (type III) are kept once.

    Args:
        stages: Channel mixing as `segments` gives it.
        dim: Number of channels.
        dtype: Data type of the weights.

    Returns:
        Weights (rows, outputs of a tile); for each tile its first input channel, the one past its last and its first
        row of the weights; biases (dim,).
    """
    device = stages[0][0].weight.device
    affine = torch.cat((torch.eye(dim, dtype=torch.float64), torch.zeros(1, dim, dtype=torch.float64))).to(device)
    for stage in stages:
        x, affine = affine, affine.clone()
        for product in stage:
            affine[:, product.out] = x[:, product.start:product.stop] @ product.weight.double().T
            affine[-1, product.out] += product.bias.double()
    bias = affine[-1]
    block_n = BLOCK_N[dtype]
    matrix = nn.functional.pad(affine[:-1], (0, -dim % block_n, 0, -dim % BLOCK_K)).to(dtype)
    weights, tiles, first_rows = [], [], []
    for columns in matrix.split(block_n, dim=1):
        used = columns.any(dim=1).nonzero()
        start = stop = 0
        if len(used):
            start = used.min().item() // BLOCK_K * BLOCK_K
            stop = (used.max().item() // BLOCK_K + 1) * BLOCK_K
        weight = columns[start:stop]
        row = next((row for known, row in zip(weights, first_rows) if torch.equal(weight, known)), None)
        if row is None:
            row = sum(map(len, weights))
            weights.append(weight)
            first_rows.append(row)
        tiles.append((start, stop, row))
    return torch.cat(weights), torch.tensor(tiles, dtype=torch.int32, device=device), bias


def pack_patches(conv: nn.Conv2d, dtype: torch.dtype) -> torch.Tensor:
    """ Weights (in_chans * kernel height * width, outputs) of a patch embedding."""
    return conv.weight.detach().flatten(1).T.to(dtype).clone(memory_format=torch.contiguous_format)


def spatial_mixing(
        x: torch.Tensor,
        params: torch.Tensor,
        kernel_size: int,
        act: str,
        residual: bool,
) -> torch.Tensor:
    """ Depthwise 1 x k, activation, affine, depthwise k x 1, activation, affine, and the input added.

    Args:
        x: Features (N, H, W, C), contiguous.
        params: Rows of C: k of the 1 x k kernel, its bias, scale and shift of the affine; the same of k x 1.
        kernel_size: Size of both kernels (k).
        act: 'gelu' or 'relu'.
        residual: Add the input.
    """
    N, H, W, C = x.shape
    y = torch.empty_like(x)

    def grid(config: Dict[str, Any]) -> Tuple[int]:
        return (N * triton.cdiv(H, config['BH']) * triton.cdiv(W, config['BW']) * triton.cdiv(C, config['BC']),)

    spatial_kernel[grid](
        x, y, params, None, _size(N), H, W, C, K=kernel_size, ACT=_act(act, x.dtype), RESIDUAL=residual, TRAINING=False,
        ACC=_accumulator(x.dtype), ALIGN=math.gcd(C, 4), enable_fp_fusion=True)
    return y


def channel_mixing(
        x: torch.Tensor,
        weight: torch.Tensor,
        tiles: torch.Tensor,
        params: torch.Tensor,
        act: str,
        residual: bool,
        precision: str,
) -> torch.Tensor:
    """ Product of the channels, activation, affine.

    Args:
        x: Features (N, H, W, C), contiguous.
        weight: Weights of `pack_channels`.
        tiles: Tiles of `pack_channels`.
        params: Bias (C,), scale and shift of the affine, stacked.
        act: 'gelu' or 'relu'.
        residual: Add the input.
        precision: Precision of fp32 products, as `tl.dot` names it.
    """
    N, H, W, C = x.shape
    M = N * H * W
    y = torch.empty_like(x)
    channel_kernel[lambda config: (triton.cdiv(M, config['BM']) * len(tiles),)](
        x, y, weight, params, tiles, _size(N) * H * W, M, C, ACT=_act(act, x.dtype), RESIDUAL=residual,
        ACC=_accumulator(x.dtype), PRECISION=precision, BN=weight.shape[1], BK=BLOCK_K, enable_fp_fusion=True)
    return y


def patch_embedding(
        images: torch.Tensor,
        weight: torch.Tensor,
        params: torch.Tensor,
        patch_size: int,
        stride: int,
        act: str,
        precision: str,
) -> torch.Tensor:
    """ Patches of images (N, in_chans, H, W) of any strides to features (N, H', W', C): product, activation, affine.

    Args:
        images: Images, converted to the data type of `weight` as they are read.
        weight: Weights of `pack_patches`.
        params: Bias (C,), scale and shift of the affine, stacked.
        patch_size: Height and width of a patch.
        stride: Distance of the patches.
        act: 'gelu' or 'relu'.
        precision: Precision of fp32 products, as `tl.dot` names it.
    """
    taps, C = weight.shape
    H, W = ((size - patch_size) // stride + 1 for size in images.shape[2:])
    y = torch.empty(len(images), H, W, C, dtype=weight.dtype, device=images.device)
    M = y.numel() // C
    block_n = BLOCK_N[weight.dtype]
    patch_kernel[lambda config: (triton.cdiv(M, config['BM']) * triton.cdiv(C, block_n),)](
        images, y, weight, params, _size(len(images)) * H * W, M, C, H, W, *images.stride(), TAPS=taps, P=patch_size,
        STRIDE=stride, ACT=_act(act, weight.dtype), ACC=_accumulator(weight.dtype), PRECISION=precision, BN=block_n,
        BK=BLOCK_K, enable_fp_fusion=True)
    return y
