"""The brain cohort at 2 mm: 60 subjects in one contrast, then a further contrast of the same anatomies (aims: under 60 s on 2 cores; at most 0.3 s a subject)."""
import tempfile
import time

from anomaly_nb.data.brain import Job, Subject, Variant, build
from anomaly_nb.data.lesions import FAMILIES


def main(count=60):
    seen = [f for f, family in FAMILIES.items() if {"FLAIR", "T2"} <= set(family.visible)]
    with tempfile.TemporaryDirectory() as folder:
        who = [Subject(f"bench-{i:03d}", "bench", "AB"[i % 2], "healthy" if i % 2 else seen[i // 2 % len(seen)]) for i in range(count)]
        for name, contrasts, aim in (("first contrast", ("FLAIR",), 60.0), ("further contrast", ("FLAIR", "T2"), 0.3 * count)):
            started = time.perf_counter()
            build([Job(folder, s, contrasts, Variant(), 2.0) for s in who])
            seconds = time.perf_counter() - started
            print(f"{name:<18}{count} subjects at 2 mm: {seconds:6.1f} s, {seconds / count:.2f} s a subject; aim <= {aim:.0f} s: {'reached' if seconds <= aim else 'MISSED'}")


if __name__ == "__main__": main()
