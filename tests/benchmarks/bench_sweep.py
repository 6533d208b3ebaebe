"""What a notebook costs beside its own work: plain papermill, one after the other, against a sweep on two cores; and what the ledger adds."""
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT/"tests"/"system")]

from project import WRITE, call, notebook, project  # noqa: E402

from anomaly_nb.ledger import Ledger  # noqa: E402

IMPORTS = "import torch, pandas, sklearn.svm, matplotlib.pyplot, pytorch_lightning"


def papermill(home, count, cells):
    "Seconds of `count` notebooks by plain papermill, its command line, one after the other."
    notebook(home/"plain.ipynb", *cells)
    began = time.perf_counter()
    for n in range(count):
        (home/f"out-{n}").mkdir()
        subprocess.run([Path(sys.executable).parent/"papermill", "plain.ipynb", f"out-{n}/notebook.ipynb", "-k", "python3", "-p", "out", f"out-{n}", "-p", "n", str(n), "--no-progress-bar"], cwd=home, check=True, capture_output=True)
    return time.perf_counter() - began


def in_one_process(home, count, cells):
    "The same by papermill's function in one process, one after the other: its imports are paid once, a kernel is started for each."
    notebook(home/"plain.ipynb", *cells)
    code = "import papermill, sys, pathlib\nfor n in range(int(sys.argv[1])):\n    pathlib.Path(f'in-{n}').mkdir()\n    papermill.execute_notebook('plain.ipynb', f'in-{n}/notebook.ipynb', parameters=dict(out=f'in-{n}', n=n), kernel_name='python3', progress_bar=False)"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", code, str(count)], cwd=home, check=True, capture_output=True)
    return time.perf_counter() - began


def sweep(home, count, cells, processes):
    "Seconds of `anomaly-nb sweep` over as many."
    made = project(home/f"sweep-{count}-{processes}", f"experiment: toy\nseeds: {count}", toy=list(cells))
    began = time.perf_counter()
    done = call(made, "sweep", "mine.yaml", "--processes", str(processes))
    assert done.returncode == 0, done.stderr
    return time.perf_counter() - began


def main():
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        print("trivial notebooks (three cells, no imports), 2 cores")
        plain, one = papermill(home, 20, [WRITE])/20, in_one_process(home, 20, [WRITE])/20
        few, many = sweep(home, 2, [WRITE], 2), sweep(home, 200, [WRITE], 2)
        print(f"  plain papermill, command line        {plain:6.2f} s a notebook, 200: {200*plain:5.0f} s (from 20)")
        print(f"  plain papermill, in one process      {one:6.2f} s a notebook, 200: {200*one:5.0f} s (from 20)")
        print(f"  sweep of 200                         {many/200:6.2f} s a notebook, 200: {many:5.0f} s, start and report included: {200*plain/many:.1f}x and {200*one/many:.1f}x")
        print(f"  a notebook after the first, one core's time: {2*(many - few)/198:.2f} s")
        print("notebooks that import torch, Lightning, scikit-learn, pandas")
        plain = papermill(home/"heavy", 3, [IMPORTS, WRITE])/3
        few, some = sweep(home/"heavy", 2, [IMPORTS, WRITE], 1), sweep(home/"heavy", 12, [IMPORTS, WRITE], 1)
        print(f"  plain papermill                      {plain:6.2f} s a notebook")
        print(f"  a notebook after the first           {(some - few)/10:6.2f} s: {plain/((some - few)/10):.0f}x")
        ledger = Ledger(home/"ledger")
        began = time.perf_counter()
        for n in range(200):
            ledger.queue(f"r{n}", "toy", {"n": n}, "bench"); ledger.claim(f"r{n}"); ledger.beat(f"r{n}"); ledger.end(f"r{n}", "done", "", 1.0)
        print(f"ledger                                 {(time.perf_counter() - began)/200*1000:6.1f} ms a run (four writes)")


if __name__ == "__main__": main()
