# SPDX-License-Identifier: Apache-2.0
"""What the operators share: views of tensors, contexts, and the registration of an operator with old and new PyTorch."""
import torch

from .. import _c

_DTYPES = {torch.float32: _c.F32, torch.float16: _c.F16, torch.bfloat16: _c.BF16, torch.float64: _c.F64, torch.int32: _c.I32}
_contexts = {}


def context(tensor):
    """The context that works on the tensor's device, with as many threads as torch uses now. Raises UnsupportedError."""
    if tensor.device.type != "cpu":
        raise _c.UnsupportedError(f"a tensor is on {tensor.device}; libentmax.torch computes on the CPU in this version: move it "
                                  "with .cpu()")
    threads = min(torch.get_num_threads(), 256)  # the most that the library has
    found = _contexts.get(threads)
    return found or _contexts.setdefault(threads, _c.Context(threads))


def run(tensor, function, *args):
    """Runs a function of the library, whose first argument is a context, where the tensor is."""
    ctx = context(tensor)
    ctx.call(function, ctx.handle, *args)


def readable(tensor, name):
    """The tensor itself where the library can read it in place, else a contiguous copy."""
    if tensor.dtype not in _DTYPES:
        raise _c.DtypeError(f"{name} has dtype {tensor.dtype}; float32, float64, float16 and bfloat16 are possible")
    if tensor.device.type != "cpu":
        context(tensor)  # raises
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    if tensor.numel() == 0:
        return tensor.new_empty(tensor.shape)
    shape, strides = tensor.shape, tensor.stride()
    in_place = (len(shape) == 0 or shape[-1] == 1 or strides[-1] == 1) and all(
        n == 1 or s > 0 for n, s in zip(shape, strides)) and tensor.data_ptr() % tensor.element_size() == 0
    return tensor if in_place else tensor.clone(memory_format=torch.contiguous_format)


def fill(struct, **tensors):
    """Sets tensor fields of a struct from readable() tensors, which it does not keep alive; None leaves a field NULL."""
    return _c.fill(struct, **{name: _c.tensor(t.data_ptr(), _DTYPES[t.dtype], t.shape, t.stride())
                              for name, t in tensors.items() if t is not None})


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
