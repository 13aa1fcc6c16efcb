from __future__ import annotations

from pathlib import Path

import pytest

from safecrit.errors import SafecritError
from safecrit.files import atomic, write_json
from safecrit.outputs import default_output, open_output


def test_a_folder_is_taken_resumed_and_then_closed(tmp_path: Path) -> None:
    out = tmp_path / "a"
    first = open_output(out, "score", {"x": 1})
    assert not first.resumed
    assert open_output(out, "score", {"x": 1}).resumed
    assert not open_output(out, "score", {"x": 7}).resumed  # nothing was done yet, so nothing is refused
    first = open_output(out, "score", {"x": 1})
    (out / "samples.jsonl").write_text("{}")
    assert open_output(out, "score", {"x": 1}).resumed
    with pytest.raises(SafecritError, match=r"other settings \(x: 1 -> 2\)"):
        open_output(out, "score", {"x": 2})
    with pytest.raises(SafecritError, match="holds the output of `safecrit score`"):
        open_output(out, "eval", {"x": 1})
    first.finish()
    with pytest.raises(SafecritError, match="already holds the finished run"):
        open_output(out, "score", {"x": 1})
    assert open_output(out, "score", {"x": 1}, reuse_finished=True).resumed
    (out / "result").write_text("old")
    with pytest.raises(SafecritError, match=r"would delete the input .*result \(model\)"):
        open_output(out, "score", {"x": 2, "model": str(out / "result")}, overwrite=True)
    assert not open_output(out, "score", {"x": 2}, overwrite=True).resumed
    assert not (out / "result").exists()


def test_foreign_folders_and_files_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    (tmp_path / "config.yaml").write_text("lr: 0.1")
    (tmp_path / ".thesis.part").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(SafecritError, match="is no output of"):
            open_output(tmp_path, "score", {}, overwrite=overwrite)
    with pytest.raises(SafecritError, match="is a file"):
        open_output(tmp_path / "thesis.txt", "score", {})
    assert (tmp_path / "thesis.txt").read_text() == (tmp_path / ".thesis.part").read_text() == "x"


def test_a_run_killed_while_writing_its_first_file_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.abc.part").write_text("half")
    assert not open_output(tmp_path, "score", {}).resumed
    assert [p.name for p in tmp_path.iterdir()] == ["config.yaml"]


def test_default_output_names_command_and_model() -> None:
    assert default_output("score", "owner/name").name.startswith("score-name-")


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError(28, "No space left on device")])
def test_atomic_writing_leaves_the_old_file(tmp_path: Path, error: BaseException | type[BaseException]) -> None:
    file = tmp_path / "a.json"
    write_json(file, {"old": 1})
    before = file.read_bytes()
    with pytest.raises(SafecritError if isinstance(error, OSError) else error), atomic(file) as temporary:  # type: ignore[arg-type]
        temporary.write_text("half")
        raise error
    assert file.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["a.json"]
