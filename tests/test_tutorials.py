"""Every exercise of the tutorials: the stub fails its check, the solution passes it. And their code fits on a page."""
import json
import re

import matplotlib
import pytest

from house import ROOT

TUTORIALS = sorted((ROOT/"nbs"/"tutorials").glob("*.ipynb"))


def steps(path):
    "The notebook as a list of ('code', text) and ('exercise', stub, check, solution)."
    cells, found, waiting = json.loads(path.read_text(encoding="utf-8"))["cells"], [], []
    for above, cell in zip([None, *cells], cells):
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.match(r"#\|\s*exercise", text):
            assert waiting or above["cell_type"] == "markdown" and re.search(r"^#+ Exercise(?!.*^#)", "".join(above["source"]), re.M | re.S), f"{path.name}: a stub stands right below the text of its exercise"
            assert "raises-exception" in cell["metadata"].get("tags", ()), f"{path.name}: a cell marked #| exercise needs the tag raises-exception, for Run All to go on behind an unsolved stub"
            waiting.append(text)
        elif cell["cell_type"] == "code": found.append(("code", text))
        elif waiting:
            solution = re.search(r"<details><summary>Solution</summary>.*?```python\n(.*?)```", text, re.S)
            assert solution, f"{path.name}: an exercise without a solution below it"
            assert len(waiting) == 2, f"{path.name}: an exercise has a stub and a check, here are {len(waiting)} cells"
            found.append(("exercise", *waiting, solution.group(1)))
            waiting = []
    assert not waiting, f"{path.name}: the last exercise has no solution"
    return found


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_code_fits_on_a_page(path):
    "JupyterLab shows about 110 characters; a newcomer should not have to read on in the next line."
    long = [line for kind, *texts in steps(path) for line in "\n".join(texts).splitlines() if len(line) > 110]
    assert not long, f"{path.name}: {len(long)} lines of code above 110 characters: {long[0][:80]}..."


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda p: p.stem)
def test_stubs_fail_and_solutions_pass(path, monkeypatch):
    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    monkeypatch.chdir(path.parent)
    space, exercises = {"__name__": "tutorial"}, 0
    for kind, *texts in steps(path):
        if kind == "code": exec(texts[0], space)
        else:
            stub, check, solution = texts
            exec(stub, space)
            with pytest.raises(NotImplementedError): exec(check, space)
            exec(solution, space)
            exec(check, space)
            exercises += 1
        plt.close("all")
    assert exercises >= 2, "a tutorial has exercises"
