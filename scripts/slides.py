"""Slides of the notebooks' figures, plots and predictions: `make slides` writes outputs/slides.html."""

import base64
import re
from pathlib import Path

import mistune
import nbformat

PROJECT = Path(__file__).resolve().parent.parent
NOTEBOOKS = PROJECT / "notebooks"
STYLE = """html { scroll-snap-type: y mandatory; font: 3vmin/1.4 system-ui, sans-serif; color: #1b1f24 }
section { min-height: 92vh; padding: 4vh 6vw; scroll-snap-align: start; break-after: page }
img { display: block; max-width: 100%; height: 58vh; margin: 2vh auto; object-fit: contain }"""


def slide(text: str, folder: Path) -> str:
    """Markdown as one screen, its pictures inside."""
    page = str(mistune.html(text))
    for name in re.findall(r'src="([^"]+)"', page):
        kind = "svg+xml" if name.endswith(".svg") else "png"
        data = base64.b64encode((folder / name).read_bytes()).decode()
        page = page.replace(name, f"data:image/{kind};base64,{data}")
    return f"<section>{page}</section>"


slides = []
for path in sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb")):
    texts = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "markdown"]
    slides.append(slide(texts[0], NOTEBOOKS))
    for text in texts:
        parts = re.findall(r"^#{2,3} .*$|^!\[.*\)$|^\*\*Predict:\*\*(?:.+\n?)+", text, re.MULTILINE)
        if "**Predict:**" in text or "](figures/" in text:
            slides.append(slide("\n\n".join(parts), NOTEBOOKS))
    for plot in sorted(NOTEBOOKS.glob(f"precomputed/plots/{path.name[:2]}_*.png")):
        slides.append(slide(f"![{plot.stem}](precomputed/plots/{plot.name})", NOTEBOOKS))
(PROJECT / "outputs").mkdir(exist_ok=True)
(PROJECT / "outputs" / "slides.html").write_text(
    f'<!doctype html><meta charset="utf-8"><title>LoRA on FiQA</title><style>{STYLE}</style>{"".join(slides)}'
)
