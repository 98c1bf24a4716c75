"""The command line: `dail STAGE CONFIGURATION key.sub=value ...`, where it is installed, or `python -m dail_jax.launch`.

Picks a stage, loads the configuration, applies overrides, calls the stage. `run` is all of them in order.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dail_jax

# The exit status after SIGTERM or Ctrl-C: what was done is saved, and the same command resumes. Not 0, which schedulers take
# for a job that is done.
STOPPED = os.EX_TEMPFAIL

PROGRAMS = ".programs"  # in the run directory: what JAX has compiled

# How reading and writing fail on a disk that is full, over quota, read-only or broken.
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)

STAGES = {
    "run": "generate, train, export, evaluate and report; with `arms`, once per arm, on shared traces",
    "check": "looks for everything that would stop `run`, which does so first, and says what would be done",
    "convert": "a Hugging Face model -> checked, sharded weights in RUN_DIR/model",
    "generate": "mixed policy rollouts -> RUN_DIR/traces.jsonl",
    "train": "the LoRA -> RUN_DIR/checkpoints",
    "evaluate": "pass@k -> RUN_DIR/samples.jsonl and results.json",
    "grade": "grades RUN_DIR/samples.jsonl of a finished evaluation again, without a model",
    "export": "the LoRA as a PEFT adapter -> RUN_DIR/adapter; to draw offline, a script for vLLM -> RUN_DIR/vllm",
    "report": "tables, RUN_DIR/report.html and RUN_DIR/plots",
    "compare": "compares finished runs, problem by problem: tables and a page in --out",
    "pretrain": "all weights of a small model (the embedded micro-world)",
    "compile": "compiles ahead of time for devices that need not be present: memory, FLOPs and whether it fits",
    "plan": "hours and memory of every stage on devices that need not be present, and what to change where it does not fit",
    "waypoints": "prints the solution, waypoints and final answer of some rows, side by side",
    "prompts": "prints some rows' prompts of all roles as the model sees them, with their tokens",
    "select": "the rows that the untrained model never solves -> RUN_DIR/selected.jsonl",
    "sweep": "`run` for every combination of the values given by --over, as arms",
    "calibrate": "is the privileged student a teacher? each role alone, and traces at several tau -> RUN_DIR/calibration.md and plots",
    "quantization": "what int8 weights change: log-probabilities of expert solutions -> RUN_DIR/quantization.json",
    "config": "the resolved configuration; with --explain KEY, what a key or a section is",
    "env": "versions, devices and mesh: what a bug report needs",
}

# What JAX says in the processes that are left, when another one of the run has ended.
LOST = re.compile(r"closed by peer|reset by peer|heartbeat")

# Stages that compute nothing on a device, and ask JAX all the same which process this is.
SHOWING = ("report", "compare", "waypoints", "prompts", "grade", "env")

# Arguments of single stages, which are passed on to them by name.
OWN_ARGUMENTS = (
    *("drawn", "row", "over", "tau", "rows", "runs", "out", "explain", "markdown"),
    *("topology", "json", "quick", "only", "short", "known", "known_only", "at_limit", "prompt_tokens"),
)
# Stages that leave the run directory alone.
ELSEWHERE = ("compile", "plan", "compare", "config", "env", "waypoints", "prompts")
AHEAD = ("compile", "plan")  # of devices that need not be present

# Stages that need no mesh, or choose one themselves.
UNLAID = (*AHEAD, "config", *(stage for stage in SHOWING if stage != "env"))


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="dail", description=__doc__.split("\n")[0])  # pyright: ignore
    top.add_argument("--version", action="version", version=f"%(prog)s {dail_jax.__version__}")
    stages = top.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, purpose in STAGES.items():
        sub = stages.add_parser(name, help=purpose, description=purpose)
        sub.add_argument(
            "--config",
            action="append",
            default=[],
            metavar="CONFIG",
            help="a YAML file, or the name of one of configs/ such as `demo`; further ones are laid over it",
        )
        sub.add_argument("--trace", action="store_true", help="show a traceback with errors")
        sub.add_argument(
            "--distributed", action="store_true", help="several processes, found by JAX itself (TPU, SLURM)"
        )
        sub.add_argument("--coordinator", metavar="HOST:PORT", help="several processes: where process 0 listens")
        sub.add_argument("--processes", type=int, metavar="N", help="... how many there are")
        sub.add_argument("--process-id", type=int, metavar="I", help="... and which this one is, from 0")
        if name in AHEAD:
            sub.add_argument(
                "--topology",
                default="cpu",
                help="cpu (default), gpu, a TPU slice such as v5e:4x4, or GPUs such as h100:8",
            )
            sub.add_argument("--json", metavar="FILE", help="also write what was found")
            sub.add_argument("--short", action="store_true", help="sampling from 1 and 3 layers, extrapolated: fast")
        if name == "compile":
            sub.add_argument("--quick", action="store_true", help="memory only: compile nothing extra to count FLOPs")
            sub.add_argument("--only", metavar="WORD", default="", help="only programs whose name contains this")
        if name == "plan":
            sub.add_argument(
                "--known",
                metavar="PATH",
                action="append",
                default=[],
                help="what --json of other plans wrote, a file or a folder; its programs are not compiled again",
            )
            sub.add_argument(
                "--known-only", action="store_true", help="compile nothing; what is not known is named and left out"
            )
            sub.add_argument(
                "--at-limit",
                metavar="SHARE",
                type=float,
                default=0.1,
                help="share of samples that reach their limit (default: %(default)s)",
            )
            sub.add_argument(
                "--prompt-tokens",
                metavar="N",
                type=int,
                default=256,
                help="length of a benchmark's prompts (default: %(default)s)",
            )
        if name in ("waypoints", "prompts"):
            sub.add_argument(
                "--row", metavar="ROW", action="append", default=[], help="a problem_id, or a number from 1"
            )
        if name == "grade":
            sub.add_argument("--import", dest="drawn", metavar="FILE", help="samples that were drawn offline, ungraded")
        if name == "quantization":
            sub.add_argument(
                "--rows", metavar="N", type=int, default=32, help="solutions to read (default: %(default)s)"
            )
        if name == "sweep":
            sub.add_argument("--over", metavar="KEY=A,B,C", action="append", required=True, help="a key and its values")
        if name == "calibrate":
            sub.add_argument("--tau", metavar="A,B,C", default="0.5,0.7,0.8,0.9,0.99", help="(default: %(default)s)")
        if name == "config":
            sub.add_argument("--explain", metavar="KEY", help="type, default, allowed values and meaning of a key")
            sub.add_argument("--markdown", action="store_true", help="all of them, as docs/configuration.md")
        if name == "compare":
            sub.add_argument("--out", metavar="DIR", default="runs/comparison", help="(default: %(default)s)")
            sub.add_argument("runs", nargs="+", metavar="RUN_DIR", help="a run, or a run with arms; the baseline first")
            sub.set_defaults(words=[])
            continue
        sub.add_argument(
            "words",
            nargs="*",
            metavar="CONFIG | key.sub=value",
            help="the configuration, as with --config; or a key of it and its value",
        )
    return top


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line. Configurations and overrides may be anywhere, although argparse takes positional arguments
    in one place only."""
    args, rest = parser().parse_known_args(argv)
    if strange := [word for word in rest if word.startswith("-") or args.stage == "compare"]:
        parser().error(f"unrecognized arguments: {' '.join(strange)}")
    words = [*args.words, *rest]
    args.overrides = [word for word in words if "=" in word]
    args.config = [*(word for word in words if "=" not in word), *args.config]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    several = args.distributed or args.coordinator is not None
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # models and tokenizers are folders
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # of a GPU; the rest is NCCL's and cuDNN's
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # such as that there is no PyTorch
    if args.stage in AHEAD and args.topology != "gpu":  # no device is looked for, and libtpu's lock is not taken
        os.environ.update(
            JAX_PLATFORMS="cpu",
            TPU_SKIP_MDS_QUERY="1",
            ALLOW_MULTIPLE_LIBTPU_LOAD="1",
            TPU_WORKER_HOSTNAMES="localhost",
        )

    from dail_jax import mesh as mesh_lib
    from dail_jax.errors import Interrupted, UserError, reason, visible
    from dail_jax.metrics import configure, log

    config = None
    try:
        if several:
            import jax

            # JAX finds what is not given: TPU pods, SLURM and Kubernetes have their own variables for it.
            handler = signal.getsignal(signal.SIGTERM)
            jax.distributed.initialize(args.coordinator, args.processes, args.process_id)
            signal.signal(signal.SIGTERM, handler)  # JAX has installed its own
        from dail_jax import config as config_lib
        from dail_jax import resources

        files = [resources.configuration(name) for name in args.config]
        if not files and (args.overrides or args.stage not in ("env", "compare", "config")):
            known = ", ".join(resources.configurations())
            raise UserError(f"{args.stage}: want a configuration: a YAML file, or one of {known}")
        config = config_lib.load(files[0], args.overrides, files[1:]) if files else None
        if config is not None:
            configure(config.log)
        if args.stage in SHOWING or several:
            mesh_lib.all_devices()  # for the error in one line if JAX_PLATFORMS names a platform that is not there
        with _in_place(config, args.stage, several) as config:
            more = {key: vars(args)[key] for key in OWN_ARGUMENTS if key in args}
            if config is not None and args.stage not in UNLAID:
                from dail_jax.stages import auto

                steps, keep = _steps(args.stage, config, more), args.stage not in ("check", "env")
                config = auto.settled(config, steps, keep=keep)
            if config is not None and args.stage != "check":
                from dail_jax.stages import check

                check.first(args.stage, config, **{key: more[key] for key in ("over", "tau") if key in more})
                if args.stage not in AHEAD:  # which only reports on programs, of other devices
                    _keep_programs(config.run_dir)
            _stage(args.stage)(config, **more)
        return 0
    except UserError as error:
        if args.trace:
            traceback.print_exc()
        for line in error.lines:
            print(f"error: {line}", file=sys.stderr)
        return _leave(several, 2)
    except Interrupted as stopped:
        log(str(stopped))
        mesh_lib.barrier("stopped")  # a launcher may kill the others as soon as one process does not end with 0
        return STOPPED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return _leave(several, 130)
    except OSError as error:  # from reading or writing where no better error was raised
        if error.filename is None and error.errno not in DISK:
            raise
        if args.trace:
            traceback.print_exc()
        path = error.filename or (config.run_dir if config else ".")
        print(visible(f"error: {path}: {reason(error)}; what was finished is kept"), file=sys.stderr)
        return _leave(several, 2)
    except Exception as error:
        if several and LOST.search(str(error)) and not args.trace:
            said = str(error).splitlines()[0]
            print(f"error: another process has ended: start all of them again, which resumes ({said})", file=sys.stderr)
        elif several:
            traceback.print_exc()
        _leave(several, 1)
        raise


def _steps(command: str, config, more: dict) -> list[tuple]:
    """The stages, with their configurations, that one layout is to serve: those of a whole run, whatever the command.

    An adapter from elsewhere stands in for training, so there is no whole run then.
    """
    from dail_jax.stages import check

    if command == "pretrain":  # whose model is yet to be made
        return []
    more = {key: more[key] for key in ("over", "tau") if key in more}
    alone = command in ("sweep", "calibrate", "select") or config.evaluate.adapter
    steps = check.steps_of(command if alone else "run", config, **more)
    return [(step.stage, step.config) for step in steps]


def _in_place(config: Any, stage: str, several: bool) -> contextlib.AbstractContextManager:
    """The configuration, with a run directory that all processes can work in: one on an object store is brought to every
    machine, and kept there; of any other, raises UserError unless all of them see the same folder."""
    from dail_jax import mirror, rundir, storage

    if config is None or stage in ELSEWHERE:
        return contextlib.nullcontext(config)
    if storage.is_remote(config.run_dir):
        return mirror.opened(config)
    if several:
        rundir.refuse_apart(Path(config.run_dir))
    return contextlib.nullcontext(config)


def _keep_programs(run_dir: str) -> None:
    """Keeps compiled programs in the run directory, so that a resumed run compiles none again; unless JAX has a folder."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        from dail_jax import provenance

        jax.config.update("jax_compilation_cache_dir", str(Path(run_dir) / PROGRAMS / provenance.instruction_set()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def _leave(at_once: bool, status: int) -> int:
    """Returns the exit status. One of several processes leaves at once: at the exit, JAX would wait for the others."""
    if at_once:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _stage(name: str) -> Callable:
    if name == "env":
        return env
    import importlib

    home = {"run": "experiment", "sweep": "experiment", "waypoints": "show", "prompts": "show"}.get(name)
    module = importlib.import_module(f"dail_jax.stages.{home or name}")
    return getattr(module, name if home else "run")


def env(config) -> None:
    """Prints what a bug report needs."""
    from rich.table import Table

    from dail_jax import mesh as mesh_lib
    from dail_jax.metrics import console
    from dail_jax.provenance import environment

    table = Table(show_header=False)
    for key, value in environment().items():
        shown = ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
        table.add_row(key, shown)
    if config is not None:
        table.add_row(
            "mesh",
            mesh_lib.described(
                *(mesh_lib.make_mesh(one) for one in (config.mesh.for_training, config.mesh.for_sampling))
            ),
        )
        table.add_row("run_dir", config.run_dir)
    console.print(table)


def _end() -> None:
    mirror = sys.modules.get("dail_jax.mirror")  # before it is there, there is nothing to send
    getattr(mirror, "leave", os._exit)(STOPPED)


def console() -> int:
    """The process's own `main`: its exit status."""
    # Preemption: where a stage has something to save it does so, elsewhere there is nothing to lose and all that was
    # finished is on disk. At once, since an exception could be swallowed on its way, or meet JAX's threads at the exit.
    # What is on an object store is sent there first.
    signal.signal(signal.SIGTERM, lambda *_: _end())
    status = main()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # all is done: let it end in peace
    return status


if __name__ == "__main__":
    sys.exit(console())
