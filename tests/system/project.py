"""A small project of its own: a settings.ini with experiments of a few cells beside it, for sweeps that should take milliseconds."""
import json
import os
import subprocess
import sys
from pathlib import Path

BIN = Path(sys.executable).parent/"anomaly-nb"
WRITE = """import json, pathlib
pathlib.Path(out, 'section.json').write_text(json.dumps({'title': f'toy {what} {n}', 'text': 'a number', 'figures': [], 'tables': {}}))
pathlib.Path(out, 'metrics.json').write_text(json.dumps({'n': n, 'seed': seed}))"""
PARAMETERS = 'out: str = ""  # folder of the run\nn: int = 1  # a number\nseed: int = 0  # a seed\nwhat: str = ""  # a word'


def notebook(path, *cells):
    "Writes an experiment: the cell of parameters, then these."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"nbformat": 4, "nbformat_minor": 5, "metadata": {"kernelspec": {"name": "python3", "display_name": "python3", "language": "python"}}, "cells": [
        {"cell_type": "code", "id": f"c{i}", "metadata": {} if i else {"tags": ["parameters"]}, "source": text, "outputs": [], "execution_count": None} for i, text in enumerate((PARAMETERS, *cells))]}))


def project(folder, sweep, **experiments):
    "A folder with settings.ini, experiments {name: cells} and mine.yaml."
    folder.mkdir(parents=True, exist_ok=True)
    (folder/"settings.ini").write_text("[paths]\ncohorts = cohorts\ncache = cache\n[runs]\nfolder = runs\n")
    for name, cells in experiments.items(): notebook(folder/"nbs"/"experiments"/f"{name}.ipynb", *cells)
    (folder/"mine.yaml").write_text(sweep)
    return folder


def environment(**more):
    "The environment of a person, without what our own runs set."
    return {k: v for k, v in os.environ.items() if not k.startswith("ANOMALY_NB_")} | {k: str(v) for k, v in more.items()}


def start(folder, *words, **env):
    return subprocess.Popen([BIN, "sweep", "mine.yaml", *words], cwd=folder, env=environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def call(folder, *words, **env):
    return subprocess.run([BIN, *words], cwd=folder, env=environment(**env), capture_output=True, text=True, timeout=300)


def states(folder, runs="runs"):
    "What the ledger says: {words of the parameters: state}."
    from anomaly_nb.ledger import read_ledger
    return {(r["parameters"]["what"] or f"{r['parameters']['n']}/{r['parameters']['seed']}"): r["state"] for r in read_ledger(folder/runs)}
