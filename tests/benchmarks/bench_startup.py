"""Start-up: `anomaly-nb --help` against importing everything, and the metrics alone. Side by side, medians of 7."""
import statistics
import subprocess
import sys
import time
from pathlib import Path

BIN = Path(sys.executable).parent
ALL = "import anomaly_nb.cli, anomaly_nb.runner, anomaly_nb.report, anomaly_nb.experiment, anomaly_nb.data.module, anomaly_nb.models.fit, sklearn.svm, matplotlib.pyplot, monai"
COMMANDS = {
    "anomaly-nb --help": [BIN/"anomaly-nb", "--help"],
    "import metrics.localization": [sys.executable, "-c", "import anomaly_nb.metrics.localization"],
    "import everything": [sys.executable, "-c", ALL],
    "python itself": [sys.executable, "-c", "pass"],
}


def seconds(command):
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - started


def main():
    times = {name: [] for name in COMMANDS}
    for command in COMMANDS.values(): seconds(command)          # warm the file cache
    for _ in range(7):
        for name, command in COMMANDS.items(): times[name].append(seconds(command))
    median = {name: statistics.median(t) for name, t in times.items()}
    for name, value in median.items(): print(f"{name:<32}{value:8.3f} s   {median['import everything'] / value:6.0f}x")
    good = median["anomaly-nb --help"] <= 0.15 and median["import metrics.localization"] <= 0.25
    print("aim: --help <= 0.15 s, metrics <= 0.25 s:", "reached" if good else "MISSED")


if __name__ == "__main__": main()
