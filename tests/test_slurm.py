"""A sweep as jobs of SLURM, without a cluster: arrays, scripts, what became of a job. tests/system/test_slurm_node.py has a real one."""
import json
import os
import pickle
import sys
from pathlib import Path

import pytest

from anomaly_nb import slurm
from anomaly_nb.core import InputError, ParameterError, write_json
from anomaly_nb.ledger import read_ledger
from anomaly_nb.slurm import JOBS, Cluster, SlurmRun, agree_with_cluster, collect_sweep, error_in, minutes_of, note_of, outcome, slurm_options, submit_sweep
from anomaly_nb.sweep import prepare, read_sweep

sys.path.append(str(Path(__file__).parent/"system"))
from project import WRITE, project  # noqa: E402

submitit = pytest.importorskip("submitit")
SWEEP = "experiment: toy\ngrid: {n: [1, 2, 3, 4]}\nthen: {experiment: gather, grid: {seed: [0, 1]}}\n"


class Book(Cluster):
    "A cluster that writes down what it is given; `said` is what its scheduler says."
    def __init__(self, folder, longest=1000): self.root, self.options, self.name, self.most, self.given, self.said = Path(folder).resolve(), {}, "mine", longest, [], {}
    def longest(self): return self.most
    def submit(self, jobs, after=()):
        self.given.append((jobs, after))
        ids = [f"{len(self.given)}_{n}" for n in range(len(jobs))]
        self.said |= {job: ("PENDING", "Priority") for job in ids}
        return ids
    def states(self, jobs): return {job: self.said.get(job, ("GONE", "")) for job in jobs}


@pytest.fixture()
def home(tmp_path, monkeypatch):
    folder = project(tmp_path/"p", SWEEP, toy=[WRITE], gather=[WRITE])
    file = folder/"nbs"/"experiments"/"gather.ipynb"
    file.write_text(file.read_text().replace("what: str", 'inputs: str = \\"\\"  # folders\\nwhat: str'))
    monkeypatch.setenv("ANOMALY_NB_SETTINGS", str(folder/"settings.ini"))
    return folder


def plan_of(home): return prepare(read_sweep(home/"mine.yaml"))


def note(root, job, name, state, **more):
    write_json(Path(root)/JOBS/f"{job}.json", {"run": name, "asked": name, "parameters": {}, "state": state, "turns": 1} | more)


def finish(root, name): write_json(Path(root)/name/"metrics.json", {"n": 1})


# --- submitting --------------------------------------------------------------------------------------------------------------------------------------------------------

def test_arrays_are_no_longer_than_the_cluster_takes(home):
    cluster = Book(home/"runs", longest=3)
    plan = plan_of(home)
    jobs = submit_sweep(plan, cluster)
    assert [len(given) for given, _ in cluster.given] == [3, 1, 2]
    assert [after for _, after in cluster.given] == [(), (), ["1_0", "1_1", "1_2", "2_0"]]                # `then` waits for both arrays
    rows = read_ledger(home/"runs")
    assert [r["job"] for r in rows] == jobs and {r["state"] for r in rows} == {"queued"} and {r["sweep"] for r in rows} == {"mine"}
    assert [r["name"] for r in rows[:4]] == [run.folder_name for run in plan.runs]
    task = cluster.given[2][0][0]
    assert task.after == (["1_0", "1_1", "1_2", "2_0"], []) and pickle.loads(pickle.dumps(task)).run == task.run


def test_what_is_there_or_on_its_way_is_not_submitted(home):
    cluster, plan = Book(home/"runs"), plan_of(home)
    done, failed = plan.runs[0].folder_name, plan.runs[1].folder_name
    finish(home/"runs", done)
    write_json(home/"runs"/"failed"/failed/"state.json", {"state": "oom", "message": "too much"})
    assert submit_sweep(plan, cluster) == ["1_0", "1_1", "2_0", "2_1"]
    assert [run.status for run in plan.runs] == ["cached", "oom", "queued", "queued"] and plan.runs[1].message == "too much"
    assert cluster.given[1][0][0].after == (["1_0", "1_1"], [done])
    again = plan_of(home)
    assert submit_sweep(again, cluster) == []
    assert [run.status for run in (*again.runs, *again.then)] == ["cached", "oom"] + ["elsewhere"]*4
    assert submit_sweep(plan_of(home), cluster, retry=True) == ["3_0", "4_0", "4_1"]                    # another result above: `then` is another run
    assert cluster.given[3][1] == ["1_0", "1_1", "3_0"]


def test_then_knows_its_folders_when_all_are_there(home):
    cluster, plan = Book(home/"runs"), plan_of(home)
    for run in plan.runs: finish(home/"runs", run.folder_name)
    assert submit_sweep(plan, cluster) == ["1_0", "1_1"]
    (given, after), = cluster.given
    assert after == () and given[0].after is None and given[0].run.parameters["inputs"] == ",".join(sorted(r.folder_name for r in plan.runs))
    assert submit_sweep(plan_of(home), cluster) == []


def test_sweeps_that_are_included(home):
    "Two files with a run in common; then over each, and over all."
    (home/"other.yaml").write_text("experiment: toy\ngrid: {n: [4, 5]}\nthen: {experiment: gather, grid: {seed: [7]}}\n")
    (home/"one.yaml").write_text(SWEEP)
    (home/"mine.yaml").write_text("include: [one.yaml, other.yaml]\nthen: {experiment: gather, grid: {seed: [9]}}\n")
    cluster, plan = Book(home/"runs"), plan_of(home)
    finish(home/"runs", plan.first[0].folder_name)
    assert len(submit_sweep(plan, cluster)) == 8 and [run.status for run in plan.every].count("cached") == 1
    assert [(len(given), after) for given, after in cluster.given] == [(4, ()), (2, ["1_0", "1_1", "1_2"]), (1, ["1_2", "1_3"]), (1, ["1_0", "1_1", "1_2", "1_3", "2_0", "2_1", "3_0"])]
    assert cluster.given[1][0][0].after[1] == cluster.given[3][0][0].after[1] == [plan.first[0].folder_name] and cluster.given[2][0][0].after[1] == []
    assert submit_sweep(plan_of(home), cluster) == []
    collected = collect_sweep(read_sweep(home/"mine.yaml"), cluster)
    assert [run.status for run in collected.every] == ["done"] + ["queued"]*8


def test_a_refused_second_array_loses_nothing_of_the_first(home):
    class Full(Book):
        def submit(self, jobs, after=()):
            if self.given: raise InputError("sbatch", "job limit", "fewer")
            return super().submit(jobs, after)
    with pytest.raises(InputError, match="job limit"): submit_sweep(plan_of(home), Full(home/"runs", longest=2))
    assert [r["job"] for r in read_ledger(home/"runs")] == ["1_0", "1_1"]


@pytest.fixture()
def commands(tmp_path, monkeypatch):
    "SLURM's commands as scripts: `sbatch` takes everything, the others say what is in files."
    place = tmp_path/"bin"
    place.mkdir()
    for name, text in {"sbatch": 'echo "Submitted batch job 77"', "srun": "", "squeue": f"cat {place}/queue", "sacct": f"echo $@ >> {place}/asked; cat {place}/accounts", "scontrol": "echo 'MaxArraySize            = 5'"}.items():
        (place/name).write_text(f"#!/bin/sh\n{text}\n")
        (place/name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")
    return place


def test_the_script_of_an_array(home, commands):
    cluster = Cluster(home/"runs", slurm_options({"time": "1:00:00", "mem": "16G", "gres": "gpu:a100:1", "setup": "module load cuda", "reservation": "course"}, "gpu", 2), "mine")
    assert cluster.longest() == 5
    assert submit_sweep(plan_of(home), cluster)[:4] == [f"77_{n}" for n in range(4)]
    scripts = sorted((home/"runs"/JOBS).glob("*submission*.sh"))
    texts = {path.name: path.read_text() for path in scripts}
    text = next(t for t in texts.values() if "--array=0-1%2" in t)                                       # the array of `then` was the last to be called 77
    for line in ("--partition=gpu", "--mem=16G", "--gres=gpu:a100:1", "--time=60", "--reservation=course", "--requeue", "--signal=USR2@90", "--dependency=afterany:77", "--job-name='anomaly-nb mine'"): assert f"#SBATCH {line}\n" in text, line
    assert "\nmodule load cuda\n" in text and "--wckey" not in text
    assert sorted(p.name for p in (home/"runs"/JOBS).glob("77_*.pkl")) == [f"77_{n}_submitted.pkl" for n in range(4)]


@pytest.mark.parametrize("words, said", [({"array": "0-3"}, "the sweep makes the array"), ({"ntasks-per-node": "2"}, "one process a run"), ({"time": "soon"}, "is 'soon'"), ({"time": "2"}, "told 90 s before"), ({"dependency": "afterok:1"}, "what comes after")])
def test_options_that_are_not_yours(words, said):
    with pytest.raises(ParameterError, match=said): slurm_options(words)
    with pytest.raises(ParameterError, match="--processes"): slurm_options({}, "", -1)
    assert [minutes_of(t) for t in ("5", "0:30", "1:0:0", "1-0", "1-2:3:4")] == [5, 1, 60, 1440, 1564]


def test_without_slurm_or_submitit_one_line(home, tmp_path, monkeypatch, capsys):
    from anomaly_nb.cli import main
    monkeypatch.chdir(home); monkeypatch.setenv("PATH", str(tmp_path))
    for words in (["--slurm"], ["--collect"]):
        assert main(["sweep", "mine.yaml", *words]) == 2
        assert "a login node of a cluster" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert main(["sweep", "mine.yaml", "--slurm"]) == 2
    assert 'pip install "anomaly_nb[slurm]"' in capsys.readouterr().err
    assert not (home/"runs").exists()


# --- what SLURM says ---------------------------------------------------------------------------------------------------------------------------------------------------

def test_queue_and_accounts_are_read(home, commands):
    (commands/"queue").write_text("77_[2-3%4]|PENDING|Priority\n77_1|RUNNING|None\n80|PENDING|PartitionDown\n81_[1,4-5]|PENDING|Resources\n")
    (commands/"accounts").write_text("77_0|CANCELLED by 1000|None\n77_1|RUNNING|None\n60|OUT_OF_MEMORY|None\n")
    (commands/"queue").write_text((commands/"queue").read_text() + "90|CANCELLED|PartitionDown\n")
    cluster = Cluster(home/"runs")
    assert cluster.states(["77_0", "77_1", "77_2", "77_3", "80", "81_1", "81_2", "81_5", "60", "50_3", "90_7"]) == {
        "77_0": ("CANCELLED", "None"), "77_1": ("RUNNING", "None"), "77_2": ("PENDING", "Priority"), "77_3": ("PENDING", "Priority"), "80": ("PENDING", "PartitionDown"),
        "81_1": ("PENDING", "Resources"), "81_2": ("GONE", ""), "81_5": ("PENDING", "Resources"), "60": ("OUT_OF_MEMORY", "None"), "50_3": ("GONE", ""), "90_7": ("CANCELLED", "PartitionDown")}
    assert (commands/"asked").read_text().count("-j 50,60,77,81") == 1                                   # one question for all
    (commands/"sacct").write_text("#!/bin/sh\necho 'Slurm accounting storage is disabled' >&2; exit 1\n")
    assert cluster.states(["60"]) == {"60": ("GONE", "")}
    (commands/"squeue").write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(InputError, match="does not answer"): cluster.states(["60"])


@pytest.mark.parametrize("said, noted, state, message", [
    (("PENDING", "Resources"), None, "queued", "Resources"),
    (("PENDING", "BeginTime"), "running", "queued", "BeginTime"),                                        # put back into the queue
    (("RUNNING", "None"), None, "queued", ""),                                                           # its Python is starting
    (("RUNNING", "None"), "running", "running", "epoch 3"),
    (("COMPLETING", "None"), "running", "running", "epoch 3"),
    (("COMPLETED", "None"), "failed", "failed", "said"),
    (("CANCELLED", ""), "failed", "failed", "said"),
    (("CANCELLED", ""), "killed", "killed", "SLURM: cancelled"),
    (("CANCELLED", ""), None, "killed", "SLURM: cancelled"),
    (("TIMEOUT", ""), "running", "timeout", "SLURM: timeout"),
    (("FAILED", ""), "timeout", "timeout", "said"),
    (("OUT_OF_MEMORY", ""), "running", "oom", "SLURM: out of memory"),
    (("NODE_FAIL", ""), "running", "killed", "SLURM: node fail"),
    (("FAILED", ""), "running", "killed", "SLURM: failed; OSError: disk"),
    (("GONE", ""), "running", "killed", "SLURM: gone; OSError: disk"),
    (("FAILED", ""), None, "failed", "OSError: disk (log: "),
    (("GONE", ""), None, "failed", "OSError: disk (log: "),
])
def test_what_became_of_a_job(tmp_path, said, noted, state, message):
    cluster = Book(tmp_path)
    write_json(tmp_path/".partial-a"/"progress.json", {"text": "epoch 3"})
    (tmp_path/JOBS).mkdir()
    cluster.log("1_0").write_text("Traceback\n  File\nOSError: disk\nsubmitit ERROR - Submitted job triggered an exception\nsrun: error: n: task 0: Exited with exit code 1\n")
    found = outcome(cluster, "a", "1_0", said, {"state": noted, "message": "said"} if noted else {})
    assert found[0] == state and found[1].startswith(message)
    finish(tmp_path, "a")
    assert outcome(cluster, "a", "1_0", said, {}) == ("done", "")                                        # a result is a result


def test_errors_are_found_in_logs(tmp_path):
    log = tmp_path/"log"
    assert error_in(log) == ""
    for text, said in (("slurmstepd: error: execve(): /x/python: No such file or directory\nsrun: error: n: task 0: Exited with exit code 2\n", "slurmstepd: error: execve"), ("srun: error: n: task 0: Killed\n", ""), ("a\nModuleNotFoundError: No module named 'torch'\nb\n", "ModuleNotFoundError"), ("/var/spool/slurm: line 9: module: command not found\nsrun: error: n: task 0: Exited with exit code 127", "/var/spool/slurm")):
        log.write_text(text)
        assert error_in(log).startswith(said) and bool(error_in(log)) == bool(said)


# --- the ledger follows ------------------------------------------------------------------------------------------------------------------------------------------------

def test_rows_follow_folders_and_scheduler(home):
    cluster, plan = Book(home/"runs"), plan_of(home)
    submit_sweep(plan, cluster)
    root, names = home/"runs", [run.folder_name for run in plan.runs]
    finish(root, names[0]); note(root, "1_0", names[0], "done", seconds=4.5, memory=300)
    (root/f".partial-{names[1]}").mkdir(); note(root, "1_1", names[1], "running")
    (root/f".partial-{names[2]}").mkdir(); note(root, "1_2", names[2], "running")
    note(root, "1_3", names[3], "failed", message="three is too many", parameters=plan.runs[3].parameters)
    cluster.said |= {"1_0": ("COMPLETED", ""), "1_1": ("RUNNING", ""), "1_2": ("OUT_OF_MEMORY", ""), "1_3": ("COMPLETED", "")}
    agree_with_cluster(cluster)
    rows = {r["job"]: r for r in read_ledger(root)}
    assert [(rows[f"1_{n}"]["state"], rows[f"1_{n}"]["message"]) for n in range(4)] == [("done", ""), ("running", ""), ("oom", "SLURM: out of memory"), ("failed", "three is too many")]
    assert (rows["1_0"]["seconds"], rows["1_0"]["memory"]) == (4.5, 300)
    assert json.loads((root/f".partial-{names[2]}"/"state.json").read_text())["state"] == "oom"           # so that it is not made again unasked
    collected = collect_sweep(read_sweep(home/"mine.yaml"), cluster)
    assert [run.status for run in (*collected.runs, *collected.then)] == ["done", "running", "oom", "failed", "queued", "queued"]
    assert collected.runs[0].folder == root/names[0] and collected.then[0].message == "Priority"
    cluster.said |= {"1_1": ("GONE", ""), "1_2": ("PENDING", "BeginTime")}                                # an administrator put it back
    agree_with_cluster(cluster)
    assert [{r["job"]: r["state"] for r in read_ledger(root)}[f"1_{n}"] for n in (1, 2)] == ["killed", "queued"]
    (home/"mine.yaml").write_text(SWEEP.replace("4]", "4, 5]"))
    assert collect_sweep(read_sweep(home/"mine.yaml"), cluster).runs[4].status == "not submitted"


def test_a_run_that_its_node_names_otherwise(home):
    "Another device or changed code: another key. The row moves, and the same submission finds the result."
    cluster, plan = Book(home/"runs"), plan_of(home)
    submit_sweep(plan, cluster)
    asked, root = plan.runs[0].folder_name, home/"runs"
    note(root, "1_0", "toy-00000000aaaa", "done", asked=asked, parameters=plan.runs[0].parameters); finish(root, "toy-00000000aaaa")
    gather = plan.then[0]
    note(root, "2_0", "gather-00000000bbbb", "done", parameters=gather.parameters | {"inputs": "toy-00000000aaaa"}); finish(root, "gather-00000000bbbb")
    cluster.said |= {"1_0": ("COMPLETED", ""), "2_0": ("COMPLETED", "")}
    agree_with_cluster(cluster)
    names = {r["job"]: r["name"] for r in read_ledger(root)}
    assert names["1_0"] == "toy-00000000aaaa" and names["2_0"] == "gather-00000000bbbb" and len(names) == 6
    collected = collect_sweep(read_sweep(home/"mine.yaml"), cluster)
    assert collected.runs[0].folder == root/"toy-00000000aaaa" and collected.then[0].folder == root/"gather-00000000bbbb"
    again = plan_of(home)
    submit_sweep(again, cluster)
    assert again.runs[0].status == "cached" and again.runs[0].folder.name == "toy-00000000aaaa"


def test_status_and_clean_know_of_jobs(home, capsys):
    from anomaly_nb.sweep_commands import clean, status_of
    cluster, root = Book(home/"runs"), home/"runs"
    submit_sweep(plan_of(home), cluster)
    for name in ("1_0_0_log.err", "0_3_0_log.err", "0_submission.sh"): (root/JOBS/name).touch()
    os.environ["PATH"], path = str(home), os.environ["PATH"]
    try: assert status_of(root) == 1
    finally: os.environ["PATH"] = path
    said = capsys.readouterr().out
    assert "jobs as they were last seen: SLURM: is not on this machine" in said and "job 1_3" in said and "6 queued" in said
    clean(root, yes=True)
    assert sorted(p.name for p in (root/JOBS).iterdir()) == ["1_0_0_log.err"]                             # of a job that waits


# --- on the node -------------------------------------------------------------------------------------------------------------------------------------------------------

@pytest.fixture()
def node(monkeypatch):
    monkeypatch.setattr(submitit, "JobEnvironment", lambda: type("", (), {"job_id": "7_0"}))
    monkeypatch.setenv("SLURM_JOB_NAME", "anomaly-nb")
    return monkeypatch


def job_of(home, **more):
    plan = plan_of(home)
    (home/"runs"/JOBS).mkdir(parents=True, exist_ok=True)
    return SlurmRun(plan.runs[0], home/"runs", asked=plan.runs[0].folder_name, **more)


def test_a_job_notes_begin_and_end(home, node):
    job, seen = job_of(home), []
    def execute(run, folder, since, limits, begin):
        begin(run); seen.append((note_of(folder, "7_0")["state"], os.environ["SLURM_JOB_NAME"]))
        run.status, run.message, run.seconds = "failed", "1/0", 3.21
    node.setattr(slurm, "execute", execute)
    job()
    assert seen == [("running", "interactive")]
    assert {k: note_of(home/"runs", "7_0")[k] for k in ("run", "state", "message", "seconds", "turns")} == {"run": job.run.folder_name, "state": "failed", "message": "1/0", "seconds": 3.2, "turns": 1}


def test_a_job_that_came_back_too_often_is_a_timeout(home, node):
    job = job_of(home)
    (home/"runs"/f".partial-{job.run.folder_name}").mkdir(parents=True)
    def execute(*args, **more): raise submitit.core.utils.UncompletedJobError("Job not requeued because: timed-out too many times.")
    node.setattr(slurm, "execute", execute)
    again = pickle.loads(pickle.dumps(job.checkpoint())).function
    again.turns = 20
    with pytest.raises(submitit.core.utils.UncompletedJobError): again()
    assert (note_of(home/"runs", "7_0")["state"], note_of(home/"runs", "7_0")["message"]) == ("timeout", "its time was over 21 times")
    assert plan_state(home, job.run) == "timeout"


def plan_state(home, run):
    from anomaly_nb.sweep import state_of
    return state_of(run, home/"runs")


def test_a_job_of_then_takes_the_finished_folders(home, node):
    root = home/"runs"
    job = job_of(home, after=(["1_0", "1_1", "1_2"], ["before"]))
    for name in ("before", "made"): finish(root, name)
    note(root, "1_0", "made", "done"); note(root, "1_1", "broken", "failed")
    asked = []
    node.setattr(slurm, "execute", lambda run, *args, **more: asked.append(run.parameters["inputs"]))
    job()
    assert asked == ["before,made"]
    nothing = job_of(home, after=(["1_1"], []))
    with pytest.raises(InputError, match="none of the runs above is finished"): nothing()
    assert note_of(root, "7_0")["state"] == "failed" and "none of the runs above" in note_of(root, "7_0")["message"]
