"""`gsmooth COMMAND [overrides]`: the same as `python -m gsmooth_lightning.tasks.COMMAND [overrides]`."""

import runpy
import sys
from pathlib import Path

COMMANDS = {
    "surrogate": "train a network that imitates a transformation",
    "train": "train a base classifier for the smoothing it will be certified under",
    "sigma": "learn where the noise of a trained classifier may be large",
    "denoise": "train a denoiser in front of a classifier of clean images",
    "bound": "bound the interpolation error of images",
    "certify": "certify images; the same command again resumes",
    "compare": "certify images by every certificate that applies, in one table",
    "attack": "attack images: worst of k, grid or gradient ascent over the parameters",
    "corrupt": "accuracy under the common corruptions: CIFAR-10-C files, or ours",
    "status": "how far a run is, and each of its processes",
    "predict": "classify your own files with a certified classifier, or export it",
    "verify": "check a run: draw some of its images again, and write an audit page",
    "report": "table and picture of stores",
    "demo": "all of it on real handwritten digits, in three minutes",
}

OF_RUNS = ("status", "predict", "verify")
"""Commands whose first argument is a run's folder: run=FOLDER, or FOLDER alone."""


def main() -> None:
    """Runs a command's module with the arguments that follow."""
    if len(sys.argv) < 2 or sys.argv[1] not in COMMANDS:
        listing = "\n".join(f"  {name:9} {text}" for name, text in COMMANDS.items())
        usage = f"usage: gsmooth COMMAND [OVERRIDES], gsmooth COMMAND --help\n{listing}"
        if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
            print(usage)
            sys.exit(0 if len(sys.argv) > 1 else 2)
        print(f"gsmooth: there is no command {sys.argv[1]!r}; use one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    name = sys.argv.pop(1)
    run = sys.argv[1] if name in OF_RUNS and len(sys.argv) > 1 else "-"
    if not run.startswith("-") and ("=" not in run or Path(run).is_dir()):
        sys.argv[1] = "run='{}'".format(run.replace("'", r"\'"))
    sys.path.insert(0, "")  # your own classes and functions are found in the current folder, as by python -m
    # run as __main__, so that a rank that Lightning relaunches with `python -m` finds the same module
    runpy.run_module(f"gsmooth_lightning.tasks.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
