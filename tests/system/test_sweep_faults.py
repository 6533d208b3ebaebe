"""What a night can do to a sweep. Every fault ends in a named state, a status that is not 0 and a report that says so; nothing finished is lost or made again."""
import json
import os
import signal
import subprocess
import time

import psutil
import pytest

from project import WRITE, call, environment, project, start, states
from test_kill import wait_for

FAULTS = f"""
import os, subprocess, sys, time
if what == "raises": 1/0
if what == "killed": os.kill(os.getpid(), 9)
if what == "endless":
    while True: pass
if what == "greedy":
    rows = [bytearray(os.urandom(1_000_000)) for _ in range(1500)]
    time.sleep(60)
if what == "asks": bytearray(10**15)
if what == "loud":
    for _ in range(100): print("x" * 1_000_000)
    os.write(1, b"y" * 40_000_000)
if what == "forks" and os.fork() == 0: print("a copy")
if what == "leaves": child = subprocess.Popen(["sleep", "1234"])
{WRITE}"""
SWEEP = "experiment: toy\nruns: [{what: [fine, raises, killed, endless, greedy, asks, loud, forks, leaves]}]"
ENDS = {"fine": "done", "raises": "failed", "killed": "killed", "endless": "timeout", "greedy": "oom", "asks": "oom", "loud": "done", "forks": "done", "leaves": "done"}


@pytest.mark.parametrize("how", ["warm", "kernel"])
def test_every_fault_has_a_state_and_costs_no_other(tmp_path, how):
    home = project(tmp_path/"p", SWEEP, toy=[FAULTS])
    words = ["mine.yaml", "--processes", "2", "--minutes", "0.3", "--memory", "900"]
    done = call(home, "sweep", *words, ANOMALY_NB_RUNS_START=how)
    expected = ENDS | ({"killed": "failed"} if how == "kernel" else {})             # papermill sees its kernel die, and raises
    assert done.returncode == 1 and states(home) == expected, done.stderr
    for what in ("raises", "killed", "endless", "greedy", "asks"): assert f"{what}: {expected[what]}." in done.stderr or f", {what}" in done.stderr, done.stderr
    page = (home/"runs"/"report-mine.html").read_text()
    assert all(f"toy {w} 1" in page for w in ("fine", "loud", "forks", "leaves")) and "ZeroDivisionError" in page and "longer than 0.3 minutes" in page and "MiB of memory" in page
    loud = next(p.parent for p in (home/"runs").glob("toy-*/section.json") if "loud" in p.read_text())
    assert sum(f.stat().st_size for f in loud.rglob("*") if f.is_file()) < (5e6 if how == "warm" else 300e6)
    assert not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1234"]], "a run left a process behind"
    again = call(home, "sweep", *words, ANOMALY_NB_RUNS_START=how)                    # what would end the same way is told; the killed one is made again
    assert again.returncode == 1 and states(home) == expected
    status = call(home, "sweep", "status")
    assert status.returncode == 1 and "timeout" in status.stdout and f"{sum(s == 'done' for s in ENDS.values())} done" in status.stdout


def everything(parent):
    "Kills a sweep and all that it started, as a power cut would."
    family = [psutil.Process(parent.pid), *psutil.Process(parent.pid).children(recursive=True)]
    for process in family:
        try: process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    parent.communicate(timeout=60)
    assert not psutil.wait_procs(family, timeout=30)[1], "a process outlived its sweep"


FORTY = "experiment: toy\ngrid: {n: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]}\nseeds: 4"
SLOW = f"import time, pathlib, os\nwith open(os.environ['MADE'], 'a') as f: f.write(f'{{n}}/{{seed}}\\n')\ntime.sleep(.1)\nimport random; random.seed(1000*n + seed); value = random.random()\n{WRITE.replace(chr(39) + 'seed' + chr(39) + ': seed', chr(39) + 'seed' + chr(39) + ': seed, ' + chr(39) + 'value' + chr(39) + ': value')}"


def results(home):
    "{folder of a run: bytes of its metrics.json}."
    return {p.parent.name: p.read_bytes() for p in (home/"runs").glob("toy-*/metrics.json")}


def test_forty_runs_killed_twice_end_as_if_left_alone(tmp_path):
    whole = project(tmp_path/"whole", FORTY, toy=[SLOW])
    assert call(whole, "sweep", "mine.yaml", "--processes", "2", MADE=tmp_path/"made-whole").returncode == 0
    home = project(tmp_path/"killed", FORTY, toy=[SLOW])
    for least in (6, 20):
        parent = start(home, "--processes", "2", MADE=tmp_path/"made")
        wait_for(lambda: len(results(home)) >= least)
        everything(parent)
        kept = {p: p.stat().st_mtime_ns for p in (home/"runs").glob("toy-*/*")}
        assert least <= len(results(home)) < 40
    last = start(home, "--processes", "2", MADE=tmp_path/"made")
    out, err = last.communicate(timeout=120)
    assert last.returncode == 0, err
    assert results(home) == results(whole) and len(results(home)) == 40
    assert all(p.stat().st_mtime_ns == t for p, t in kept.items()), "a finished run was touched"
    assert set(states(home).values()) == {"done"} and not list((home/"runs").glob(".partial-*"))
    made = (tmp_path/"made").read_text().split()
    assert len(set(made)) == 40 and len(made) <= 44                                   # at most the two that were being made at each kill are begun again
    assert call(home, "sweep", "status").returncode == 0


def test_the_warm_parent_is_killed(tmp_path):
    home = project(tmp_path/"p", FORTY.replace("seeds: 4", "seeds: 1"), toy=[SLOW.replace("sleep(.1)", "sleep(1)")])
    parent, made = start(home, "--processes", "2", MADE=tmp_path/"made"), tmp_path/"made"
    wait_for(lambda: made.exists() and len(made.read_text().split()) >= 5)            # a run that has a second to go
    (warm,) = [p for p in psutil.Process(parent.pid).children() if "serve()" in " ".join(p.cmdline())]
    warm.send_signal(signal.SIGKILL)
    out, err = parent.communicate(timeout=120)
    assert parent.returncode == 1 and "Start the same command again" in err           # the one or two that it took along; all others have a new parent
    assert 8 <= len(results(home)) < 10
    assert call(home, "sweep", "mine.yaml", MADE=made).returncode == 0 and len(results(home)) == 10


def test_two_sweeps_at_once_make_each_run_once(tmp_path):
    home = project(tmp_path/"p", FORTY, toy=[SLOW])
    both = [start(home, "--processes", "2", MADE=tmp_path/"made") for _ in range(2)]
    said = [p.communicate(timeout=240) for p in both]
    assert [p.returncode for p in both] == [0, 0], said
    assert sorted((tmp_path/"made").read_text().split()) == sorted(f"{n}/{s}" for n in range(1, 11) for s in range(4))
    assert set(states(home).values()) == {"done"}


def test_a_clock_that_goes_backwards(tmp_path):
    "Every look at the clock is an hour before the last."
    home = project(tmp_path/"p", "experiment: toy\ngrid: {n: [1, 2, 3]}", toy=[WRITE])
    (tmp_path/"site").mkdir()
    (tmp_path/"site"/"sitecustomize.py").write_text("import time\nreal, looks = time.time, []\ndef back():\n    looks.append(1)\n    return real() - 3600*len(looks)\ntime.time = back\n")
    done = call(home, "sweep", "mine.yaml", PYTHONPATH=tmp_path/"site")
    assert done.returncode == 0, done.stderr
    assert set(states(home).values()) == {"done"} and len(results(home)) == 3


def mounted(folder, *options):
    "A file system of its own at `folder`, or a skip where this machine lets nobody mount one."
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", ",".join(("size=4m", *options)), "tmpfs", folder], capture_output=True, text=True)
    if done.returncode: (pytest.fail if os.environ.get("CI") else pytest.skip)(f"NOT RUN: mount: {done.stderr.strip()}")
    return folder


def test_a_full_disk(tmp_path):
    home = project(tmp_path/"p", "experiment: toy\ngrid: {n: [1, 2, 3]}", toy=["open(f'{out}/rows.bin', 'wb').write(bytes(n*1_900_000))", WRITE])
    disk = mounted(home/"runs")
    try:
        done = call(home, "sweep", "mine.yaml", "--processes", "1")
        assert done.returncode == 1 and "No space left on device" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert "the report cannot be written" in done.stderr
        assert "done" not in [state for run, state in states(home).items() if run != "1/0"]
        assert len(results(home)) == 1 and all(json.loads(b) for b in results(home).values())
    finally: subprocess.run(["umount", disk])


def test_folders_and_ledgers_that_may_not_be_written(tmp_path):
    home = project(tmp_path/"p", "experiment: toy\ngrid: {n: [1, 2]}", toy=[WRITE])
    disk = mounted(home/"runs", "ro")
    try:
        done = call(home, "sweep", "mine.yaml")
        assert done.returncode == 2 and str(home/"runs") in done.stderr and "cannot be written" in done.stderr and "Traceback" not in done.stderr, done.stderr
    finally: subprocess.run(["umount", disk])
    assert call(home, "sweep", "mine.yaml").returncode == 0
    before, ledger = results(home), home/"runs"/"ledger.sqlite"
    subprocess.run(["mount", "--bind", ledger, ledger], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", ledger], check=True)
        (home/"mine.yaml").write_text("experiment: toy\ngrid: {n: [1, 2, 3]}")
        done = call(home, "sweep", "mine.yaml")
        assert done.returncode == 2 and "ledger.sqlite: cannot be written" in done.stderr and "Traceback" not in done.stderr, done.stderr
        assert results(home) == before
    finally: subprocess.run(["umount", ledger])


def test_half_a_result_is_none(tmp_path):
    home = project(tmp_path/"p", "experiment: toy\ngrid: {n: [1, 2]}", toy=[WRITE])
    assert call(home, "sweep", "mine.yaml").returncode == 0
    whole = results(home)
    broken = next((home/"runs").glob("toy-*/metrics.json"))
    broken.write_bytes(broken.read_bytes()[:5])
    (home/"runs"/"ledger.sqlite").write_bytes(b"not a database at all" * 100)
    page = call(home, "report")
    assert page.returncode == 1 and broken.parent.name in page.stderr
    dry = call(home, "sweep", "mine.yaml", "--dry-run")
    assert dry.stdout.count("done ") == 1 and "to do" in dry.stdout
    again = call(home, "sweep", "mine.yaml")
    assert again.returncode == 0 and results(home) == whole and (home/"runs"/"ledger.sqlite.broken-0").is_file()


def test_nothing_worked_and_the_page_says_so(tmp_path):
    home = project(tmp_path/"p", "experiment: toy\nruns: [{what: raises}]", toy=[FAULTS])
    done = call(home, "sweep", "mine.yaml")
    assert done.returncode == 1 and "ZeroDivisionError" in (home/"runs"/"report-mine.html").read_text()


def test_an_import_that_starts_a_thread(tmp_path):
    "No copy of such a process: each run has a kernel, and somebody is told why it takes longer."
    home = project(tmp_path/"p", "experiment: toy\ngrid: {n: [1, 2]}", toy=["import computes", WRITE])
    (tmp_path/"site").mkdir()
    (tmp_path/"site"/"computes.py").write_text("import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()\n")
    done = call(home, "sweep", "mine.yaml", PYTHONPATH=tmp_path/"site")
    assert done.returncode == 0 and len(results(home)) == 2, done.stderr
    assert "a kernel of its own" in done.stderr and "an import started 1 thread" in done.stderr, done.stderr
