"""Commands and exit codes: train, plan, evaluate, ... 0 is done, 2 what the user can mend, 130 stopped, 1 all else.

`python -m gear_trainer train --config FILE [key=value ...]` under a launcher is what `gear_trainer/run.py` is by itself.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gear_trainer.config import Config, load_config, make_config, near
from gear_trainer.errors import ConfigError, RunError
from gear_trainer.launcher import ranks_here

if TYPE_CHECKING:
    from gear_trainer.runs.study import Plan as StudyPlan
    from gear_trainer.runs.study import Standing


def main(argv: list[str] | None = None) -> int:
    """`gear-trainer COMMAND ...`. Returns the exit code."""
    given = sys.argv[1:] if argv is None else argv
    if not given or given[0] not in COMMANDS:
        about = "\n".join(f"  {name:10}{(command.__doc__ or name).splitlines()[0]}" for name, command in COMMANDS.items())
        print(f"usage: gear-trainer COMMAND ...\n\n{about}", file=sys.stdout if given in (["-h"], ["--help"]) else sys.stderr)
        return 0 if given in (["-h"], ["--help"]) else 2
    return COMMANDS[given[0]](given[1:])


def launched(argv: list[str] | None = None) -> int:
    """The command gear_trainer/run.py: a run, or with --dry-run its plan. Returns the exit code."""
    args = parse(argv)
    return _guarded(lambda: _plan(_config(args), args.card) if args.dry_run else _train(_config(args), args.resume))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Arguments of gear_trainer/run.py."""
    parser = _parser("gear_trainer", "Train an LLM agent with GRPO and token-level credit.")
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    parser.add_argument("--dry-run", action="store_true", help="check everything, print the resolved run, start nothing")
    parser.add_argument("--card", type=float, metavar="GB", help="of a dry run: plan memory for GPUs sold as 80, 141, ... GB")
    return parser.parse_intermixed_args(argv)


def _parser(prog: str, description: str | None, config: bool = True) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--config", required=config, help="YAML file, see gear_trainer/configs")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # the deepspeed launcher's
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="dotted overrides, for example train.lr=1e-5")
    return parser


def _config(args: argparse.Namespace) -> Config:
    return load_config(args.config, args.overrides)


# --- commands ---------------------------------------------------------------------------------------------------------------


def train(argv: list[str]) -> int:
    """Train a policy; start it by a launcher, one process a rank."""
    parser = _parser("gear-trainer train", train.__doc__)
    parser.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    args = parser.parse_intermixed_args(argv)
    return _guarded(lambda: _train(_config(args), args.resume))


def plan(argv: list[str]) -> int:
    """Check everything, print the resolved run and its memory, start nothing."""
    parser = _parser("gear-trainer plan", plan.__doc__)
    parser.add_argument("--card", type=float, metavar="GB", help="plan memory for GPUs sold as 80, 141, ... GB")
    args = parser.parse_intermixed_args(argv)
    return _guarded(lambda: _plan(_config(args), args.card))


def evaluate(argv: list[str]) -> int:
    """Solve the held-out problems with a run's model, or another, on an engine in this process; or compare two results."""
    parser = _parser("gear-trainer evaluate", evaluate.__doc__, config=False)
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run, as runs/NAME: its configuration and its model")
    parser.add_argument("--step", type=int, metavar="N", help="of the run: the checkpoint of a step in place of the final model")
    parser.add_argument("--model", metavar="PATH", help="an HF directory or hub name in place of the run's or the config's")
    parser.add_argument("--samples", type=int, metavar="K", help="rollouts of each problem, as eval.samples=K")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the results' folder; what is there already is gone on with")
    parser.add_argument("--batch", type=int, metavar="N", help="problems sampled at a time; what a kill loses at most")
    parser.add_argument(
        "--paper", nargs="?", const="", metavar="NAME", help="set the figures beside the paper's, of the benchmark NAME"
    )
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two results' folders, problem by problem")
    args = parser.parse_intermixed_args(argv)
    if args.compare:
        return _guarded(lambda: _compare(args.compare, args.out))
    if args.run and args.config or not (args.run or args.config or args.model):
        parser.error("give --run DIR or --config FILE, or --model PATH with task=NAME")
    for name in ("samples", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name}: at least 1")
    if args.step is not None and (args.model or not args.run):
        parser.error("--step N names a checkpoint of --run DIR: give that, and no --model")
    return _guarded(lambda: _evaluate(args))


def audit(argv: list[str]) -> int:
    """Measure what each token of sampled trajectories was worth, by continuations, beside what teachers say of it."""
    parser = _parser("gear-trainer audit", audit.__doc__, config=False)
    parser.add_argument("--run", type=Path, metavar="DIR", help="a run, as runs/NAME: its configuration and its model")
    parser.add_argument("--step", type=int, metavar="N", help="of the run: the checkpoint of a step in place of the final model")
    parser.add_argument("--out", type=Path, metavar="DIR", help="the audit's folder; what is there already is gone on with")
    args = parser.parse_intermixed_args(argv)
    if bool(args.run) == bool(args.config):
        parser.error("give --run DIR or --config FILE")
    if args.step is not None and not args.run:
        parser.error("--step N names a checkpoint of --run DIR: give that")
    return _guarded(lambda: _audit(args))


def report(argv: list[str]) -> int:
    """Write the page of a run, an audit, an evaluation or a study; or of several, on the terminal, served, or as a curve."""
    parser = argparse.ArgumentParser(prog="gear-trainer report", description=report.__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder or file: runs/NAME, an audit's, ...")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--together", type=Path, metavar="FILE.html", help="one page of all: curves overlaid, problems compared")
    only.add_argument(
        "--serve", nargs="?", type=int, const=0, metavar="PORT", help="serve the page on 127.0.0.1; it follows runs"
    )
    only.add_argument("--text", action="store_true", help="on the terminal")
    only.add_argument("--compare", type=Path, metavar="FILE.png", help="held-out success of all runs, one colour a method")
    args = parser.parse_intermixed_args(argv)
    return _guarded(lambda: _report(args))


def runs(argv: list[str]) -> int:
    """List runs: their state, their step, what they came to."""
    parser = argparse.ArgumentParser(prog="gear-trainer runs", description=runs.__doc__)
    parser.add_argument("folders", nargs="*", type=Path, metavar="DIR", help="where runs are: output_dir, or one run; runs/")
    args = parser.parse_intermixed_args(argv)
    return _guarded(lambda: _runs(args.folders or [Path("runs")]))


def study(argv: list[str]) -> int:
    """Run a study: arms of a configuration with several seeds each, side by side, and one page of what they came to."""
    parser = argparse.ArgumentParser(prog="gear-trainer study", description=study.__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="YAML: a configuration, arms, seeds; see docs/studies.md")
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="start the runs of these arms alone")
    add = "study.json of the same study, made in another place: its finished runs count, and do not start"
    parser.add_argument("--add", nargs="+", type=Path, default=[], metavar="JSON", help=add)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="check every arm, say what each run needs, start nothing")
    only.add_argument("--report-only", action="store_true", help="write the page of the runs that are there")
    args = parser.parse_args(argv)
    return _guarded(lambda: _study(args))


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "train": train, "plan": plan, "evaluate": evaluate, "audit": audit, "report": report, "runs": runs, "study": study,
}  # fmt: skip


def _plan(cfg: Config, sold_as: float | None) -> int:
    from gear_trainer.preflight.dry_run import dry_run

    dry_run(cfg, sold_as)
    return 0


def _train(cfg: Config, resume: bool) -> int:
    from gear_trainer.build import build, finish, resolve_model_path, set_environment
    from gear_trainer.preflight.checks import check, check_launch
    from gear_trainer.runs.files import lock_run
    from gear_trainer.runs.interrupts import Interrupts

    check_launch(cfg)
    task, recipe = check(cfg)
    interrupts = Interrupts()
    lock = lock_run(cfg) if int(os.environ["RANK"]) == 0 else None  # before anything that takes time, or that is written
    set_environment(cfg)
    from gear_trainer.hints.endpoint import connect
    from gear_trainer.policy.hub import check_hub_model

    check_hub_model(cfg.model.path)
    if recipe.kl and recipe.kl.reference.path:
        check_hub_model(recipe.kl.reference.path, "kl.reference")
    # every rank asks for itself, as it will during the run
    endpoint = connect(cfg.writer, cfg.rollout.max_model_len) if recipe.references == "writer" and cfg.writer.url else None
    model_path = resolve_model_path(cfg, task)  # before the process group: a warm start outlasts a collective's patience
    trainer, start = build(cfg, task, recipe, model_path, endpoint, interrupts, resume)
    code = finish(cfg, trainer, trainer.train(start))
    if lock:
        lock.release()
    return code


def _evaluate(args: argparse.Namespace) -> int:
    from gear_trainer.build import alone, prepare_evaluation, set_environment
    from gear_trainer.evaluation import paper
    from gear_trainer.evaluation.run import evaluate, trained_with
    from gear_trainer.report.build import write_evaluation
    from gear_trainer.report.evaluation import line

    given, cfg, out = _evaluation_config(args)
    if args.paper is not None:
        paper.check(args.paper, cfg)
    alone()
    set_environment(cfg)
    trained = trained_with(given) if args.run and not args.model else None
    try:
        sets, engine, model_path = prepare_evaluation(cfg, given.model.path, args.run, args.step)
        for folder, result in evaluate(cfg, sets, engine, out, model_path, args.batch):
            beside = None if args.paper is None else paper.beside(result, args.paper, trained)
            print(line(result), f"written: {write_evaluation(folder, result, beside)}", sep="\n", flush=True)
    except KeyboardInterrupt:
        print(f"gear_trainer: interrupted; the same command goes on with {out}", file=sys.stderr, flush=True)
        return 130
    return 0


def _evaluation_config(args: argparse.Namespace) -> tuple[Config, Config, Path]:
    """The configuration that was given, the same for the model and the lengths that are evaluated, and the results' folder."""
    if args.run or args.config:
        given = load_config(args.run / "config.json" if args.run else args.config, args.overrides)
    else:
        given = make_config({"name": "evaluation", "world_size": 1, "model": {"path": args.model}}, args.overrides)
    path = args.model or (str(args.run / "model") if args.run and args.step is None else given.model.path)
    samples, length = args.samples or given.eval.samples, given.eval.max_model_len or given.rollout.max_model_len
    cfg = _of_model(given, path).model_copy(
        update={
            "eval": given.eval.model_copy(update={"samples": samples}),
            "rollout": given.rollout.model_copy(update={"max_model_len": length}),  # no trainer's: the engine has all of it
        }
    )
    called = _called(None if args.model else args.run, args.step, path)
    return given, cfg, args.out or (args.run or Path(given.output_dir)) / "evaluation" / called


def _audit(args: argparse.Namespace) -> int:
    from gear_trainer.audit.run import Subject, audit, problems_of
    from gear_trainer.audit.signals import Scorer
    from gear_trainer.build import alone, prepare_model, set_environment

    given = load_config(args.run / "config.json" if args.run else args.config, args.overrides)
    cfg = _of_model(given, str(args.run / "model") if args.run and args.step is None else given.model.path)
    out = args.out or (args.run or Path(given.output_dir)) / "audit" / _called(args.run, args.step, cfg.model.path)
    alone("audit")
    set_environment(cfg)
    try:
        task, chat, engine, path = prepare_model(cfg, given.model.path, args.run, args.step)
        step = (given.train.steps if args.step is None else args.step) if args.run else 0
        subject = Subject(path, step, engine, lambda: Scorer(cfg, path))
        print(f"written: {audit(cfg, problems_of(cfg, task, chat), subject, out)}", flush=True)
    except KeyboardInterrupt:
        print(f"gear_trainer: interrupted; the same command goes on with {out}", file=sys.stderr, flush=True)
        return 130
    return 0


def _of_model(given: Config, path: str) -> Config:
    """The configuration of that model, which has its adapters merged, as in what a run exports."""
    model, lora = given.model.model_copy(update={"path": path}), given.lora.model_copy(update={"rank": 0})
    return given.model_copy(update={"model": model, "lora": lora})


def _called(run: Path | None, step: int | None, path: str) -> str:
    """The folder's name of what was found of a model: a run's final one, that of a step, or another."""
    if step is not None:
        return f"step-{step}"
    return "model" if run else re.sub(r"[^\w.-]+", "-", path).strip("-.")


def _compare(folders: list[Path], out: Path | None) -> int:
    from gear_trainer.evaluation.compare import compare
    from gear_trainer.report.evaluation import comparison, write_comparison

    found = compare(folders[0], folders[1])
    print(comparison(found), end="")
    if out:
        print(f"\nwritten: {write_comparison(out, found)}")
    return 0


def _report(args: argparse.Namespace) -> int:
    from gear_trainer.report.build import draw_comparison, write_pages, write_report

    if args.text:
        from rich.console import Console

        from gear_trainer.report.terminal import show

        show(args.runs, Console(highlight=False))
    elif args.serve is not None:
        from gear_trainer.report.serve import serve

        serve(args.runs, args.serve)
    elif args.together:
        write_pages(args.runs, args.together)
        print(f"report: {args.together}")
    elif args.compare:
        draw_comparison(args.runs, args.compare)
    else:
        print(*(write_report(folder) for folder in args.runs), sep="\n")
    return 0


def _runs(folders: list[Path]) -> int:
    from rich.console import Console

    from gear_trainer.runs.registry import find_runs, table

    found = [run for folder in folders for run in find_runs(folder)]
    out = Console(highlight=False)
    out.print(table(found), markup=False) if out.is_terminal else print(*(run.line() for run in found), sep="\n")
    return 0


def _study(args: argparse.Namespace) -> int:
    from gear_trainer.report.build import write_study
    from gear_trainer.report.study import read_elsewhere
    from gear_trainer.runs.launches import Launches, locked
    from gear_trainer.runs.study import load_plan, standings, summary

    plan = load_plan(args.file)
    if unknown := [arm for arm in args.arms or () if arm not in plan.study.arms]:
        raise ConfigError(f"--arms {unknown[0]}: {args.file} has no such arm{near(unknown[0], plan.study.arms)}")

    def chosen() -> list[Standing]:
        return [s for s in standings(plan) if s.cell.arm in (args.arms or plan.study.arms)]

    code = 0
    if not args.report_only:
        _check_arms(args.file, plan)
    elsewhere = read_elsewhere(plan, args.add)
    if args.dry_run:
        print(summary(plan, chosen()))
        if elsewhere:
            print(f"{len(elsewhere)} of them finished in another place (--add) and do not start")
        return 0
    if not args.report_only:
        with locked(plan):
            code = Launches(plan, [s for s in chosen() if (s.cell.arm, s.cell.seed) not in elsewhere]).run()
    print(write_study(plan, elsewhere))
    return code


def _check_arms(file: Path, plan: StudyPlan) -> None:
    """What each arm's first run would refuse is refused before any run starts. Raises ConfigError."""
    from gear_kernels import GearKernelsError
    from gear_trainer.preflight.checks import check
    from gear_trainer.tasks.base import TaskError

    for arm in plan.study.arms:
        try:
            check(plan.of(arm)[0].cfg)
        except (ConfigError, TaskError, GearKernelsError) as error:
            raise ConfigError(f"{file}: arm {arm}: {error}") from None


# --- how a command ends -----------------------------------------------------------------------------------------------------


def _guarded(command: Callable[[], int]) -> int:
    """The command's exit code; 130 where it was interrupted, else what its error means."""
    _share_cores()
    _quiet()
    try:
        return command()
    except KeyboardInterrupt:
        if int(os.environ.get("RANK", 0)) == 0:
            from gear_trainer.runs.interrupts import EARLY

            print(f"gear_trainer: {EARLY}", file=sys.stderr, flush=True)
        return 130
    except Exception as error:
        return _tell(error)


def _tell(error: Exception) -> int:
    """Say once, on one of the ranks, why the run ends; what the user can mend is one line. Returns the exit code."""
    from gear_kernels import GearKernelsError
    from gear_trainer.runs.ranks import Beats
    from gear_trainer.tasks.base import TaskError

    beats, rank = Beats.running, int(os.environ.get("RANK", 0))
    if beats:
        if lost := beats.blame(error):
            beats.leave(lost)
        beats.fail(error)
    mendable = isinstance(error, (ConfigError, TaskError, GearKernelsError))
    foreseen = mendable or isinstance(error, RunError)
    if foreseen:
        said = f"gear_trainer: {error}\n"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        said = f"gear_trainer: the disk is full ({error.filename or 'a file of the run'}): make room, then --resume goes on\n"
    else:
        said = "".join(traceback.format_exception(error))
    if not rank or _speaks(beats, error, foreseen):
        print((f"[rank {rank}] " if rank else "") + said, end="", file=sys.stderr, flush=True)
    return 2 if mendable else 1


def _speaks(beats, error: Exception, foreseen: bool) -> bool:
    """Whether a rank other than 0 has something to say that rank 0 does not: the same error is most often raised on all."""
    time.sleep(3)  # a launcher kills all ranks once one has exited: let rank 0 print first
    if beats is None:  # what is foreseen by then is the same on all ranks of a machine, a surprise is not
        return not foreseen or os.environ.get("LOCAL_RANK") == "0"
    return not beats.said_by(0, error)


def _share_cores() -> None:
    """Each rank its share of the cores, before torch makes its thread pool (the deepspeed launcher leaves it to us)."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks_here())))


def _quiet() -> None:
    """Leave the terminal to the run: other libraries' deprecations and loading bars are 30 lines a rank."""
    import logging
    import warnings

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.|vllm\.")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
    logging.getLogger("torch._library.triton").setLevel(logging.ERROR)
