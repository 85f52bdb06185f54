"""Bugs to plant into the kernels, each with the tests that must notice it.

A mutation replaces `old`, which must stand exactly once in `file` (below the package), by `new`. `tests` is a file of
tests and `select` what of it to run (pytest's -k); the plain sources must pass the same. `quick` ones run in every test
run, the others with `make slow`.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mutation:
    name: str
    file: str
    old: str
    new: str
    tests: str
    select: str
    quick: bool = False


def _torch(name, file, old, new, select, quick=False):
    file, tests = f"kernels/{file}", "test_torch_backend.py"
    return Mutation(name=name, file=file, old=old, new=new, tests=tests, select=select, quick=quick)


TORCH = (
    _torch(
        "the window reaches one key too far",
        "torch_softmax.py",
        "allowed = allowed & (distance.abs() < size)",
        "allowed = allowed & (distance.abs() <= size)",
        "ranges_are_the_definition and 131",
        quick=True,
    ),
    _torch(
        "a causal row does not see itself",
        "torch_softmax.py",
        "allowed = distance >= 0 if p.causal",
        "allowed = distance > 0 if p.causal",
        "ranges_are_the_definition and 63",
    ),
    _torch(
        "the scale is dropped",
        "torch_softmax.py",
        "s = (q.to(wide) * scale) @ k.to(wide)",
        "s = q.to(wide) @ k.to(wide)",
        "ranges_are_the_definition and 63",
    ),
    _torch(
        "an extra key within the window counts twice",
        "torch_softmax.py",
        "far = at <= i[:, None] - size",
        "far = at <= i[:, None]",
        "ranges_are_the_definition and 131",
    ),
    _torch(
        "keys that are not valid are attended to",
        "torch_softmax.py",
        "allowed = allowed & p.valid[:, None, None, None, low:high]",
        "pass",
        "ranges_are_the_definition and 63",
    ),
    _torch(
        "the bits of a partial block are read from the wrong end",
        "torch_lists.py",
        ">> (word % 32)) & 1",
        ">> (31 - word % 32)) & 1",
        "lists_are_the_definition",
    ),
    _torch(
        "the last block of keys is not masked at the end",
        "torch_lists.py",
        "(there[..., None] & (index < keys))",
        "(there[..., None] & (index <= keys))",
        "lists_are_the_definition",
    ),
    _torch(
        "the branch reaches into the block of the rows",
        "torch_lists.py",
        "(blocks + 1) * self.bk <= first",
        "blocks * self.bk <= first",
        "covers_the_rest and lists",
    ),
    _torch(
        "the weight of the branch has the wrong sign",
        "torch_mixed.py",
        "c = branch.weight.to(tail.dtype)",
        "c = -branch.weight.to(tail.dtype)",
        "covers_the_rest and True",
        quick=True,
    ),
    _torch(
        "the state of an earlier call is forgotten",
        "torch_linear.py",
        "start = None if state is None else state.to(fq.dtype)",
        "start = None",
        "linear_attention_is_the_definition",
    ),
    _torch(
        "a chunk reads a state that holds the chunk itself",
        "torch_linear.py",
        "before = torch.cat([first, through[:, :, :-1]], 2)",
        "before = through",
        "linear_attention_is_the_definition",
    ),
    _torch(
        "one slot too few of a cache is used",
        "torch_softmax.py",
        "k, v = part.k[:, :, : part.used], part.v[:, :, : part.used]",
        "k, v = part.k[:, :, 1 : part.used], part.v[:, :, 1 : part.used]",
        "decode_step",
    ),
    _torch(
        "the second half of a Hedgehog map has the sign of the first",
        "torch_maps.py",
        "(-y).softmax(-1)",
        "y.softmax(-1)",
        "feature_maps",
    ),
    _torch(
        "selection keeps one block too few",
        "torch_select.py",
        "taken = rank < p.keep",
        "taken = rank < p.keep - 1",
        "selection_keeps",
    ),
    _torch(
        "scores begin one row too late",
        "torch_retain.py",
        ">= p.window // 2) & alive",
        "> p.window // 2) & alive",
        "retention_is_the_definition",
        quick=True,
    ),
    _torch(
        "the oldest recent token is dropped a position early",
        "torch_retain.py",
        "oldest = start - p.window + p.block ",
        "oldest = start - p.window + p.block + 1 ",
        "retention_is_the_definition",
    ),
)


def _triton(name, file, old, new, select, quick=False):
    file, tests = f"kernels/{file}", "test_triton_sanitized.py"
    return Mutation(name=name, file=file, old=old, new=new, tests=tests, select=select, quick=quick)


TRITON = (
    _triton(
        "what the softmax holds is not scaled down to a new maximum",
        "triton_mixed.py",
        "acc = tl.dot(p.to(v.dtype), v, acc * fade[:, None], input_precision=PRECISION)",
        "acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)",
        "mixed_attention and limit",
        quick=True,
    ),
    _triton(
        "the logarithm of the sum is stored without the maximum",
        "triton_mixed.py",
        "(m + tl.log2(total)) * LN2",
        "tl.log2(total) * LN2",
        "mixed_attention and limit",
    ),
    _triton(
        "query heads read the keys of another group",
        "triton_mixed.py",
        "    g = h // GROUP\n",
        "    g = h % (tl.num_programs(1) // GROUP)\n",
        "mixed_attention and limit",
    ),
    _triton(
        "the weight of the branch has the wrong sign in Triton",
        "triton_mixed.py",
        "c = tl.load(weight + head) * LOG2E",
        "c = -tl.load(weight + head) * LOG2E",
        "mixed_attention and windows",
    ),
    _triton(
        "the last tile of keys is left out",
        "triton_mixed_masks.py",
        "right = tl.cdiv(tl.maximum(stop - resume, 0), BN)",
        "right = tl.maximum(stop - resume, 0) // BN",
        "mixed_attention and windows",
    ),
    _triton(
        "the window reaches one key too far in Triton",
        "triton_mixed_masks.py",
        "return (j <= i) & (i - j < w)",
        "return (j <= i) & (i - j <= w)",
        "mixed_attention and causal",
    ),
    _triton(
        "an extra key at the edge of the window is left out",
        "triton_mixed_masks.py",
        "far = at <= i - w",
        "far = at < i - w",
        "mixed_attention and windows",
    ),
    _triton(
        "the bits of a partial block are read from the wrong end in Triton",
        "triton_mixed_masks.py",
        "((word >> ((first + key) % 32)) & 1)",
        "((word >> (31 - (first + key) % 32)) & 1)",
        "mixed_attention and lists",
    ),
    _triton(
        "the gradient of the logits leaves out what the normaliser gives",
        "triton_mixed_steps.py",
        "ds = p * (dp - delta)",
        "ds = p * dp",
        "mixed_attention and limit",
    ),
    _triton(
        "the gradient of k lacks the scale",
        "triton_mixed_backward.py",
        "tl.where(inside[:, None], acc_k * scale, 0.0)",
        "tl.where(inside[:, None], acc_k, 0.0)",
        "mixed_attention and limit",
    ),
    _triton(
        "a segment reads a state that holds the segment itself",
        "triton_linear.py",
        "tl.cumsum(t, 0) - t + carry[None, :]",
        "tl.cumsum(t, 0) + carry[None, :]",
        "linear_attention and state",
    ),
    _triton(
        "the state of an earlier call is forgotten in Triton",
        "triton_linear.py",
        "carry += tl.load(state + place, mask=live, other=0.0).to(tl.float32)",
        "carry += 0.0",
        "linear_attention and state",
    ),
    _triton(
        "the last used slot of a cache is not read",
        "triton_decode.py",
        "there = slot < end\n",
        "there = slot < end - 1\n",
        "decode_step",
    ),
    _triton(
        "a slot that is not used is read",
        "triton_decode.py",
        "end = tl.minimum(begin + slice_size, used)",
        "end = tl.minimum(begin + slice_size, used + 1)",
        "decode_step",
    ),
    _triton(
        "scores begin one row too late in Triton",
        "triton_retain.py",
        "(row[:, None] - at[None, :] >= window // 2)",
        "(row[:, None] - at[None, :] > window // 2)",
        "retention",
    ),
    _triton(
        "the ring gives the token of another slot",
        "triton_retain.py",
        "ring + position % window",
        "ring + (position + 1) % window",
        "retention",
    ),
    _triton(
        "selection keeps one block too few in Triton",
        "triton_select.py",
        "tl.cast(keep, tl.float32)",
        "tl.cast(keep - 1, tl.float32)",
        "selection and keep",
    ),
    _triton(
        "the second half of a Hedgehog map has the sign of the first in Triton",
        "triton_features.py",
        "tl.store(place + D, tl.maximum(n, FLOOR)",
        "tl.store(place + D, tl.maximum(p, FLOOR)",
        "feature_maps and hedgehog",
    ),
)


FORWARD = "mixed_attention_is_the_definition or every_length"


def _cpp(name, file, old, new, select):
    select = f"({select}) and not emulated"  # one instruction set: what is built is built for the mutation alone
    return Mutation(name=name, file=f"kernels/{file}", old=old, new=new, tests="test_cpp.py", select=select)


CPP = (
    _cpp(
        "what the softmax holds is not scaled down to a new maximum in C++",
        "cpp/softmax.h",
        "        l *= shrink;\n        scale_by(o, shrink, d);\n",
        "        l *= shrink;\n",
        FORWARD,
    ),
    _cpp(
        "the window starts one key late in C++",
        "cpp/problem.h",
        "std::max<int64_t>(0, i - w + 1)",
        "std::max<int64_t>(0, i - w + 2)",
        FORWARD,
    ),
    _cpp(
        "keys that are not valid are attended to in C++",
        "cpp/softmax.h",
        "bits[w] = range_bits(c, low, high) & real[c / 32];",
        "bits[w] = range_bits(c, low, high);",
        FORWARD,
    ),
    _cpp(
        "an extra key within the window counts twice in C++",
        "cpp/softmax.h",
        "at[j] <= i - x.w ||",
        "at[j] <= i ||",
        FORWARD,
    ),
    _cpp(
        "a partial block is read at the row of another head in C++",
        "cpp/softmax.h",
        "const int64_t r = (t / x.G) % a.block_q,",
        "const int64_t r = t % a.block_q,",
        FORWARD,
    ),
    _cpp(
        "query heads read those of another group in C++",
        "cpp/softmax.h",
        "a.q.at(x.s.b, x.g * x.G + t % x.G, x.s.q0 + t / x.G)",
        "a.q.at(x.s.b, t % x.G, x.s.q0 + t / x.G)",
        FORWARD,
    ),
    _cpp(
        "what fills the last vector of pairs taken alone counts in C++",
        "cpp/few.h",
        "for (int64_t j = n; j < whole; j++) s[j] = LOWEST;",
        "",
        FORWARD,
    ),
    _cpp(
        "the gradient of the logits leaves out what the normaliser gives in C++",
        "cpp/softmax_backward.h",
        "sub(load(t + j), less)",
        "load(t + j)",
        "gradients_are_those_of_the_definition",
    ),
    _cpp(
        "the branch covers a key of the window in C++",
        "cpp/branch.h",
        "clamp(at - w.w + 1, 0, K)",
        "clamp(at - w.w + 2, 0, K)",
        FORWARD,
    ),
    _cpp(
        "one slot too few of a cache is used in C++",
        "cpp/decode.cpp",
        "std::min(c + PIECE, a.parts[n].used)",
        "std::min(c + PIECE, a.parts[n].used - 1)",
        "decode_is_the_definition",
    ),
    _cpp(
        "scores begin one row too late in C++",
        "cpp/retain.cpp",
        "at - a.window / 2 + 1",
        "at - a.window / 2",
        "retention_is_the_definition",
    ),
)

MUTATIONS = TORCH + TRITON + CPP
