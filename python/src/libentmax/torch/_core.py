# SPDX-License-Identifier: Apache-2.0
"""What the operators share: views of tensors, contexts, and the registration of an operator with old and new PyTorch."""
from __future__ import annotations

import threading

import torch

from .. import _c

_DTYPES = {torch.float32: _c.F32, torch.float16: _c.F16, torch.bfloat16: _c.BF16, torch.float64: _c.F64, torch.int32: _c.I32}
_contexts = {}
_making = threading.Lock()


def context(tensor):
    """The context that works on the tensor's device: on the CPU one with as many threads as torch uses now, and one for each GPU.
    Raises UnsupportedError."""
    device = tensor.device
    if device.type not in ("cpu", "cuda"):
        raise _c.UnsupportedError(f"a tensor is on {device}; libentmax.torch computes on the CPU and on CUDA devices: move it "
                                  "with .cpu() or .cuda()")
    threads = min(torch.get_num_threads(), 256)  # the most that the library has
    key = threads if device.type == "cpu" else device
    found = _contexts.get(key)
    if found is None:
        with _making:
            if key not in _contexts:
                _contexts[key] = (_c.Context(threads) if device.type == "cpu" else
                                  _c.Context(device=_c.DEVICE_CUDA, device_index=device.index))
            found = _contexts[key]
    return found


def run(tensor, function, *args):
    """Runs a function of the library, whose first argument is a context, where the tensor is. On a GPU the work is enqueued on
    torch's current stream of that device, so memory that torch hands out for it is used in order."""
    ctx = context(tensor)
    if tensor.device.type == "cuda":
        ctx.call_on(torch.cuda.current_stream(tensor.device).cuda_stream, function, ctx.handle, *args)
    else:
        ctx.call(function, ctx.handle, *args)


def view(t):
    """emx_tensor of a readable() tensor, which it does not keep alive."""
    cuda = t.device.type == "cuda"
    return _c.tensor(t.data_ptr(), _DTYPES[t.dtype], t.shape, t.stride(), _c.DEVICE_CUDA if cuda else _c.DEVICE_CPU,
                     t.device.index if cuda else 0)


def synchronize(device: torch.device | str | int | None = None) -> None:
    """Waits for this package's work on a CUDA device (None: the current one), on torch's current stream.

    What a GPU finds out too late for an error of the call itself, a target that is no class or an alpha of one row out of range,
    makes that row NaN, and the first such fault is raised here: InvalidError. On the CPU there is nothing to wait for.
    """
    ctx = context(torch.empty(0, device="cuda" if device is None else device))
    if not ctx.on_cpu:
        stream = torch.cuda.current_stream(None if device is None else device).cuda_stream
        ctx.call_on(stream, _c.lib.emx_ctx_sync, ctx.handle)


def in_place(tensor):
    """Whether the library can use the tensor's memory as it is: positive strides, the last one 1."""
    shape, strides = tensor.shape, tensor.stride()
    return (len(shape) == 0 or shape[-1] == 1 or strides[-1] == 1) and all(
        n == 1 or s > 0 for n, s in zip(shape, strides)) and tensor.data_ptr() % tensor.element_size() == 0


def readable(tensor, name):
    """The tensor itself where the library can read it in place, else a contiguous copy."""
    if tensor.dtype not in _DTYPES:
        raise _c.DtypeError(f"{name} has dtype {tensor.dtype}; float32, float64, float16 and bfloat16 are possible")
    context(tensor)  # raises where it is on no device of ours
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.numel() == 0:
        return tensor.new_empty(tensor.shape)
    return tensor if in_place(tensor) else tensor.clone(memory_format=torch.contiguous_format)


def fill(struct, **tensors):
    """Sets tensor fields of a struct from readable() tensors, which it does not keep alive; None leaves a field NULL."""
    return _c.fill(struct, **{name: view(t) for name, t in tensors.items() if t is not None})


def fine(dtype):
    """The dtype of thresholds and losses that goes with scores of `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _setup_nothing(ctx, inputs, output):
    pass


def no_derivative(ctx, *_):
    raise _c.UnsupportedError("libentmax.torch has second derivatives of entmax and budget by the scores, and first ones of the "
                              "rest")


def operator(name, schema, fake, setup_context=_setup_nothing, backward=no_derivative):
    """Makes an operator of a function of tensors and numbers.

    fake: the same from shapes alone. setup_context(ctx, inputs, output) and backward(ctx, *gradients): its derivative, as
    torch.library.register_autograd takes them.
    """
    def register(function):
        if hasattr(torch.library, "register_autograd"):
            # Not torch.library.custom_op, which does these four but loads all of torch.compile, for a second, on the first call.
            full = "libentmax::" + name
            torch.library.define(full, schema, tags=torch.Tag.pt2_compliant_tag)
            torch.library.impl(full, "default", function)
            torch.library.register_fake(full, fake)
            torch.library.register_autograd(full, backward, setup_context=setup_context)
            return getattr(torch.ops.libentmax, name).default

        def forward(ctx, *inputs):
            output = function(*inputs)
            setup_context(ctx, inputs, output)
            return output
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return type(name, (torch.autograd.Function,), methods).apply
    return register


def no_gradient(value, name, function):
    """Refuses a tensor whose gradient somebody would wait for in vain."""
    if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
        raise _c.UnsupportedError(f"{function} has no gradient by {name}; pass {name}.detach()")
