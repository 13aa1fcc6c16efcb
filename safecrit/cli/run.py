"""`safecrit run`: a recipe's stages one after another, each with its own command's code; finished ones are kept."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated, Any

import typer

from safecrit.cli import options as o
from safecrit.cli.sink import Sink

STAGES = ("score", "mask", "set", "spa", "eval", "perturb", "report")
PLACES = {"score": "scores", "mask": "mask.safetensors", "set": "model", "spa": "model", "eval": "results"}
STATE = "run.yaml"
ALONE = ("perturb", "report")  # stages of one process

RecipeFile = Annotated[Path | None, typer.Argument(metavar="RECIPE", help="YAML file: model, output, and stages.")]
Init = Annotated[str | None, typer.Option("--init", metavar="MODEL", help="Write a commented recipe for MODEL.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the commands and what scoring would need.")]
Output = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="PATH", help="Output folder; with --init, the recipe's file."),
]


def run(
    recipe: RecipeFile = None,
    init: Init = None,
    output: Output = None,
    dry_run: DryRun = False,
    overwrite: o.Overwrite = False,
    dist_timeout: o.DistTimeout = o.DIST_TIMEOUT_S,
    quiet: o.Quiet = False,
    debug: o.Debug = False,
) -> None:
    """Run a recipe: score, mask, set or spa, eval, perturb, report, those that it names, in this order.

    A section's keys are the command's long options. Run again, it goes on where
    it stopped; a changed section asks for --overwrite and is then done anew,
    with those after it. Under torchrun the stages run on all ranks; what is for one process is left
    to a run without it.
    """
    from safecrit.errors import UsageError

    sink = Sink(quiet=quiet)
    if (recipe is None) == (init is None):
        raise UsageError("give a RECIPE to run, or --init MODEL to write one.")
    if init is not None:
        _init(init, output or Path("recipe.yaml"), overwrite, sink)
    else:
        from safecrit import distributed

        assert recipe is not None
        if not dry_run:
            distributed.start(dist_timeout)
        _Run(recipe, output, overwrite, quiet, sink).go(dry_run=dry_run)


class _Run:
    """One recipe and its output folder."""

    def __init__(self, recipe: Path, output: Path | None, overwrite: bool, quiet: bool, sink: Sink) -> None:
        from safecrit import distributed
        from safecrit.errors import SafecritError

        self.sections = read_recipe(recipe)
        place = output or self.sections.get("output")
        if not place:
            raise SafecritError(f"{recipe}: names no output folder. Add `output: FOLDER`, or use -o.")
        self.recipe, self.folder = recipe, Path(place)
        self.overwrite, self.quiet, self.sink = overwrite, quiet, sink
        self.state: dict[str, Any] = distributed.from_first(
            lambda: _yaml(self.folder / STATE) if (self.folder / STATE).is_file() else {}
        )

    def go(self, *, dry_run: bool) -> None:
        """Run what is left; CheckFailed at the end where an evaluation's gate did not hold."""
        from safecrit import distributed
        from safecrit.errors import CheckFailed, SafecritError

        stages = [stage for stage in STAGES if stage in self.sections]
        commands = {stage: self.command(stage) for stage in stages}
        if dry_run:
            for command in commands.values():
                self.sink.line("safecrit " + " ".join(_quoted(word) for word in command))
            if "score" in commands:
                _call([*commands["score"], "--dry-run"])
            return
        key, failed, redo = "", [], False
        for stage in stages:
            key = hashlib.sha256("\0".join([key, *commands[stage]]).encode()).hexdigest()
            known = self.state.get(stage)
            if known and known["key"] == key and not redo and (known["done"] or self.finished(stage)):
                self.sink.note(f"{stage}: finished before")
                failed += [known["failed"]] if known["failed"] else []
                continue
            if known and known["key"] != key and not self.overwrite:
                raise SafecritError(
                    f"{self.folder}: its {stage} was made with other settings than {self.recipe} has now. "
                    "Use --overwrite to make it and what follows anew, or another -o."
                )
            if distributed.current().world > 1 and stage in ALONE:
                self.sink.line(f"{stage} runs in one process: `safecrit run {self.recipe}` without torchrun goes on.")
                break
            redo = redo or bool(known and (known["done"] or known["key"] != key))
            again = redo or (bool(known) and stage == "mask")  # a mask's file does not say whether it is ours
            self.save(stage, key, "", done=False)
            self.sink.line(f"== {stage}")
            problem = ""
            try:
                _call([*commands[stage], *(["--overwrite"] if again else []), *(["-q"] if self.quiet else [])])
            except CheckFailed as error:
                if stage not in ("eval", "perturb"):
                    raise
                problem = str(error)  # the figures are written; the report may still want them
                failed.append(problem)
            self.save(stage, key, problem, done=True)
        else:
            self.sink.line(f"Everything is in {self.folder}.")
        if failed:
            raise CheckFailed(" ".join(failed))

    def finished(self, stage: str) -> bool:
        """Whether the stage's output says so itself: the run was killed before it could note that."""
        from safecrit import distributed

        inside = "safecrit" if stage in ("set", "spa") else ""
        file = self.place(stage) / inside / "config.yaml"
        return distributed.from_first(lambda: file.is_file() and bool(_yaml(file).get("finished")))

    def save(self, stage: str, key: str, failed: str, *, done: bool) -> None:
        """Keep how far it got."""
        import yaml

        from safecrit import distributed
        from safecrit.files import write_text

        self.state[stage] = {"key": key, "failed": failed, "done": done}
        if distributed.current().first:
            write_text(self.folder / STATE, yaml.safe_dump(self.state, sort_keys=True))

    def place(self, stage: str) -> Path:
        """Where a stage's output lies."""
        return self.folder / PLACES.get(stage, stage)

    def command(self, stage: str) -> list[str]:
        """The stage's command line, its inputs being the outputs of the stages before it."""
        base, trained = str(self.sections["model"]), str(self.place("set"))
        changed = "set" in self.sections or "spa" in self.sections
        mask = str(self.place("mask"))
        inputs: dict[str, list[str]] = {
            "score": [base],
            "mask": [str(self.place("score"))],
            "set": [base, "--mask", mask],
            "spa": [base, "--mask", mask],
            "eval": [trained, "--baseline", base] if changed else [base],
            "perturb": [base, "--mask", mask, "--scores", str(self.place("score"))],
            "report": [str(self.place(s)) for s in ("score", "mask", "eval", "perturb") if s in self.sections],
        }
        given = _flags(self.sections[stage] or {})
        return [stage, *inputs[stage], *given, "-o", str(self.place(stage))]


def read_recipe(path: Path) -> dict[str, Any]:
    """A recipe's content; SafecritError names every unknown stage and option at once."""
    from safecrit.errors import SafecritError

    content = _yaml(path)
    faults = [] if isinstance(content.get("model"), str) else ["`model` is missing"]
    faults += [f"no stage is called {name!r}" for name in content if name not in ("model", "output", *STAGES)]
    if {"set", "spa"} <= set(content):
        faults.append("`set` and `spa` exclude each other: one recipe each")
    for stage, needed in (("mask", "score"), ("set", "mask"), ("spa", "mask"), ("perturb", "mask")):
        if stage in content and needed not in content:
            faults.append(f"`{stage}` needs `{needed}`")
    for stage in STAGES:
        section = content.get(stage)
        if section is not None and not isinstance(section, dict):
            faults.append(f"`{stage}` must hold options and values")
        elif section:
            known = _options(stage)
            faults += [f"`{stage}` has no option {key!r}" for key in section if key.replace("_", "-") not in known]
    if faults:
        raise SafecritError(f"{path}: {'; '.join(faults)}.")
    return content


def _options(stage: str) -> set[str]:
    """Long options of a command, without dashes."""
    from typer.main import get_command

    from safecrit.cli.app import app

    command: Any = get_command(app)
    parameters = command.commands[stage].params
    return {name.removeprefix("--") for p in parameters for name in p.opts if name.startswith("--")}


def _flags(section: dict[str, Any]) -> list[str]:
    words: list[str] = []
    for key, value in section.items():
        flag = f"--{key.replace('_', '-')}"
        for entry in value if isinstance(value, list) else [value]:
            if isinstance(entry, bool):
                words += [flag] if entry else []
            elif entry is not None:
                words += [flag, str(entry)]
    return words


def _call(words: list[str]) -> None:
    """Run one command of our own in this process; its errors are raised."""
    from typer.main import get_command

    from safecrit.cli.app import app

    command: Any = get_command(app)
    if code := command.main(args=words, prog_name="safecrit", standalone_mode=False):
        raise typer.Exit(code)  # interrupted


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    from safecrit.errors import SafecritError

    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SafecritError(f"{path}: cannot be read as YAML ({type(error).__name__}).") from error
    if not isinstance(content, dict):
        raise SafecritError(f"{path}: must hold `model`, `output` and stages.")
    return content


def _quoted(word: str) -> str:
    import shlex

    return shlex.quote(word)


def _init(model: str, output: Path, overwrite: bool, sink: Sink) -> None:
    from safecrit.files import write_text
    from safecrit.outputs import check_output_file

    check_output_file(output, overwrite=overwrite)
    write_text(output, TEMPLATE.replace("MODEL", model).replace("FOLDER", f"safecrit-out/{Path(model).name}"))
    sink.line(f"Recipe: {output}. Fill in the files, then: safecrit run {output}")


TEMPLATE = """\
# A recipe for `safecrit run`. Keys of a section are that command's long options (safecrit COMMAND --help).
# Sections may be left out; what is left runs in the order score, mask, set or spa, eval, perturb, report.
# Not run by us.

model: MODEL
output: FOLDER

score:                        # how much each weight matters to safety
  judge: Qwen/Qwen3Guard-Gen-0.6B
  prompts: harmful_train.csv  # a column goal, Behavior, prompt, instruction, question or messages
  limit: 256
  stability: true             # twice the time; says how far the mask depends on prompts and noise

mask:
  top: 1%

set:                          # train the mask's weights alone; or `spa:` with `data: task.jsonl` to freeze them
  data: refusals.jsonl        # prompt, completion
  retain: benign.jsonl        # keeps utility
  retain-share: 0.75
  steps: 100
  learning-rate: 1e-3         # the paper's 3e-5 moves weights very little

eval:                         # the changed model beside MODEL
  prompts: harmful_test.csv   # others than those of score
  benign: xstest_prompts.csv
  judge: [refusal, Qwen/Qwen3Guard-Gen-0.6B]

perturb:                      # the causal test, on MODEL itself
  prompts: harmful_test.csv
  judge: Qwen/Qwen3Guard-Gen-0.6B
  noise: 0.38,1,2
  limit: 100

report: {}
"""
