"""An output folder is a finished model or not there; two runs never write the same one; side files come along."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from quantkit.checkpoint import output
from quantkit.checkpoint.output import check, finish, partial_folder, prepare, release
from quantkit.checkpoint.side_files import copy_side_files, left_behind, side_files
from quantkit.errors import OutputError, SourceError

_ROOT = Path(__file__).parents[2]


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    out = tmp_path / "out"
    yield out
    release(partial_folder(out))


def _model(folder: Path, config: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config)
    (folder / "model.safetensors").touch()
    return folder


def _tree(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_output_appears_only_when_it_is_finished(out: Path) -> None:
    partial = prepare(out)
    assert partial == partial_folder(out) == out.with_name("out.partial") and partial.is_dir() and not out.exists()
    _model(partial, "new")
    (partial / "ledger.json").write_text("{}")
    finish(partial, out)
    assert _tree(out) == ["config.json", "model.safetensors"] and not partial.exists()


def test_missing_parents_are_made(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    finish(_model(prepare(out), "new"), out)
    assert (out / "config.json").read_text() == "new"


def test_empty_folder_is_no_obstacle(out: Path) -> None:
    out.mkdir()
    finish(_model(prepare(out), "new"), out)
    assert (out / "config.json").read_text() == "new"


def test_existing_output_is_refused_before_any_work(out: Path) -> None:
    _model(out, "old")
    for refuse in (check, prepare):
        with pytest.raises(OutputError, match="--overwrite"):
            refuse(out)
    assert not partial_folder(out).exists()


def test_checking_creates_nothing(out: Path, tmp_path: Path) -> None:
    check(out / "a" / "b")
    assert list(tmp_path.iterdir()) == []
    _model(out, "old")
    check(out, overwrite=True)
    assert _tree(tmp_path) == ["out/config.json", "out/model.safetensors"]


def test_overwritten_output_stays_until_the_new_one_is_whole(out: Path, tmp_path: Path) -> None:
    _model(out, "old")
    partial = _model(prepare(out, overwrite=True), "new")
    assert (out / "config.json").read_text() == "old"
    finish(partial, out, overwrite=True)
    assert (out / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_some_model_is_whole_at_every_step_of_an_overwrite(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _model(out, "old")
    partial = _model(prepare(out, overwrite=True), "new")
    seen = []

    def watch(name: str) -> None:
        real = getattr(output.os if name == "rename" else output.shutil, name)

        def watched(*arguments: object) -> None:
            seen.append(sorted(path.read_text() for path in tmp_path.glob("*/config.json")))
            real(*arguments)

        monkeypatch.setattr(output.os if name == "rename" else output.shutil, name, watched)

    watch("rename"), watch("rmtree")
    finish(partial, out, overwrite=True)
    assert seen == [["new", "old"]] * 3


@pytest.mark.parametrize("stop_at", [1, 2, 3])
def test_stop_in_the_middle_of_an_overwrite_is_mended_by_the_next_run(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    _model(out, "old")
    partial = _model(prepare(out, overwrite=True), "new")
    (partial / "ledger.json").write_text("{}")
    steps = 0

    def stop(real: object) -> object:
        def stopping(*arguments: object) -> None:
            nonlocal steps
            steps += 1
            if steps == stop_at:
                raise KeyboardInterrupt
            real(*arguments)

        return stopping

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "rename", stop(os.rename))
        patch.setattr(output.shutil, "rmtree", stop(output.shutil.rmtree))
        finish(partial, out, overwrite=True)
    release(partial)
    prepare(out, overwrite=True)
    assert (out / "config.json").read_text() == ("new" if stop_at == 3 else "old")
    if stop_at < 3:
        finish(partial, out, overwrite=True)
    release(partial)
    assert (out / "config.json").read_text() == "new"
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "out.partial"}


@pytest.mark.parametrize("stop_at", ["sync_folder", "rmtree", "unlink"])
@pytest.mark.parametrize("again", [{}, {"overwrite": True}], ids=["refused", "overwriting"])
def test_leftovers_of_a_finished_output_are_tidied_by_the_next_run(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: str, again: dict[str, bool]
) -> None:
    _model(out, "old")
    partial = _model(prepare(out, overwrite=True), "new")
    (partial / "ledger.json").write_text("{}")
    real = {"sync_folder": output.sync_folder, "rmtree": output.shutil.rmtree, "unlink": Path.unlink}[stop_at]

    def stop(path: Path, *arguments: object, **settings: object) -> None:
        if (out / "ledger.json").exists() and path in (out.parent, out.with_name(".out.quantkit-replaced"), out / "ledger.json"):
            raise KeyboardInterrupt
        real(path, *arguments, **settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr({"sync_folder": output, "rmtree": output.shutil, "unlink": Path}[stop_at], stop_at, stop)
        finish(partial, out, overwrite=True)
    release(partial)
    assert _tree(out) == [".quantkit-lock", "config.json", "ledger.json", "model.safetensors"]

    with nullcontext() if again else pytest.raises(OutputError, match="--overwrite"):
        prepare(out, **again)
    release(partial)

    assert _tree(tmp_path) == ["out/config.json", "out/model.safetensors"] and (out / "config.json").read_text() == "new"


def test_a_run_in_the_middle_of_finishing_is_not_tidied(out: Path) -> None:
    partial = _model(prepare(out), "new")
    os.rename(partial, out)

    with pytest.raises(OutputError, match="exists"):
        prepare(out)

    assert _tree(out) == [".quantkit-lock", "config.json", "model.safetensors"]


def test_overwrite_never_deletes_what_is_not_a_model(out: Path) -> None:
    out.mkdir()
    (out / "thesis.tex").touch()
    with pytest.raises(OutputError, match=r"not a model \(it holds thesis\.tex\)"):
        prepare(out, overwrite=True)
    assert (out / "thesis.tex").exists()


def test_a_config_alone_makes_no_model_that_may_be_overwritten(out: Path) -> None:
    out.mkdir()
    (out / "config.json").write_text("{}")
    with pytest.raises(OutputError, match=r"not a model \(it holds config\.json\)"):
        prepare(out, overwrite=True)


@pytest.mark.parametrize(("names", "words"), [(["photos"], "the folder photos"), ([".git", "photos"], r"the folders \.git, photos")])
def test_overwrite_spares_folders_that_are_no_part_of_a_model(names: list[str], words: str, out: Path) -> None:
    _model(out, "old")
    for name in (*names, "additional_chat_templates", ".cache"):
        (out / name).mkdir()
    for refuse in (check, prepare):
        with pytest.raises(OutputError, match=rf"holds {words}, which --overwrite does not delete; move (it|them) away first"):
            refuse(out, overwrite=True)
    for name in names:
        (out / name).rmdir()
    check(out, overwrite=True)


def test_output_that_came_to_exist_meanwhile_is_not_replaced(out: Path) -> None:
    partial = _model(prepare(out), "new")
    _model(out, "another's")
    with pytest.raises(OutputError, match="exists"):
        finish(partial, out)
    assert (out / "config.json").read_text() == "another's" and (partial / "config.json").read_text() == "new"


@pytest.mark.parametrize("place", ["file", "file/below", "/"], ids=["a file", "below a file", "the root"])
def test_impossible_places_are_refused(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").touch()
    for refuse in (check, prepare):
        with pytest.raises(OutputError, match=place.replace("/below", "")):
            refuse(tmp_path / place)


def test_place_without_permission_is_refused() -> None:
    is_root = os.geteuid() == 0
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        if is_root:
            os.seteuid(65534)
        try:
            for refuse in (check, prepare):
                with pytest.raises(OutputError, match=rf"cannot write {name}/out\.partial.*may not write"):
                    refuse(Path(name) / "out")
        finally:
            if is_root:
                os.seteuid(0)


def test_two_runs_into_one_output_are_refused(out: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from quantkit.checkpoint.output import prepare
        prepare(Path(sys.argv[1]), fresh=True)
        print("locked", flush=True)
        sys.stdin.read()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(out)]
    with subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        with pytest.raises(OutputError, match="another run is writing"):
            prepare(out, overwrite=True, fresh=True)
        other.kill()
    assert prepare(out).is_dir(), "the lock of a killed run is gone with it"


def test_second_run_in_the_same_process_is_refused_until_release(out: Path) -> None:
    partial = prepare(out)
    with pytest.raises(OutputError, match="another run is writing"):
        prepare(out)
    release(partial)
    release(prepare(out))


def test_partial_work_is_kept_only_with_a_ledger(out: Path) -> None:
    partial = prepare(out)
    (partial / "sub").mkdir()
    (partial / "sub" / "shard").touch()
    release(partial)
    assert _tree(prepare(out)) == [".quantkit-lock"], "nothing vouches for the shard"

    (partial / "ledger.json").touch()
    (partial / "shard").touch()
    release(partial)
    assert _tree(prepare(out)) == [".quantkit-lock", "ledger.json", "shard"]
    release(partial)
    assert _tree(prepare(out, fresh=True)) == [".quantkit-lock"]


def test_foreign_folder_with_the_partial_name_is_not_cleared(out: Path) -> None:
    partial_folder(out).mkdir()
    (partial_folder(out) / "notes.txt").touch()
    with pytest.raises(OutputError, match="did not write"):
        prepare(out, fresh=True)
    assert (partial_folder(out) / "notes.txt").exists()


def test_output_named_by_a_link_is_built_beside_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    partial = _model(prepare(tmp_path / "link"), "new")
    assert partial == tmp_path / "disk" / "out.partial"
    finish(partial, tmp_path / "link")
    assert (tmp_path / "link" / "config.json").read_text() == "new"


def _fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)


def test_side_files_are_everything_but_weights_and_config(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    kept = ["tokenizer.json", "tokenizer.model", "chat_template.jinja", "generation_config.json", "LICENSE", "README.md", "modeling_x.py"]
    kept += ["additional_chat_templates/tool.jinja", "1_Pooling/config.json", "spm.bin"]
    left = ["config.json", "quantize_config.json", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"]
    left += ["pytorch_model.bin.index.json", "a.pt", "b.pth", "c.ckpt", "d.gguf", "onnx/e.onnx", "flax_model.msgpack", "tf_model.h5"]
    left += [".gitattributes", ".git/HEAD", ".cache/huggingface/x.json", "__pycache__/x.pyc", "old.partial/tokenizer.json"]
    _fill(source, *kept, *left)
    assert sorted(map(str, copy_side_files(source, target))) == _tree(target) == sorted(kept)
    assert all((target / name).read_text() == name for name in kept)


@pytest.mark.parametrize("first", [b"PK\x03\x04", b"\x80\x02"], ids=["zip", "pickle"])
def test_a_file_that_begins_as_torch_s_do_is_no_side_file(first: bytes, tmp_path: Path) -> None:
    (tmp_path / "training_args.bin").write_bytes(first + b"...")

    assert side_files(tmp_path) == []


def test_what_does_not_come_along_is_named(tmp_path: Path) -> None:
    own = ["config.json", "model-00001-of-00001.safetensors", "model.safetensors.index.json", "tokenizer.json", ".cache/x.bin"]
    behind = ["README.md", "extra.safetensors", "pytorch_model.bin", "sub/adapter_model.safetensors"]
    _fill(tmp_path, *own, *behind)

    found = left_behind(tmp_path, weights=[tmp_path / own[1]], exclude=["README.md", "recipe.yaml"])

    assert [path.as_posix() for path in found] == behind


def test_excluded_side_files_stay_behind(tmp_path: Path) -> None:
    _fill(tmp_path, "README.md", "docs/README.md", "tokenizer.json")
    assert [path.as_posix() for path in side_files(tmp_path, exclude=["README.md"])] == ["docs/README.md", "tokenizer.json"]


def test_links_of_a_hub_cache_are_copied_as_contents(tmp_path: Path) -> None:
    cache, target = tmp_path / "models--org--name", tmp_path / "target"
    snapshot = cache / "snapshots" / "abc"
    _fill(cache, "blobs/123")
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").symlink_to("../../blobs/123")
    copy_side_files(snapshot, target)
    assert not (target / "tokenizer.json").is_symlink() and (target / "tokenizer.json").read_text() == "blobs/123"


@pytest.mark.parametrize("exists", [True, False], ids=["leads out", "leads nowhere"])
def test_link_out_of_the_model_is_refused_before_anything_is_copied(tmp_path: Path, exists: bool) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    _fill(source, "a.json")
    if exists:
        _fill(tmp_path, "id_rsa")
    (source / "tokenizer.json").symlink_to(tmp_path / "id_rsa")
    with pytest.raises(SourceError, match=rf"tokenizer\.json is a link that {'leads out' if exists else 'leads nowhere'}"):
        copy_side_files(source, target)
    assert not target.exists()


def test_linked_folders_are_not_entered(tmp_path: Path) -> None:
    _fill(tmp_path, "private/secret.txt", "source/tokenizer.json")
    (tmp_path / "source" / "sub").symlink_to(tmp_path / "private")
    (tmp_path / "source" / "loop").symlink_to(tmp_path / "source")
    assert [path.name for path in side_files(tmp_path / "source")] == ["tokenizer.json"]


def test_output_inside_its_source_is_not_copied_into_itself(tmp_path: Path) -> None:
    _fill(tmp_path, "tokenizer.json", "quantized/tokenizer.json")
    assert [path.as_posix() for path in copy_side_files(tmp_path, tmp_path / "quantized")] == ["tokenizer.json"]
