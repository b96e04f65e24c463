"""`jaxgpt train`: train a recipe, or resume a run. `jaxgpt recipes`: list the recipes."""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import tyro

from jaxgpt.cli import flush_stdout
from jaxgpt.cli.compile_cache import use_compile_cache
from jaxgpt.cli.options import Folders, parse, take_name
from jaxgpt.cli.places import local_path
from jaxgpt.config import Config, UsageError, replaced
from jaxgpt.recipes import RECIPES, recipe
from jaxgpt.run import Run

if TYPE_CHECKING:
    from jaxgpt.monitor.terminal import RunConsole
    from jaxgpt.train import Summary


@dataclass(frozen=True)
class Train:
    run: str
    """Name of the run and of its directory in --runs-dir."""
    config: Config
    folders: Folders = field(default_factory=Folders)
    resume: bool = False
    """Resume an existing run with its own settings; only --steps and those of evaluation and saves may change."""
    log: tyro.conf.UseAppendAction[tuple[Literal["tensorboard", "wandb", "trackio"], ...]] = ()
    """Send the metrics to this logger too; may be repeated."""
    debug_nans: bool = False
    """End the run at the first non-finite step and name the operation; slower."""
    mesh: str = "auto"
    """The device mesh: sizes of data, fsdp, tensor and context, as in data=8,fsdp=4; or auto."""
    distributed: bool = False
    """Join the other processes that SLURM, Open MPI, Kubernetes or Cloud TPU started."""
    coordinator: str = ""
    """Without such a launcher: the address of process 0, HOST:PORT; give --num-processes and --process-id too."""
    num_processes: int = 1
    """Number of processes that train the run."""
    process_id: int = 0
    """Index of this process, from 0."""


def run_train(args: list[str]) -> int:
    named, args = take_name(Train, args)
    if named and "--resume" in args:
        raise UsageError(f"a resume takes its settings from the run: leave out {named!r}, and name the run with --run")
    name = named or "gpt-demo"
    known = recipe(name)
    measured = "" if name.endswith(".json") else f" {known.hardware}: {known.time}, loss {known.loss}."
    about = f"{known.about}{measured} Recipes: {', '.join(RECIPES)}."
    default = _from_file(name, known.config) if name.endswith(".json") else Train(run=name, config=known.config)
    given = parse(Train, args, "train", about, default, name)
    existing = Run.named(given.folders.runs_dir, given.run) if given.resume else None
    if existing:
        given = parse(Train, args, "train", about, replace(default, config=existing.config), name)
    code = _fit(given, existing)
    flush_stdout()  # the run is saved, whatever becomes of its output
    return code


@dataclass(frozen=True)
class Recipes:
    """No options."""


def run_recipes(args: list[str]) -> int:
    parse(Recipes, args, "recipes")
    for name, known in RECIPES.items():
        print(f"jaxgpt train {name}\n  {known.about}\n  {known.hardware}: {known.time}; loss {known.loss}")
    return 0


def _from_file(name: str, config: Config) -> Train:
    """The defaults of a recipe in a file. The config of a run gives that run's name, and vocab_size 0 if it has that of
    the run's tokenizer, so that it follows another text."""
    path = local_path(name)
    made = Run(path.resolve().parent)
    if path.name != "config.json" or not (made.path / "tokens.json").is_file():
        return Train(run=path.stem, config=config)
    if made.tokenizer.vocab_size == config.model.vocab_size:
        config = replaced(config, vocab_size=0)
    return Train(run=made.path.name, config=config)


def _fit(given: Train, existing: Run | None) -> int:
    import jax

    from jaxgpt import processes
    from jaxgpt.checkpoint import CheckpointError, Checkpoints
    from jaxgpt.cli import memory
    from jaxgpt.cli.corpora import absolute
    from jaxgpt.cli.join import join
    from jaxgpt.cli.mesh import mesh_for
    from jaxgpt.cli.runs import resume, start_run
    from jaxgpt.display.text import count
    from jaxgpt.monitor import cost, loggers
    from jaxgpt.monitor.chips import utilization
    from jaxgpt.monitor.spikes import sampler, with_spikes
    from jaxgpt.monitor.terminal import RunConsole, TrainingDisplay
    from jaxgpt.sharding import Sizes
    from jaxgpt.train import fit

    loggers.require(given.log)
    sizes = None if given.mesh == "auto" else Sizes.parse(given.mesh)
    if not given.coordinator and (given.num_processes, given.process_id) != (1, 0):
        raise UsageError("--num-processes and --process-id need the address of process 0: --coordinator HOST:PORT")
    if given.distributed or given.coordinator:
        join(given.coordinator, given.num_processes, given.process_id)
    use_compile_cache()
    runs_dir, data_dir = given.folders.runs_dir, given.folders.data_dir

    def require_room(config: Config, n_tokens: int) -> None:
        mesh, _ = mesh_for(config, sizes)
        memory.require(config, n_tokens, Sizes(**mesh.shape), new=not existing)

    config = given.config
    if existing:
        run = existing
        if absolute(config.data.corpus) == run.config.data.corpus:
            config = replaced(config, corpus=run.config.data.corpus)
        corpus = processes.on_primary(lambda: resume(config, run, data_dir))
    else:
        made = processes.on_primary(lambda: start_run(config, given.run, runs_dir, data_dir, require_room=require_room))
        run, corpus = made or (Run.named(runs_dir, given.run), None)
        config = run.config
    corpus = corpus or resume(config, run, data_dir)
    primary = processes.is_primary()
    console = RunConsole(quiet=not primary)
    console.print(corpus.summary)
    mesh, why = mesh_for(config, sizes)
    require_room(config, len(corpus.split(config.data)[0]))
    with jax.set_mesh(mesh):
        console.print(cost.describe(config.model))
    console.print(why)
    latest = Checkpoints(run.checkpoints).latest or 0
    if latest == config.train.steps:
        console.print(f"the run is at its last step, {config.train.steps:,}: --steps N trains longer")
    end = config.optimizer.decay_steps
    if config.optimizer.schedule != "constant" and config.train.steps > max(end, latest):
        console.print(f"the learning rate stays at {config.optimizer.final_learning_rate:g} from step {end:,} on")
    with run.lock():
        pass  # before a logger joins the session of a process that trains this run
    used = partial(utilization, config, jax.devices()[0].device_kind, mesh.size)
    with (
        TrainingDisplay(console, config.train.steps, used) as display,
        loggers.logged(run, given.log if primary else (), display) as log,
    ):
        sample = sampler(config.model, corpus.tokenizer) if not display.disable and jax.device_count() == 1 else None
        try:
            done = fit(run, corpus, with_spikes(run, log), config, given.debug_nans, mesh, sample)
        except CheckpointError as error:
            error.add_note(f"Resume with: {resume_command(given, run)}")
            raise
    if display.disable and (curve := display.curve()):  # a terminal shows it already
        console.print(curve)
    if display.notices:
        console.print(f"{count(display.notices, 'warning')}: see {run.events_file}", style="bold yellow")
    if done.interrupted_by:
        again = resume_command(given, run)
        console.print(f"interrupted at step {done.step:,} of {done.steps:,}; saved. Resume with: {again}")
        return 128 + done.interrupted_by
    _print_summary(console, done)
    console.print(f"Sample from it: {run.command('sample')}")
    return 0


def resume_command(given: Train, run: Run) -> str:
    """The command that resumes an interrupted `run` with the same devices and loggers."""
    flags = [] if given.mesh == "auto" else ["--mesh", given.mesh]
    flags += ["--distributed"] * given.distributed
    flags += [word for logger in given.log for word in ("--log", logger)]
    command = run.command("train", "--resume", *flags, data_dir=given.folders.data_dir)
    if given.coordinator:
        command += f" --coordinator {given.coordinator} --num-processes {given.num_processes} --process-id 0, 1, ..."
    return command


def _print_summary(console: "RunConsole", done: "Summary") -> None:
    from jaxgpt.monitor.terminal import describe, duration

    first, last, best = done.scores[0], done.scores[-1], done.best
    speed = f", {done.tokens_per_second:,.0f} tokens/s" if done.tokens_per_second else ""
    console.print(f"{done.run.path}: step {done.step:,} in {duration(done.seconds)}{speed}")
    if first.step == 0 and first is not last:
        console.print(f"  before  {describe(first.evaluation)}")
    console.print(f"  after   {describe(last.evaluation)}")
    if best and best.step != last.step:
        lost = "" if (done.run.checkpoints / str(best.step)).exists() else ", which was not saved"
        console.print(f"  best    {describe(best.evaluation)}, at step {best.step:,}{lost}")
