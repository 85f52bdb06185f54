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
    return Mutation(
        name=name, file=f"kernels/{file}", old=old, new=new, tests="test_torch_backend.py", select=select, quick=quick
    )


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
        quick=True,
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

MUTATIONS = TORCH
