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
# Whether kernels may have instructions of NVIDIA's GPUs in them.
PTX = tl.constexpr(not knobs.runtime.interpret and torch.version.hip is None)


def _configs(names: Tuple[str, ...], *configs: Tuple[int, ...]) -> List[triton.Config]:
    """ Configurations to measure at the first call with new sizes: values of `names`, warps, stages."""
    if INTERPRETED:
        configs = ((4, 4, 16, 2, 2, 1, 1) if len(names) > 1 else (16, 1, 1),)
    return [
        triton.Config(dict(zip(names, values)), num_warps=warps, num_stages=stages)
        for *values, warps, stages in configs
    ]


# Triton by itself would warm up each configuration for 25 ms and measure it for 100.
_tuned = functools.partial(triton.autotune, do_bench=functools.partial(do_bench, warmup=5, rep=20))


@triton.jit
def _reciprocal(x):
    if PTX:  # one instruction; Triton's division takes more
        return tl.inline_asm_elementwise(
            'rcp.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1 / x


@triton.jit
def _exp2(x):
    if PTX:  # Triton's keeps results that are no normal numbers, which takes more
        return tl.inline_asm_elementwise(
            'ex2.approx.ftz.f32 $0, $1;', '=f,f', [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def _normal_cdf(x, ACT: tl.constexpr):
    """ Normal distribution function, for GELU as `_act` names it.

    For fp32 half of erf as a ratio of two polynomials (the fit of cpu_kernels.cpp), within 1.6e-8 before its roundings,
    in fewer instructions than by erf. For half precision, which rounds off more, a logistic function of a polynomial: x
    times it is within 2.6e-5 of GELU.
    """
    if ACT == 'gelu_half':
        s = tl.minimum(x * x, 52.)  # where the polynomial turns back
        return _reciprocal(1 + _exp2(x * ((0.00101426306 * s - 0.106775724) * s - 2.30112134)))
    elif ACT == 'gelu_single':
        b = tl.minimum(tl.maximum(x, -5.5437171645025325), 5.5437171645025325)
        s = b * b
        p = 2.248085295e-08 * s + 6.35248335e-06
        p = p * s + 0.0001709590045
        p = p * s + 0.004689937055
        p = p * s + 0.03407632095
        p = p * s + 0.398942229
        q = 1.18970938e-06 * s + 7.42577586e-05
        q = q * s + 0.00189654506
        q = q * s + 0.0287712306
        q = q * s + 0.252082503
        q = q * s + 1
        return b * p * _reciprocal(q) + 0.5
    else:
        return 0.5 * (1 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def _activate(x, ACT: tl.constexpr):
    if ACT == 'relu':
        x = tl.where(x < 0, 0., x).to(x.dtype)  # keeps NaN, which on a GPU tl.maximum does not
    else:
        x = x * _normal_cdf(x, ACT)
    return x


@triton.jit
def _place(H, W, C, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, COLS: tl.constexpr = 1):
    """ Channels, columns and first row that a program works on, offset of its image, number of its (row, column).

    Of COLS neighbouring columns the first is given.
    """
    pid = tl.program_id(0)
    c_blocks = tl.cdiv(C, BC)
    w_blocks = tl.cdiv(W, BW * COLS)
    h_blocks = tl.cdiv(H, BH)
    c = pid % c_blocks * BC + tl.arange(0, BC)[None, :]
    pid //= c_blocks
    w = (pid % w_blocks * BW + tl.arange(0, BW)[:, None]) * COLS
    top = pid // w_blocks % h_blocks * BH
    image = (pid // (w_blocks * h_blocks)).to(tl.int64) * H * W * C
    return c, w, top, image, pid


@triton.jit
def _in_channels(c, C, ALIGNED: tl.constexpr):
    # The compiler is not told that C is a multiple of 16, so that a thread takes ALIGNED channels at once and no more:
    # it keeps the kernels of each of its channels in registers. For such loads their mask must be one as well.
    return c // ALIGNED < C // ALIGNED


@triton.jit
def _row(ptr, image, h, W, C, ALIGNED: tl.constexpr):
    """ Pointer to a row: offsets from it fit 32 bits, those from the first row of a large image do not."""
    return ptr + tl.multiple_of(image + h.to(tl.int64) * W * C, ALIGNED)


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
def _dot(kernel, tiles, bias, K: tl.constexpr, FIRST: tl.constexpr = 0):
    y = bias + kernel[0] * tiles[FIRST]
    for j in tl.static_range(1, K):
        y += kernel[j] * tiles[FIRST + j]
    return y


@triton.jit
def _store_sums(sums_ptr, place, row, ROWS: tl.constexpr, c, C, tile, in_channels):
    """ Sum a tile over its positions into row `row` of ROWS of the sums of this place."""
    offset = (place * ROWS + row).to(tl.int64) * C + c
    tl.store(sums_ptr + offset, tl.sum(tile, axis=0)[None, :], in_channels)


@_tuned(
    _configs(
        ('BH', 'BW', 'BC', 'VEC', 'COLS'),
        (32, 2, 128, 2, 1, 2, 1), (32, 2, 64, 2, 1, 1, 1), (32, 4, 128, 2, 1, 4, 1), (32, 8, 64, 4, 1, 2, 1),
        (16, 2, 128, 2, 1, 2, 1), (16, 8, 64, 2, 1, 4, 1), (8, 8, 64, 2, 1, 4, 1), (4, 8, 64, 2, 1, 4, 1),
        (8, 8, 32, 4, 1, 2, 1), (32, 1, 64, 2, 4, 1, 1), (32, 1, 128, 2, 4, 2, 1), (16, 1, 64, 2, 4, 1, 1),
        (8, 2, 64, 2, 4, 2, 1)),
    key=['SIZE', 'H', 'W', 'C', 'K'],
)
@triton.jit(do_not_specialize=['SIZE', 'C'])
def spatial_kernel(
        x_ptr, y_ptr, params_ptr, sums_ptr, SIZE, H, W, C,
        K: tl.constexpr, ACT: tl.constexpr, RESIDUAL: tl.constexpr, TRAINING: tl.constexpr, ACC: tl.constexpr,
        ALIGN: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr, VEC: tl.constexpr,
        COLS: tl.constexpr,
):
    """ A program walks down BH rows of one image, BW times COLS columns and BC channels wide; SIZE only tells batches
    apart.

    A thread that takes COLS neighbouring columns loads what they share once. In training the second convolution's
    output is stored as it is, with the sums of its activations and their squares.
    """
    LEFT: tl.constexpr = (K - 1) // 2  # as in torch, the odd column or row of 'same' padding goes behind
    RIGHT: tl.constexpr = K - 1 - LEFT
    ALIGNED: tl.constexpr = VEC if VEC < ALIGN else ALIGN
    c, w, top, image, place = _place(H, W, C, BH, BW, BC, COLS)
    in_channels = _in_channels(c, C, ALIGNED)
    conv1 = _load_kernel(params_ptr, 0, c, C, in_channels, K, ACC)
    bias1, scale1, shift1 = _load_kernel(params_ptr, K, c, C, in_channels, 3, ACC)
    conv2 = _load_kernel(params_ptr, K + 3, c, C, in_channels, K, ACC)
    bias2, scale2, shift2 = _load_kernel(params_ptr, 2 * K + 3, c, C, in_channels, 3, ACC)

    # unfinished[n * K + j]: sum so far of the output row, in column n, that needs K - 1 - j more rows
    nothing = tl.zeros((BW, BC), ACC) + bias2
    unfinished = ()
    for _ in tl.static_range(COLS * K):
        unfinished = unfinished + (nothing,)
    total = tl.zeros((BW, BC), ACC)
    squares = tl.zeros((BW, BC), ACC)
    for i in range(BH + K - 1):
        h = top - LEFT + i
        # rows outside the image are zeros to the second convolution, not what the first makes of zeros
        row = ()
        for _ in tl.static_range(COLS):
            row = row + (tl.zeros((BW, BC), ACC),)
        if (h >= 0) & (h < H):
            row_ptr = _row(x_ptr, image, h, W, C, ALIGNED)
            tiles = _load_neighbours(row_ptr, w, c, W, C, in_channels, LEFT, K + COLS - 1, ALIGNED, ACC)
            row = ()
            for n in tl.static_range(COLS):
                row = row + (_activate(_dot(conv1, tiles, bias1, K, n), ACT) * scale1 + shift1,)
        y = ()
        shifted = ()
        for n in tl.static_range(COLS):
            y = y + (unfinished[n * K] + conv2[K - 1] * row[n],)
            for j in tl.static_range(K - 1):
                shifted = shifted + (unfinished[n * K + j + 1] + conv2[K - 2 - j] * row[n],)
            shifted = shifted + (nothing,)
        unfinished = shifted
        h -= RIGHT
        if (h >= top) & (h < H):
            for n in tl.static_range(COLS):
                offset = tl.multiple_of((w + n) * C + c, (1, ALIGNED))
                inside = in_channels & (w + n < W)
                out_ptr = _row(y_ptr, image, h, W, C, ALIGNED) + offset
                if TRAINING:
                    u = y[n].to(y_ptr.dtype.element_ty)
                    tl.store(out_ptr, u, inside)
                    u = tl.where(inside, _activate(u.to(ACC), ACT), 0)
                    total += u
                    squares += u * u
                else:
                    out = _activate(y[n], ACT) * scale2 + shift2
                    if RESIDUAL:
                        out += tl.load(_row(x_ptr, image, h, W, C, ALIGNED) + offset, inside, other=0).to(ACC)
                    tl.store(out_ptr, out.to(y_ptr.dtype.element_ty), inside)
    if TRAINING:
        _store_sums(sums_ptr, place, 0, 2, c, C, total, in_channels)
        _store_sums(sums_ptr, place, 1, 2, c, C, squares, in_channels)


@triton.jit
def _high(x):
    """ fp32 rounded to TF32: cut off instead, the rests would have up to twice the size, and all the sign of `x`."""
    return ((x.to(tl.int32, bitcast=True) + 4096) & -8192).to(tl.float32, bitcast=True)


@triton.jit
def _product(x, weight, y, PRECISION: tl.constexpr):
    if INTERPRETED and x.dtype == tl.bfloat16:  # which the interpreter would multiply as the integers of its bits
        x = x.to(tl.float32)
        weight = weight.to(tl.float32)
    if PRECISION == 'tf32x3' and x.dtype == tl.float32:
        # Triton's own takes more instructions, and keeps infinities; here they become NaN
        high, weight_high = _high(x), _high(weight)
        y = tl.dot(x - high, weight_high, y, input_precision='tf32')
        y = tl.dot(high, weight - weight_high, y, input_precision='tf32')
        return tl.dot(high, weight_high, y, input_precision='tf32')
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
        (128, 8, 3), (64, 4, 4), (64, 8, 3), (32, 4, 4), (32, 8, 3)),
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
    return {2: 'gelu_half', 4: 'gelu_single'}.get(dtype.itemsize, name) if name == 'gelu' else name


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
        columns = config['BW'] * config['COLS']
        return (N * triton.cdiv(H, config['BH']) * triton.cdiv(W, columns) * triton.cdiv(C, config['BC']),)

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
