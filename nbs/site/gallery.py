"""The gallery: one small picture for each chapter and tutorial, cut from its stored figures while the site is built."""
import base64
import io

from PIL import Image

from course import PARTS

SIZE = (300, 200)


def choose(figures):
    "The figure that tells most in a small picture: of usual shape, and with the most on it, so images before curves; the later one of two alike."
    def worth(figure):
        image = Image.open(io.BytesIO(base64.b64decode(figure[1])))
        shape = min(image.width / image.height / 1.5, 1.5 * image.height / image.width)
        small = image.convert("L").resize((60, 40), Image.Resampling.BOX).histogram()
        return round(shape**0.5 * (0.25 + sum(small[:235]) / sum(small)), 2)
    return max(reversed(figures), key=worth)


def thumbnail(png, path):
    "A figure on white, whole, in a box of `SIZE`."
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.thumbnail(SIZE, Image.Resampling.LANCZOS)
    box = Image.new("RGB", SIZE, "white")
    box.paste(image, ((SIZE[0] - image.width) // 2, (SIZE[1] - image.height) // 2))
    path.parent.mkdir(parents=True, exist_ok=True)
    box.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def page(pages, folder):
    "The gallery as Markdown; writes the pictures into `folder`."
    said = ["# Gallery", "One figure of every chapter and tutorial that draws one. All are made by the notebook that they lead to, on embedded cohorts: they show how methods work, and are no evidence about patients."]
    for part, (title, *_) in PARTS.items():
        items = []
        for p in (p for p in pages if p.part == part and p.figures):
            cell, png = choose(p.figures)
            thumbnail(png, folder/f"{p.path.stem}.png")
            items.append(f"- [![](thumbs/{p.path.stem}.png){p.name}](../{p.doc}.ipynb)")
        if items: said += [f"## {title}", "```{container} gallery\n" + "\n".join(items) + "\n```"]
    return "\n\n".join(said) + "\n"
