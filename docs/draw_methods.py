"""Draws the pictures of docs/methods.md: python docs/draw_methods.py

Blue boxes are frozen, orange ones learn, grey ones have nothing to learn; dashed arrows carry no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

COLOURS = {"frozen": "#b9d3ee", "learns": "#ffc98a", "plain": "#ececec", "none": "none"}
FOLDER = Path(__file__).parent / "images" / "methods"


@dataclass
class Picture:
    """Boxes on a grid and the arrows between them."""

    width: float
    height: float
    boxes: dict[str, tuple[float, float, float, float]] = field(default_factory=dict)
    drawn: list[tuple[str, str, str]] = field(default_factory=list)
    arrows: list[tuple[str, str, bool, str]] = field(default_factory=list)

    def box(
        self, name: str, x: float, y: float, text: str, kind: str = "plain", w: float = 1.5, h: float = 0.62
    ) -> None:
        """A box around (x, y)."""
        self.boxes[name] = (x, y, w, h)
        self.drawn.append((name, text, kind))

    def arrow(self, start: str, end: str, gradient: bool = True, text: str = "") -> None:
        """An arrow between two boxes; dashed where no gradient comes back."""
        self.arrows.append((start, end, gradient, text))

    def save(self, name: str) -> None:
        """Writes the picture."""
        figure, axes = plt.subplots(figsize=(self.width, self.height))
        axes.set_xlim(0, self.width)
        axes.set_ylim(0, self.height)
        axes.set_axis_off()
        figure.subplots_adjust(0, 0, 1, 1)
        for box, text, kind in self.drawn:
            x, y, w, h = self.boxes[box]
            if kind != "none":
                axes.add_patch(
                    FancyBboxPatch(
                        (x - w / 2, y - h / 2), w, h, boxstyle="round,pad=0,rounding_size=0.1",
                        facecolor=COLOURS[kind], edgecolor="#444444", linewidth=1.0,
                    )
                )  # fmt: skip
            axes.text(x, y, text, ha="center", va="center", fontsize=10, linespacing=1.15)
        for start, end, gradient, text in self.arrows:
            a, b = self._ends(start, end)
            axes.add_patch(
                FancyArrowPatch(
                    a, b, arrowstyle="-|>", mutation_scale=11, linewidth=1.1, color="#333333",
                    linestyle="-" if gradient else (0, (4, 3)), shrinkA=0, shrinkB=0,
                )
            )  # fmt: skip
            if text:
                axes.text((a[0] + b[0]) / 2, (a[1] + b[1]) / 2 + 0.13, text, ha="center", fontsize=9)
        FOLDER.mkdir(parents=True, exist_ok=True)
        figure.savefig(FOLDER / f"{name}.png", dpi=110)
        plt.close(figure)

    def _ends(self, start: str, end: str) -> tuple[tuple[float, float], tuple[float, float]]:
        """Where an arrow leaves one box and meets the other: on the sides that face each other."""
        ax, ay, aw, ah = self.boxes[start]
        bx, by, bw, bh = self.boxes[end]
        if abs(bx - ax) >= (aw + bw) / 2:
            sign = 1 if bx > ax else -1
            return (ax + sign * aw / 2, ay), (bx - sign * bw / 2, by)
        sign = 1 if by > ay else -1
        if aw > 2 * bw:
            ax = bx
        return (ax, ay + sign * ah / 2), (bx, by - sign * bh / 2)


def image_to_head(width: float = 8.4, height: float = 1.6, middle: float = 0.8) -> Picture:
    """A picture with the image at its left and policy or decoder at its right."""
    picture = Picture(width, height)
    picture.box("image", 0.75, middle, "image", w=1.1)
    picture.box("head", width - 0.9, middle, "policy or\ndecoder", "learns", w=1.4)
    return picture


def features() -> None:
    """The base alone."""
    p = image_to_head()
    p.box("base", 4.0, 0.8, "base B", "frozen", w=2.4)
    p.arrow("image", "base", False)
    p.arrow("base", "head", False)
    p.save("features")


def finetune() -> None:
    """One network that learns whole."""
    p = image_to_head()
    p.box("base", 4.0, 0.8, "B, from its\npre-trained weights", "learns", w=2.4)
    p.arrow("image", "base")
    p.arrow("base", "head")
    p.save("finetune")


def scratch() -> None:
    """The same from random weights."""
    p = image_to_head()
    p.box("base", 4.0, 0.8, "network, from\nrandom weights", "learns", w=2.4)
    p.arrow("image", "base")
    p.arrow("base", "head")
    p.save("scratch")


def midtune() -> None:
    """Features first, then fine-tuning."""
    p = Picture(8.4, 2.6)
    for y, name, kind, text in (
        (1.95, "a", "frozen", "first: base B"),
        (0.65, "b", "learns", "then: base B"),
    ):
        p.box(f"i{name}", 0.75, y, "image", w=1.1)
        p.box(f"n{name}", 4.0, y, text, kind, w=2.4)
        p.box(f"h{name}", 7.5, y, "policy or\ndecoder", "learns", w=1.4)
        p.arrow(f"i{name}", f"n{name}", name == "b")
        p.arrow(f"n{name}", f"h{name}", name == "b")
    p.arrow("na", "nb", text="")
    p.save("midtune")


def sidetune() -> None:
    """Base and side in parallel."""
    p = image_to_head(height=2.6, middle=1.3)
    p.box("base", 3.0, 2.0, "base B", "frozen", w=1.8)
    p.box("side", 3.0, 0.6, "side S", "learns", w=1.8)
    p.box("blend", 5.5, 1.3, r"$\alpha B+(1-\alpha)S$", "learns", w=2.0)
    p.arrow("image", "base", False)
    p.arrow("image", "side")
    p.arrow("base", "blend", False)
    p.arrow("side", "blend")
    p.arrow("blend", "head")
    p.save("sidetune")


def hst() -> None:
    """A pyramid beside a ViT."""
    p = Picture(9.6, 3.4)
    p.box("image", 0.75, 1.7, "image", w=1.0)
    for i, x in enumerate((2.5, 4.2, 5.9, 7.6)):
        p.box(f"v{i}", x, 2.75, f"ViT blocks,\nstage {i + 1}", "frozen", w=1.35, h=0.72)
        p.box(f"t{i}", x, 1.7, "LN · MR\nT-Bridge", "learns", w=1.35, h=0.72)
        p.box(f"s{i}", x, 0.6, f"side blocks\n1/{4 * 2**i}", "learns", w=1.35, h=0.72)
        p.arrow(f"v{i}", f"t{i}")
        p.arrow(f"t{i}", f"s{i}")
        if i:
            p.arrow(f"v{i - 1}", f"v{i}")
            p.arrow(f"s{i - 1}", f"s{i}")
    p.box("head", 9.0, 0.6, "pooled,\nor maps", "plain", w=0.95, h=0.72)
    p.arrow("image", "v0")
    p.arrow("image", "s0")
    p.arrow("s3", "head")
    p.save("hst")


def piggyback() -> None:
    """Masks over frozen weights."""
    p = image_to_head(height=2.6, middle=0.7)
    p.box("w", 2.7, 2.0, "weights W", "frozen", w=1.6)
    p.box("m", 5.3, 2.0, r"mask $1[m>\tau]$", "learns", w=1.8)
    p.box("net", 4.0, 0.7, r"network with $W\odot M$", "plain", w=2.6)
    p.arrow("image", "net")
    p.arrow("w", "net", False)
    p.arrow("m", "net", text="")
    p.arrow("net", "head")
    p.save("piggyback")


def spottune() -> None:
    """A choice of two copies at every block."""
    p = Picture(9.6, 3.0)
    p.box("image", 0.75, 1.2, "image", w=1.0)
    p.box("policy", 4.6, 2.6, "policy network: a draw for each block and image", "learns", w=5.4, h=0.5)
    for i, x in enumerate((2.6, 5.4)):
        p.box(f"f{i}", x, 1.75, "block F", "frozen", w=1.3, h=0.55)
        p.box(f"c{i}", x, 0.65, r"copy $\hat{F}$", "learns", w=1.3, h=0.55)
        p.box(f"g{i}", x + 1.45, 1.2, "one or\nthe other", "plain", w=0.95)
        p.arrow(f"f{i}", f"g{i}")
        p.arrow(f"c{i}", f"g{i}")
        p.arrow("policy", f"g{i}")
    p.box("head", 8.5, 1.2, "policy or\ndecoder", "learns", w=1.4)
    p.arrow("image", "f0")
    p.arrow("image", "c0")
    p.arrow("image", "policy")
    p.arrow("g0", "f1")
    p.arrow("g0", "c1")
    p.arrow("g1", "head")
    p.save("spottune")


def ladder() -> None:
    """A narrow side network with a rung from every block."""
    p = Picture(9.6, 2.8)
    p.box("image", 0.75, 2.1, "image", w=1.0)
    for i, x in enumerate((2.5, 4.4, 6.3)):
        p.box(f"b{i}", x, 2.1, f"block {i + 1}", "frozen", w=1.3)
        p.box(f"s{i}", x, 0.7, f"gate {i + 1},\nnarrow block", "learns", w=1.3, h=0.72)
        p.arrow(f"b{i}", f"s{i}", False)
        if i:
            p.arrow(f"b{i - 1}", f"b{i}", False)
            p.arrow(f"s{i - 1}", f"s{i}")
    p.box("head", 8.5, 0.7, "policy or\ndecoder", "learns", w=1.4)
    p.arrow("image", "b0", False)
    p.arrow("s2", "head")
    p.save("ladder")


def progressive() -> None:
    """A new column that listens to the old one."""
    p = Picture(9.6, 2.8)
    p.box("image", 0.75, 1.4, "image", w=1.0)
    for i, x in enumerate((2.5, 4.4, 6.3)):
        p.box(f"b{i}", x, 2.1, f"column 1,\nblock {i + 1}", "frozen", w=1.3, h=0.72)
        p.box(f"s{i}", x, 0.7, f"column 2,\nblock {i + 1}", "learns", w=1.3, h=0.72)
        if i:
            p.arrow(f"b{i - 1}", f"b{i}", False)
            p.arrow(f"b{i - 1}", f"s{i}", False)
            p.arrow(f"s{i - 1}", f"s{i}")
    p.box("head", 8.5, 0.7, "policy or\ndecoder", "learns", w=1.4)
    p.arrow("image", "b0", False)
    p.arrow("image", "s0")
    p.arrow("s2", "head")
    p.save("progressive")


def ewc() -> None:
    """Fine-tuning on a spring."""
    p = image_to_head(height=2.6, middle=0.7)
    p.box("net", 4.0, 0.7, r"weights $\theta$", "learns", w=2.0)
    p.box("old", 4.0, 2.0, r"$\theta^*$ and Fisher information $F$", "frozen", w=3.4)
    p.box("pull", 7.2, 2.0, r"penalty $\frac{c}{2}\sum F(\theta-\theta^*)^2$", "none", w=2.4)
    p.arrow("image", "net")
    p.arrow("net", "head")
    p.arrow("old", "net", False)
    p.save("ewc")


def superposition() -> None:
    """Many tasks in one set of weights."""
    p = image_to_head(height=2.6, middle=0.7)
    p.box("w", 2.7, 2.0, "shared weights W", "learns", w=2.0)
    p.box("c", 5.6, 2.0, "the task's signs c", "frozen", w=2.0)
    p.box("net", 4.0, 0.7, r"layers $W(c\odot x)$", "plain", w=2.4)
    p.arrow("image", "net")
    p.arrow("w", "net")
    p.arrow("c", "net", False)
    p.arrow("net", "head")
    p.save("superposition")


def residual_adapters() -> None:
    """Small convolutions beside the frozen ones."""
    p = image_to_head(height=2.6, middle=1.3)
    p.box("conv", 3.3, 2.0, "3x3 convolution", "frozen", w=1.9)
    p.box("adapter", 3.3, 0.6, "1x1 convolution", "learns", w=1.9)
    p.box("sum", 5.4, 1.3, "+", "plain", w=0.5)
    p.arrow("image", "conv")
    p.arrow("image", "adapter")
    p.arrow("conv", "sum")
    p.arrow("adapter", "sum")
    p.arrow("sum", "head", text="every layer")
    p.save("residual_adapters")


def lora() -> None:
    """A product of two thin matrices beside the frozen one."""
    p = image_to_head(height=2.6, middle=1.3)
    p.box("w", 3.3, 2.0, "weights W", "frozen", w=1.9)
    p.box("a", 2.7, 0.6, "A (r x d)", "learns", w=1.1)
    p.box("b", 4.1, 0.6, "B (d x r)", "learns", w=1.1)
    p.box("sum", 5.4, 1.3, "+", "plain", w=0.5)
    p.arrow("image", "w")
    p.arrow("image", "a")
    p.arrow("a", "b")
    p.arrow("w", "sum")
    p.arrow("b", "sum")
    p.arrow("sum", "head", text="every layer")
    p.save("lora")


DRAWINGS = (
    features, finetune, scratch, midtune, sidetune, hst, piggyback, spottune, ladder, progressive, ewc,
    superposition, residual_adapters, lora,
)  # fmt: skip

if __name__ == "__main__":
    for draw in DRAWINGS:
        draw()
