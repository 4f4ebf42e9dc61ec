"""`penstock fit -m`: Hydra's own multirun drives, each job is a fresh process of the single-run command.

Launcher and sweeper plugins of Hydra (submitit, joblib, Optuna ...) therefore work (`hydra/launcher=joblib`), and so
does DDP inside a job. A job's value for the sweeper is `objective` (a metric name) read from its metrics.json.
"""

import json
import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

from penstock.lightning_modules.cli import sweep_table
from penstock.lightning_modules.cli.categories import expanded
from penstock.lightning_modules.cli.compose import hydra_words, refusal, split_word
from penstock.lightning_modules.cli.conf import check_choice, conf_dirs
from penstock.lightning_modules.errors import UserError, did_you_mean


class _Stop(BaseException):
    """Ends a sweep; after an `Exception` of a job Hydra would go on with the next."""


def run_sweep(verb: str, words: list[str]) -> int:
    """Runs every combination; prints where each job's folder is, and a table of all that `sweep_table` writes.

    Exit code 1 when a job failed, 2 for bad input.

    A job without the metric that a word `objective=` names is the last, unless a launcher runs jobs side by side.
    """
    hydra_own = [w for w in words if w.lstrip("+~").startswith(("hydra/", "hydra."))]
    own_words = [w for w in words if w not in hydra_own]
    if any(w.partition("=")[0] == "run_dir" for w in own_words):
        raise UserError("run_dir: all jobs of a sweep would write to one folder; leave it out")
    own_words = expanded(own_words)
    overrides = _expandable(own_words)
    import hydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig

    main, *own = conf_dirs()
    folder = Path("runs") / "sweeps" / datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    if own:
        hydra_own.append(f"hydra.searchpath=[{','.join(f'file://{d}' for d in own)}]")
    complete = False
    asked = any(word.lstrip("+").startswith("objective=") for word in own_words)
    process = os.getpid()

    def job(config: DictConfig) -> float | None:
        from hydra.core.hydra_config import HydraConfig

        choices = HydraConfig.get()
        number = choices.job.num
        run_dir = (folder / str(number)).resolve()
        task = list(choices.overrides.task)
        print(f"job {number}: penstock {verb} {' '.join(task)}  ->  {os.path.relpath(run_dir)}", flush=True)
        code = run_job(verb, task, run_dir)
        name = config.get("objective")
        sweep_table.record(run_dir, number, task, code, name)
        if code:
            print(f"job {number}: exit code {code}", file=sys.stderr, flush=True)
            return None
        value = objective(name, run_dir)
        if asked and name is not None and value is None and os.getpid() == process:
            raise _Stop(number)
        return value

    quiet = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled", "hydra.output_subdir=null"]
    argv = [sys.argv[0], "-m", f"hydra.sweep.dir={folder}", *quiet, *hydra_own, *overrides]
    saved, sys.argv = sys.argv, argv
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        hydra.main(config_path=str(main), config_name="config", version_base="1.3")(job)()
        complete = True
    except HydraException as error:
        raise UserError(refusal(error, "sweep", dict(zip(overrides, own_words)))) from error
    except _Stop as stop:
        print(f"sweep: stopped after job {stop}; {folder}")
        return 2
    finally:
        sys.argv = saved
        if text := sweep_table.write(folder, complete):
            print(f"{text}written: {', '.join(str(folder / name) for name in sweep_table.FILES)}")
    print(f"sweep: {folder}; compare with: penstock compare {folder}/*")
    return 1 if any(job["exit_code"] for job in sweep_table.read(folder)) else 0


def _expandable(words: list[str]) -> list[str]:
    """Hydra sweep overrides of the words; each choice of `experiment=a,b` is checked."""
    result = []
    for word in words:
        key, value, is_group = split_word(word)
        if not any(sign in value for sign in ",("):
            result += hydra_words([word])
            continue
        if is_group and value[:1] != "[" and "(" not in value:
            for choice in value.split(","):
                check_choice(key, choice.strip())
        result.append(f"{key}={value}")
    return result


def run_job(verb: str, words: list[str], run_dir: Path) -> int:
    """One single-run command in a process of its own; returns its exit code."""
    environment = {**os.environ, "RUN_DIR": str(run_dir)}
    return subprocess.run(
        [sys.executable, "-P", "-m", "penstock.lightning_modules", verb, *words], env=environment, check=False
    ).returncode


def objective(name: str | None, run_dir: Path) -> float | None:
    """The job's value for the sweeper; None, with a line on stderr, when the run has no such metric."""
    if name is None:
        return None
    path = run_dir / "metrics.json"
    metrics: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    if name not in metrics:
        held = f"{did_you_mean(name, metrics)}; it holds {', '.join(sorted(metrics)) or 'nothing'}"
        print(f"penstock: objective={name}: not in {os.path.relpath(path)}{held}", file=sys.stderr, flush=True)
        return None
    return float(metrics[name])
