"""The command `jopt`: run a recipe, list recipes, look into an artifact, profile a model."""

import json
import os
import pathlib
import sys
from typing import Annotated

try:
    import rich.console
    import typer
except ModuleNotFoundError as missing:  # the library works without; only the command does not
    sys.exit(f'The command `jopt` needs `{missing.name}`: pip install "jopt[run]"')

import jopt

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Make a trained or training JAX model smaller and faster.\n\n"
    "Start with `jopt recipes`, then `jopt run digits`.",
)
DataDir = Annotated[
    pathlib.Path | None,
    typer.Option(
        "--data-dir",
        envvar="JOPT_DATA",
        help="Folder with the data sets, such as the one that holds `cifar-10-batches-bin`.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Change a value of the recipe; stages go by name or number. May be given repeatedly: "
        "`--set stages.teacher.epochs=2 --set seed=1`.",
    ),
]
RecipeName = Annotated[
    str, typer.Argument(metavar="RECIPE", help="A YAML file, or the name of a built-in recipe.")
]


@app.command()
def run(
    recipe: RecipeName,
    out: Annotated[
        pathlib.Path | None,
        typer.Option(help="New folder for all that the run writes. Default: `runs/NAME`."),
    ] = None,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            help="Go on with a run that was cut, from its newest checkpoint, to the same bits.",
        ),
    ] = False,
    data_dir: DataDir = None,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress, only the end.")
    ] = False,
) -> None:
    """Run a recipe from data to a checked artifact and a report.

    Example: `jopt run digits --out runs/digits`
    """
    from jopt import recipe as recipes

    config = recipes.load(recipes.find(recipe), overrides or [])
    try:
        recipes.run(
            config,
            out or pathlib.Path("runs") / config.name,
            data_dir=data_dir,
            resume=resume,
            quiet=quiet,
        )
    except KeyboardInterrupt:
        typer.echo("Interrupted, and saved. Add `--resume` to go on.", err=True)
        raise typer.Exit(130) from None


@app.command(name="recipes")
def list_recipes(
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of recipes and nothing else.")
    ] = False,
    show: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Print a recipe, every default filled in.")
    ] = None,
) -> None:
    """List the built-in recipes, print one, or print the schema that all must follow.

    Example: `jopt recipes --show digits > mine.yaml`
    """
    import yaml
    from rich.table import Table

    from jopt import recipe as recipes

    if schema:
        typer.echo(json.dumps(recipes.Recipe.model_json_schema(), indent=2))
        return
    if show is not None:
        config = recipes.load(recipes.find(show)).model_dump(mode="json")
        typer.echo(yaml.safe_dump(config, sort_keys=False).rstrip())
        return
    table = Table("recipe", "what it shows", box=None, header_style="bold")
    for name, path in recipes.built_in().items():
        table.add_row(name, recipes.load(path).about)
    rich.console.Console().print(table)


@app.command()
def inspect(
    artifact: Annotated[pathlib.Path, typer.Argument(help="Folder that `jopt run` exported.")],
) -> None:
    """Check an artifact's hashes and say what is in it.

    Example: `jopt inspect runs/digits/artifact`
    """
    from jopt import artifact as artifacts

    typer.echo(artifacts.load(artifact).describe())


@app.command()
def profile(
    recipe: Annotated[
        str | None,
        typer.Argument(
            metavar="[RECIPE]",
            help="A YAML file, or the name of a built-in recipe. With `--tune` it may be left out.",
        ),
    ] = None,
    overrides: Overrides = None,
    data_dir: DataDir = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="Measure the implementations of quantized products here."),
    ] = False,
    shape: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ROWSxINPUTSxOUTPUTS",
            help="With `--tune`: a product to measure, such as `64x1024x4096`. May be given "
            "repeatedly. Default: those of the recipe, or a grid of common sizes.",
        ),
    ] = None,
    kind: Annotated[
        list[str] | None,
        typer.Option(
            help="With `--tune`: operands to measure, such as `w8a8` or `w4-group`. May be given "
            "repeatedly. Default: all."
        ),
    ] = None,
    output: Annotated[
        pathlib.Path | None,
        typer.Option(help="With `--tune`: the file to write. Default: one in the user's cache."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="With `--tune`: rounds of measurement.")] = 10,
) -> None:
    """Say what each model of a recipe costs: products, FLOPs, bytes, memory, time.

    Nothing is trained: the weights are random. Example: `jopt profile digits`

    With `--tune`, measure on this machine how quantized products are computed fastest, and write a
    table. It is used where `jopt.quant.use_table(FILE)` or `JOPT_PRODUCTS=FILE` names it, and
    nowhere else. Example: `jopt profile --tune digits --output products.json`
    """
    if not tune:
        if recipe is None:
            raise ValueError("`jopt profile` needs a recipe, such as `jopt profile digits`.")
        if shape or kind or output:
            raise ValueError("`--shape`, `--kind` and `--output` are options of `--tune`.")
        from jopt import recipe as recipes

        recipes.profile(recipes.load(recipes.find(recipe), overrides or []), data_dir=data_dir)
        return
    from jopt import quant

    shapes = [_shape(text) for text in shape or []]
    if recipe is not None:
        from jopt import recipe as recipes

        config = recipes.load(recipes.find(recipe), overrides or [])
        shapes += recipes.products(config, data_dir=data_dir)
        if not shapes:
            raise ValueError(f"`{recipe}` has no matrix product with a weight to measure.")

    def say(timing: quant.Timing) -> None:
        times = sorted(timing.microseconds, key=lambda item: item[1])
        listed = ", ".join(f"{name} {time:,.0f}" for name, time in times[:4])
        typer.echo(f"{timing.kind:12} {timing.rows}x{timing.inputs}x{timing.outputs}: {listed} µs")

    table = quant.tune(shapes or quant.COMMON_SHAPES, kinds=kind, rounds=rounds, report=say)
    path = output or quant.cache_path()
    quant.write_table(table, path)
    typer.echo(f"Wrote {path}\nUse it with `JOPT_PRODUCTS={path}` or `jopt.quant.use_table`.")


def _shape(text: str) -> tuple[int, int, int]:
    sizes = text.lower().replace("×", "x").split("x")
    if len(sizes) != 3 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise ValueError(f"`--shape {text}`: expected ROWSxINPUTSxOUTPUTS, such as 64x1024x4096.")
    rows, inputs, outputs = map(int, sizes)
    return rows, inputs, outputs


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"jopt {jopt.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options before the command."""


def main() -> None:
    """Runs the command; what goes wrong is one message and a non-zero exit.

    With `JOPT_DEBUG` set in the environment errors keep their traceback.
    """
    try:
        app()
    except (ValueError, TypeError, OSError, FloatingPointError, ModuleNotFoundError) as error:
        if os.environ.get("JOPT_DEBUG"):
            raise
        rich.console.Console(stderr=True).print(f"error: {error}", style="bold red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()
