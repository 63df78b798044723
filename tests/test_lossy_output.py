"""A run whose output cannot be written goes on without it, and ends as it would have."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import runs
import yaml

from mmtx.training.lossy_output import lossy_output

PROGRAM = "import sys; from mmtx.cli import main; main(sys.argv[1:])"


@pytest.mark.parametrize("sink", ["gone", "full", "closed"])
def test_a_run_goes_on_without_its_log(sink, tmp_path):
    """The reader of a pipe is gone (`| head -1`), the disk of the log is full, or the shell closed both (`>&- 2>&-`)."""
    if sink == "full" and not Path("/dev/full").exists():
        pytest.skip("the system has no device that is always full")
    config = runs.prepare(tmp_path, steps=2, val_check_interval=1)
    config["data"]["init_args"]["num_workers"] = 0
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    reader, writer = os.pipe()
    os.close(reader)
    out = {"gone": f">&{writer} 2>&1", "full": ">/dev/full 2>&1", "closed": ">&- 2>&-"}[sink]
    command = [sys.executable, "-W", "always", "-c", PROGRAM, "fit", "--config", "run.yaml", "--output", "run",
               "--trainer.enable_progress_bar", "true"]
    environment = {name: value for name, value in os.environ.items() if name != "TQDM_DISABLE"}
    done = subprocess.run(["bash", "-c", f'"$@" {out}', "bash", *command], cwd=tmp_path, timeout=200, pass_fds=[writer],
                          env={**environment, "OMP_NUM_THREADS": "1"})
    os.close(writer)
    assert done.returncode == 0
    assert (tmp_path / "run" / "model" / "config.json").is_file()


def test_other_output_is_untouched(capfd):
    with lossy_output():
        print("told")
        print("warned", file=sys.stderr)
    assert capfd.readouterr() == ("told\n", "warned\n")
