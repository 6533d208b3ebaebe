"""What a person at a notebook sees, and `nbdev-test` does not: figures in a real kernel."""
import nbformat
from nbclient import NotebookClient


def test_figures_appear_after_one_of_ours():
    "A style's context, left, must not switch off what shows figures."
    cells = ["from anomaly_nb import viz\nviz.show_curves({'a': ([0, 1], [0, 1])}, 'x', 'y', 'title');", "import matplotlib.pyplot as plt\nplt.plot([1, 2]);", "plt.plot([2, 1]);"]
    nb = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    NotebookClient(nb, kernel_name="python3", timeout=120).execute()
    assert [sum("image/png" in o.get("data", {}) for o in c.outputs) for c in nb.cells] == [1, 1, 1]
