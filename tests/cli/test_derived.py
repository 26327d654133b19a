"""The command line is what the verbs' signatures say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from typer.core import TyperGroup

from conftest import BUNDLED, PROJECT
from spikellm import cli
from spikellm.__main__ import main
from spikellm.commands.support.verb import Argument, Option, Verb, verbs
from spikellm.core.errors import RequestError

VERBS = ["bench", "compare", "convert", "demo", "doctor", "eval", "export"]
VERBS += ["generate", "inspect", "recipes", "report", "sweep", "trace"]


def test_a_verb_is_a_file() -> None:
    folder = PROJECT / "src" / "spikellm" / "commands"
    files = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
    assert set(VERBS) <= files
    assert files == {verbs[name].__module__.rpartition(".")[2] for name in verbs.names()}
    assert files == set(verbs.names())


@pytest.mark.parametrize("name", VERBS)
def test_every_parameter_is_an_option_under_its_name_and_has_words(name: str) -> None:
    group = typer.main.get_command(cli.app)
    assert isinstance(group, TyperGroup)
    command, verb = group.commands[name], Verb(name)
    shown = {one.name: one for one in command.params if not getattr(one, "hidden", False)}
    own = {one.name for one in verb.parameters}
    assert shown.keys() - own <= {"json", "table"}
    for parameter in verb.parameters:
        found = shown[parameter.name]
        assert getattr(found, "help", None), parameter
        if not isinstance(parameter.help, Argument):
            assert found.opts == [parameter.option]
    assert len(verb.run.__annotations__) <= 7, "six parameters and a result"


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom spikellm.__main__ import main\nmain(['--help'])\nmain(['convert',"
        " '--help'])\nprint(sorted({name.split('.')[0] for name in sys.modules} & {'torch',"
        " 'transformers', 'datasets', 'numpy'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


@dataclass(frozen=True, kw_only=True)
class CountOptions:
    times: Annotated[int, Option("How often.")] = 1
    words: Annotated[tuple[str, ...], Option("A word.", name="word")] = ()
    places: Annotated[tuple[int, ...], Option("Places.", "1,2,…", separated=True)] = ()
    loudly: Annotated[bool, Option("In capitals.")] = False
    way: Annotated[str | None, Option("How.", formerly="form", filled="a way")] = None
    reads: Annotated[str | None, Option("A file.", reads="files")] = None
    out: Annotated[Path | None, Option("A file.", writes="file")] = None
    aside: int = 7


_DEFAULT = CountOptions()


def count(
    what: Annotated[str, Argument("What.")], options: CountOptions = _DEFAULT, secret: int = 1
) -> dict[str, Any]:
    """Count what there is.

    Example: spikellm count sheep
    --times 3

    Args:
        secret: for Python alone.
    """
    return {"what": what, "options": options, "secret": secret}


found: list[Any] = []


def show(result: dict[str, Any], what: str) -> None:
    found.append((result, what))


def require(result: dict[str, Any]) -> None:
    if result["what"] == "nothing":
        raise RequestError("nothing was counted")


@pytest.fixture
def counting() -> Iterator[None]:
    """A further verb, as a file in ``commands`` would enter it."""
    found.clear()
    verbs.register("count")(count)
    cli.add_command(cli.app, Verb("count"))
    yield
    cli.app.registered_commands.pop()
    verbs._entries.pop("count")


@pytest.mark.usefixtures("counting")
def test_options_reach_the_function_as_it_wants_them(capsys: pytest.CaptureFixture[str]) -> None:
    given = "count sheep --times 3 --word a --word b --places 2,1 --loudly --form slow"
    assert main(given.split()) == 0
    expected = CountOptions(times=3, words=("a", "b"), places=(2, 1), loudly=True, way="slow")
    assert found == [({"what": "sheep", "options": expected, "secret": 1}, "sheep")]
    assert main(["count", "sheep"]) == 0
    assert found[-1][0]["options"] == CountOptions()
    assert main(["count", "--help"]) == 0
    told = capsys.readouterr().out
    assert "Example: spikellm count sheep --times 3\n" in told
    assert "Python alone" not in told
    assert "--form" not in told
    assert "--aside" not in told
    assert "[default: 1]" in told


@pytest.mark.usefixtures("counting")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("nothing", "nothing was counted"),
        ("a --way fast --form slow", "--way and --form are the same; give one of them"),
        ("a --places 1,1", "--places 1,1: expected each number once"),
        ("a --places x", "--places 'x': expected whole numbers"),
        ("a --times x", "valid integer"),
        ("a --reads x.txt --out x.txt", "is what this command reads"),
        ("a --out x.json --json x.json", "would overwrite each other"),
        ("a --aside 3", "No such option"),
        ("", "Missing argument"),
    ],
)
def test_wrong_requests(
    arguments: str,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").touch()
    assert main(["count", *arguments.split()]) == 2
    assert words in capsys.readouterr().err


def test_empty_options_are_refused_under_the_name_that_was_typed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("--execution", "--form"):
        assert main(["eval", str(BUNDLED), "--perplexity", "stdlib", name, ""]) == 2
        expected = f"{name} is empty; expected merged, stepped, binary or phase"
        assert expected in capsys.readouterr().err
