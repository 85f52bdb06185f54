"""The table and the picture of docs/masks.md: `python docs/masks.py` writes both from the code."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from attnconvert.kernels import masks_patterns
from attnconvert.kernels.lowering import blocks
from attnconvert.kernels.masks import Layout
from attnconvert.kernels.masks_density import density

HERE = Path(__file__).parent
BLOCK = (128, 64)
TEXT = Layout(grid=(32768,))
FLUX1K = Layout(grid=(64, 64), text_first=512)
FLUX4K = Layout(grid=(256, 256), text_first=512)
WAN = Layout(grid=(21, 45, 80))
HUNYUAN = Layout(grid=(30, 48, 80), text_last=256)
ROWS: tuple[tuple[str, Layout, str, tuple[int, ...] | None], ...] = (  # the last: tiles of the tile order
    ("32k text", TEXT, "sliding_window(size=1024)", None),
    ("32k text", TEXT, "a_shape(size=1024, sinks=4)", None),
    ("32k text", TEXT, "tri_shape(size=1024, sinks=4, rows=128)", None),
    ("32k text", TEXT, "dilated(size=256, dilation=4)", None),
    ("32k text", TEXT, "strided(local=16, every=16, unit=64)", None),
    ("32k text", TEXT, "power(unit=256, local=5)", None),
    ("FLUX 1024²", FLUX1K, "disc(radius=16)", (8, 16)),
    ("FLUX 4096²", FLUX4K, "disc(radius=16)", (8, 16)),
    ("FLUX 4096²", FLUX4K, "neighbourhood(window=(64, 64))", (8, 16)),
    ("FLUX 4096²", FLUX4K, "neighbourhood(window=(72, 80), stride=(8, 16))", (8, 16)),
    ("FLUX 4096²", FLUX4K, "tiled(window=(9, 5), tile=(8, 16))", (8, 16)),
    ("Wan 720p", WAN, "radial(decay=0.2, neighbour=0.5, sink=True)", None),
    ("Wan 720p", WAN, "attention_tile(references=(0, 7, 14))", None),
    ("Wan 720p", WAN, "frames(before=6, chunk=3, sinks=3)", None),
    ("Wan 720p", WAN, "neighbourhood(window=(11, 24, 40))", (4, 4, 8)),
    ("Hunyuan 720p", HUNYUAN, "tiled(window=(3, 3, 3), tile=(6, 8, 8))", (6, 8, 8)),
)
PICTURES = (
    ("a_shape(size=96, sinks=32)", Layout(grid=(512,))),
    ("power(unit=32, local=2)", Layout(grid=(512,))),
    ("disc(radius=5)", Layout(grid=(22, 22), text_first=28)),
    ("neighbourhood(window=(7, 7))", Layout(grid=(22, 22), text_first=28)),
    ("tiled(window=(1, 3, 3), tile=(2, 4, 4))", Layout(grid=(4, 8, 16), order="tile", tile=(2, 4, 4))),
    ("radial(floor=8)", Layout(grid=(8, 8, 8))),
    ("attention_tile(references=(0,))", Layout(grid=(8, 8, 8))),
    ("frames(before=2, sinks=1)", Layout(grid=(8, 8, 8))),
)


def row(name: str, layout: Layout, code: str, tile: tuple[int, ...] | None) -> str:
    """A line of the table: share of pairs and of 128 × 64 blocks, in the order of the model and in tiles."""
    mask = eval(code, vars(masks_patterns))
    causal = layout is TEXT
    found = density(blocks(mask, layout, BLOCK, causal=causal), layout.tokens, causal=causal)
    tiles = "–"
    if tile is not None:
        share = density(blocks(mask, replace(layout, order="tile", tile=tile), BLOCK), layout.tokens).block
        tiles = f"{share:.1%} ({' × '.join(map(str, tile))})"
    return f"| {name} | `{code}` | {found.element:.1%} | {found.block:.1%} | {tiles} |"


def table() -> str:
    """All of them, as Markdown."""
    head = ["| tokens | mask | pairs | blocks | blocks in tiles |", "|---|---|---:|---:|---:|"]
    return "\n".join(head + [row(*given) for given in ROWS])


def picture(path: Path) -> None:
    """Thumbnails: full blocks dark, partial blocks lighter, each of 16 queries × 32 keys."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 4, figsize=(11, 6.2), layout="constrained")
    for axis, (code, layout) in zip(axes.flat, PICTURES, strict=True):
        where = blocks(eval(code, vars(masks_patterns)), layout, (16, 32))
        image = np.zeros((where.starts.shape[2], where.t_starts.shape[2]))
        for n, (start, count) in enumerate(zip(where.starts[0, 0].tolist(), where.counts[0, 0].tolist(), strict=True)):
            listed = slice(start, start + count)
            full = np.ones(count) if where.kinds is None else np.where(where.kinds[listed].numpy() < 0, 1.0, 0.45)
            image[n, where.columns[listed].numpy()] = full
        axis.imshow(image, cmap="Blues", vmin=0, vmax=1.15, aspect="auto", interpolation="nearest")
        axis.set_title(code.replace(", tile=", ",\ntile="), fontsize=8, family="monospace")
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main() -> None:
    """Put the table between the marks of the page, and draw the picture."""
    page = HERE / "masks.md"
    before, rest = page.read_text(encoding="utf-8").split("<!-- table -->\n")
    after = rest.split("<!-- end -->\n")[1]
    page.write_text(f"{before}<!-- table -->\n{table()}\n<!-- end -->\n{after}", encoding="utf-8")
    picture(HERE / "masks.png")


if __name__ == "__main__":
    main()
