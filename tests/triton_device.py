""" Where tests of Triton kernels run: on a GPU, or on the CPU by Triton's interpreter, in a process of its own.

`TRITON_INTERPRET` counts at the definition of a kernel, and kernels so defined cannot be compiled: a test module's
tests marked `runs_kernels` are run by `run_interpreted` in a second process, and on a GPU in the first as well.
"""
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

triton = pytest.importorskip('triton')
INTERPRETED = os.environ.get('TRITON_INTERPRET') == '1'
HAS_CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = 'cuda' if HAS_CUDA else 'cpu'
TOLERANCE = 1e-4 if HAS_CUDA else 1e-5  # relative, of fp32
torch.backends.cudnn.allow_tf32 = False  # the plain layers are the reference
torch.backends.cudnn.deterministic = True  # and some tests run them twice

runs_kernels = pytest.mark.cuda if HAS_CUDA else pytest.mark.skipif(
    not INTERPRETED, reason='test_interpreted runs this on the CPU')
not_interpreted = pytest.mark.skipif(INTERPRETED, reason='not for the interpreter')
cuda = [pytest.mark.cuda, pytest.mark.skipif(not HAS_CUDA, reason='needs a GPU')]

if INTERPRETED:
    from triton import language as tl
    from triton.runtime import interpreter

    patch_lang, patch_lang_tensor = interpreter._patch_lang, interpreter._patch_lang_tensor
    scope = SimpleNamespace(__globals__=dict(tl=tl, core=tl.core))  # what a kernel and all that it calls are written in

    def _patch_lang(function):
        # Triton does it again at each call of a function within a kernel, which takes long.
        return patch_lang(scope) if tl.core.is_builtin(tl.load) else None

    def _patch_lang_tensor(tensor, *args):
        patch_lang_tensor(tensor, *args)
        # the interpreter of Triton 3.6 makes an int of an array with one element, which NumPy 2.5 refuses
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang, interpreter._patch_lang_tensor = _patch_lang, _patch_lang_tensor
    # Its check of integers takes long, and without `debug`, which it does not set, asserts nothing.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=builder.options.debug)
    create_dot = builder.create_dot

    def _create_dot(a, b, d, input_precision, *args):
        # It multiplies in full precision; tensor cores ignore the bits that TF32 does not have.
        if input_precision == interpreter._ir.INPUT_PRECISION.TF32 and a.data.dtype == np.float32:
            a, b = (interpreter.TensorHandle((x.data.view(np.int32) & -8192).view(np.float32), x.dtype) for x in (a, b))
        return create_dot(a, b, d, input_precision, *args)

    builder.create_dot = _create_dot


def run_interpreted(path):
    env = {**os.environ, 'TRITON_INTERPRET': '1', 'CUDA_VISIBLE_DEVICES': ''}
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-x', path], cwd=ROOT, env=env, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert ' passed' in run.stdout


def compile_kernel(kernel, arguments, constants, aligned, capability, num_warps, num_stages):
    """ Compile a kernel for a GPU that need not be there.

    Args:
        kernel: Kernel, not autotuned.
        arguments: Types of its pointers, and other arguments that are not i32.
        constants: Values of its constants; others than its own are left out.
        aligned: Names of the arguments known to be multiples of 16.
        capability: Compute capability.
        num_warps: Number of warps.
        num_stages: Number of stages of pipelined loops.

    Returns:
        Bytes of shared memory, and of local memory that a thread needs for what it has no registers for.
    """
    signature = {
        name: 'constexpr' if name in constants else arguments.get(name, 'i32') for name in kernel.arg_names}
    compiled = triton.compile(
        triton.compiler.ASTSource(
            kernel, signature, {name: constants[name] for name in kernel.arg_names if name in constants},
            attrs={(kernel.arg_names.index(name),): [['tt.divisibility', 16]] for name in aligned
                   if signature.get(name, 'constexpr') != 'constexpr'}),
        target=triton.backends.compiler.GPUTarget('cuda', capability, 32),
        options=dict(num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True))
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage = subprocess.run(
            [triton.knobs.nvidia.cuobjdump.path, '--dump-resource-usage', file.name],
            check=True, capture_output=True, text=True).stdout
    return compiled.metadata.shared, int(re.search(r'STACK:(\d+)', usage)[1])
