"""How much memory a tour takes at its highest, in a process of its own: python -m benchmarks.memory

The figures are those that `lmtrain doctor` compares a machine with (lmtrain/doctor.py, MEASURED). It fails if a tour took
more than it says there.
"""
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from lmtrain.doctor import MEASURED

RUN = """
import sys
from pathlib import Path
from lmtrain import cli
sys.argv = ["lmtrain", "tour", "--steps", "20", "--scale", sys.argv[1], "--out", sys.argv[2]]
try: cli.main()
except SystemExit as e: assert not e.code
print(Path("/proc/self/status").read_text(encoding="utf-8"))
"""


def peak(scale: str) -> float:
    "The most memory that a tour of 20 steps had in use at once, in GiB."
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, "-c", RUN, scale, f"{folder}/tour"], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]
    return int(re.search(r"VmHWM:\s+(\d+)", done.stdout)[1]) / 2**20


def main() -> None:
    assert Path("/proc/self/status").exists(), "this reads the kernel's own count, which only Linux keeps"
    for scale, says in MEASURED.items():
        found = peak(scale)
        print(f"{scale:<10} {found:.2f} GiB at its highest, doctor says {says}", flush=True)
        assert found <= says, f"a tour of the scale {scale} took {found:.2f} GiB: correct MEASURED in lmtrain/doctor.py"


if __name__ == "__main__": main()
