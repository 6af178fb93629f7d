# SPDX-License-Identifier: Apache-2.0
"""The C interface of emx.h and emx_model.h through ctypes: structs, prototypes, errors, contexts.

The library is searched beside this file (wheels bundle it), then where LIBENTMAX_LIBRARY points (a file, or the folder of
libentmax.so and libentmax_model.so), then where the system's loader looks. libentmax_model is loaded when it is first needed.
tests/python/test_header.py compares every struct, constant and prototype here with the headers.
"""
import ctypes
import os
import signal
import threading
import weakref
from ctypes import (CFUNCTYPE, POINTER, byref, c_char, c_char_p, c_double, c_float, c_int32, c_int64, c_size_t, c_uint8, c_uint16,
                    c_uint32, c_uint64, c_void_p)
from pathlib import Path

import numpy as np

ABI_VERSION = 1

# ------------------------------------------------------------------------------------------------------------- constants

CONSTANTS = {
    "EMX_F32": 1, "EMX_F16": 2, "EMX_BF16": 3, "EMX_F64": 4, "EMX_I32": 5,
    "EMX_DEVICE_CPU": 0, "EMX_DEVICE_CUDA": 1,
    "EMX_LAYOUT_BHND": 0, "EMX_LAYOUT_BNHD": 1,
    "EMX_MAP_ENTMAX": 0, "EMX_MAP_NORMMAX": 1, "EMX_MAP_BUDGET": 2,
    "EMX_REDUCE_NONE": 0, "EMX_REDUCE_SUM": 1, "EMX_REDUCE_MEAN": 2,
    "EMX_ATTN_CAUSAL": 1, "EMX_PASS_FORWARD": 0, "EMX_PASS_BACKWARD": 1,
    "EMX_SUMMARY_MINMAX": 1, "EMX_SUMMARY_MOMENTS": 2, "EMX_SUMMARY_SKETCH": 4, "EMX_SUMMARY_RESIDUAL": 8,
    "EMX_KV_MEMORY_DEVICE": 0, "EMX_KV_MEMORY_HOST": 1,
    "EMX_SELECT_ALL": 0, "EMX_SELECT_TOPK": 1, "EMX_SELECT_GAUSSIAN": 2, "EMX_SELECT_CERTIFIED": 3, "EMX_SELECT_PAGES": 4,
    "EMX_TAU_EXACT": 0, "EMX_TAU_CORRECTED": 1, "EMX_TAU_FIXED": 2,
    "EMX_STOP_DONE": 0, "EMX_STOP_BUDGET": 1, "EMX_STOP_BYTES": 2, "EMX_STOP_DELTA": 3,
    "EMX_PATH_ALL": 0, "EMX_PATH_PAGES": 1, "EMX_PATH_LADDER": 2,
    "EMX_REPORT_CERTIFIED": 1, "EMX_REPORT_NONFINITE": 2,
    "EMX_ERR_INVALID": -1, "EMX_ERR_SHAPE": -2, "EMX_ERR_DTYPE": -3, "EMX_ERR_UNSUPPORTED": -4, "EMX_ERR_NOMEM": -5,
    "EMX_ERR_WORKSPACE": -6, "EMX_ERR_IO": -7, "EMX_ERR_FORMAT": -8, "EMX_ERR_DEVICE": -9, "EMX_ERR_STATE": -10,
    "EMX_ERR_CANCELLED": -11, "EMX_ERR_NONFINITE": -12, "EMX_ERR_INTERNAL": -13,
    "EMX_MAX_DIMS": 5, "EMX_ABI_VERSION": ABI_VERSION,
}
globals().update((name[4:], value) for name, value in CONSTANTS.items() if name != "EMX_ABI_VERSION")

# -------------------------------------------------------------------------------------------------------------- structs


class Tensor(ctypes.Structure):
    """emx_tensor: a borrowed view. Whoever makes one keeps the memory alive."""
    _fields_ = [("data", c_void_p), ("dtype", c_int32), ("device", c_int32), ("ndim", c_int32), ("device_index", c_int32),
                ("shape", c_int64 * 5), ("stride", c_int64 * 5)]


_PT = POINTER(Tensor)


class CtxOpts(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("device", c_int32), ("device_index", c_int32), ("threads", c_int32),
                ("stream", c_void_p), ("parallel_for", c_void_p), ("parallel_user", c_void_p)]


class CtxInfo(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("device", c_int32), ("threads", c_int32), ("reserved", c_int32), ("isa", c_char * 32),
                ("device_name", c_char * 128)]


class EntmaxDesc(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("kind", c_int32), ("alpha", c_double), ("budget", c_double)]


class EntmaxIo(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("reserved", c_uint32), ("x", _PT), ("p", _PT), ("tau", _PT), ("support", _PT),
                ("dp", _PT), ("dx", _PT), ("alpha", _PT), ("d_alpha", _PT), ("budget", _PT)]


class LossIo(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("ignore_index", c_int32), ("reduction", c_int32), ("reserved", c_int32), ("x", _PT),
                ("target", _PT), ("loss", _PT), ("total", _PT), ("support", _PT), ("d_loss", _PT), ("dx", _PT)]


class AttnDesc(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("flags", c_uint32), ("alpha", c_double), ("scale", c_float), ("layout", c_int32),
                ("window_left", c_int32), ("window_right", c_int32)]


class AttnIo(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("reserved", c_uint32)] + [(name, _PT) for name in (
        "q", "k", "v", "o", "tau", "support", "alibi_slopes", "block_table", "seqlens_q", "seqlens_k", "cu_seqlens_q",
        "cu_seqlens_k", "d_o", "d_q", "d_k", "d_v", "lse", "alphas", "d_alpha", "support_index")]


class KvOpts(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("dtype", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32),
                ("page_size", c_int32), ("layout", c_int32), ("summaries", c_int32), ("max_seqs", c_int32),
                ("max_pages", c_int64), ("k_pool", _PT), ("v_pool", _PT), ("file", c_char_p), ("kv_memory", c_int32),
                ("reserved", c_int32)]


class KvInfo(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("dtype", c_int32), ("kv_heads", c_int32), ("head_dim", c_int32),
                ("page_size", c_int32), ("layout", c_int32), ("summaries", c_int32), ("seqs", c_int32), ("max_pages", c_int64),
                ("free_pages", c_int64), ("bytes_kv", c_int64), ("bytes_summary", c_int64)]


class KvBatch(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("batch", c_int32), ("seqs", POINTER(c_int32)), ("block_table", _PT),
                ("seq_lens", _PT), ("max_len", c_int64)]


class KvSummary(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("valid", c_int32), ("tokens", c_int32), ("nonfinite", c_int32), ("min", c_void_p),
                ("max", c_void_p), ("mean", POINTER(c_float)), ("m2", POINTER(c_float)), ("radius", c_float),
                ("reserved", c_int32)]


class SelectDesc(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("kind", c_int32), ("tau_mode", c_int32), ("tau_steps", c_int32), ("budget", c_int64),
                ("max_bytes", c_int64), ("max_delta", c_double), ("max_quantile", c_float), ("safety_margin", c_float),
                ("excess_margin", c_float), ("reserved", c_int32)]


class Report(ctypes.Structure):
    _fields_ = [("tau", c_float), ("delta_bound", c_float), ("mass", c_float), ("max_unread", c_float), ("support", c_int32),
                ("tokens", c_int32), ("pages", c_int32), ("select", c_uint8), ("path", c_uint8), ("stopped_by", c_uint8),
                ("flags", c_uint8), ("bytes_k", c_int64), ("bytes_v", c_int64), ("bytes_meta", c_int64), ("reserved", c_int64)]


class DecodeIo(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("layout", c_int32), ("alpha", c_double), ("scale", c_float), ("reserved", c_int32),
                ("q", _PT), ("k_new", _PT), ("v_new", _PT), ("o", _PT), ("alibi_slopes", _PT), ("pages", _PT), ("n_pages", _PT),
                ("bound", _PT), ("reports", c_void_p), ("report_stride", c_int64), ("alphas", _PT), ("support_index", _PT),
                ("support_weight", _PT), ("support_count", _PT)]


class ModelConfig(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32)] + [(name, c_int32) for name in (
        "vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "position_type",
        "alibi_num_heads", "alibi_slope_type", "attn_scale_type", "tie_word_embeddings", "max_position")] + [
        (name, c_double) for name in ("rms_norm_eps", "entmax_alpha", "rope_theta", "focal_temperature")] + [
        ("focal_learned", c_int32), ("alpha_learned", c_int32), ("alibi_slopes", c_double * 128), ("task", c_int32),
        ("reserved", c_int32)]


class SessionOpts(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("kv_dtype", c_int32), ("page_size", c_int32), ("summaries", c_int32),
                ("chunk", c_int32), ("max_sessions", c_int32), ("max_tokens", c_int64), ("kv_file", c_char_p)]


class SessionStats(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("nonfinite", c_int32), ("tokens", c_int64), ("rows", c_int64), ("certified", c_int64),
                ("support_sum", c_double), ("delta_bound_sum", c_double), ("delta_bound_max", c_double), ("mass_min", c_double),
                ("mass_max", c_double), ("bytes_k", c_int64), ("bytes_v", c_int64), ("bytes_meta", c_int64),
                ("bytes_full", c_int64), ("attn_seconds", c_double), ("seconds", c_double), ("paths", c_int64 * 3)]


class SessionSupport(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("reserved", c_int32), ("capacity", c_int64), ("index", c_void_p), ("weight", c_void_p),
                ("count", c_void_p), ("reports", c_void_p)]


class SampleOpts(ctypes.Structure):
    _fields_ = [("struct_size", c_uint32), ("top_k", c_int32), ("temperature", c_float), ("top_p", c_float), ("seed", c_uint64)]


# The header's name of every struct above.
STRUCTS = {"emx_tensor": Tensor, "emx_ctx_opts": CtxOpts, "emx_ctx_info": CtxInfo, "emx_entmax_desc": EntmaxDesc,
           "emx_entmax_io": EntmaxIo, "emx_loss_io": LossIo, "emx_attn_desc": AttnDesc, "emx_attn_io": AttnIo,
           "emx_kv_opts": KvOpts, "emx_kv_info": KvInfo, "emx_kv_batch": KvBatch, "emx_kv_summary": KvSummary,
           "emx_select_desc": SelectDesc, "emx_report": Report, "emx_decode_io": DecodeIo, "emx_model_config": ModelConfig,
           "emx_session_opts": SessionOpts, "emx_session_support": SessionSupport, "emx_session_stats": SessionStats,
           "emx_sample_opts": SampleOpts}
_HEADER_NAMES = {struct: name for name, struct in STRUCTS.items()}

# ------------------------------------------------------------------------------------------------------------ prototypes

_P = c_void_p  # opaque handles
_PP = POINTER(c_void_p)
_S = c_int32  # emx_status
_PI32, _PI64, _PF = POINTER(c_int32), POINTER(c_int64), POINTER(c_float)
Progress = CFUNCTYPE(None, c_void_p, c_int64, c_int64)


def _init(struct):
    return None, (POINTER(struct), c_size_t)


CORE = {
    "emx_version": (c_char_p, ()), "emx_abi_version": (c_int32, ()), "emx_status_name": (c_char_p, (_S,)),
    "emx_last_error": (c_char_p, ()),
    "emx_ctx_opts_init_sized": _init(CtxOpts), "emx_ctx_create": (_S, (POINTER(CtxOpts), _PP)), "emx_ctx_destroy": (None, (_P,)),
    "emx_ctx_set_stream": (_S, (_P, _P)), "emx_ctx_sync": (_S, (_P,)),
    "emx_ctx_get_info": (_S, (_P, POINTER(CtxInfo))), "emx_ctx_cancel": (None, (_P,)), "emx_ctx_resume": (None, (_P,)),
    "emx_entmax_desc_init_sized": _init(EntmaxDesc), "emx_entmax_io_init_sized": _init(EntmaxIo),
    "emx_entmax_forward": (_S, (_P, POINTER(EntmaxDesc), POINTER(EntmaxIo))),
    "emx_entmax_backward": (_S, (_P, POINTER(EntmaxDesc), POINTER(EntmaxIo))),
    "emx_loss_io_init_sized": _init(LossIo), "emx_entmax_loss": (_S, (_P, POINTER(EntmaxDesc), POINTER(LossIo))),
    "emx_attn_desc_init_sized": _init(AttnDesc), "emx_attn_io_init_sized": _init(AttnIo),
    "emx_attn_workspace_size": (_S, (_P, POINTER(AttnDesc), POINTER(AttnIo), c_int32, POINTER(c_size_t))),
    "emx_attn_forward": (_S, (_P, POINTER(AttnDesc), POINTER(AttnIo), c_void_p, c_size_t)),
    "emx_attn_backward": (_S, (_P, POINTER(AttnDesc), POINTER(AttnIo), c_void_p, c_size_t)),
    "emx_kv_opts_init_sized": _init(KvOpts), "emx_kv_create": (_S, (_P, POINTER(KvOpts), _PP)), "emx_kv_destroy": (None, (_P,)),
    "emx_kv_get_info": (_S, (_P, POINTER(KvInfo))), "emx_seq_create": (_S, (_P, _PI32)),
    "emx_seq_fork": (_S, (_P, c_int32, _PI32)), "emx_seq_truncate": (_S, (_P, c_int32, c_int64)),
    "emx_seq_destroy": (_S, (_P, c_int32)), "emx_seq_copy": (_S, (_P, c_int32, _P, _PI32)), "emx_seq_length": (_S, (_P, c_int32, _PI64)),
    "emx_seq_block_table": (_S, (_P, c_int32, POINTER(_PI32), _PI64)), "emx_kv_batch_init_sized": _init(KvBatch),
    "emx_kv_append": (_S, (_P, _P, POINTER(KvBatch), _PT, _PT, _PT)),
    "emx_kv_get_summary": (_S, (_P, c_int32, c_int32, POINTER(KvSummary))),
    "emx_select_desc_init_sized": _init(SelectDesc), "emx_decode_io_init_sized": _init(DecodeIo),
    "emx_decode_workspace_size": (_S, (_P, _P, POINTER(SelectDesc), POINTER(DecodeIo), c_int64, POINTER(c_size_t))),
    "emx_select": (_S, (_P, _P, POINTER(KvBatch), POINTER(SelectDesc), POINTER(DecodeIo), c_void_p, c_size_t)),
    "emx_decode": (_S, (_P, _P, POINTER(KvBatch), POINTER(SelectDesc), POINTER(DecodeIo), c_void_p, c_size_t)),
}
MODEL = {
    "emx_model_open": (_S, (_P, c_char_p, _PP)), "emx_model_close": (None, (_P,)),
    "emx_model_get_config": (_S, (_P, POINTER(ModelConfig))), "emx_session_opts_init_sized": _init(SessionOpts),
    "emx_session_create": (_S, (_P, POINTER(SessionOpts), _PP)), "emx_session_destroy": (None, (_P,)),
    "emx_session_prefill": (_S, (_P, _PI32, c_int64, _PF, _PF, Progress, c_void_p)),
    "emx_session_set_select": (_S, (_P, POINTER(SelectDesc))), "emx_session_decode": (_S, (_P, c_int32, _PF)),
    "emx_session_set_support": (_S, (_P, POINTER(SessionSupport))),
    "emx_session_get_stats": (_S, (_P, POINTER(SessionStats))),
    "emx_kv_save": (_S, (_P, _PI32, c_int32, c_char_p, Progress, c_void_p)),
    "emx_kv_load": (_S, (_P, c_char_p, _PI32, c_int32, _PI32, Progress, c_void_p)),
    "emx_sample_opts_init_sized": _init(SampleOpts),
    "emx_sample": (_S, (_PF, c_int32, POINTER(SampleOpts), c_int64, _PI32)),
}

# ---------------------------------------------------------------------------------------------------------------- errors


class Error(Exception):
    """A call of the library failed. `status` is its number, `status_name` its name; the text is the library's sentence."""

    def __init__(self, sentence, status=CONSTANTS["EMX_ERR_INVALID"], status_name="EMX_ERR_INVALID"):
        super().__init__(sentence)
        self.status = status
        self.status_name = status_name

    def __reduce__(self):
        return type(self), (str(self), self.status, self.status_name)


class InvalidError(Error, ValueError):
    """An argument has no meaning."""


class ShapeError(Error, ValueError):
    """Shapes or strides contradict each other."""

    def __init__(self, sentence, status=CONSTANTS["EMX_ERR_SHAPE"], status_name="EMX_ERR_SHAPE"):
        super().__init__(sentence, status, status_name)


class DtypeError(Error, TypeError):
    """A dtype is not accepted here, or dtypes that must agree do not."""

    def __init__(self, sentence, status=CONSTANTS["EMX_ERR_DTYPE"], status_name="EMX_ERR_DTYPE"):
        super().__init__(sentence, status, status_name)


class UnsupportedError(Error, NotImplementedError):
    """Meaningful, but this back end cannot do it; the sentence names the nearest thing it can."""


class OutOfMemoryError(Error, MemoryError):
    """Out of memory; the sentence has the number of bytes."""


class FileError(Error):
    """The operating system refused to read or write, or a file is not what it claims to be."""


class StateError(Error):
    """The handle is not in a state that allows this: unknown sequence, no free page, closed."""

    def __init__(self, sentence, status=CONSTANTS["EMX_ERR_STATE"], status_name="EMX_ERR_STATE"):
        super().__init__(sentence, status, status_name)


class Cancelled(Error):
    """Context.cancel() was called, or Ctrl-C was pressed and the program's own SIGINT handler did not raise."""


_ERRORS = {"EMX_ERR_INVALID": InvalidError, "EMX_ERR_SHAPE": ShapeError, "EMX_ERR_DTYPE": DtypeError,
           "EMX_ERR_UNSUPPORTED": UnsupportedError, "EMX_ERR_NOMEM": OutOfMemoryError, "EMX_ERR_IO": FileError,
           "EMX_ERR_FORMAT": FileError, "EMX_ERR_STATE": StateError, "EMX_ERR_CANCELLED": Cancelled}

# --------------------------------------------------------------------------------------------------------------- library


def _folder():
    """Where the bundled library, or the one of LIBENTMAX_LIBRARY, lies; None: the loader's own paths."""
    bundled = Path(__file__).resolve().parent / "_lib"
    if bundled.is_dir():
        return bundled
    given = os.environ.get("LIBENTMAX_LIBRARY")
    if not given:
        return None
    path = Path(given)
    if not path.exists():
        raise ImportError(f"LIBENTMAX_LIBRARY is {given}, which does not exist")
    return path if path.is_dir() else path.parent


def _load(name, prototypes):
    folder = _folder()
    soname = f"{name}.so.{ABI_VERSION}"
    path = soname if folder is None else str(folder / soname)
    try:
        library = ctypes.CDLL(path)
    except OSError as error:
        raise ImportError(f"{path} cannot be loaded ({error}); install the wheel, install libentmax for the whole system, or set "
                          "LIBENTMAX_LIBRARY to the folder of the library") from None
    for function, (restype, argtypes) in prototypes.items():
        try:
            bound = getattr(library, function)
        except AttributeError:
            raise ImportError(f"{path} has no {function}: it is older than this package") from None
        bound.restype, bound.argtypes = restype, argtypes
    return library


lib = _load("libentmax", CORE)
if lib.emx_abi_version() != ABI_VERSION:
    raise ImportError(f"libentmax has ABI version {lib.emx_abi_version()}, this package needs {ABI_VERSION}")
library_version = lib.emx_version().decode()
_model_library = None


def model_lib():
    """libentmax_model, loaded on the first call."""
    global _model_library
    if _model_library is None:
        _model_library = _load("libentmax_model", MODEL)
    return _model_library


def check(status):
    """Raises the exception of a status other than EMX_OK, with the library's sentence."""
    if status != 0:
        name = lib.emx_status_name(status).decode()
        raise _ERRORS.get(name, Error)(lib.emx_last_error().decode("utf-8", "replace"), status, name)


def make(struct, **fields):
    """A struct with the library's defaults where it has an _init, then `fields`."""
    value = struct()
    name = _HEADER_NAMES[struct] + "_init_sized"
    if name in CORE:
        getattr(lib, name)(byref(value), ctypes.sizeof(struct))
    elif name in MODEL:
        getattr(model_lib(), name)(byref(value), ctypes.sizeof(struct))
    else:
        value.struct_size = ctypes.sizeof(struct)
    for field, content in fields.items():
        setattr(value, field, content)
    return value


# --------------------------------------------------------------------------------------------------------------- tensors

DTYPES = {"float32": 1, "float16": 2, "bfloat16": 3, "float64": 4, "int32": 5}
_SIZES = {1: 4, 2: 2, 3: 2, 4: 8, 5: 4}


def tensor(data, dtype, shape, stride, device=0, device_index=0):
    """emx_tensor of memory at address `data`; `stride` counts elements. The caller keeps the memory alive."""
    ndim = len(shape)
    if ndim > 5:
        raise ShapeError(f"{ndim} dimensions, at most 5 are possible")
    stride = [1 if n <= 1 else s for n, s in zip(shape, stride)]  # what a length of 1 is spaced by means nothing
    return Tensor(data, dtype, device, ndim, device_index, (c_int64 * 5)(*shape), (c_int64 * 5)(*stride))


def dtype_code(array, name="array"):
    """EMX_* of a NumPy array's dtype (bfloat16 is that of the ml_dtypes package). Raises DtypeError."""
    code = DTYPES.get(array.dtype.name) if array.dtype.isnative else None
    if code is None:
        raise DtypeError(f"{name} has dtype {array.dtype}; float32, float16, bfloat16 (ml_dtypes), float64 and, for indices, "
                         "int32 in the machine's byte order are possible")
    return code


def usable(array):
    """Whether the library can read or write the array where it is: positive strides of whole elements, the last one 1."""
    size = array.itemsize
    if array.size == 0:
        return True
    strides = [s for n, s in zip(array.shape, array.strides) if n > 1]
    last = array.ndim == 0 or array.shape[-1] <= 1 or array.strides[-1] == size
    return last and array.ctypes.data % size == 0 and all(s > 0 and s % size == 0 for s in strides)


def readable(array, name="array"):
    """The array itself where the library can read it in place, else a contiguous copy."""
    if hasattr(array, "__cuda_array_interface__"):
        raise InvalidError(f"{name} is on a GPU; libentmax.torch takes CUDA tensors, these functions NumPy arrays")
    array = np.asarray(array)
    dtype_code(array, name)
    return array if usable(array) else np.array(array, order="C")


def view(array):
    """emx_tensor of a usable() array, which it keeps alive; None of None."""
    if array is None:
        return None
    size = array.itemsize
    strides = [s // size for s in array.strides] if array.size else [1] * array.ndim  # an empty array's may be anything
    out = tensor(array.ctypes.data, dtype_code(array), array.shape, strides)
    out.owner = array
    return out


def fill(struct, **arrays):
    """Sets tensor fields of a struct from usable() arrays; None leaves a field NULL. The struct keeps the arrays alive."""
    for name, array in arrays.items():
        if array is not None:
            setattr(struct, name, ctypes.pointer(array if isinstance(array, Tensor) else view(array)))
    return struct


# ---------------------------------------------------------------------------------------------------- contexts and Ctrl-C


class _Interrupts:
    """Lets Ctrl-C end a call. While the main thread is inside the library Python cannot run its SIGINT handler, but its C handler
    writes the signal's number to the wakeup descriptor; a thread reads that and cancels the context. What is meant for another
    owner of the descriptor (an event loop) is passed on before the call returns."""

    def __init__(self):
        self.lock = threading.Lock()
        self.passed_on = threading.Event()
        self.context = None  # of the call that the main thread is in
        self.hit = False
        self.reader = self.writer = None
        self.previous = -1

    @staticmethod
    def wanted():
        """Whether this thread gets signals and somebody handles SIGINT in Python."""
        return threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT))

    def enter(self, context):
        if self.reader is None:
            self.reader, self.writer = os.pipe()
            os.set_blocking(self.writer, False)
            threading.Thread(target=self.watch, name="libentmax-interrupt", daemon=True).start()
        with self.lock:
            self.context, self.hit = context, False
        self.previous = signal.set_wakeup_fd(self.writer, warn_on_full_buffer=False)

    def watch(self):
        while True:
            signals = os.read(self.reader, 64)
            with self.lock:
                if signal.SIGINT in signals and self.context is not None:
                    self.hit = True
                    lib.emx_ctx_cancel(self.context.handle)
            if self.previous >= 0:
                try:
                    os.write(self.previous, signals.replace(b"\0", b""))
                except OSError:
                    pass  # full or closed: what the C handler would have met too
            if 0 in signals:
                self.passed_on.set()

    def leave(self):
        """Whether the call was cancelled."""
        signal.set_wakeup_fd(self.previous)
        if self.previous >= 0:
            self.passed_on.clear()
            os.write(self.writer, b"\0")
            self.passed_on.wait()
        with self.lock:
            self.context, self.previous = None, -1
            return self.hit


_interrupts = _Interrupts()
_contexts = weakref.WeakSet()


class Context:
    """Threads and working memory of calls. Every function takes `ctx`; None is one default context of the process.

    threads: worker threads; 0: EMX_THREADS from the environment, else the CPUs this process may run on.

    Calls of several threads on one context, or on objects made from it, run one after the other. A forked child may use it.
    Ctrl-C during a call of the main thread ends it: KeyboardInterrupt, outputs undefined, caches consistent.
    Errors: InvalidError, UnsupportedError, OutOfMemoryError.
    """

    def __init__(self, threads=0, *, device=CONSTANTS["EMX_DEVICE_CPU"], device_index=0):
        self.handle = None
        self.lock = threading.RLock()
        self.on_cpu = device == CONSTANTS["EMX_DEVICE_CPU"]
        handle = c_void_p()
        check(lib.emx_ctx_create(byref(make(CtxOpts, threads=threads, device=device, device_index=device_index)), byref(handle)))
        self.handle = handle
        _contexts.add(self)

    def __del__(self):
        if getattr(self, "handle", None):
            lib.emx_ctx_destroy(self.handle)
            self.handle = None

    def call(self, function, *args):
        """Runs a function of the library, alone on this context, with Ctrl-C as its cancel flag. Raises its error."""
        with self.lock:
            watched = self.on_cpu and _interrupts.wanted()  # a GPU's call returns at once
            try:
                if watched:
                    _interrupts.enter(self)
                status = function(*args)  # the program's SIGINT handler runs as soon as this returns
            finally:
                if watched and _interrupts.leave():
                    lib.emx_ctx_resume(self.handle)
            check(status)

    def call_on(self, stream, function, *args):
        """The same of a context on a GPU, with its work enqueued on a stream (an address)."""
        with self.lock:
            check(lib.emx_ctx_set_stream(self.handle, stream))
            self.call(function, *args)

    def cancel(self):
        """Ends the running call, and every later one until resume(), with Cancelled. For other threads."""
        lib.emx_ctx_cancel(self.handle)

    def resume(self):
        """Takes cancel() back."""
        lib.emx_ctx_resume(self.handle)

    @property
    def _info(self):
        info = make(CtxInfo)
        check(lib.emx_ctx_get_info(self.handle, byref(info)))
        return info

    @property
    def threads(self):
        """Worker threads in use."""
        return self._info.threads

    @property
    def isa(self):
        """Kernel table in use: "scalar", "avx2" or "avx512"."""
        return self._info.isa.decode()


_default = None
_default_lock = threading.Lock()


def context(ctx=None):
    """`ctx`, or the process's default context."""
    global _default
    if ctx is not None:
        return ctx
    with _default_lock:
        if _default is None:
            _default = Context()
        return _default


def run(ctx, function, *args):
    """Runs a function whose first argument is the context: `ctx`, or the default one."""
    ctx = context(ctx)
    ctx.call(function, ctx.handle, *args)


def _after_fork():
    """In a child: locks that threads of the parent may have held, and the watcher that stayed behind, are made anew."""
    global _interrupts, _default_lock
    if _interrupts.context is not None:  # another thread forked during a call of the main thread
        signal.set_wakeup_fd(-1)
    if _interrupts.reader is not None:
        os.close(_interrupts.reader)
        os.close(_interrupts.writer)
    _interrupts, _default_lock = _Interrupts(), threading.Lock()
    for ctx in list(_contexts):
        ctx.lock = threading.RLock()


os.register_at_fork(after_in_child=_after_fork)
