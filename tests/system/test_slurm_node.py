"""A sweep on a real SLURM: one node, made of this machine by slurm_node.sh. Where SLURM is not installed these are NOT RUN."""
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from house import ROOT
from project import WRITE, call, notebook, project
from test_kill import wait_for

NEEDS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scancel")
GATHER = """import json, pathlib
pathlib.Path(out, 'section.json').write_text(json.dumps({'title': 'gathered', 'text': 'a number', 'figures': [], 'tables': {}}))
pathlib.Path(out, 'metrics.json').write_text(json.dumps({'of': [json.loads((pathlib.Path(out).parent/f/'metrics.json').read_text())['n'] for f in inputs.split(',')]}))"""
SLEEP = "import time\nwhile what == 'sleeps': time.sleep(.1)"


@pytest.fixture(scope="module", autouse=True)
def slurm():
    "SLURM_CONF of a cluster that lives as long as these tests; an array has at most 3 jobs."
    places = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in NEEDS if not shutil.which(name, path=places)]
    if missing:
        said = f"NOT RUN: a sweep on SLURM, for there is no {', '.join(missing)} (apt-get install -y slurm-wlm munge)"
        pytest.fail(said) if os.environ.get("CI") and shutil.which("apt-get") else pytest.skip(said)
    folder, script = Path(tempfile.mkdtemp(prefix="slurm-")), Path(__file__).with_name("slurm_node.sh")
    subprocess.run(["bash", script, "start", folder], check=True, env=os.environ | {"MAX_ARRAY": "3"}, timeout=120)
    os.environ["SLURM_CONF"] = str(folder/"slurm.conf")
    yield folder
    subprocess.run(["scancel", "--full", "--signal=KILL", "-u", str(os.getuid())], capture_output=True)
    subprocess.run(["bash", script, "stop", folder], check=True, timeout=120)
    del os.environ["SLURM_CONF"]
    shutil.rmtree(folder)


def collect(folder, until=lambda said: "queued" not in said and "running" not in said, seconds=180):
    "Collects until it says so; returns the last call."
    def ready():
        done = call(folder, "sweep", "mine.yaml", "--collect")
        assert done.returncode in (0, 1), done.stderr
        return done if until(done.stdout) else time.sleep(3)
    return wait_for(ready, seconds)


def scheduler(*words):
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


def said_epoch(folder):
    "The epoch that the run of a folder says it is in, or None."
    for file in (folder/"runs").glob(".partial-*/progress.json"):
        try: return int(json.loads(file.read_text())["text"].split("epoch ")[1].split(",")[0])
        except (OSError, ValueError, KeyError, IndexError): return None


def rows(folder):
    from anomaly_nb.ledger import read_ledger
    return read_ledger(folder/"runs")


def test_submit_leave_and_collect(tmp_path):
    folder = project(tmp_path/"p", "experiment: toy\ngrid: {n: [1, 2, 3, 4]}\nthen: {experiment: gather, grid: {seed: [0]}}\n", toy=["if n == 3: raise ValueError('three is too many')", WRITE], gather=[GATHER])
    file = folder/"nbs"/"experiments"/"gather.ipynb"
    file.write_text(file.read_text().replace('what: str', 'inputs: str = \\"\\"  # folders\\nwhat: str'))
    began = time.monotonic()
    left = call(folder, "sweep", "mine.yaml", "--slurm")
    assert left.returncode == 0 and "5 submitted" in left.stdout, left.stdout + left.stderr
    print(f"submitted and left after {time.monotonic() - began:.1f} s")
    assert len({r["job"].split("_")[0] for r in rows(folder)}) == 3                        # four runs are two arrays, and one job after them
    assert "Dependency" in scheduler("squeue", "-h", "-o", "%r")
    twice = call(folder, "sweep", "mine.yaml", "--slurm")
    assert "0 submitted, 0 done before, 5 in the queue before" in twice.stdout, twice.stdout + twice.stderr

    done = collect(folder)
    assert done.returncode == 1 and "4 done, 1 failed" in done.stdout
    assert "n=3: failed. ValueError: three is too many." in done.stderr and "failed/toy-" in done.stderr and "Traceback" not in done.stderr
    gathered = next((folder/"runs").glob("gather-*/metrics.json"))
    assert sorted(json.loads(gathered.read_text())["of"]) == [1, 2, 4]
    page = (folder/"runs"/"report-mine.html").read_text()
    assert "three is too many" in page and "gathered" in page
    status = call(folder, "sweep", "status")
    assert "4 done, 1 failed" in status.stdout and "job " in status.stdout
    again = call(folder, "sweep", "mine.yaml", "--slurm")
    assert "0 submitted, 4 done before" in again.stdout and again.returncode == 1           # what failed would fail again

    notebook(folder/"nbs"/"experiments"/"toy.ipynb", "if n == 3: n = 5", WRITE)               # repaired: other code, other runs
    assert "5 submitted" in call(folder, "sweep", "mine.yaml", "--slurm", "--partition", "down").stdout
    scheduler("scancel", "-u", str(os.getuid()))
    assert "5 killed" in collect(folder).stdout


def test_a_job_that_finds_no_python_brings_its_error(tmp_path):
    folder = project(tmp_path/"p", "experiment: toy\ngrid: {n: [1]}\n", toy=[WRITE])
    left = call(folder, "sweep", "mine.yaml", "--slurm", "--slurm-option", "setup=export PYTHONHOME=/nowhere")
    assert left.returncode == 0, left.stderr
    done = collect(folder)
    assert done.returncode == 1 and "1 failed" in done.stdout
    assert "No module named 'encodings'" in done.stderr and "_0_log.err" in done.stderr, done.stderr
    log = Path(done.stderr.split("(log: ")[1].split(")")[0])
    assert "encodings" in log.read_text()


def test_cancelled_is_killed_and_goes_on_when_asked(tmp_path):
    folder = project(tmp_path/"p", "experiment: toy\ngrid: {what: [sleeps, waits]}\n", toy=[SLEEP, WRITE])
    assert call(folder, "sweep", "mine.yaml", "--slurm").returncode == 0
    running = collect(folder, lambda said: "sleeps: running" in said)
    assert running.returncode == 1
    job = next(r["job"] for r in rows(folder) if r["parameters"]["what"] == "sleeps")
    scheduler("scancel", job)
    done = collect(folder)
    assert "1 done, 1 killed" in done.stdout or "1 killed, 1 done" in done.stdout, done.stdout
    assert "sleeps: killed. SLURM: cancelled." in done.stderr
    held = call(folder, "sweep", "mine.yaml", "--slurm", "--partition", "down")               # a queue that starts nothing
    assert "1 submitted" in held.stdout, held.stdout + held.stderr
    assert "sleeps: queued, PartitionDown" in collect(folder, lambda said: "queued" in said).stdout
    scheduler("scancel", "--state=PENDING", "-u", str(os.getuid()))
    assert "sleeps: killed. SLURM: cancelled." in collect(folder).stderr


def test_a_job_whose_time_is_over_goes_on_from_its_checkpoint(tmp_path):
    run = ["-p", "model=ae", "-p", "epochs=24", "-p", "batch_size=4", "-p", "size=tiny"]
    folder = project(tmp_path/"p", "runs: [{model: ae, epochs: 24, batch_size: 4, size: tiny}]\n")
    (folder/"settings.ini").write_text(f"[paths]\ncohorts = {ROOT/'data'/'cohorts'}\ncache = {ROOT/'data'/'cache'}\n[runs]\nfolder = runs\n")
    assert call(folder, "sweep", "mine.yaml", "--slurm").returncode == 0
    wait_for(lambda: list((folder/"runs").glob(".partial-*/checkpoints/*.resume")))                # saved while it trains, at most every ten seconds
    reached, job = said_epoch(folder), rows(folder)[0]["job"]
    scheduler("scancel", "--signal=USR2", job)                                                # what SLURM sends 90 seconds before the end
    wait_for(lambda: "PENDING" in scheduler("squeue", "-h", "-a", "-j", job, "-o", "%T"))
    assert not list((folder/"runs").glob("evaluate-*"))
    assert "queued" in collect(folder, lambda said: True).stdout
    next((folder/"runs").glob(".partial-*/progress.json")).unlink()                           # of the first turn
    first = wait_for(lambda: said_epoch(folder) is not None and (said_epoch(folder),))[0]
    done = collect(folder)
    assert done.returncode == 0 and "1 done" in done.stdout, done.stdout + done.stderr
    assert reached >= 1 and first >= reached, f"the second turn began with epoch {first}, and the first had reached {reached}"
    note = json.loads((folder/"runs"/".slurm"/f"{job}.json").read_text())
    assert note["turns"] == 2 and note["state"] == "done"
    whole = call(folder, "run", "evaluate", *run, ANOMALY_NB_RUNS_FOLDER=folder/"whole")
    assert whole.returncode == 0, whole.stderr
    assert next((folder/"runs").glob("evaluate-*/metrics.json")).read_bytes() == next((folder/"whole").glob("evaluate-*/metrics.json")).read_bytes()


@pytest.mark.parametrize("words, said", [
    (["--partition", "nowhere"], "Invalid partition name specified"),
    (["--slurm-option", "tiem=10"], "unrecognized option '--tiem=10'"),
    (["--slurm-option", "array=0-9"], "the sweep makes the array"),
    (["--slurm-option", "time=soon"], "is 'soon'"),
])
def test_what_the_cluster_does_not_take_is_said_in_one_line(tmp_path, words, said):
    folder = project(tmp_path/"p", "experiment: toy\ngrid: {n: [1]}\n", toy=[WRITE])
    done = call(folder, "sweep", "mine.yaml", "--slurm", *words)
    assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not rows(folder)


def test_a_scheduler_that_is_silent_is_not_taken_for_an_empty_one(tmp_path, slurm):
    folder = project(tmp_path/"p", "experiment: toy\ngrid: {what: [sleeps]}\n", toy=[SLEEP, WRITE])
    assert call(folder, "sweep", "mine.yaml", "--slurm", "--partition", "down").returncode == 0
    (tmp_path/"silent.conf").write_text("\n".join("SlurmctldPort=1" if line.startswith("SlurmctldPort") else line for line in (slurm/"slurm.conf").read_text().splitlines()) + "\nMessageTimeout=2\n")
    silent = {"SLURM_CONF": tmp_path/"silent.conf"}
    done = call(folder, "sweep", "mine.yaml", "--collect", **silent)
    assert done.returncode == 2 and "squeue: does not answer" in done.stderr
    assert call(folder, "sweep", "mine.yaml", "--slurm", **silent).returncode == 2
    assert "as they were last seen" in call(folder, "sweep", "status", **silent).stdout
    assert [r["state"] for r in rows(folder)] == ["queued"]
    scheduler("scancel", rows(folder)[0]["job"])
