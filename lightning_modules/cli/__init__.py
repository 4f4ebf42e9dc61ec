"""The `penstock` command line: Hydra composes, LightningCLI judges the types and runs.

Two dialects behind one front door. Plain words are Hydra overrides (`penstock fit experiment=x model.lr=1e-4`);
`--flags` are plain LightningCLI (`penstock fit --config runs/x/config.yaml --trainer.max_epochs=3`), where plain words
are still understood as `--word`. Nothing heavy is imported before the words are understood.
"""

import os
import sys
import traceback
from collections.abc import Sequence

from penstock.lightning_modules.errors import UserError, did_you_mean

PRINTS = ("list", "compare", "flops", "plan", "help", "-h", "--help", "--version")
HELP = """\
usage: penstock VERB [word=value ...]      plain words: composed from conf/, any key, typed
       penstock VERB [--flag=value ...]    plain LightningCLI, e.g. --config runs/.../config.yaml

train and score
  fit        penstock fit experiment=rectified_flow_digits
  validate   penstock validate ckpt_path=runs/.../checkpoints/last.ckpt
  test       penstock test ckpt_path=runs/.../checkpoints/last.ckpt
  predict    penstock predict ckpt_path=runs/.../checkpoints/last.ckpt
sweep        penstock fit -m experiment=a,b seed_everything=1,2,3
resume       penstock fit ckpt_path=runs/.../checkpoints/last.ckpt
look
  sample     penstock sample ckpt_path=runs/.../checkpoints/last.ckpt n=64 steps=4
  pairs      penstock pairs ckpt_path=runs/.../checkpoints/last.ckpt n=6000 steps=20
  encode     penstock encode experiment=starflow_t2i_256 out=latents
  export     penstock export ckpt_path=runs/.../checkpoints/last.ckpt format=onnx
  compare    penstock compare runs/a runs/b
  flops      penstock flops experiment=piip_digits net=piip_tsb_368
  plan       penstock plan experiment=starflow_v_480p gpus=64
  table      penstock table fastflow_mvtec tier=smoke
  list       penstock list [experiments|methods|data|kernels|tables|options]

options of fit/validate/test/predict
  --print    show the composed configuration and stop
  --help     every key that LightningCLI knows, with its type
groups       model= net= path= times= coupling= solver= neck= host= data=
              trainer= callbacks= logger= strategy= perf= debug= (choices: penstock list options)
own configs  PENSTOCK_CONF=folder holds more files of the same groups
"""


def _run(argv: Sequence[str]) -> int:
    verb, words = (argv[0], list(argv[1:])) if argv else ("--help", [])
    if verb in ("-h", "--help", "help"):
        print(HELP, end="")
        return 0
    if verb == "--version":
        from importlib.metadata import version

        print(f"penstock {version('penstock')}")
        return 0
    if verb == "list":
        from penstock.lightning_modules.cli.listing import run_list

        return run_list(words)
    if verb == "compare":
        from penstock.lightning_modules.cli.compare import run_compare

        return run_compare(words)
    if verb == "sample":
        from penstock.lightning_modules.cli.sample import run_sample

        return run_sample(words)
    if verb == "pairs":
        from penstock.lightning_modules.cli.pairs import run_pairs

        return run_pairs(words)
    if verb == "encode":
        from penstock.lightning_modules.cli.encode import run_encode

        return run_encode(words)
    if verb == "export":
        from penstock.lightning_modules.cli.export import run_export

        return run_export(words)
    if verb == "flops":
        from penstock.lightning_modules.cli.flops import run_flops

        return run_flops(words)
    if verb == "plan":
        from penstock.lightning_modules.cli.plan import run_plan

        return run_plan(words)
    if verb == "table":
        from penstock.lightning_modules.cli.table import run_table

        return run_table(words)
    if verb in ("fit", "validate", "test", "predict"):
        if "-m" in words or "--multirun" in words:
            from penstock.lightning_modules.cli.sweep import run_sweep

            return run_sweep(verb, [w for w in words if w not in ("-m", "--multirun")])
        from penstock.lightning_modules.cli.verbs import run_verb

        return run_verb(verb, words)
    verbs = (
        "fit",
        "validate",
        "test",
        "predict",
        "sample",
        "pairs",
        "encode",
        "export",
        "compare",
        "flops",
        "plan",
        "table",
        "list",
    )
    raise UserError(f"verb '{verb}': expected one of {', '.join(verbs)}{did_you_mean(verb, verbs)}")


def _rank() -> int:
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return getattr(rank_zero_only, "rank", None) or 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program; returns the exit code (0 fine, 2 bad input, 130 interrupted)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        code = _run(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever reads has seen enough, as in `penstock list | head -1`
        if argv and argv[0] not in PRINTS and not {"--print", "--dry-run"} & {*argv}:
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as error:
        if os.environ.get("PENSTOCK_TRACEBACK"):
            traceback.print_exc()
        if not (error.everywhere and _rank()):
            print(f"penstock: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("penstock: interrupted", file=sys.stderr)
        return 130
