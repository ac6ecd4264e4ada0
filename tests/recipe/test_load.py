"""Recipes: what is wrong is said with file, line, key and the nearest valid one."""

import pathlib

import pydantic
import pytest

pytest.importorskip("yaml")

from jopt.recipe import _load as loading
from jopt.recipe import _schema as schema

GOOD = """\
name: small
data: {kind: digits}
stages:
  - stage: train
    name: teacher
    model: {kind: convnet, widths: [4]}
    optimizer: {kind: sgd, momentum: 0.9, learning_rate: 1e-2}
  - stage: sparsify
    sparsity: {target: 0.5}
"""


@pytest.fixture
def write(tmp_path: pathlib.Path):
    def write(text: str) -> pathlib.Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return path

    return write


def test_good_recipe_with_defaults(write):
    recipe = loading.load(write(GOOD))
    teacher, sparse = recipe.stages
    assert isinstance(teacher, schema.Train) and isinstance(sparse, schema.Sparsify)
    assert teacher.optimizer.learning_rate == 0.01  # YAML 1.1 reads 1e-2 as text
    assert sparse.name == "sparsify" and sparse.sparsity.scope == "global"


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("widths", "widhts", 6, ["stages.0.model.widhts", "did you mean `widths`"]),
        ("momentum: 0.9", "momentum: fast", 7, ["stages.0.optimizer.momentum", "'fast'"]),
        ("target: 0.5", "target: 1.0", 9, ["stages.1.sparsity.target", "less than 1"]),
        ("target: 0.5", "target: -0.1", 9, ["stages.1.sparsity.target", "greater than or equal"]),
        ("kind: sgd", "kind: sdg", 7, ["stages.0.optimizer.kind", "'sgd'", "'sdg'"]),
        ("stage: sparsify", "stage: prune", 8, ["stages.1.stage", "`train`", "`sparsify`"]),
        ("kind: digits", "kind: mnist", 2, ["data.kind", "`digits`", "`cifar10`"]),
        ("stage: sparsify", "stage: sparsfy", 8, ["did you mean `sparsify`?"]),
        (
            "target: 0.5",
            "at: [{epoch: 2, sparsity: 0.5}, {epoch: 1, sparsity: 0.6}]",
            9,
            ["forward"],
        ),
        ("target: 0.5", "target: .nan", 9, ["stages.1.sparsity.target"]),
        ("target: 0.5", "at: 2", 9, ["stages.1.sparsity.at", "a list, found 2"]),
        ("name: small", "seed: .inf\nname: small", 1, ["seed"]),
        (
            "stage: sparsify",
            "stage: sparsify\n    epochs: 0",
            8,
            ["can neither prune, regularize nor"],
        ),
        ("    name: teacher\n", "    name: teacher\n    start: x\n", 4, ["leave one out"]),
        ("name: teacher", "name: sparsify", 1, ["two stages are called `sparsify`"]),
        ("model: {kind: convnet, widths: [4]}", "epochs: 1", 1, ["comes first", "`model`"]),
        ("name: small\n", "", 1, ["`name`", "Field required"]),
        ("target: 0.5", "begin: 0.2", 9, ["either `target` or `at`"]),
        ("target: 0.5", "pattern: {n: 4, m: 2}", 9, ["n < m", "4:2"]),
        ("target: 0.5", "target: 0.5, begin: 0.8", 9, ["`begin` (0.8)"]),
    ],
)
def test_mistakes_name_line_and_key(write, old, new, line, words):
    assert old in GOOD
    path = write(GOOD.replace(old, new))
    with pytest.raises(loading.RecipeError) as error:
        loading.load(path)
    message = str(error.value)
    assert f"{path}:{line}: " in message
    for word in words:
        assert word in message, message
    assert len(message.splitlines()) == 1


def test_bits_out_of_range(write):
    rule = "{weight: {bits: 9}}"
    path = write(GOOD + f"  - stage: quantize\n    policy:\n      - {rule}\n")
    with pytest.raises(loading.RecipeError, match=r"recipe\.yaml:12: .*bits.*less than or equal"):
        loading.load(path)


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("  - {stage: quantize, policy: [{weight: null}]}", "nothing would be quantized"),
        ("  - {stage: quantize, policy: [{weight: {bits: 4, granularity: group}}]}", "group_size"),
        ("  - {stage: quantize, policy: [{weight: {bits: 4}, static: true}]}", "`activation` too"),
        ("  - {stage: quantize, policy: [{weight: {bits: 4}}], method: gptq}", "has pruned"),
        (
            "  - {stage: quantize, policy: [{weight: {bits: 4}}], method: awq, start: teacher, "
            "epochs: 1}",
            "rounds after training",
        ),
        ("  - {stage: quantize, policy: [{weight: {bits: 4}}], method: gpt}", "gptq"),
        ("  - {stage: export, platforms: []}", "platforms"),
        ("  - {stage: export}\n  - {stage: export, name: b}", "one `export`"),
        ("  - {stage: export}\n  - {stage: train, start: export}", "those are: teacher, sparsify"),
    ],
)
def test_stages_that_make_no_sense(write, stages, words):
    with pytest.raises(loading.RecipeError, match=words):
        loading.load(write(GOOD + stages + "\n"))


def test_two_unknown_keys_of_one_block_are_both_named(write):
    path = write(GOOD.replace("widths: [4]", "widhts: [4], deph: 2"))
    with pytest.raises(loading.RecipeError) as error:
        loading.load(path)
    assert "`widths`?" in str(error.value) and "`depth`?" in str(error.value)


def test_a_document_that_contains_itself(write):
    with pytest.raises(loading.RecipeError, match="contains itself"):
        loading.load(write("name: x\ndata: &a [*a]\n"))


def test_several_mistakes_are_all_named(write):
    path = write(GOOD.replace("widths", "widhts").replace("target", "taget"))
    with pytest.raises(loading.RecipeError) as error:
        loading.load(path)
    assert ":6:" in str(error.value) and ":9:" in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "not valid YAML"),
        ("- just\n- a list\n", "a recipe is a mapping"),
        ("", "a recipe is a mapping"),
        (GOOD + "name: again\n", "`name` stands twice"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_not_a_recipe(write, text, words):
    with pytest.raises(loading.RecipeError, match=words):
        loading.load(write(text))


def test_references_must_be_earlier(write):
    student = "  - {stage: distill, distill: {teacher: tutor}}\n"
    with pytest.raises(loading.RecipeError, match="makes a model; those are: teacher, sparsify"):
        loading.load(write(GOOD + student))


def test_overrides(write):
    path = write(GOOD)
    recipe = loading.load(path, ["seed=7", "stages.teacher.epochs=2", "stages.1.name=thin"])
    assert recipe.seed == 7
    assert recipe.stages[0].epochs == 2
    assert recipe.stages[1].name == "thin"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", "key.path=value"),
        ("stages.nobody.epochs=1", "one of: teacher, sparsify"),
        ("stages.7.epochs=1", "no item 7"),
        ("name.first=x", "`first` cannot be set inside 'small'"),
        ("sead=1", r"--set sead=1.*did you mean `seed`"),
        ("stages.teacher.epochs=few", r"--set stages.teacher.epochs=few.*valid number"),
    ],
)
def test_override_mistakes_name_the_option(write, override, words):
    with pytest.raises(loading.RecipeError, match=words):
        loading.load(write(GOOD), [override])


def test_find_knows_the_built_in_recipes():
    assert "digits" in loading.built_in()
    assert loading.find("digits") == loading.find("configs/digits.yaml").resolve()
    with pytest.raises(loading.RecipeError, match=r"built-in: .*digits"):
        loading.find("digitz")


@pytest.mark.parametrize("name", sorted(loading.built_in()))
def test_built_in_recipes_are_valid(name):
    recipe = loading.load(loading.find(name))
    assert recipe.name == name and recipe.about


def test_schema_describes_every_block():
    document = schema.Recipe.model_json_schema()
    assert document["properties"]["stages"]["items"]["discriminator"]["propertyName"] == "stage"
    assert all("description" in block for block in document["$defs"].values())


def test_recipes_are_frozen(write):
    recipe = loading.load(write(GOOD))
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        recipe.seed = 3
