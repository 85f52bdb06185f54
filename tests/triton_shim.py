"""bf16 and tf32 in Triton's interpreter, which otherwise computes with the bits of a bf16 as if they were an integer.

A bf16 value is held as a float32 that is rounded to bf16 whenever a result is made: after a load, a cast, a dot and
every elementwise operation, which are the places where a GPU rounds. Only memory holds the 16 bits. The operands of a
dot with `input_precision` tf32, the default, lose the bits that the tensor cores of a GPU drop: exact fp32 products
would hide a missing "ieee". Written for Triton 3.6 to 3.9; `install` raises where the interpreter is built otherwise.

It also makes the interpreter about twice as fast: the language is patched once for a launch, not for each call of a
function in a kernel, and sums of integers are not computed again in int64 for an assertion that nobody turns on.
"""

import contextlib
import dataclasses
import functools

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
_original = {}
_numpy = {}


def install():
    """Patches the interpreter, once for the process."""
    if _original:
        return
    handle = interpreter.TensorHandle
    needed = ["create_masked_load", "create_masked_store", "cast_impl", "create_fp_to_fp", "create_bitcast"]
    needed += ["create_dot", "create_fabs", "create_atomic_rmw", "create_atomic_cas"]
    missing = [name for name in needed if not hasattr(BUILDER, name)]
    if missing or not hasattr(interpreter, "_get_np_dtype") or not hasattr(handle, "__post_init__"):
        raise RuntimeError(f"the interpreter of this Triton lacks {missing or 'what it had'}: adapt triton_shim.py")
    _original.update({name: getattr(BUILDER, name) for name in needed})
    _original["np_dtype"] = interpreter._get_np_dtype
    _original["fits"] = interpreter._validate_np_data_size
    _original["made"] = handle.__post_init__
    interpreter._get_np_dtype = np_dtype
    interpreter._validate_np_data_size = fits
    handle.__post_init__ = made
    BUILDER.get_bf16 = lambda self, value: handle(np.array([value], dtype=np.float32), tl.bfloat16)
    interpreter._patch_lang = patched_once(interpreter._patch_lang)
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    interpreter._patch_lang_tensor = with_index(interpreter._patch_lang_tensor)
    BUILDER.create_masked_load = load
    BUILDER.create_masked_store = store
    BUILDER.cast_impl = cast
    BUILDER.create_fp_to_fp = fp_to_fp
    BUILDER.create_bitcast = bitcast
    BUILDER.create_fabs = fabs
    BUILDER.create_dot = dot
    BUILDER.create_atomic_rmw = no_atomics(BUILDER.create_atomic_rmw)
    BUILDER.create_atomic_cas = no_atomics(BUILDER.create_atomic_cas)


# ------------------------------------------------------------------------------------------------------------- numbers


def round_bf16(x):
    """float32 to the nearest bf16, ties to even, as float32; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    rounded = rounded.view(np.float32).reshape(x.shape)
    return np.where(np.isnan(x), x, rounded)


def truncate_bf16(x):
    """float32 to bf16 towards zero, as float32."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32).reshape(x.shape)


def to_bits(x):
    """The 16 bits of values that are bf16 already."""
    bits = (np.ascontiguousarray(x, dtype=np.float32).view(np.uint32) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), bits.reshape(x.shape))


def from_bits(bits):
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(bits.shape)


def round_tf32(x):
    """float32 to the 10 bits of mantissa of tf32, ties away from zero as cvt.rna does."""
    bits = (np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), bits.view(np.float32).reshape(x.shape), x)


# ------------------------------------------------------------------------------------------------------ the interpreter


def np_dtype(dtype):
    scalar = dtype.scalar
    if isinstance(scalar, tl.pointer_type):
        return np.dtype(np.uint64)
    if scalar.name not in _numpy:
        _numpy[scalar.name] = np.dtype(np.float32) if scalar == tl.bfloat16 else _original["np_dtype"](scalar)
    return _numpy[scalar.name]


def fits(array, dtype):
    if not isinstance(dtype, tl.pointer_type) and dtype.scalar == tl.bfloat16 and array.dtype == np.float32:
        return True
    return _original["fits"](array, dtype)


def made(handle):
    """Every bf16 result is rounded as it is made. (The label may be bf16 on the booleans of a comparison, too.)"""
    _original["made"](handle)
    if handle.dtype == tl.bfloat16 and handle.data.dtype == np.float32:
        handle.data = round_bf16(handle.data)


def load(self, ptrs, mask, other, *more, **named):
    if ptrs.get_element_ty() != tl.bfloat16:
        return _original["create_masked_load"](self, ptrs, _masks(mask), other, *more, **named)
    handle = interpreter.TensorHandle
    as_bits = handle(ptrs.data, tl.pointer_type(tl.uint16))
    other = None if other is None else handle(to_bits(np.asarray(other.data)), tl.uint16)
    got = _original["create_masked_load"](self, as_bits, _masks(mask), other, *more, **named)
    return handle(from_bits(got.data), tl.bfloat16)


def store(self, ptrs, value, mask, *more, **named):
    if ptrs.get_element_ty() == tl.bfloat16:
        bits = to_bits(round_bf16(np.asarray(value.data, dtype=np.float32)))
        ptrs = interpreter.TensorHandle(ptrs.data, tl.pointer_type(tl.uint16))
        value = interpreter.TensorHandle(bits, tl.uint16)
    return _original["create_masked_store"](self, ptrs, value, _masks(mask), *more, **named)


def _masks(mask):
    """As a handle of booleans: descriptors hand over a plain array, a constant may be an integer (3.9 refuses that)."""
    data = np.asarray(mask if isinstance(mask, np.ndarray) else mask.data)
    return interpreter.TensorHandle(data.astype(bool, copy=False), tl.int1)


def cast(self, src, dst_type):
    """Between bf16 and others through float32. The data decides, not the label, for the reason in `made`."""
    scalars = (src.dtype.scalar, dst_type.scalar)
    if tl.bfloat16 not in scalars or isinstance(dst_type.scalar, tl.pointer_type):
        return _original["cast_impl"](self, src, dst_type)
    with np.errstate(over="ignore", invalid="ignore"):
        return interpreter.TensorHandle(src.data.astype(np_dtype(dst_type)), dst_type.scalar)


def fp_to_fp(self, src, dst_type, rounding_mode):
    """With a rounding mode: nearest or towards zero."""
    handle = interpreter.TensorHandle
    source, target = src.dtype.scalar, dst_type.scalar
    if tl.bfloat16 not in (source, target):
        return _original["create_fp_to_fp"](self, src, dst_type, rounding_mode)
    wide = handle(src.data, tl.float32) if source == tl.bfloat16 else cast(self, src, tl.float32)
    if target != tl.bfloat16:
        return wide if target == tl.float32 else _original["create_fp_to_fp"](self, wide, dst_type, rounding_mode)
    towards_zero = rounding_mode is not None and rounding_mode == ir.ROUNDING_MODE.RTZ
    return handle((truncate_bf16 if towards_zero else round_bf16)(wide.data), tl.bfloat16)


def bitcast(self, src, dst_type):
    source, target = src.dtype.scalar, dst_type.scalar
    if source == tl.bfloat16 and target != tl.bfloat16:
        src = interpreter.TensorHandle(to_bits(src.data), tl.uint16)
    if target == tl.bfloat16 and source != tl.bfloat16:
        return interpreter.TensorHandle(from_bits(np.ascontiguousarray(src.data).view(np.uint16)), tl.bfloat16)
    return _original["create_bitcast"](self, src, dst_type)


def fabs(self, arg):
    return interpreter.TensorHandle(np.abs(arg.data), arg.dtype.scalar)


def dot(self, a, b, d, input_precision, *more, **named):
    single = [np.float32 == x.data.dtype and x.dtype.scalar == tl.float32 for x in (a, b)]
    if all(single) and input_precision == ir.INPUT_PRECISION.TF32:
        a, b = (interpreter.TensorHandle(round_tf32(x.data), tl.float32) for x in (a, b))
    with np.errstate(over="ignore", invalid="ignore"):
        return _original["create_dot"](self, a, b, d, input_precision, *more, **named)


@functools.cache
def languages_of(fn):
    return frozenset(n for n, x in (("tl", tl), ("core", tl.core)) if any(x is y for y in fn.__globals__.values()))


def patched_once(original):
    """Within a launch, what the launch has patched stays so: functions that a kernel calls find it as it should be."""
    done = set()

    def patch(fn):
        languages = languages_of(fn)
        if languages <= done:
            return contextlib.ExitStack()
        scope = original(fn)
        if scope is None:  # an older Triton, which never goes back
            return None
        new = languages - done
        done.update(new)
        restore = scope.restore

        def back():
            restore()
            done.difference_update(new)

        scope.restore = back
        return scope

    return patch


def with_index(original):
    """Triton 3.6 makes an integer of an array of one element, which numpy 2.4 refuses: loops over a scalar need it."""

    def patch(tensor, *more):
        original(tensor, *more)
        tensor.__index__ = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])

    return patch


def no_atomics(original):
    """bf16 has few atomics on a GPU and none here: partial sums are kept in fp32."""

    @functools.wraps(original)
    def checked(self, *args, **named):
        pointers = [x for x in args if isinstance(x, interpreter.TensorHandle)]
        if any(x.get_element_ty() == tl.bfloat16 for x in pointers):
            raise NotImplementedError("atomic operations on bf16: accumulate in fp32")
        return original(self, *args, **named)

    return checked
