"""`build.py [FOLDER]`: the site, from the stored outputs of the notebooks, into FOLDER (default `_docs`). A warning is an error. Nothing is executed, nothing is fetched."""
import shutil
import sys
import tempfile
import time
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from course import ROOT, SITE
from stage import stage


def build(out):
    "Builds aside, and puts the site in the place of the old one when it is whole. Returns Sphinx's exit status."
    began = time.monotonic()
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f"{out.name}.", suffix=".tmp") as place:
        place = Path(place)
        pages = stage(place/"source")
        status = sphinx(["-b", "html", "-c", str(SITE), "-d", str(place/"doctrees"), "-W", "--keep-going", "-q", "-j", "1", str(place/"source"), str(place/"html")])
        if status: return status
        (place/"html"/".buildinfo").unlink(missing_ok=True)
        if out.exists(): shutil.rmtree(out)
        (place/"html").rename(out)
    print(f"{out}: {sum(1 for _ in out.rglob('*.html'))} pages, {len(pages) + 1} of them notebooks, in {time.monotonic() - began:.0f} s")
    return 0


if __name__ == "__main__": sys.exit(build(Path(sys.argv[1]).resolve() if sys.argv[1:] else ROOT/"_docs"))
