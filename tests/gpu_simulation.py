"""What a GPU does differently, imitated on a CPU, so that a first run on one finds nothing new.

    REFLUX_SIMULATE_GPU=1 python -m pytest tests/kernels      # conftest.py then calls `simulate`

1. Every op takes its kernel path; Triton's interpreter runs the kernels.
2. Python floats reach a kernel as fp32, as the launcher passes them; the interpreter alone would
   compute with them in float64.
3. GEMMs of 16-bit inputs take the branch for tensor cores: fp32 out of `mm` and `addmm`.

What it cannot show: times, fp32 with TF32, the order of atomics, launch limits, tensors that stayed
behind on the CPU (tests/kernels/test_fake_cuda.py shows those).
"""

import numpy as np
import torch
from close import wide_gemms


def simulate() -> None:
    """For the rest of this process. TRITON_INTERPRET must be set before."""
    from reflux.kernels import _chunks, _triton

    # the code objects, so that modules that imported the functions by name see it, too
    _triton.runs_triton.__code__ = (lambda x: True).__code__
    _chunks.on_tensor_cores.__code__ = (lambda x: x.dtype.itemsize == 2).__code__
    _floats_as_fp32()
    _gemms_with_out_dtype()


def _floats_as_fp32() -> None:
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._implicit_cvt

    def as_launched(argument):
        if not isinstance(argument, float):
            return convert(argument)
        handle = interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    interpreter._implicit_cvt = as_launched


def _gemms_with_out_dtype() -> None:
    """CPU builds of torch have no mm with out_dtype: the product is made in fp32."""
    torch.mm, torch.addmm = wide_gemms()
