#!/bin/bash
# A real SLURM of one node, in a folder of its own: slurm_node.sh start FOLDER | stop FOLDER
# Needs Debian's packages: apt-get install -y slurm-wlm munge. Everything (key, sockets, state, logs) lies in FOLDER, and the ports are free ones,
# so it runs without root and beside a cluster that the machine may belong to. `start` ends when the node is idle; then: export SLURM_CONF=FOLDER/slurm.conf
set -euo pipefail
PATH=$PATH:/usr/sbin:/sbin
do=${1:?start or stop}; mkdir -p "${2:?a folder}"; folder=$(cd "$2" && pwd)
export SLURM_CONF=$folder/slurm.conf

stop() {
    local name pids=""
    for name in slurmd slurmctld munged; do pids="$pids $(cat "$folder/$name.pid" 2>/dev/null || true)"; done
    for pid in $pids; do kill "$pid" 2>/dev/null || true; done
    for pid in $pids; do
        for _ in $(seq 50); do kill -0 "$pid" 2>/dev/null || break; sleep .1; done
        kill -9 "$pid" 2>/dev/null || true
    done
    rm -f "$folder"/*.pid
}

port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }

start() {
    for name in munged slurmctld slurmd sbatch; do command -v $name > /dev/null || { echo "no $name: apt-get install -y slurm-wlm munge" >&2; exit 3; }; done
    chmod 755 "$folder"; mkdir -p "$folder/state" "$folder/spool"
    (umask 077; head -c 1024 /dev/urandom > "$folder/munge.key")
    munged --force --num-threads=2 --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
    me=$(id -un) host=$(hostname -s)
    cat > "$SLURM_CONF" <<CONF
ClusterName=one
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=$(port)
SlurmdPort=$(port)
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
KillWait=3
MinJobAge=3600
MaxArraySize=${MAX_ARRAY:-1001}
NodeName=$host NodeAddr=127.0.0.1 CPUs=${CPUS:-2} State=UNKNOWN
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE State=UP
PartitionName=down Nodes=ALL MaxTime=INFINITE State=DOWN
CONF
    slurmctld -f "$SLURM_CONF"
    slurmd -f "$SLURM_CONF" -N "$host"
    for _ in $(seq 150); do
        case "$(sinfo -h -p test -o %T 2>/dev/null || true)" in idle*) return 0;; down*|drain*) scontrol update nodename="$host" state=resume 2>/dev/null || true;; esac
        sleep .2
    done
    echo "the node does not become idle:" >&2; tail -n 5 "$folder"/*.log >&2; stop; exit 1
}

case $do in start) start;; stop) stop;; *) echo "start or stop" >&2; exit 2;; esac
