"""Run a command and write what it cost as JSON: python measure.py COST.json COMMAND...

A process of its own, because Linux counts the memory of the process that starts a command into the command's peak: this one stays small.
"""

import json
import os
import subprocess
import sys
import time


def main() -> int:
    load_before, started = os.getloadavg()[0], time.perf_counter()
    process = subprocess.Popen(sys.argv[2:])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)  # else Popen waits again
    cost = {
        "wall_seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "max_rss_mib": usage.ru_maxrss // 1024,
        "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)],
    }
    if process.returncode:
        cost["error"] = f"exit status {process.returncode}"
    with open(sys.argv[1], "w") as file:
        json.dump(cost, file)
    return process.returncode


if __name__ == "__main__":
    sys.exit(main())
