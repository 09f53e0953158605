"""Looks up known vulnerabilities of installed packages, if advisories can be reached.

.venv/bin/python scripts/audit.py

Installs pip-audit beside .venv, in a separate environment. Without a network, or if the index in
use has no advisories, it reports that it was skipped and exits with 0; with a vulnerability, 1.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

PATIENCE = 120  # seconds for each step
HOME = Path(__file__).resolve().parents[1] / ".venv" / "audit"


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def skip(why: str) -> None:
    print(f"pip-audit: skipped, {why}.")
    sys.exit(0)


def main() -> None:
    program = HOME / "bin" / "pip-audit"
    try:
        if not program.exists():
            venv.create(HOME, with_pip=True, clear=True)
            options = ["--quiet", "--disable-pip-version-check", "--retries=0", "--timeout=10"]
            if run(HOME / "bin" / "pip", "install", *options, "pip-audit>=2.7").returncode:
                skip("it could not be installed")
        installed = sysconfig.get_path("purelib")
        options = ["--format=json", "--progress-spinner=off", "--timeout=10"]
        done = run(program, f"--path={installed}", *options)
        packages = json.loads(done.stdout)["dependencies"]
    except (OSError, subprocess.SubprocessError):
        skip("it could not be started in time")
    except (ValueError, KeyError):
        skip("the database of advisories could not be reached")
    audited = [package for package in packages if "vulns" in package]
    if not audited:
        skip("the index in use has no advisories")
    found = [(package, fault) for package in audited for fault in package["vulns"]]
    for package, fault in found:
        fixed = ", ".join(fault["fix_versions"]) or "no release"
        print(f"{package['name']} {package['version']}: {fault['id']}, fixed in {fixed}")
    print(f"pip-audit: {len(found)} known vulnerabilities in {len(audited)} packages.")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
