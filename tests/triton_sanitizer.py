"""What Triton's interpreter does not see: reads and writes out of bounds, undefined lanes, races, int32 overflow.

Inside `sanitized()` every pointer that a launch hands to its kernel is a made-up address that tells its tensor, so an
access is checked against the elements of that very tensor, views with gaps included, however far it strays. Lanes that
a mask turns off and no `other` fills become NaN (integers a number that is out of bounds soon). Two programs of a
launch that touch the same element, one of them writing, are a race unless all writes are atomic or a scalar atomic
stands between them as release and acquire. int32 sums, differences and products must not wrap.
"""

import contextlib
import math

import numpy as np
import triton.language as tl
from triton._C.libtriton import ir
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

BUILDER = interpreter.InterpreterBuilder
SHIFT, HALF, FIRST = 44, 1 << 43, 16  # tensor n is at (FIRST + n) << SHIFT, far beyond every address of a process


class SanitizerError(AssertionError):
    """A kernel did what would go wrong, now or then, on a GPU."""


class Region:
    """One tensor of a launch: where it really is, which elements it has, what its made-up address is."""

    def __init__(self, tensor, number, name):
        self.name, self.shape = name, tuple(tensor.shape)
        self.address, self.itemsize = tensor.data_ptr(), tensor.element_size()
        # a made-up address keeps the alignment; what is reached through a table is where it is
        self.tag = self.address if number is None else ((FIRST + number) << SHIFT) + self.address % 4096
        storage = tensor.untyped_storage()
        self.storage, self.storage_bytes = storage.data_ptr(), storage.nbytes()
        strides = tensor.stride()
        empty = tensor.numel() == 0
        self.span = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(self.shape, strides, strict=True))
        self.inside = None
        if self.span != tensor.numel():  # a view with gaps (or with elements more than once)
            self.inside = np.zeros(self.span, dtype=bool)
            np.lib.stride_tricks.as_strided(self.inside, self.shape, strides)[...] = True


class Shadow:
    """Who touched each element of a storage: programs are counted from 1, 0 is nobody, −1 more than one."""

    def __init__(self, size):
        self.writer, self.epoch, self.reader = (np.zeros(size, dtype=np.int32) for _ in range(3))
        self.atomic = np.zeros(size, dtype=bool)


class Launch:
    def __init__(self, name, tensors, reachable):
        self.name, self.names = name, tensors  # {(address, shape): argument}
        self.regions, self.shadows, self.units = [], {}, {}
        self.reachable = [Region(x, None, f"reachable tensor {n}") for n, x in enumerate(reachable)]
        for region in self.reachable:
            self.units[region.storage] = min(region.itemsize, self.units.get(region.storage, 16))
        self.epochs, self.known, self.released = {}, {}, {}
        self.error = None

    def add(self, tensor):
        name = self.names.get((tensor.data_ptr(), tuple(tensor.shape)), "a tensor")
        region = Region(tensor, len(self.regions), name)
        self.regions.append(region)
        self.units[region.storage] = min(region.itemsize, self.units.get(region.storage, 16))
        return region

    def fail(self, grid, what):
        self.error = SanitizerError(f"{self.name}, program {tuple(int(x) for x in grid)}: {what}")
        raise self.error

    # ------------------------------------------------------------------------------------------------------- bounds

    def resolve(self, builder, pointers, mask, verb):
        """Real addresses in place of made-up ones, and (region, element numbers in its storage) of the live lanes."""
        data = np.asarray(pointers.data)
        live = np.broadcast_to(_data(mask), data.shape).astype(bool)
        active = data[live].astype(np.uint64)
        real, touched = active.copy(), []
        numbers = ((active + np.uint64(HALF)) >> np.uint64(SHIFT)).astype(np.int64) - FIRST
        for number in np.unique(numbers):
            chosen = numbers == number
            for region, part in self._regions(builder, number, active, chosen, verb):
                offset = (active[part] - np.uint64(region.tag)).view(np.int64)
                self._bounds(builder, region, offset, verb)
                real[part] = (offset + region.address).astype(np.uint64)
                element = (offset + region.address - region.storage) // self.units[region.storage]
                touched.append((region, element, part))
        out = data.copy()
        out[live] = real
        return interpreter.TensorHandle(out, pointers.dtype), live, touched

    def _regions(self, builder, number, active, chosen, verb):
        """The tensors that these addresses were made from, and which addresses are whose."""
        if 0 <= number < len(self.regions):
            yield self.regions[number], chosen
            return
        left = chosen.copy()
        for region in self.reachable:
            end = region.address + region.span * region.itemsize
            part = left & (active >= np.uint64(region.address)) & (active < np.uint64(end))
            if part.any():
                left &= ~part
                yield region, part
        if left.any():
            address = hex(int(active[left][0]))
            self.fail(builder.grid_idx, f"{verb} {address}, which is in no tensor of the launch")

    def _bounds(self, builder, region, offset, verb):
        element, rest = np.divmod(offset, region.itemsize)
        bad = (offset < 0) | (element >= region.span)
        if region.inside is not None and region.span:
            bad |= ~region.inside[np.clip(element, 0, region.span - 1)]
        if bad.any():
            at = int(element[bad][0])
            where = "in a gap of the view" if 0 <= at < region.span else f"of {region.span}"
            what = f"{verb} `{region.name}` {region.shape} out of bounds: element {at} {where}"
            self.fail(builder.grid_idx, f"{what}, {int(bad.sum())} of {bad.size} lanes")
        if rest.any():
            self.fail(builder.grid_idx, f"{verb} `{region.name}` between two elements")

    # -------------------------------------------------------------------------------------------------------- races

    def shadow(self, region):
        if region.storage not in self.shadows:
            self.shadows[region.storage] = Shadow(region.storage_bytes // self.units[region.storage] + 1)
        return self.shadows[region.storage]

    def program(self, builder):
        x, y, z = builder.grid_idx
        return 1 + x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)

    def read(self, builder, region, element):
        me, shadow = self.program(builder), self.shadow(region)
        self._unordered(builder, region, shadow, element, shadow.writer[element], "reads", "wrote")
        before = shadow.reader[element]
        shadow.reader[element] = np.where((before == 0) | (before == me), me, -1)

    def write(self, builder, region, element, atomic):
        me, shadow = self.program(builder), self.shadow(region)
        writer = shadow.writer[element]
        if atomic:
            writer = np.where(shadow.atomic[element], 0, writer)
        self._unordered(builder, region, shadow, element, writer, "writes", "wrote")
        reader = shadow.reader[element]
        known = self.known.get(me, {})
        strangers = (reader != 0) & (reader != me) & ~np.isin(reader, list(known)) & ~((reader == -1) & bool(known))
        if strangers.any():
            self._race(builder, region, element[strangers][0], "writes", "read", reader[strangers][0])
        shadow.writer[element], shadow.atomic[element] = me, atomic
        shadow.epoch[element] = self.epochs.get(me, 0)

    def _unordered(self, builder, region, shadow, element, writer, verb, other):
        me = self.program(builder)
        strange = (writer != 0) & (writer != me)
        if not strange.any():
            return
        known = self.known.get(me, {})
        seen = np.array([known.get(int(w), -1) for w in writer[strange]])
        late = shadow.epoch[element[strange]] > seen
        if late.any():
            self._race(builder, region, element[strange][late][0], verb, other, writer[strange][late][0])

    def _race(self, builder, region, element, verb, other, who):
        at = (int(element) * self.units[region.storage] + region.storage - region.address) // region.itemsize
        who = "several other programs" if who < 0 else f"program number {int(who) - 1}"
        self.fail(builder.grid_idx, f"race: {verb} element {at} of `{region.name}` {region.shape}, which {who} {other}")

    def synchronise(self, builder, address):
        """A scalar atomic: what others released here is known from now on, and so is, to those after, what this did."""
        me = self.program(builder)
        mine, there = self.known.setdefault(me, {}), self.released.setdefault(address, {})
        _merge(mine, there)
        _merge(there, mine)
        _merge(there, {me: self.epochs.get(me, 0)})
        self.epochs[me] = self.epochs.get(me, 0) + 1


def _merge(into, more):
    for program, epoch in more.items():
        into[program] = max(epoch, into.get(program, -1))


def _data(mask):
    return mask.data if isinstance(mask, interpreter.TensorHandle) else np.asarray(mask)


# ---------------------------------------------------------------------------------------------------------- the patches


@contextlib.contextmanager
def sanitized(*reachable):
    """Launches inside are checked; the first fault raises SanitizerError. The interpreter must be what runs kernels.

    `reachable` are tensors that kernels find by addresses in a table: these are real ones.
    """
    original = {
        (interpreter, "_implicit_cvt"): _cvt,
        (interpreter.GridExecutor, "__call__"): lambda old: _launch(old, reachable),
        (interpreter.TensorHandle, "set_attr"): _hint,
        (TritonSemantic, "load"): _semantic_load,
        (BUILDER, "create_masked_load"): _load,
        (BUILDER, "create_masked_store"): _store,
        (BUILDER, "create_atomic_rmw"): _rmw,
        (BUILDER, "create_atomic_cas"): _cas,
        (BUILDER, "create_add"): lambda old: _exact(old, np.add, "+"),
        (BUILDER, "create_sub"): lambda old: _exact(old, np.subtract, "-"),
        (BUILDER, "create_mul"): lambda old: _exact(old, np.multiply, "*"),
    }
    before = {(owner, name): getattr(owner, name) for owner, name in original}
    try:
        for (owner, name), wrap in original.items():
            setattr(owner, name, wrap(before[owner, name]))
        yield
    finally:
        for (owner, name), old in before.items():
            setattr(owner, name, old)


_running = []


def _launch(old, reachable):
    def call(self, *args, **kwargs):
        named = {**dict(zip(self.arg_names, args, strict=False)), **kwargs}
        tensors = {
            (x.data_ptr(), tuple(x.shape)): name
            for name, x in named.items()
            if hasattr(x, "data_ptr") and hasattr(x, "shape")
        }
        launch = Launch(self.fn.__name__, tensors, reachable)
        _running.append(launch)
        try:
            return old(self, *args, **kwargs)
        except Exception:
            if launch.error is not None:  # the interpreter wraps it once for each call in the kernel
                raise launch.error from None
            raise
        finally:
            _running.pop()

    return call


def _cvt(old):
    def convert(arg):
        converted = old(arg)
        if _running and hasattr(arg, "data_ptr"):
            region = _running[-1].add(interpreter._unwrap_tensor(arg))
            converted.handle.data = np.array([region.tag], dtype=np.uint64)
        return converted

    return convert


def _semantic_load(old):
    def load(self, ptr, mask, other, *more, **named):
        self.builder.filled = other is not None  # the interpreter takes a scalar zero for no `other` at all
        return old(self, ptr, mask, other, *more, **named)

    return load


def _load(old):
    def load(self, ptrs, mask, other, *more, **named):
        if not _running:
            return old(self, ptrs, mask, other, *more, **named)
        launch, filled = _running[-1], getattr(self, "filled", False)
        real, live, touched = launch.resolve(self, ptrs, mask, "reads")
        for region, element, _ in touched:
            launch.read(self, region, element)
        got = old(self, real, mask, other, *more, **named)
        if other is None and not filled and not live.all():
            got.data = np.where(live, got.data, _undefined(got.data.dtype))
        return got

    return load


def _undefined(dtype):
    if dtype.kind == "f":
        return dtype.type(math.nan)
    return dtype.type(min(10007, np.iinfo(dtype).max)) if dtype.kind in "iu" else dtype.type(True)


def _store(old):
    def store(self, ptrs, value, mask, *more, **named):
        if not _running:
            return old(self, ptrs, value, mask, *more, **named)
        launch = _running[-1]
        real, live, touched = launch.resolve(self, ptrs, mask, "writes")
        values = np.broadcast_to(np.asarray(value.data), live.shape)[live]
        for region, element, chosen in touched:
            launch.write(self, region, element, atomic=False)
            _once(launch, self, region, element, values[chosen])
        return old(self, real, value, mask, *more, **named)

    return store


def _once(launch, builder, region, element, values):
    """Two lanes of one store to the same element must at least agree."""
    order = np.argsort(element, kind="stable")
    element, values = element[order], values[order]
    same = element[1:] == element[:-1]
    if same.any() and (values[1:][same] != values[:-1][same]).any():
        launch.fail(builder.grid_idx, f"race: two lanes of one store write different values to `{region.name}`")


def _rmw(old):
    def atomic(self, op, ptr, value, mask, sem, *more, **named):
        if not _running:
            return old(self, op, ptr, value, mask, sem, *more, **named)
        launch = _running[-1]
        real, live, touched = launch.resolve(self, ptr, mask, "adds to")
        for region, element, _ in touched:
            launch.write(self, region, element, atomic=True)
        if sem != ir.MEM_SEMANTIC.RELAXED and live.size == 1 and live.all():
            launch.synchronise(self, int(real.data.reshape(-1)[0]))
        return old(self, op, real, value, mask, sem, *more, **named)

    return atomic


def _cas(old):
    def atomic(self, ptr, cmp, value, sem, *more, **named):
        if not _running:
            return old(self, ptr, cmp, value, sem, *more, **named)
        launch = _running[-1]
        real, live, touched = launch.resolve(self, ptr, np.ones(np.shape(ptr.data), dtype=bool), "exchanges")
        for region, element, _ in touched:
            launch.write(self, region, element, atomic=True)
        if sem != ir.MEM_SEMANTIC.RELAXED and live.size == 1:
            launch.synchronise(self, int(real.data.reshape(-1)[0]))
        return old(self, real, cmp, value, sem, *more, **named)

    return atomic


def _exact(old, operation, sign):
    def compute(self, lhs, rhs):
        out = old(self, lhs, rhs)
        if _running and lhs.dtype.scalar == tl.int32 and out.data.dtype == np.int32:
            wide = operation(lhs.data.astype(np.int64), rhs.data.astype(np.int64))
            wrong = np.broadcast_to(wide != out.data, np.shape(out.data))
            if wrong.any():
                a, b = (np.broadcast_to(x.data, wrong.shape)[wrong][0] for x in (lhs, rhs))
                _running[-1].fail(self.grid_idx, f"int32 overflow: {int(a)} {sign} {int(b)}")
        return out

    return compute


def _hint(old):
    def set_attr(self, key, value):
        first = np.asarray(self.data).reshape(-1)[:1]
        if _running and key == "tt.divisibility" and first.size and first.dtype.kind in "iu":
            step = int(value[-1])
            if int(first[0]) % step and int(first[0]) < (FIRST << SHIFT):  # pointers keep only their own alignment
                grid = interpreter.interpreter_builder.grid_idx
                _running[-1].fail(grid, f"multiple_of says {step}, the value is {int(first[0])}")
        return old(self, key, value)

    return set_attr
