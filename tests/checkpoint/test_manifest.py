"""Manifests: whatever happens to whichever file of a checkpoint is found, and named."""

import itertools
import json
import shutil
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plt_jax.checkpoint import manifest as manifest_module
from plt_jax.checkpoint.damage import refuse_damaged
from plt_jax.checkpoint.manifest import (
    MANIFEST,
    OWN,
    File,
    _dump,
    find_damage,
    has_checksums,
    own_files,
    read_manifest,
    take_checksums,
    validation_loss,
    write_manifest,
)
from plt_jax.errors import InputError
from tests.checkpoint.damage import data_file, files_of, flip_bit, forget_checksums, save_steps


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint that tests leave as they found it."""
    directory = tmp_path_factory.mktemp("saved")
    save_steps(directory, 7)
    return directory / "7"


@pytest.fixture
def copy(saved, tmp_path):
    """One to damage."""
    return shutil.copytree(saved, tmp_path / "7")


def test_every_file_is_in_the_manifest(saved):
    manifest = read_manifest(saved)
    assert sorted([*manifest.files, MANIFEST]) == files_of(saved)
    assert any(name.startswith("params/") for name in manifest.files)
    assert manifest.size == sum((saved / name).stat().st_size for name in manifest.files)
    assert manifest.validation_loss == validation_loss(saved) == 2.0
    assert find_damage(saved) == []
    assert has_checksums(saved)


def test_checksums_are_crc_32(tmp_path):
    (tmp_path / "a").write_bytes(b"123456789")
    (tmp_path / "empty").touch()
    large = bytes(range(256)) * 40_000  # of several chunks
    (tmp_path / "large").write_bytes(large)
    taken = take_checksums(tmp_path, ["a", "empty", "large"])
    assert taken["a"] == File(9, 0xCBF43926)  # the check value of its definition
    assert taken["empty"] == File(0, 0)
    assert taken["large"] == File(len(large), zlib.crc32(large))


def damage_file(path, how: str, position: int, bit: int) -> None:
    contents = path.read_bytes()
    if how == "removed":
        path.unlink()
    elif how == "longer" or not contents:
        path.write_bytes(contents + b"\0")
    elif how == "shorter":
        path.write_bytes(contents[: position % len(contents)])
    else:
        flip_bit(path, position, bit)


@settings(max_examples=150, deadline=None)
@given(
    which=st.integers(0, 10**6),
    how=st.sampled_from(["flipped", "flipped", "flipped", "removed", "longer", "shorter"]),
    position=st.integers(0, 10**6),
    bit=st.integers(0, 7),
)
def test_any_damage_to_any_file_is_found_and_named(saved, which, how, position, bit):
    names = files_of(saved)
    name = names[which % len(names)]
    before = (saved / name).read_bytes()
    try:
        damage_file(saved / name, how, position, bit)
        (problem,) = find_damage(saved)
        assert problem.startswith(name)
        with pytest.raises(InputError, match="is damaged") as refusal:
            refuse_damaged(saved.parent, 7)
        assert name in str(refusal.value) and "\n" not in str(refusal.value)
    finally:
        (saved / name).write_bytes(before)
    assert find_damage(saved) == []


def test_what_is_wrong_is_said(copy):
    file = data_file(copy)
    name, size = file.relative_to(copy).as_posix(), file.stat().st_size
    flip_bit(file, 5)
    assert find_damage(copy) == [f"{name} has another checksum"]
    file.write_bytes(b"x")
    assert find_damage(copy) == [f"{name} has 1 bytes instead of {size:,}"]
    file.unlink()
    assert find_damage(copy) == [f"{name} is missing"]
    file.mkdir()
    assert find_damage(copy)[0].startswith(f"{name} has ")
    (copy / MANIFEST).unlink()
    assert find_damage(copy) == [f"{MANIFEST} is missing"]


def test_without_reading_only_sizes_are_compared(copy):
    flip_bit(data_file(copy))
    assert find_damage(copy, contents=False) == []
    data_file(copy).write_bytes(b"")
    assert len(find_damage(copy, contents=False)) == 1


def test_what_is_not_read_is_not_checked(copy):
    flip_bit(data_file(copy, "optimizer"))
    assert find_damage(copy, ["params"]) == []
    assert find_damage(copy, ["params", "optimizer"]) == find_damage(copy) != []
    flip_bit(copy / "_CHECKPOINT_METADATA")
    assert find_damage(copy, ["params"]) == ["_CHECKPOINT_METADATA has another checksum"]


@pytest.mark.parametrize("count", [1, 2, 3, 50])
def test_processes_share_the_files(copy, count):
    names = [name for name in files_of(copy) if name != MANIFEST]
    for name in names:
        (copy / name).unlink()
    parts = [find_damage(copy, index=index, count=count) for index in range(count)]
    assert sorted(itertools.chain(*parts)) == [f"{name} is missing" for name in names]
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_each_process_takes_the_checksums_of_what_it_wrote(tmp_path):
    owners = {
        "_CHECKPOINT_METADATA": 0,
        "params/_METADATA": 0,
        "params/d/0f": 0,
        "params/ocdbt.process_0/d/1f": 0,
        "params/ocdbt.process_1/d/2f": 1,
        "params/ocdbt.process_12/manifest.ocdbt": 12,
        "params/array_metadatas/process_0": 0,
        "params/array_metadatas/process_12": 12,
    }
    for name in owners:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    for index in (0, 1, 2, 12):
        owned = [name for name, owner in owners.items() if owner == index]
        assert own_files(tmp_path, index) == sorted(owned)


def test_what_earlier_versions_saved_has_nothing_to_be_checked_against(copy):
    forget_checksums(copy)
    assert read_manifest(copy) is None
    assert not has_checksums(copy)
    data_file(copy).unlink()
    assert find_damage(copy) == []
    assert validation_loss(copy) is None
    (copy / "metrics").mkdir()
    (copy / "metrics" / "metrics").write_text('{"validation_loss": 2.5}')
    assert validation_loss(copy) == 2.5


def test_a_manifest_is_json_with_a_checksum_of_its_own(tmp_path):
    write_manifest(tmp_path, {"a": File(1, 2)}, 0.1)
    fields = json.loads((tmp_path / MANIFEST).read_text())
    assert fields["files"] == {"a": [1, 2]}
    assert fields["validation_loss"] == 0.1
    (tmp_path / MANIFEST).write_text(json.dumps(fields | {"files": {}}, indent=1) + "\n")
    assert find_damage(tmp_path) == [f"{MANIFEST} has another checksum"]


def forge(checkpoint, **fields):
    """Writes a manifest with a right checksum, as one on purpose has."""
    made = json.loads((checkpoint / MANIFEST).read_text())
    made.pop(OWN)
    (checkpoint / MANIFEST).write_text(_dump(made | fields))


@pytest.mark.parametrize(
    "name", ["../../secret", "/etc/passwd", "/dev/zero", "params/../../x", "a\0b", ".", ""]
)
def test_names_that_lead_out_of_a_checkpoint_are_not_followed(copy, name, monkeypatch):
    forge(copy, files={name: [10, 5]})
    (copy.parent.parent / "secret").write_bytes(b"0123456789")
    monkeypatch.setattr(manifest_module, "_read", lambda path: pytest.fail(f"opens {path}"))
    (damage,) = find_damage(copy)
    assert "is not the name of a file in" in damage


def test_a_link_in_a_checkpoint_is_not_followed(copy):
    name = next(name for name in read_manifest(copy).files if name.startswith("params/"))
    (copy / name).rename(copy.parent / "elsewhere")
    (copy / name).symlink_to(copy.parent / "elsewhere")
    (damage,) = find_damage(copy)
    assert damage.endswith("is a link; put the file itself there, as cp -rL does")


@pytest.mark.parametrize(
    "fields",
    [
        {"files": [1]},
        {"files": {"a": 3}},
        {"files": {"a": ["1", 2]}},
        {"files": {"a": [1, 2, 3]}},
        {"files": None},
        {"saved": "now"},
        {"validation_loss": [2.0]},
        {"more": 1},
    ],
    ids=repr,
)
def test_a_manifest_of_other_types_is_damage(copy, fields):
    forge(copy, **fields)
    assert find_damage(copy) == [f"{MANIFEST} is not as it was written"]


@pytest.mark.parametrize("content", [b"[" * 100_000, b'{"a": ' * 100_000, b"[]", b"3", b"null"])
def test_a_manifest_of_another_form_is_damage(copy, content):
    (copy / MANIFEST).write_bytes(content)
    assert find_damage(copy) == [f"{MANIFEST} is not as it was written"]
